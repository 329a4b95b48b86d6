"""The data of a run, opened: its sources mixed for training, and its held-out text counted by kind and source."""

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import Pretrain
from jaxlm.data import batches, mixture, packing, prepare
from jaxlm.data.prepared import Prepared
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.loops import pairing

Group = tuple[str, str]  # (kind, source)


class Corpus(NamedTuple):
  """Prepared folders of one tokenizer; the first is `data.path`, the others are named in the mixture."""

  folders: dict[str, Prepared]
  watched: list[Prepared]  # those that are evaluated: these, and some that nothing is read of in training
  weights: list[dict[str, Fraction]]  # of each phase; empty where rows are drawn as they come
  begins: list[float]  # the share of the steps after which each phase begins

  @property
  def tokenizer(self) -> Tokenizer:
    return next(iter(self.folders.values())).tokenizer

  @property
  def contents(self) -> str:
    """The digests of all tokens; runs on equal ones see equal rows."""
    return ' '.join(one.summary.contents for one in self.folders.values())


def load(path: str, mix: str = '', phases: Sequence[str] = (), held_out: Sequence[str] = ()) -> Corpus:
  """Opens `path`, every other folder that the mixture names, and those of which only `held_out` text is wanted.

  Phases are taken in the order of their shares. Raises InputError for what is no prepared folder, a name that is
  neither a kind of `path` nor a folder, folders of different tokenizers, and two phases that begin together.
  """
  first = prepare.load(path)
  prepared_with = {kind: Fraction(str(weight)) for kind, weight in first.summary.weights.items()}
  later = sorted(map(mixture.parse_phase, phases), key=lambda phase: phase[0])
  for (one, _), (other, _) in itertools.pairwise(later):
    if one == other:
      raise InputError(f'data.phases: two phases begin at {one:g} of the steps')
  opening = mixture.parse(mix) if mix else prepared_with
  if later and not opening:
    raise InputError('data.phases: needs a data.mix to begin with')
  weights = [opening, *(weights for _, weights in later)] if opening else []
  folders = {path: first}
  for name in dict.fromkeys(name for one in weights for name in one):
    if name not in first.summary.kinds('train'):
      try:
        folders[name] = prepare.load(name)
      except InputError as error:
        kinds = ', '.join(first.summary.kinds('train'))
        raise InputError(f'data.mix: {name!r} is no kind of {path} ({kinds}), and as a folder: {error}') from error
  watched = folders | {name: prepare.load(name) for name in held_out}
  for name, one in watched.items():
    if one.tokenizer.digest != first.tokenizer.digest:
      raise InputError(f'{name}: was prepared with another tokenizer than {path}: prepare it again with that one')
  return Corpus(folders, list(watched.values()), weights, [0.0, *(begins for begins, _ in later)])


class Training(NamedTuple):
  """The stream of training batches, the names of its sources ('' where nothing is mixed), how full their rows are."""

  batches: batches.Batches
  names: list[str]
  rows: int
  fill: float


def training(corpus: Corpus, config: Pretrain) -> Training:
  """The batches of a run as a function of the cursor."""
  data = config.data
  make = lambda folder, kind=None: _rows(config, folder, kind)
  first = next(iter(corpus.folders.values()))
  ramp = batches.parse_ramp(data.batch_warmup, data.global_batch)
  if not corpus.weights:
    rows = batches.Joined([make(first)])
    return Training(batches.Batches(rows, data.global_batch, config.seed, ramp=ramp), [''], len(rows), rows.fill)
  names = list(dict.fromkeys(name for weights in corpus.weights for name in weights))
  parts = [make(corpus.folders[name]) if name in corpus.folders else make(first, name) for name in names]
  for name, part in zip(names, parts, strict=True):
    if not len(part):
      raise InputError(f'data.mix: {name!r} has no training row: give more of it, or leave it out')
  size = batches.Batches(parts[0], data.global_batch, 0, ramp=ramp)  # where a batch begins is not the mixture's
  phases = [
    (size.first(round(begins * config.steps)), [weights.get(name, Fraction(0)) for name in names])
    for begins, weights in zip(corpus.begins, corpus.weights, strict=True)
  ]
  joined, mixed = batches.Joined(parts), mixture.Mixture(phases)
  stream, count = batches.Batches(joined, data.global_batch, config.seed, mixture=mixed, ramp=ramp), len(joined)
  return Training(stream, names, count, joined.fill)


