"""Preferences as the data of a run: rows of whole pairs for training and for evaluation, and what is said of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm import hosts, masked
from jaxlm.config import Pretrain
from jaxlm.data import batches
from jaxlm.data.pairs import PairRows, folds
from jaxlm.data.prepared import Prepared
from jaxlm.errors import InputError

MULTIPLE = 16  # of the places that have logits


def rows(config: Pretrain, folder: Prepared, *, held_out: bool, kind: str | None = None) -> batches.Joined:
  """The rows of a folder that a run trains on, or those that it holds out: a split, or as folds say.

  Raises InputError for a folder without preferences, and for one of single answers where pairs are needed.
  """
  how, there = config.preference, folder.summary.preference
  if there is None:
    raise InputError(f'{folder.path}: holds no preferences: prepare them with `jaxlm prepare --preference`')
  unit = 'single' if how.stage == 'preference' and how.loss == 'kto' else 'pair'
  if unit == 'pair' and there == 'labels':
    needed = 'a reward model' if how.stage == 'reward' else how.loss
    raise InputError(f'{folder.path}: holds single labelled answers, and {needed} needs pairs (kto does not)')
  splits = ('train', 'validation') if how.fold >= 0 else ('validation' if held_out else 'train',)
  parts = []
  for split in splits:
    if kind is not None and kind not in folder.summary.kinds(split):
      continue
    tokens = folder.split(split, kind)
    keep = (folds(tokens, how.folds) == how.fold) == held_out if how.fold >= 0 else None
    made: dict[str, Any] = {'unit': unit, 'ends': how.stage == 'reward', 'apart': folder.summary.answers, 'keep': keep}
    parts.append(PairRows(tokens, config.data.seq_len, folder.tokenizer, **made))
  found = batches.Joined([part for part in parts if len(part)])
  if not held_out and not len(found):
    raise InputError(f'{folder.path}: no preference fits into data.seq_len={config.data.seq_len}: raise it')
  return found


def leaves(source: Any) -> Iterator[PairRows]:
  """The streams of preferences that make up a source of rows."""
  if isinstance(source, PairRows):
    yield source
  for part in getattr(source, 'parts', ()):
    yield from leaves(part)


def placed(streams: Sequence[PairRows]) -> int:
  """How many places of a row have logits, set in all streams, whose rows are of one length; 0 where it is all."""
  learnt = max((one.learnt for one in streams), default=0)
  places = -(-learnt // MULTIPLE) * MULTIPLE
  for one in streams:
    one.places = places if places < one.seq_len else 0
  return streams[0].places if streams else 0


def of_units(
  fn: Callable[[Any, Any], Any], params: Any, stream: PairRows, size: int, place: Callable[[Any], Any]
) -> np.ndarray:
  """float32 [units, 2, ...]: what `fn(params, batch)` (`objectives.answers`) gives for each unit; NaN where left out.

  `place(make)` makes a batch of `size` rows of `make(rows)`.
  """
  found, fixed = np.full((stream.count, 2), np.nan, np.float32), batches.in_order(stream, size)
  for number in range(len(fixed)):
    both = map(hosts.read, fn(params, place(lambda some, n=number: fixed.part(n, some))))
    both = [x.reshape(size, -1, *x.shape[1:]) for x in both]
    if not number:
      found = np.full((stream.count, 2, *both[0].shape[2:]), np.nan, np.float32)
    for place_in, row in enumerate(range(number * size, min((number + 1) * size, len(stream)))):
      units = stream.units_of(row)
      found[units] = np.stack([x[place_in, : len(units)] for x in both], 1)
  return found


def described(source: Any) -> str:
  """How many units there are and how many do not fit into a row."""
  streams = list(leaves(source))
  used, dropped = (sum(n) for n in zip(*((len(one.units), one.dropped) for one in streams), strict=True))
  what = 'pairs' if streams[0].unit == 'pair' else 'answers'
  left = f'; {dropped} longer than a row are left out' if dropped else ''
  return f'{used:,} {what}{left}'


def evaluated(totals: Mapping[str, Any]) -> tuple[dict[str, float], float, str]:
  """A row of metrics from an evaluation's totals, the loss in it, and both in words."""
  values = {name: float(masked.value(one)) for name, one in totals.items()}
  said = f'held-out loss {values["loss"]:.3f}, {values["rewards/accuracies"]:.1%} right'
  if 'rewards/margins' in values:
    said += f', margin {values["rewards/margins"]:.3f}'
  if 'nll' in values:
    said += f', chosen answers {values["nll"]:.3f} nats a token'
  return {f'eval/{name}': value for name, value in values.items()}, values['loss'], said
