"""Views of a run beside metrics.jsonl, which is the truth: TensorBoard's event file, trackio, or wandb."""

import importlib
import importlib.util
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from etils import epath
from tensorboardX import summary
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from jaxlm.errors import InputError
from jaxlm.files import Appended, read_json, write_whole

Kind = Literal['none', 'tensorboard', 'trackio', 'wandb']
Say = Callable[[str], None]
Values = Mapping[str, float]

EXTRA = ('trackio', 'wandb')  # packages, each an extra of its own name
PROJECT = 'jaxlm'
NAMED = 'tracker.json'  # the run's name there, drawn once

_events: Any = event_pb2  # generated modules: no type checker sees what is in them
_summaries: Any = summary_pb2


class Tracker:
  """What every row goes to; this one keeps nothing."""

  def row(self, step: int, values: Values) -> None:
    """Finite values by name."""

  def sample(self, step: int, prompt: str, text: str) -> None:
    """One generated text."""

  def flush(self) -> None:
    """Raises OSError where what was given could not be written to the run's folder."""

  def close(self) -> None:
    """The last call."""


def check(kind: Kind) -> None:
  """Raises InputError if a tracker's package is not there; imports nothing."""
  if kind in EXTRA and importlib.util.find_spec(kind) is None:
    raise InputError(f"watch.tracker={kind}: needs {kind}: pip install -e '.[{kind}]'")


def open_tracker(kind: Kind, run: epath.Path, step: int, say: Say, config: Mapping[str, Any]) -> Tracker:
  """The tracker of a run that begins at `step`, or goes on from there; one that does not open is told, not raised.

  trackio and wandb are given metrics and the configuration, not samples; where they keep them is for their own
  environment variables to say (TRACKIO_DIR, WANDB_MODE, WANDB_PROJECT).
  """
  check(kind)
  if kind == 'none':
    return Tracker()
  if kind == 'tensorboard':
    return Board(run, step, say)
  try:
    package = importlib.import_module(kind)
    return Told(_began(package, run, config), package.finish, kind, say)
  except Exception as error:  # whatever a tracker raises: no key, no disk, no server
    say(f'{kind}: {type(error).__name__}: {error}; the run goes on without it, metrics.jsonl has all')
    return Tracker()


class Board(Tracker):
  """TensorBoard's event file in the run's folder."""

  def __init__(self, run: epath.Path, step: int, say: Say):
    self._file = Appended(run / f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}', say)
    self._file.add(_event(file_version='brain.Event:2'))
    if step:  # hides what an interrupted run showed after it
      self._file.add(_event(step=step + 1, session_log=_events.SessionLog(status=_events.SessionLog.START)))

  def row(self, step: int, values: Values) -> None:
    scalars = [summary.scalar(name, value).value[0] for name, value in values.items()]
    self._file.add(_event(step=step, summary=_summaries.Summary(value=scalars)))

  def sample(self, step: int, prompt: str, text: str) -> None:
    self._file.add(_event(step=step, summary=summary.text('sample', f'**{prompt}** {text}')))

  def flush(self) -> None:
    self._file.flush()

  def close(self) -> None:
    self._file.close()


class Told(Tracker):
  """A run of trackio or wandb, which log alike; the first failure is told, and ends no training."""

  def __init__(self, run: Any, finish: Callable[[], Any], kind: str, say: Say):
    self._run, self._finish, self._kind, self._say, self._failed = run, finish, kind, say, False

  def row(self, step: int, values: Values) -> None:
    if self._kind == 'wandb':  # it drops what has a step that it has seen, as after a resume
      self._try(lambda: self._run.log({**values, 'step': step}))
    else:
      self._try(lambda: self._run.log(dict(values), step=step))

  def close(self) -> None:
    self._try(self._finish)

  def _try(self, act: Callable[[], Any]) -> None:
    try:
      act()
    except Exception as error:  # whatever it raises
      if not self._failed:
        self._say(f'{self._kind}: {type(error).__name__}: {error}; metrics.jsonl has all')
      self._failed = True


def _began(package: Any, run: epath.Path, config: Mapping[str, Any]) -> Any:
  """A run of the tracker, the same one whenever the folder's run goes on."""
  name, wandb = _name(run), package.__name__ == 'wandb'
  project = os.environ.get('WANDB_PROJECT') if wandb else None
  what = {'project': project or PROJECT, 'name': name, 'config': dict(config), 'resume': 'allow'}
  if not wandb:
    return package.init(**what, embed=False)
  began = package.init(**what, id=name, dir=None if '://' in str(run) else os.fspath(run))
  began.define_metric('*', step_metric='step')
  return began


def _name(run: epath.Path) -> str:
  """What the run is called there: its folder, and a few drawn letters, for folders have the same names."""
  path = run / NAMED
  if not path.exists():
    write_whole(path, json.dumps({'name': f'{run.name}-{secrets.token_hex(4)}'}))
  return read_json(path)['name']


def _event(**fields: Any) -> bytes:
  """One record of an event file: its length, the event, and a checksum of each."""
  data = _events.Event(wall_time=time.time(), **fields).SerializeToString()
  length = struct.pack('<Q', len(data))
  return b''.join((length, _checksum(length), data, _checksum(data)))


def _checksum(data: bytes) -> bytes:
  return struct.pack('<I', masked_crc32c(data))