def _rows(config: Pretrain, folder: Prepared, kind: str | None) -> Any:
  """What a run trains on of a folder. Raises InputError for preferences where the stage is none of theirs."""
  if config.preference.stage != 'none':
    return pairing.rows(config, folder, held_out=False, kind=kind)
  _check_text(folder)
  return packing.rows(config.data.packing, folder.split('train', kind), config.data.seq_len, folder.tokenizer)


def _check_text(folder: Prepared) -> None:
  if folder.summary.preference:
    raise InputError(f'{folder.path}: holds preferences: `jaxlm preference` and `jaxlm reward` learn from them')


def held_out(
  folders: Sequence[Prepared], seq_len: int, *, by_document: bool = False
) -> tuple[batches.Joined, list[Group]]:
  """All held-out rows, their targets counted by group or by document, and of what group each of these is."""
  for one in folders:
    _check_text(one)
  splits = [one.split('validation') for one in folders]
  found = [[one.summary.groups[i] for i in split.document_groups()] for one, split in zip(folders, splits, strict=True)]
  if by_document:
    groups = list(itertools.chain(*found))
    numbers = np.split(np.arange(len(groups)), np.cumsum([len(some) for some in found])[:-1])
  else:
    groups = list(dict.fromkeys(group for one in folders for group in one.summary.groups))
    number = {group: i for i, group in enumerate(groups)}
    numbers = [[number[group] for group in some] for some in found]
  parts = zip(folders, splits, numbers, strict=True)
  return batches.Joined([packing.Rows(split, seq_len, one.tokenizer, some) for one, split, some in parts]), groups


class Score(NamedTuple):
  """What a model makes of some held-out text."""

  nll: float  # nats a token
  bits_per_byte: float
  tokens: int
  bytes: int


def evaluated(totals: dict[str, Any], groups: Sequence[Group]) -> tuple[dict[str, float], float, str]:
  """A row of metrics from an evaluation's totals, the loss in it, and both in words."""
  whole = scores(totals, [''] * len(groups))['']
  kinds = scores(totals, [kind for kind, _ in groups])
  row = {'eval/loss': whole.nll, 'eval/bits_per_byte': whole.bits_per_byte}
  if len(kinds) > 1:
    row |= {f'eval/{kind}/bits_per_byte': score.bits_per_byte for kind, score in kinds.items()}
    row |= {f'eval/{kind}/loss': score.nll for kind, score in kinds.items()}
  return row, whole.nll, f'held-out {whole.nll:.3f} nats a token, {whole.bits_per_byte:.3f} bits per byte'


def scores(totals: dict[str, Any], names: Sequence[Any]) -> dict[Any, Score]:
  """The score of each name from the totals by group ('nll' and 'bits_per_byte', see `objectives.by_group`).

  `names` says what each group is to be counted as; a name without a token is left out.
  """
  nll, bits = totals['nll'], totals['bits_per_byte']
  number = {name: i for i, name in enumerate(dict.fromkeys(names))}
  places = [number[name] for name in names]
  arrays = [np.bincount(places, np.asarray(x)) for x in (nll.total, nll.weight, bits.total, bits.weight)]
  found = {}
  for name, *sums in zip(number, *arrays, strict=True):
    nats, tokens, bits, bytes_ = map(float, sums)
    if tokens:
      found[name] = Score(nats / tokens, bits / bytes_ if bytes_ else float('nan'), int(tokens), int(bytes_))
  return found
