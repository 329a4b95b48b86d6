"""Checkpoints: Orbax writes the arrays, a digest of every file acknowledges the save.

`checkpoints/00000100/` holds what Orbax wrote, `meta.json`, and last of all `digest.json`: a folder without it was
interrupted and does not count. Nothing is renamed or locked by us, so the same holds on an object store.
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from etils import epath

from jaxlm import files, tree
from jaxlm.errors import InputError
from jaxlm.files import write_whole

DIGEST, META, ASIDE = 'digest.json', 'meta.json', 'damaged.txt'


class Checkpoints:
  """The checkpoints of one run, written by one process at a time in the background."""

  def __init__(self, directory: Any, *, keep_last: int = 3, keep_every: int = 0, keep_best: int = 0):
    """What stays is said by `retained`; the file system is not touched before the first call."""
    path = epath.Path(directory)
    self.directory = path if '://' in str(path) else path.absolute()  # Orbax takes no relative path
    self.keep = {'last': keep_last, 'every': keep_every, 'best': keep_best}
    self._pending: Future | None = None
    self._worker = ThreadPoolExecutor(1, 'checkpoint')

  def steps(self) -> list[int]:
    """The acknowledged steps that were not set aside, oldest first."""
    named = [p for p in files.children(self.directory) if p.name.isdigit()]
    return sorted(int(p.name) for p in named if (p / DIGEST).exists() and not (p / ASIDE).exists())

  def newest_sound(self, say: Callable[[str], None]) -> int | None:
    """The newest step whose every file is as it was saved, or None where nothing was saved.

    Damaged newer ones are named to `say` and set aside: they stay on disk and no longer count. Raises InputError when
    no step is sound.
    """
    steps, damaged = self.steps(), {}
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

  def path(self, step: int) -> epath.Path:
    """The folder of a step."""
    return self.directory / f'{step:08d}'

  def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """Starts saving and returns once the arrays are copied, so the caller may donate them; one save runs at a time.

    Raises what the save before it failed with, if it did.
    """
    from orbax.checkpoint import v1 as ocp

    self.wait()
    self._clear_unfinished()
    if (self.path(step) / ASIDE).exists():
      self.path(step).rmtree()  # damaged, and now made again
    response = ocp.save_async(self.path(step), jax.tree.map(_storable, state))
    self._pending = self._worker.submit(self._finish, response, step, {**meta, 'step': step})

  def wait(self) -> None:
    """Blocks until the running save is acknowledged; raises what it failed with."""
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()

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
    response.result()
    path = self.path(step)
    write_whole(path / META, json.dumps(meta, indent=1))
    digests = _digests(path)
    write_whole(path / DIGEST, json.dumps(digests | {DIGEST: files.seal(digests)}, indent=1))
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
  return files.changes(expected, _digests(path))


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
