"""Rows for training out of a stream of tokens: concatenate and split, or best fit; segments keep documents apart."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxlm.data.prepared import Tokens
from jaxlm.data.tokenizer import Tokenizer

Row = dict[str, np.ndarray]
Packing = Literal['concat', 'best_fit']


def pack(
  tokens: np.ndarray,
  begins: np.ndarray,
  seq_len: int,
  pad_id: int,
  token_bytes: np.ndarray,
  learned: np.ndarray | None = None,
) -> Row:
  """A row from a slice of the stream: `tokens` int [n + 1] and `begins` bool [n + 1], 1 <= n <= seq_len = T.

  Position t of the row sees tokens[t] and predicts tokens[t + 1]. Returns arrays [T]:
  - tokens, targets int32: padded with `pad_id` after n;
  - loss_mask float32: 0 on padding, where the target begins another document, and where it is not `learned` (bool
    [n + 1], if given), else 1. It never looks at ids, so an end-of-text label counts even where `pad_id` is the same;
  - segment_ids int32: 1, 2, ... for the row's documents, 0 on padding;
  - positions int32: from 0 in each segment;
  - target_bytes int32: bytes of UTF-8 that the target stands for, 0 where the mask is 0.
  """
  n = len(tokens) - 1
  starts = begins[:n].copy()
  starts[0] = True
  index = np.arange(n)
  mask = ~begins[1:] if learned is None else ~begins[1:] & learned[1:]
  return {
    'tokens': padded(tokens[:n], seq_len, np.int32, pad_id),
    'targets': padded(tokens[1:], seq_len, np.int32, pad_id),
    'loss_mask': padded(mask, seq_len, np.float32),
    'segment_ids': padded(np.cumsum(starts), seq_len, np.int32),
    'positions': padded(index - np.maximum.accumulate(np.where(starts, index, 0)), seq_len, np.int32),
    'target_bytes': padded(token_bytes[tokens[1:]] * mask, seq_len, np.int32),
  }


class Rows:
  """The rows of a split: row r covers stream[r * T : (r + 1) * T + 1]; each text token is a target exactly once.

  With `numbers` [documents], which says under what number each document of the split is to be counted, rows have
  `group` int32 [T]: that number for each target.
  """

  def __init__(self, tokens: Tokens, seq_len: int, tokenizer: Tokenizer, numbers: Any = None):
    self.tokens, self.seq_len, self.pad_id = tokens, seq_len, tokenizer.pad_id
    self._token_bytes = tokenizer.token_bytes()
    self._numbers = None if numbers is None else np.asarray(numbers, np.int32)

  def __len__(self) -> int:
    return max(-(-(len(self.tokens) - 1) // self.seq_len), 0)

  @property
  def fill(self) -> float:
    """Share of the rows' places that hold a token to predict from."""
    return (len(self.tokens) - 1) / (len(self) * self.seq_len) if len(self) else 0.0

  def __getitem__(self, row: int) -> Row:
    if not 0 <= row < len(self):
      raise IndexError(f'row {row} of {len(self)}')
    start, stop = row * self.seq_len, (row + 1) * self.seq_len + 1
    learned = self.tokens.learned(start, stop)
    packed = pack(*self.tokens.read(start, stop), self.seq_len, self.pad_id, self._token_bytes, learned)
    if self._numbers is not None:
      packed['group'] = padded(self._numbers[self.tokens.documents(start + 1, stop)], self.seq_len, np.int32)
    return packed


