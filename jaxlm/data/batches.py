"""A batch as a function of (seed, cursor): epochs shuffled by random access, evaluation batches, prefetching."""

import itertools
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxlm.data.mixture import Mixture
from jaxlm.errors import InputError

SEED_STEP = 0x9E3779B1  # between the seeds of a run's sources

Batch = dict[str, np.ndarray]
T = TypeVar('T')


class RowSource(Protocol):
  """Anything indexable that gives rows: dicts of arrays with the same names, shapes and types in each."""

  def __len__(self) -> int: ...

  def __getitem__(self, row: int, /) -> dict[str, np.ndarray]: ...


class Joined:
  """Several row sources as one: the rows of the first, then those of the second, and so on."""

  def __init__(self, parts: Sequence[RowSource]):
    self.parts = list(parts)
    self.bounds = np.cumsum([0, *map(len, self.parts)])

  def __len__(self) -> int:
    return int(self.bounds[-1])

  @property
  def fill(self) -> float:
    """Share of the rows' places that hold a token."""
    parts: list[Any] = self.parts
    return sum(part.fill * len(part) for part in parts) / max(1, len(self))

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    part = int(np.searchsorted(self.bounds, row, 'right')) - 1
    return self.parts[part][row - int(self.bounds[part])]


class Batches:
  """`batches(cursor)`: that batch of an endless stream of shuffled epochs, arrays [rows, ...].

  The value depends on `seed` (0 to 2**32 - 1) and `cursor`, which counts batches, and on nothing else. A batch has
  `global_batch` rows, or fewer at first: `ramp` is (cursor, rows), before which cursor batches have so many. Rows come
  from `rows`, or from several sources in the proportions of `mixture`. Each epoch of a source is another permutation
  of all its rows; a batch may hold the end of one and the beginning of the next, so fewer rows than `global_batch` are
  fine: they repeat. Raises InputError if there is no row.
  """

  def __init__(
    self,
    rows: RowSource,
    global_batch: int,
    seed: int,
    *,
    mixture: Mixture | None = None,
    ramp: Sequence[tuple[int, int]] = (),
  ):
    import grain

    self.rows = rows if isinstance(rows, Joined) else Joined([rows])
    if not all(map(len, self.rows.parts)):
      raise InputError('batches: the data holds no row: give more text')
    self.global_batch, self.mixture, self._ramp = global_batch, mixture or Mixture([(0, [1])]), tuple(ramp)
    self._orders = [
      grain.MapDataset.range(len(part)).seed((seed + number * SEED_STEP) % 2**32).shuffle().repeat()
      for number, part in enumerate(self.rows.parts)
    ]

  def size(self, cursor: int) -> int:
    """Rows of a batch."""
    return next((rows for until, rows in self._ramp if cursor < until), self.global_batch)

  def first(self, cursor: int) -> int:
    """Rows of the stream before a batch."""
    total, since = 0, 0
    for until, rows in (*self._ramp, (cursor, self.global_batch)):
      total += max(0, min(cursor, until) - since) * rows
      since = max(since, min(cursor, until))
    return total

  def epochs(self, cursor: int) -> list[float]:
    """How often each source was read through before a batch."""
    drawn = self.mixture.drawn(self.first(cursor))
    return [float(count) / len(part) for count, part in zip(drawn, self.rows.parts, strict=True)]

  def row_ids(self, cursor: int) -> np.ndarray:
    """int64 [rows]: which rows make up that batch, counted through all sources, without reading them."""
    first = self.first(cursor)
    draws = [self.mixture.draw(position) for position in range(first, first + self.size(cursor))]
    return np.array([self.rows.bounds[source] + self._orders[source][draw] for source, draw in draws], np.int64)

  def __call__(self, cursor: int, rows: slice = slice(None)) -> Batch:
    """That batch, or some of its rows: no other one is read then."""
    return stack([self.rows[int(row)] for row in self.row_ids(cursor)[rows]])


def parse_ramp(ramp: Sequence[str], global_batch: int) -> list[tuple[int, int]]:
  """('8=200', '16=400') as [(200, 8), (400, 16)]: 8 rows before batch 200, 16 before 400, and `global_batch` after.

  Raises InputError for other forms, and for rows or steps that do not grow.
  """
  found: list[tuple[int, int]] = []
  for one in ramp:
    match = re.fullmatch(r'(\d+)=(\d+)', one)
    if not match:
      raise InputError(f"data.batch_warmup: {one!r} is not ROWS=STEP, as '8=200' is")
    found.append((int(match[2]), int(match[1])))
  bounds = [(0, 0), *found, (2**62, global_batch)]
  if any(a[0] >= b[0] or a[1] >= b[1] for a, b in itertools.pairwise(bounds)):
    raise InputError(f'data.batch_warmup: {", ".join(ramp)}: rows and steps grow, up to global_batch={global_batch}')
  return found


class InOrder:
  """The batches of `in_order`, read when they are asked for; iterates as a list does."""

  def __init__(self, rows: RowSource, global_batch: int, limit: int | None = None):
    count = len(rows) if limit is None else min(limit, len(rows))
    self.rows, self.global_batch = rows, global_batch
    self.ids = np.arange(count) * len(rows) // max(1, count)

  def __len__(self) -> int:
    return -(-len(self.ids) // self.global_batch)

  def __getitem__(self, index: int) -> Batch:
    return self.part(index, slice(None))

  def part(self, index: int, rows: slice) -> Batch:
    """Some rows (at least one) of a batch; no other one is read."""
    if not 0 <= index < len(self):
      raise IndexError(f'batch {index} of {len(self)}')
    first = index * self.global_batch
    wanted = range(first, first + self.global_batch)[rows]
    some = [self.rows[int(self.ids[i])] for i in wanted if i < len(self.ids)]
    like = some[0] if some else self.rows[int(self.ids[first])]
    blank = {name: np.zeros_like(value) for name, value in like.items()}
    return stack(some + [blank] * (len(wanted) - len(some)))


def in_order(rows: RowSource, global_batch: int, limit: int | None = None) -> InOrder:
  """Every row once, in order, as batches [global_batch, ...]: the last is filled up with rows of zeros (mask 0).

  `limit` takes that many rows at most, evenly from the first to the last, so that every kind of text has its share.
  """
  return InOrder(rows, global_batch, limit)


def stack(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
  """Rows of the same names and shapes as one batch, along a new leading axis."""
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def prefetch(fn: Callable[[int], T], start: int, stop: int, *, depth: int = 2) -> Iterator[tuple[int, T]]:
  """(cursor, fn(cursor)) for cursor in [start, stop), computed up to `depth` ahead by one background thread.

  What `fn` raises is raised here, at its cursor. Closing the generator, or leaving it for good, ends the thread.
  """
  pool = ThreadPoolExecutor(1, thread_name_prefix='prefetch')
  try:
    ahead = deque(pool.submit(fn, cursor) for cursor in range(start, min(start + depth, stop)))
    for cursor in range(start, stop):
      value = ahead.popleft().result()
      if cursor + depth < stop:
        ahead.append(pool.submit(fn, cursor + depth))
      yield cursor, value
  finally:
    pool.shutdown(cancel_futures=True)
