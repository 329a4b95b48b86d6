"""What a model that stays as it is makes of preferences, computed once before the first step and kept in a folder.

That is a reference's log-probabilities, and what a frozen trunk makes of the ends of answers, of which scores are made.
"""

import functools
import hashlib
import itertools
import json
import time
from typing import Any, Literal

import numpy as np
from etils import epath

from jaxlm import files, hosts, program
from jaxlm.config import Pretrain
from jaxlm.data.pairs import PairRows
from jaxlm.errors import InputError
from jaxlm.files import read_json, write_whole
from jaxlm.loops import bases, pairing
from jaxlm.program import Program

SILENCE = 30.0  # seconds between two lines of a long reading

What = Literal['reference', 'features']  # the folder, and the attribute of a stream


def attach(
  config: Pretrain, built: Program, state: Any, sources: dict[str, Any], contents: str, say: Any = lambda line: None
) -> None:
  """Gives the streams of preferences in `sources` (by name) what the model makes of them before step 0.

  It is read where the folder has it. Raises InputError where that is of another base or other data, and where it is
  missing though the run has begun.
  """
  if config.reference == 'cached':
    streams = {f'{name}-{i}.npy': one for name, of in sources.items() for i, one in enumerate(pairing.leaves(of))}
    found = _found('reference', config, built, state, streams, contents, say)
    for name, stream in streams.items():
      stream.reference = found[name]
  elif program.frozen(config):  # of whole splits, which folds share
    leaves = [(_name(one), one) for of in sources.values() for one in pairing.leaves(of)]
    found = _found('features', config, built, state, {name: one.whole() for name, one in leaves}, contents, say)
    for name, stream in leaves:
      stream.features, stream.segments = found[name], built.batch['features'].shape[1]


def _name(stream: PairRows) -> str:
  """A file for a stream's tokens, whichever of its units are kept."""
  digest = hashlib.sha256(stream.tokens.document_starts().tobytes())
  digest.update(stream.tokens.read(0, len(stream.tokens))[0].tobytes())
  return f'{digest.hexdigest()[:16]}.npy'


def kept(config: Pretrain, streams: list[PairRows]) -> list[np.ndarray] | None:
  """What a frozen trunk made of all units of each stream, float32 [units, 2, D]; None where the run keeps none of it.

  Raises InputError for what is damaged.
  """
  folder, names = _folder('features', config), [_name(one) for one in streams]
  facts = folder / 'features.json'
  if not program.frozen(config) or not facts.exists() or not set(names) <= set(read_json(facts)['files']):
    return None
  _check('features', facts, {'data.seq_len': config.data.seq_len}, names)
  return [_read(folder / name) for name in names]


def _folder(what: What, config: Pretrain) -> epath.Path:
  path = what if what == 'reference' else config.preference.features
  step = lambda folder, part: folder.parent if part == '..' else folder / part
  return functools.reduce(step, path.split('/'), epath.Path(config.run))


def _found(
  what: What,
  config: Pretrain,
  built: Program,
  state: Any,
  streams: dict[str, PairRows],
  contents: str,
  say: Any,
) -> dict[str, np.ndarray]:
  """The figures of each stream, out of the folder or computed."""
  folder = _folder(what, config)
  about = hosts.from_first(lambda: _about(config, contents))
  facts = folder / f'{what}.json'
  if hosts.from_first(facts.exists):
    _check(what, facts, about, list(streams))
    return {name: _read(folder / name) for name in streams}
  if int(state.step):
    raise InputError(f'{folder}: missing, the {what} of a run that has begun: put it back, or use another --run')
  say(f'the {"reference" if what == "reference" else "frozen trunk"} reads all preferences once')
  found = {name: _computed(config, built, state, stream, say) for name, stream in streams.items()}
  hosts.from_first(lambda: _written(facts, found, about))
  return found


def _about(config: Pretrain, contents: str) -> dict[str, Any]:
  """What the figures belong to."""
  data = config.data
  read = {'data.mix': data.mix, 'data.phases': list(data.phases), 'data.held_out': list(data.held_out)}
  base = bases.digest_of(config.init) if config.init else f'seed {config.seed}'
  shape = {'data.seq_len': data.seq_len, 'answers': 'single' if config.preference.loss == 'kto' else 'pairs'}
  return {'base': base, 'data': contents} | read | shape


def _check(what: What, facts: epath.Path, about: dict[str, Any], names: list[str]) -> None:
  folder, kept = facts.parent, hosts.from_first(lambda: read_json(facts))
  for name, value in about.items():
    if kept.get(name) != value:
      shown = name if name in ('base', 'data') else f'{name}={kept.get(name)}'
      other = {'base': 'another base', 'data': 'other data'}.get(name, shown)
      raise InputError(f'{folder}: holds the {what} of {other}: put that back, or use another --run')
  there = {name: digest for name, digest in kept['files'].items() if name in names}
  damaged = hosts.from_first(
    lambda: files.changes(there, {n: files.sha256(folder / n) for n in there if (folder / n).exists()})
  )
  if damaged or len(there) < len(names):
    raise InputError(f'{folder}: damaged: {"; ".join(damaged) or "files are missing"}: use another --run')


def _computed(config: Pretrain, built: Program, state: Any, stream: Any, say: Any) -> np.ndarray:
  like, size = program.bare(built.batch), config.data.global_batch
  assert built.answers is not None  # of preferences it is there
  count, begun = -(-len(stream) // size), time.monotonic()
  numbers, told = itertools.count(1), begun

  def place(make: Any) -> Any:
    nonlocal told
    number, now = next(numbers), time.monotonic()
    if now - told > SILENCE:
      told = now
      say(f'batch {number:,} of {count:,} after {now - begun:.0f} s')
    return hosts.place(size, make, like)

  return pairing.of_units(built.answers, state.params, stream, size, place)


def _read(path: epath.Path) -> np.ndarray:
  with path.open('rb') as file:
    return np.load(file, allow_pickle=False)


def _written(facts: epath.Path, found: dict[str, np.ndarray], about: dict[str, Any]) -> None:
  folder = facts.parent
  folder.mkdir(parents=True, exist_ok=True)
  for name, values in found.items():
    with (folder / name).open('wb') as file:
      np.save(file, values, allow_pickle=False)
  digests = {name: files.sha256(folder / name) for name in found}
  write_whole(facts, json.dumps(about | {'files': digests}, indent=1))