class BestFitRows:
  """Rows of whole documents: none is cut but those longer than a row, at its multiples; see `best_fit`."""

  def __init__(self, tokens: Tokens, seq_len: int, tokenizer: Tokenizer):
    self.tokens, self.seq_len, self.pad_id = tokens, seq_len, tokenizer.pad_id
    self._token_bytes = tokenizer.token_bytes()
    self._starts, self._lengths = _pieces(tokens.document_starts(), seq_len)
    row = best_fit(self._lengths, seq_len)
    self._order = np.argsort(row, kind='stable')
    self._bounds = np.searchsorted(row[self._order], np.arange(row.max(initial=-1) + 2))

  def __len__(self) -> int:
    return len(self._bounds) - 1

  @property
  def fill(self) -> float:
    """Share of the rows' places that hold a token to predict from."""
    return int(self._lengths.sum()) / (len(self) * self.seq_len) if len(self) else 0.0

  def __getitem__(self, row: int) -> Row:
    if not 0 <= row < len(self):
      raise IndexError(f'row {row} of {len(self)}')
    parts = []
    for i in self._order[self._bounds[row] : self._bounds[row + 1]]:
      start, length = int(self._starts[i]), int(self._lengths[i])
      tokens, _ = self.tokens.read(start, start + length + 1)
      learned = self.tokens.learned(start, start + length + 1)
      parts.append(pack(tokens, np.zeros(length + 1, np.bool_), length, self.pad_id, self._token_bytes, learned))
    return joined(parts, self.seq_len, self.pad_id)


def joined(parts: Sequence[Row], seq_len: int, pad_id: int) -> Row:
  """Rows of one segment each as the segments 1, 2, ... of one row."""
  for number, part in enumerate(parts, 1):
    part['segment_ids'][:] = number
  fills = {'tokens': pad_id, 'targets': pad_id}
  return {
    name: padded(np.concatenate([part[name] for part in parts]), seq_len, value.dtype.type, fills.get(name, 0))
    for name, value in parts[0].items()
  }


def rows(packing: Packing, tokens: Tokens, seq_len: int, tokenizer: Tokenizer) -> Rows | BestFitRows:
  """The rows of a split: 'concat' wastes no place and cuts documents, 'best_fit' cuts none that fits into a row."""
  return {'concat': Rows, 'best_fit': BestFitRows}[packing](tokens, seq_len, tokenizer)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
  """int64 [pieces]: the row of each piece, longest first into the fullest row with room (best-fit decreasing).

  Ding et al. 2024, arXiv:2404.10830. `lengths` are 1 to `capacity`; equal ones are placed together, one to a row, so
  that the cost is that of the distinct lengths and not of their pairs. The rows depend on the lengths alone.
  """
  row = np.zeros(len(lengths), np.int64)
  if not len(row):
    return row
  room: dict[int, list[int]] = {}  # free places -> the rows that have so many
  made = 0
  by_length = np.argsort(-lengths, kind='stable')
  values, firsts = np.unique(-lengths[by_length], return_index=True)
  for length, group in zip(-values, np.split(by_length, firsts[1:]), strict=True):
    placed = 0
    while placed < len(group):
      left = min((free for free, some in room.items() if free >= length and some), default=None)
      if left is None:
        left, room[capacity] = capacity, list(range(made, made + -(-(len(group) - placed) // (capacity // length))))
        made += len(room[capacity])
      taken = room[left][: len(group) - placed]
      del room[left][: len(taken)]
      row[group[placed : placed + len(taken)]] = taken
      room.setdefault(left - int(length), []).extend(taken)
      placed += len(taken)
  return row


def _pieces(starts: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
  """Where each piece begins and how many tokens it predicts, of documents that begin at `starts` (the end included).

  A document of n tokens predicts n - 1; a longer one than a row is cut at its multiples, a piece's last target being
  the next one's first token.
  """
  predicted = np.maximum(np.diff(starts) - 1, 0)
  counts = -(-predicted // seq_len)
  index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # the piece's number in its document
  lengths = np.minimum(np.repeat(predicted, counts) - index * seq_len, seq_len)
  return np.repeat(starts[:-1], counts) + index * seq_len, lengths


def padded(values: np.ndarray, length: int, dtype: type, fill: int = 0) -> np.ndarray:
  """`values` [n, ...] at the beginning of an array [length, ...]."""
  out = np.full((length, *np.shape(values)[1:]), fill, dtype)
  out[: len(values)] = values
  return out
