"""Near-duplicates: documents most of whose word sequences were in one document kept before (MinHash with banding)."""

import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from jaxlm.errors import InputError

SEED = 1
AT_ONCE = 1 << 12  # shingles hashed together: 2 MB for 128 permutations
MISSES_COST_MORE = (0.1, 0.9)  # than false candidates, which the whole signature then rejects
LONGEST_WORD = 12.0  # characters a word on average; beyond it (Chinese, Japanese, Thai) spaces do not part words

Place = tuple[int, ...]  # of a document, by which documents are in their order


class Sketcher:
  """Makes sketches of texts, and tells which are alike: a sketch is `num_perm` values of 4 bytes.

  Alike means an estimated Jaccard similarity of at least `threshold` between the sets of shingles (see `shingles`), and
  the estimate has a standard deviation of sqrt(s (1 - s) / num_perm), 0.035 at s = 0.8 and 128: pairs well above the
  threshold are found, pairs near it by chance, always the same for the same documents in the same order.

  Papers: Broder, On the resemblance and containment of documents, 1997; Leskovec et al., Mining of Massive Datasets,
  chapter 3.
  Raises InputError without the library, or for a threshold that `num_perm` cannot tell apart.
  """

  def __init__(self, threshold: float = 0.8, num_perm: int = 128, shingle: int = 5):
    try:
      import datasketch
    except ImportError as error:
      raise InputError("near-duplicates need datasketch: pip install -e '.[dedup]'") from error
    if not (0 < threshold < 1 and shingle > 0 and num_perm > 1):
      raise InputError(
        f'near-duplicates: threshold must be between 0 and 1, shingle positive and num_perm at least 2, '
        f'not {threshold}, {shingle} and {num_perm}'
      )
    self.threshold, self.shingle = threshold, shingle
    try:
      self.index = datasketch.MinHashLSH(threshold, num_perm, weights=MISSES_COST_MORE)
    except ValueError as error:
      raise InputError(f'near-duplicates: threshold {threshold} with num_perm {num_perm}: {error}') from error
    self._empty = datasketch.MinHash(num_perm, SEED, hashfunc=zlib.crc32)

  def minhash(self, text: str) -> Any:
    """The sketch as an object of the library."""
    sketch, parts = self._empty.copy(), shingles(text, self.shingle)
    while some := list(islice(parts, AT_ONCE)):
      sketch.update_batch(some)
    return sketch

  def sketch(self, text: str) -> bytes:
    """The sketch's values; nothing for a text without a word, which is like none."""
    sketch = self.minhash(text)
    return b'' if sketch.is_empty() else sketch.hashvalues.tobytes()

  def values(self, sketches: Sequence[bytes]) -> np.ndarray:
    """The values of sketches: [len(sketches), num_perm]."""
    kind = self._empty.hashvalues.dtype
    return np.frombuffer(b''.join(sketches), kind).reshape(len(sketches), -1)

  def bands(self, sketch: bytes) -> list[bytes]:
    """Sketches that are compared at all have one of these in common."""
    (values,) = self.values([sketch])
    cuts = [values[start:stop].tobytes() for start, stop in self.index.hashranges]
    return [number.to_bytes(2, 'big') + cut for number, cut in enumerate(cuts)]

  def alike(self, values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """bool [N]: which of the sketches' values `others` [N, num_perm] are like `values` [num_perm]."""
    return np.mean(others == values, axis=-1) >= self.threshold


class NearDuplicates(Sketcher):
  """Remembers documents and tells whether a new one is like one of them; the first of its kind is kept.

  What is found depends on the order; every run on every machine finds the same. A kept document takes about 6 KB of
  memory.
  """

  def __init__(self, threshold: float = 0.8, num_perm: int = 128, shingle: int = 5):
    super().__init__(threshold, num_perm, shingle)
    self._kept: dict[Hashable, np.ndarray] = {}

  def seen(self, text: str) -> bool:
    """True if `text` is like one kept before; otherwise it is kept. A text without a word is like none."""
    sketch = self.minhash(text)
    if sketch.is_empty():
      return False
    values = sketch.hashvalues
    if any(self.alike(values, self._kept[key]) for key in self.index.query(sketch)):
      return True
    self.index.insert(len(self._kept), sketch, check_duplication=False)
    self._kept[len(self._kept)] = values
    return False


def pairs(sketcher: Sketcher, documents: Iterable[tuple[Place, bytes]]) -> Iterator[tuple[Place, Place]]:
  """(later, earlier) for those of some documents (place, sketch) that are alike."""
  places, sketches = zip(*sorted(documents), strict=True)
  values = sketcher.values(sketches)
  for later in range(1, len(places)):
    for earlier in np.flatnonzero(sketcher.alike(values[later], values[:later])):
      yield places[later], places[earlier]


def later_ones(found: Iterable[tuple[Place, Place]]) -> set[Place]:
  """Which documents `NearDuplicates` would not keep, given all pairs (later, earlier) that are alike."""
  dropped: set[Place] = set()
  for later, earlier in sorted(found):
    if earlier not in dropped:
      dropped.add(later)
  return dropped


def shingles(text: str, size: int = 5) -> Iterator[bytes]:
  """All runs of `size` words of the text, case and white space aside; repeated ones come again.

  Where that makes fewer than `size` runs, or words are long because the script has no spaces between them, they are
  runs of `size` characters instead. A text shorter than one run is a run itself.
  """
  words = text.casefold().split()
  if len(words) < 2 * size - 1 or sum(map(len, words)) > LONGEST_WORD * len(words):
    line = ' '.join(words)
    for start in range(max(1, len(line) - size + 1) if line else 0):
      yield line[start : start + size].encode('utf-8', 'surrogatepass')
  else:
    for start in range(len(words) - size + 1):
      yield ' '.join(words[start : start + size]).encode('utf-8', 'surrogatepass')
