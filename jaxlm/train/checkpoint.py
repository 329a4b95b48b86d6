"""Checkpoints: Orbax writes the arrays, a digest of every file acknowledges the save.

`checkpoints/00000100/` holds what Orbax wrote, `meta.json`, and last of all `digest.json`: a folder without it was
interrupted and does not count. Nothing is renamed or locked by us, so the same holds on an object store.
Of several processes each writes its own part of the arrays, and process 0 all else; it alone looks, checks and deletes.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from etils import epath

from jaxlm import files, hosts, tree
from jaxlm.errors import InputError
from jaxlm.files import write_whole

DIGEST, META, ASIDE = 'digest.json', 'meta.json', 'damaged.txt'
Say = Callable[[str], None]


class Checkpoints:
  """The checkpoints of one run, written by one process at a time in the background."""

  def __init__(
    self, directory: Any, *, keep_last: int = 3, keep_every: int = 0, keep_best: int = 0, say: Say = lambda line: None
  ):
    """What stays is said by `retained`; the file system is not touched before the first call.

    `say` is told at once of a save that the file system refused (a full disk, a quota).
    """
    path = epath.Path(directory)
    self.directory = path if '://' in str(path) else path.absolute()  # Orbax takes no relative path
    self.keep = {'last': keep_last, 'every': keep_every, 'best': keep_best}
    self.failed = 0  # saves that the file system refused
    self._say = say
    self._failure: OSError | None = None
    self._pending: Future | None = None
    self._worker = ThreadPoolExecutor(1, 'checkpoint')

  def steps(self) -> list[int]:
    """The acknowledged steps that were not set aside, oldest first."""
    named = [p for p in files.children(self.directory) if p.name.isdigit()]
    return sorted(int(p.name) for p in named if (p / DIGEST).exists() and not (p / ASIDE).exists())

  def unfinished(self) -> list[int]:
    """Steps whose folder is there without what acknowledges it, oldest first."""
    named = [p for p in files.children(self.directory) if p.name.isdigit()]
    return sorted(int(p.name) for p in named if not (p / DIGEST).exists())

  def newest_sound(self, say: Say) -> int | None:
    """The newest step whose every file is as it was saved, or None where nothing was saved.

    Damaged newer ones are named to `say` and set aside: they stay on disk and no longer count. Raises InputError when
    no step is sound.
    """
    return hosts.from_first(lambda: self._newest_sound(say))

  def _newest_sound(self, say: Say) -> int | None:
    steps, damaged = self.steps(), {}
    for step in self.unfinished():
      say(f'{self.path(step)}: no {DIGEST}: the save did not end, or the file was deleted; does not count')
    for step in reversed(steps):
      lines = verify(self.path(step))
      if not lines:
        for bad, text in damaged.items():
          write_whole(self.path(bad) / ASIDE, text)
          say(f'{text}; set aside')
        return step
      damaged[step] = f'{self.path(step)}: damaged: {"; ".join(lines)}'
    if damaged:
      raise InputError('no checkpoint is sound: ' + '. '.join(damaged.values()))
    return None

  def tidy(self) -> None:
    """Removes what interrupted saves and deletions left: a run that was at its end saves no more, and would keep it."""
    if hosts.first():
      self._clear_unfinished()
      self._delete_old()

  def path(self, step: int) -> epath.Path:
    """The folder of a step."""
    return self.directory / f'{step:08d}'

  def save(self, step: int, state: Any, meta: Mapping[str, Any], first: Callable[[], None] = lambda: None) -> None:
    """Starts saving and returns once the arrays are copied, so the caller may donate them; one save runs at a time.

    `first()` has to succeed before. What the file system refuses, here or in the background, raises nothing: `say` is
    told, `failed` counts it, its remains are removed, older steps stay, and `wait` raises it if no save came after it.
    Where one of several processes cannot write its part, the run ends instead.
    """
    from orbax.checkpoint import v1 as ocp

    with contextlib.suppress(OSError):  # was told
      self.wait()
    with self._told(step):
      hosts.from_first(lambda: self._prepare(step, first))
      logging.getLogger('absl').addFilter(_no_trace)
      context = ocp.Context()
      # In the background, a folder that cannot be made would cost Orbax a wait of five minutes.
      context.asynchronous.create_directories_asynchronously = False
      with context:
        response = ocp.save_async(self.path(step), jax.tree.map(_storable, state))
      self._pending = self._worker.submit(self._finish, response, step, {**meta, 'step': step})

  def _prepare(self, step: int, first: Callable[[], None]) -> None:
    first()
    self._clear_unfinished()
    if (self.path(step) / ASIDE).exists():
      self.path(step).rmtree()  # damaged, and now made again

  def wait(self) -> None:
    """Blocks until the running save is acknowledged. Raises OSError if that one or, none running, the last failed."""
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()
    failure, self._failure = self._failure, None
    if failure is not None:
      raise failure

  def close(self) -> None:
    """`wait`, then lets the background thread go."""
    try:
      self.wait()
    finally:
      self._worker.shutdown()

  def meta(self, step: int) -> dict[str, Any]:
    """What was saved beside the arrays: the step, the resolved config, the tokenizer's digest."""
    return json.loads((self.path(step) / META).read_text())

  def restore(self, step: int, abstract: Any, *, partial: bool = False, verified: bool = False) -> Any:
    """The state of a step, laid out as `abstract` says (arrays or ShapeDtypeStructs, with shardings).

    `partial` reads only the leaves that `abstract` names: `{'params': ...}` leaves the optimizer's moments on disk.
    `verified` says that the files were checked just now.
    Raises InputError when a file of the step is damaged or missing, or a leaf is not the one the checkpoint has.
    """
    from orbax.checkpoint import v1 as ocp

    path = self.path(step)
    damaged = [] if verified else verify(path)
    if damaged:
      raise InputError(f'{path}: damaged: {"; ".join(damaged)}')
    stored = jax.tree.map(_storable_abstract, abstract)
    _check_shapes(path, ocp.metadata(path).metadata, stored, partial)
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    with context:
      loaded = ocp.load(path, stored)
    return jax.tree.map(lambda x, like: jax.random.wrap_key_data(x) if _is_key(like) else x, loaded, abstract)

  def _finish(self, response: Any, step: int, meta: dict[str, Any]) -> None:
    with self._told(step):
      try:
        _written(response, self.path(step))
      except OSError as error:
        hosts.blame(error)
        hosts.broken(f'step {step} could not be saved: {error.strerror or error}')
        raise
      hosts.from_first(lambda: self._acknowledge(self.path(step), meta), 'saved')

  def _acknowledge(self, path: epath.Path, meta: dict[str, Any]) -> None:
    write_whole(path / META, json.dumps(meta, indent=1))
    files.settle(path)
    digests = _digests(path)
    write_whole(path / DIGEST, json.dumps(digests | {DIGEST: files.seal(digests)}, indent=1))
    self._delete_old()

  @contextlib.contextmanager
  def _told(self, step: int) -> Generator[None]:
    """Keeps an OSError for `wait`, tells of it, and gives back the space of what was written until then."""
    try:
      yield
    except OSError as error:
      hosts.blame(error)
      line = f'step {step} could not be saved: {error.strerror or error}'
      self.failed, self._failure = self.failed + 1, OSError(error.errno, line, str(self.directory))
      self._say(f'{self.directory}: {line}; older steps stay')
      with contextlib.suppress(OSError):  # else the next save does it
        if hosts.first():
          self._clear_unfinished()

  def _delete_old(self) -> None:
    scores = {s: self.meta(s).get('score') if self.keep['best'] else None for s in self.steps()}
    for old in scores.keys() - retained(scores, **self.keep):
      (self.path(old) / DIGEST).unlink()  # first: what is half deleted no longer counts
      self.path(old).rmtree()

  def _clear_unfinished(self) -> None:
    """Removes what interrupted saves left behind."""
    for path in files.children(self.directory):
      if path.is_dir() and not (path / DIGEST).exists():
        path.rmtree()


