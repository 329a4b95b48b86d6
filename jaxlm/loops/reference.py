"""The reference's log-probabilities, computed once before the first step and kept in the run's folder."""

import json
from typing import Any

import numpy as np
from etils import epath

from jaxlm import files, hosts
from jaxlm.config import Pretrain
from jaxlm.errors import InputError
from jaxlm.files import read_json, write_whole
from jaxlm.loops import bases, pairing
from jaxlm.program import Program

FOLDER, FACTS = 'reference', 'reference.json'


def attach(
  config: Pretrain, built: Program, state: Any, sources: dict[str, Any], contents: str, say: Any = lambda line: None
) -> None:
  """Gives the streams of preferences in `sources` (by name) what the model makes of them before step 0.

  It is read where the run's folder has it. Raises InputError where that is of another base or other data, and where it
  is missing though the run has begun.
  """
  if config.reference != 'cached':
    return
  streams = {f'{name}-{i}.npy': one for name, of in sources.items() for i, one in enumerate(pairing.leaves(of))}
  folder = epath.Path(config.run) / FOLDER
  about = hosts.from_first(lambda: _about(config, contents))
  if hosts.from_first(lambda: (folder / FACTS).exists()):
    _check(folder, about, list(streams))
    found = {name: _read(folder / name) for name in streams}
  else:
    if int(state.step):
      raise InputError(f'{folder}: the reference of this run is missing: put it back, or use another --run')
    say('the reference reads all preferences once')
    found = {name: _computed(config, built, state, stream) for name, stream in streams.items()}
    hosts.from_first(lambda: _written(folder, found, about))
  for name, stream in streams.items():
    stream.reference = found[name]


def _about(config: Pretrain, contents: str) -> dict[str, Any]:
  """What the figures belong to."""
  data = config.data
  read = {'data.mix': data.mix, 'data.phases': list(data.phases), 'data.held_out': list(data.held_out)}
  base = bases.digest_of(config.init) if config.init else f'seed {config.seed}'
  shape = {'data.seq_len': data.seq_len, 'answers': 'single' if config.preference.loss == 'kto' else 'pairs'}
  return {'base': base, 'data': contents} | read | shape


def _check(folder: epath.Path, about: dict[str, Any], names: list[str]) -> None:
  kept = hosts.from_first(lambda: read_json(folder / FACTS))
  for name, value in about.items():
    if kept.get(name) != value:
      shown = name if name in ('base', 'data') else f'{name}={kept.get(name)}'
      other = {'base': 'another base', 'data': 'other data'}.get(name, shown)
      raise InputError(f'{folder}: holds the reference of {other}: put that back, or use another --run')
  there = {name: digest for name, digest in kept['files'].items() if name in names}
  damaged = hosts.from_first(
    lambda: files.changes(there, {n: files.sha256(folder / n) for n in there if (folder / n).exists()})
  )
  if damaged or len(there) < len(names):
    raise InputError(f'{folder}: damaged: {"; ".join(damaged) or "files are missing"}: use another --run')


def _computed(config: Pretrain, built: Program, state: Any, stream: Any) -> np.ndarray:
  like = {name: spec for name, spec in built.batch.items() if name != 'ref_logps'}
  size = config.data.global_batch
  assert built.answers is not None  # of preferences it is there
  return pairing.of_units(built.answers, state.params, stream, size, lambda make: hosts.place(size, make, like))


def _read(path: epath.Path) -> np.ndarray:
  with path.open('rb') as file:
    return np.load(file, allow_pickle=False)


def _written(folder: epath.Path, found: dict[str, np.ndarray], about: dict[str, Any]) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for name, values in found.items():
    with (folder / name).open('wb') as file:
      np.save(file, values, allow_pickle=False)
  digests = {name: files.sha256(folder / name) for name in found}
  write_whole(folder / FACTS, json.dumps(about | {'files': digests}, indent=1))
