"""A batch as a function of (seed, cursor): epochs shuffled by random access, evaluation batches, prefetching."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np

from jaxlm.errors import InputError

Batch = dict[str, np.ndarray]
T = TypeVar('T')


class RowSource(Protocol):
  """Anything indexable that gives rows: dicts of arrays with the same names, shapes and types in each."""

  def __len__(self) -> int: ...

  def __getitem__(self, row: int, /) -> dict[str, np.ndarray]: ...


class Batches:
  """`batches(cursor)`: that batch of an endless stream of shuffled epochs, arrays [global_batch, ...].

  The value depends on `seed` (0 to 2**32 - 1) and `cursor`, which counts batches, and on nothing else. Each epoch is
  another permutation of all rows; a batch may hold the end of one and the beginning of the next, so fewer rows than
  `global_batch` are fine: they repeat. Raises InputError if there is no row.
  """

  def __init__(self, rows: RowSource, global_batch: int, seed: int):
    import grain

    if not len(rows):
      raise InputError('batches: the data holds no row: give more text')
    self.rows, self.global_batch = rows, global_batch
    self._order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()

  def row_ids(self, cursor: int) -> np.ndarray:
    """int64 [global_batch]: which rows make up that batch, without reading them."""
    first = cursor * self.global_batch
    return np.array([self._order[i] for i in range(first, first + self.global_batch)], np.int64)

  def __call__(self, cursor: int) -> Batch:
    return stack([self.rows[int(row)] for row in self.row_ids(cursor)])


class InOrder:
  """The batches of `in_order`, read when they are asked for; iterates as a list does."""

  def __init__(self, rows: RowSource, global_batch: int):
    self.rows, self.global_batch = rows, global_batch

  def __len__(self) -> int:
    return -(-len(self.rows) // self.global_batch)

  def __getitem__(self, index: int) -> Batch:
    if not 0 <= index < len(self):
      raise IndexError(f'batch {index} of {len(self)}')
    first = index * self.global_batch
    some = [self.rows[row] for row in range(first, min(first + self.global_batch, len(self.rows)))]
    blank = {name: np.zeros_like(value) for name, value in some[0].items()}
    return stack(some + [blank] * (self.global_batch - len(some)))


def in_order(rows: RowSource, global_batch: int) -> InOrder:
  """Every row once, in order, as batches [global_batch, ...]: the last is filled up with rows of zeros (mask 0)."""
  return InOrder(rows, global_batch)


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
