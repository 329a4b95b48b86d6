"""Rows of whole preferences: the answers of each are segments of one row, side by side, that never see each other."""

import hashlib
from collections.abc import Callable
from typing import Literal

import numpy as np

from jaxlm.data import packing
from jaxlm.data.packing import Row
from jaxlm.data.prepared import Tokens
from jaxlm.data.tokenizer import Tokenizer

Unit = Literal['pair', 'single']
BLOCK = 1 << 20  # bits read at a time


class PairRows:
  """Rows of units of two segments each, packed by best fit; a unit longer than a row is left out, `dropped` of them.

  A 'pair' is a chosen and a rejected answer, each behind its prompt. A 'single' one is an answer, good or not, and then
  the same prompt with the answer to another (KTO's estimate of its baseline, arXiv:2402.01306, section 4.1): that of
  the next row of the stream, which stays the same one in every epoch (TRL shifts the answers of a batch by one, once).
  Unit u of a row is its segments 2u + 1 and 2u + 2.

  Rows are those of `packing.pack` and have as many places for what is said of segments, whose number is so bounded
  whatever the data: `labels` int32 [T] (1: the better or a good answer) and `margins` float32 [T] at place s - 1 for
  segment s, and `ref_logps` float32 [T] where `reference` [units, 2] has the log-probabilities of all units' answers.
  Where `features` [units, 2, D] has what a trunk makes of their ends, `features` float32 [segments, D] has it in the
  same order; `segments` is set beside it, to `most` of the streams whose rows make one batch, or to more.
  Where `places` is set, to `learnt` (targets of a row's answers at most) of such streams or to more, `places` int32
  [places] are those where `loss_mask` is on, and T for those that are over.
  `loss_mask` is on for the targets of answers. With `ends` it is on for the last token of each answer instead, where a
  score is read; rows then hold the last token of a document, which is else predicted alone.
  `keep` (bool, one a unit) leaves out others.
  """

  def __init__(
    self,
    tokens: Tokens,
    seq_len: int,
    tokenizer: Tokenizer,
    *,
    unit: Unit = 'pair',
    ends: bool = False,
    apart: int = 1,
    keep: np.ndarray | None = None,
    reference: np.ndarray | None = None,
  ):
    """`apart`: documents from a single answer to the one that it is mismatched with; 2 where rows are pairs."""
    self.tokens, self.seq_len, self.pad_id = tokens, seq_len, tokenizer.pad_id
    self._whole: Callable[[], PairRows] = lambda: PairRows(
      tokens, seq_len, tokenizer, unit=unit, ends=ends, apart=apart
    )
    self.unit, self.ends, self.apart, self.reference = unit, ends, apart, reference
    self._token_bytes, (self._labels, self._margins) = tokenizer.token_bytes(), tokens.answers()
    self._starts = tokens.document_starts()
    self.features: np.ndarray | None = None
    self.segments, self.places = 0, 0
    lengths, answers = self._unit_lengths()
    self.most = 2 * int(np.searchsorted(np.cumsum(np.sort(lengths)), seq_len, 'right'))  # segments of any row, or more
    wanted = np.ones(len(lengths), np.bool_) if keep is None else keep
    fits = wanted & (lengths <= seq_len)
    self.units, self.count, self.dropped = np.flatnonzero(fits), len(lengths), int((wanted & ~fits).sum())
    self._used = int(lengths[fits].sum())
    row = packing.best_fit(lengths[fits], seq_len)
    self.learnt = int(np.bincount(row, answers[fits]).max(initial=0))
    self._order = np.argsort(row, kind='stable')
    self._bounds = np.searchsorted(row[self._order], np.arange(row.max(initial=-1) + 2))

  def _unit_lengths(self) -> tuple[np.ndarray, np.ndarray]:
    """Places of each unit, and how many of them are under the loss mask."""
    sizes, (prompts, answers) = np.diff(self._starts), completions(self.tokens).T
    if self.ends:
      answers = np.ones_like(answers)
    if self.unit == 'pair':
      return (sizes[::2] + sizes[1::2]) - 2 * (not self.ends), answers[::2] + answers[1::2]
    self._prompts = prompts
    other = (np.arange(len(sizes)) + self.apart) % max(1, len(sizes))
    return (sizes - 1) + (prompts + (sizes - prompts)[other] - 1), answers + answers[other]

  def __len__(self) -> int:
    return len(self._bounds) - 1

  @property
  def fill(self) -> float:
    """Share of the rows' places that hold a token."""
    return self._used / (len(self) * self.seq_len) if len(self) else 0.0

  def whole(self) -> 'PairRows':
    """The rows of all units, without `keep`."""
    return self._whole()

  def units_of(self, row: int) -> np.ndarray:
    """int64: the units of a row in their order, counted through the stream, those that were left out included."""
    return self.units[self._order[self._bounds[row] : self._bounds[row + 1]]]

  def __getitem__(self, row: int) -> Row:
    if not 0 <= row < len(self):
      raise IndexError(f'row {row} of {len(self)}')
    units = self.units_of(row)
    parts = [self._packed(*segment) for unit in units for segment in self._segments(int(unit))]
    found = packing.joined(parts, self.seq_len, self.pad_id)
    documents = np.stack([2 * units, 2 * units + 1], 1) if self.unit == 'pair' else np.stack([units, units], 1)
    labels, margins = self._labels[documents], self._margins[documents]
    if self.unit == 'single':
      labels[:, 1] = False
    said = {'labels': labels.astype(np.int32), 'margins': margins}
    if self.reference is not None:
      said['ref_logps'] = self.reference[units]
    found |= {name: packing.padded(x.reshape(-1), self.seq_len, x.dtype.type) for name, x in said.items()}
    if self.places:
      on = np.flatnonzero(found['loss_mask'])
      found['places'] = np.append(on, np.full(self.places - len(on), self.seq_len)).astype(np.int32)
    if self.features is not None:
      ends = self.features[units]
      found['features'] = packing.padded(ends.reshape(-1, ends.shape[-1]), self.segments, np.float32)
    return found

  def _segments(self, unit: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The ids of both segments, and which of them are the answer's."""
    if self.unit == 'pair':
      return [self._document(2 * unit), self._document(2 * unit + 1)]
    other = (unit + self.apart) % self.count
    own, theirs = self._document(unit), self._document(other)
    n, m = int(self._prompts[unit]), int(self._prompts[other])
    return [own, (np.append(own[0][:n], theirs[0][m:]), np.append(own[1][:n], theirs[1][m:]))]

  def _document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    start, stop = int(self._starts[number]), int(self._starts[number + 1])
    learned = self.tokens.learned(start, stop)
    assert learned is not None  # of preferences it is always there
    return self.tokens.read(start, stop)[0], learned

  def _packed(self, ids: np.ndarray, learned: np.ndarray) -> Row:
    """A segment alone; `joined` numbers it."""
    if self.ends:
      ids, learned = np.append(ids, self.pad_id), np.append(learned, False)
    begins = np.zeros(len(ids), np.bool_)
    part = packing.pack(ids, begins, len(ids) - 1, self.pad_id, self._token_bytes, learned)
    if self.ends:
      part['loss_mask'] = np.zeros_like(part['loss_mask'])
      part['loss_mask'][np.flatnonzero(learned)[-1]] = 1.0
      part['target_bytes'] = np.zeros_like(part['target_bytes'])
    return part


def completions(tokens: Tokens) -> np.ndarray:
  """int64 [documents, 2]: tokens before the answer of each document, and those of the answer."""
  starts, first = tokens.document_starts(), 0
  found = np.zeros((len(starts) - 1, 2), np.int64)
  while first < len(found):
    last = max(first + 1, int(np.searchsorted(starts, starts[first] + BLOCK, 'right')) - 1)
    begin = int(starts[first])
    learned = tokens.learned(begin, int(starts[last]))
    assert learned is not None  # of preferences it is always there
    places = np.flatnonzero(learned) + begin
    edges = np.searchsorted(places, starts[first : last + 1])
    found[first:last, 0] = places[edges[:-1]] - starts[first:last]
    found[first:last, 1] = np.diff(edges)
    first = last
  return found


def folds(tokens: Tokens, count: int) -> np.ndarray:
  """int64 [pairs]: the part, of `count`, that each pair is in, by its prompt's hash: equal prompts stay together."""
  starts, prompts = tokens.document_starts()[:-1:2], completions(tokens)[::2, 0]
  read = lambda start, size: tokens.read(int(start), int(start + size))[0].tobytes()
  digests = (hashlib.sha256(read(start, size)).digest() for start, size in zip(starts, prompts, strict=True))
  return np.array([int.from_bytes(digest[:8], 'big') % count for digest in digests], np.int64)
