"""What plain compressors and a byte n-gram make of the same text: the figures that a language model has to beat."""

import lzma

import numpy as np

from jaxlm.errors import InputError

LARGEST_DICTIONARY = 1536 << 20  # liblzma's own limit


def xz_bits_per_byte(heldout: bytes) -> float:
  """Bits of `xz -9` per byte of `heldout`, which is compressed alone."""
  return 8 * _xz_size(heldout) / _length(heldout)


def xz_conditional_bits_per_byte(train: bytes, heldout: bytes) -> float:
  """Bits per byte that `heldout` adds to an `xz -9` file of `train`: xz with the training text in its window."""
  return 8 * (_xz_size(train + heldout) - _xz_size(train)) / _length(heldout)


def ngram_bits_per_byte(train: bytes, heldout: bytes, order: int = 5) -> float:
  """Cross entropy in bits per byte of `heldout` under the n-gram model of `ngram_probs`."""
  _length(heldout)
  return float(-np.log2(ngram_probs(train, heldout, order)).mean())


def ngram_probs(train: bytes, heldout: bytes, order: int = 5) -> np.ndarray:
  """float64 [N]: p(heldout[i] | the order - 1 bytes before it), by interpolated modified Kneser-Ney.

  p_n(w | h) = (c(hw) - D(c(hw)) + sum_v D(c(hv)) p_{n-1}(w | h')) / sum_v c(hv), with h' = h less its first byte,
  p_0 = 1/256, and p_n = p_{n-1} where h was never seen. c counts occurrences at the highest order and distinct bytes
  before hw at lower ones; D has one value each for counts of 1, 2 and more (Chen and Goodman 1999, "An empirical
  study of smoothing techniques for language modeling"). The first bytes have shorter contexts. Raises InputError
  unless 1 <= order <= 8 (an n-gram is one 64-bit integer, so that nothing collides).
  """
  if not 1 <= order <= 8:
    raise InputError(f'byte n-gram: order {order} is not in 1..8')
  probs = np.full(len(heldout), 1 / 256)
  for n in range(1, order + 1):
    grams, counts = _counts(train, n, order)
    if not len(grams) or len(heldout) < n:
      break
    discounts = _discounts(counts)
    contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
    total, kept_back = np.add.reduceat(counts, first), np.add.reduceat(discounts, first)
    asked = _keys(heldout, n)
    at, seen = _find(grams, asked)
    at_context, seen_context = _find(contexts, asked >> np.uint64(8))
    own = np.where(seen, (counts - discounts)[at], 0.0)
    lower = probs[n - 1 :]
    higher = (own + kept_back[at_context] * lower) / total[at_context]
    probs[n - 1 :] = np.where(seen_context, higher, lower)
  return probs


def _keys(data: bytes, n: int) -> np.ndarray:
  """uint64 [max(0, len(data) - n + 1)]: n-grams as big-endian integers, so that sorting groups them by context."""
  values = np.frombuffer(data, np.uint8).astype(np.uint64)
  windows = max(0, len(values) - n + 1)
  keys = np.zeros(windows, np.uint64)
  for i in range(n):
    keys = (keys << np.uint64(8)) | values[i : i + windows]
  return keys


def _counts(train: bytes, n: int, order: int) -> tuple[np.ndarray, np.ndarray]:
  """Sorted n-grams and their counts: occurrences at the highest order, distinct bytes before them below it."""
  if n == order:
    return np.unique(_keys(train, n), return_counts=True)
  longer = np.unique(_keys(train, n + 1))
  return np.unique(longer & np.uint64((1 << 8 * n) - 1), return_counts=True)


def _discounts(counts: np.ndarray) -> np.ndarray:
  """float64, as `counts`: what each count gives up, from the counts of counts."""
  n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
  y = n1 / max(n1 + 2 * n2, 1)
  raw = (1 - 2 * y * n2 / max(n1, 1), 2 - 3 * y * n3 / max(n2, 1), 3 - 4 * y * n4 / max(n3, 1))
  # On tiny texts the estimates can leave their range; above zero, unseen bytes keep some probability.
  table = np.array([0.0] + [min(max(d, 0.1), k) for k, d in enumerate(raw, 1)])
  return table[np.minimum(counts, 3)]


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where each key is in the sorted table (any place if it is not), and whether it is there."""
  at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
  return at, table[at] == keys


def _xz_size(data: bytes) -> int:
  # A window over all the data, and no larger: the encoder takes ten times its size in memory.
  size = min(max(4096, 1 << max(len(data) - 1, 0).bit_length()), LARGEST_DICTIONARY)
  return len(lzma.compress(data, filters=[{'id': lzma.FILTER_LZMA2, 'preset': 9, 'dict_size': size}]))


def _length(heldout: bytes) -> int:
  if not heldout:
    raise InputError('compression: the held-out text is empty')
  return len(heldout)
