"""Rows for training out of a stream of tokens: concatenate and split, with segments so that documents stay apart."""

import numpy as np

from jaxlm.data.prepared import Tokens
from jaxlm.data.tokenizer import Tokenizer

Row = dict[str, np.ndarray]


def pack(tokens: np.ndarray, begins: np.ndarray, seq_len: int, pad_id: int, token_bytes: np.ndarray) -> Row:
  """A row from a slice of the stream: `tokens` int [n + 1] and `begins` bool [n + 1], 1 <= n <= seq_len = T.

  Position t of the row sees tokens[t] and predicts tokens[t + 1]. Returns arrays [T]:
  - tokens, targets int32: padded with `pad_id` after n;
  - loss_mask float32: 0 on padding and where the target begins another document, else 1. It never looks at ids, so
    an end-of-text label counts even where `pad_id` is the same token;
  - segment_ids int32: 1, 2, ... for the row's documents, 0 on padding;
  - positions int32: from 0 in each segment;
  - target_bytes int32: bytes of UTF-8 that the target stands for, 0 where the mask is 0.
  """
  n = len(tokens) - 1
  starts = begins[:n].copy()
  starts[0] = True
  index = np.arange(n)
  mask = ~begins[1:]
  return {
    'tokens': _padded(tokens[:n], seq_len, np.int32, pad_id),
    'targets': _padded(tokens[1:], seq_len, np.int32, pad_id),
    'loss_mask': _padded(mask, seq_len, np.float32),
    'segment_ids': _padded(np.cumsum(starts), seq_len, np.int32),
    'positions': _padded(index - np.maximum.accumulate(np.where(starts, index, 0)), seq_len, np.int32),
    'target_bytes': _padded(token_bytes[tokens[1:]] * mask, seq_len, np.int32),
  }


class Rows:
  """The rows of a split: row r covers stream[r * T : (r + 1) * T + 1]; each text token is a target exactly once."""

  def __init__(self, tokens: Tokens, seq_len: int, tokenizer: Tokenizer):
    self.tokens, self.seq_len, self.pad_id = tokens, seq_len, tokenizer.pad_id
    self._token_bytes = tokenizer.token_bytes()

  def __len__(self) -> int:
    return max(-(-(len(self.tokens) - 1) // self.seq_len), 0)

  def __getitem__(self, row: int) -> Row:
    if not 0 <= row < len(self):
      raise IndexError(f'row {row} of {len(self)}')
    tokens, begins = self.tokens.read(row * self.seq_len, (row + 1) * self.seq_len + 1)
    return pack(tokens, begins, self.seq_len, self.pad_id, self._token_bytes)


def _padded(values: np.ndarray, length: int, dtype: type, fill: int = 0) -> np.ndarray:
  out = np.full(length, fill, dtype)
  out[: len(values)] = values
  return out