def retained(scores: Mapping[int, float | None], *, last: int, every: int, best: int) -> set[int]:
  """The steps that stay: the newest `last` (at least one), multiples of `every`, and the `best` of least score."""
  newest = sorted(scores)[-max(1, last) :]
  multiples = [step for step in scores if every and step % every == 0]
  scored = sorted((score, -step) for step, score in scores.items() if score is not None)
  return {*newest, *multiples, *(-step for _, step in scored[:best])}


def verify(path: epath.Path) -> list[str]:
  """What is wrong with an acknowledged step: one line for each damaged, missing or foreign file; empty when whole."""
  try:
    expected = json.loads((path / DIGEST).read_text())
  except (OSError, ValueError) as e:
    return [f'{DIGEST}: {type(e).__name__}']
  if not isinstance(expected, dict) or expected.pop(DIGEST, None) != files.seal(expected):
    return [f'{DIGEST} has changed']
  changed = files.changes(expected, _digests(path))
  if not changed and path.name.isdigit() and (step := files.read_json(path / META).get('step')) != int(path.name):
    return [f'{META} is of step {step}']
  return changed


def _written(response: Any, path: epath.Path) -> None:
  """Waits for Orbax. Raises OSError: TensorStore and the clients of object stores have exceptions of their own."""
  try:
    response.result()
  except OSError:
    raise
  except Exception as error:
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
      raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    raise OSError(None, f'{type(error).__name__}: {error}'.splitlines()[0], str(path)) from error


def _no_trace(record: logging.LogRecord) -> bool:
  """Drops the stack of each of Orbax's threads that an error passes: it comes out of `result`, and is told once."""
  return '_SignalingThread.run() raised' not in str(record.msg)


def _digests(path: epath.Path) -> dict[str, str]:
  return files.digests(path, but=(DIGEST, ASIDE))


def _is_key(x: Any) -> bool:
  return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _storable(x: Any) -> Any:
  return jax.random.key_data(x) if _is_key(x) else x


def _storable_abstract(x: Any) -> jax.ShapeDtypeStruct:
  raw = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
  return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=x.sharding)


def _check_shapes(path: epath.Path, saved: Any, wanted: Any, partial: bool) -> None:
  there = {name: tuple(x.shape) for name, x in tree.items(saved)}
  here = {name: tuple(x.shape) for name, x in tree.items(wanted)}
  for name in sorted(here if partial else there.keys() | here.keys(), key=lambda n: (not n.startswith('params'), n)):
    if there.get(name) != here.get(name):
      shown = [f'{where.get(name, "absent")}' for where in (there, here)]
      raise InputError(f'{path}: {name} is {shown[0]} in the checkpoint and {shown[1]} in this config')
