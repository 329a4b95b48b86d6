"""Views of a run beside metrics.jsonl, which is the truth: TensorBoard's event file, trackio, or wandb."""

import importlib
import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Literal

from etils import epath

from jaxlm.errors import InputError
from jaxlm.files import read_json, write_whole

Kind = Literal['none', 'tensorboard', 'trackio', 'wandb']
Say = Callable[[str], None]
Values = Mapping[str, float]

EXTRA = ('trackio', 'wandb')  # packages, each an extra of its own name
PROJECT = 'jaxlm'
NAMED = 'tracker.json'  # the run's name there, drawn once


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
    from jaxlm.train.board import Board  # its package imports torch where that is installed

    return Board(run, step, say)
  try:
    package = importlib.import_module(kind)
    return Told(_began(package, run, config), package.finish, kind, say)
  except Exception as error:  # whatever a tracker raises: no key, no disk, no server
    say(f'{kind}: {type(error).__name__}: {error}; the run goes on without it, metrics.jsonl has all')
    return Tracker()


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
