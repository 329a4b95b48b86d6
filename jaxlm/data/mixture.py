"""Which source each row of an endless stream comes from: exact proportions, in phases, a function of the position."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import NamedTuple

import numpy as np

from jaxlm.data import sources
from jaxlm.errors import InputError

LONGEST = 100_000  # rows after which a mixture repeats; finer weights would be a typing error

Weights = Mapping[str, Fraction]


class _Period(NamedTuple):
  start: int  # the first row of the stream that it is for
  order_W: np.ndarray  # the source of each row of a period
  rank_W: np.ndarray  # how many of that source come before it in the period
  counts_S: np.ndarray  # rows of each source in a period
  before_S: np.ndarray  # rows of each source that were drawn before `start`


class Mixture:
  """Rows of S sources in given proportions; `phases` are (first row of the stream, weights [S]), from row 0 on.

  In every phase the rows drawn from a source are within one of its share, at every row, and exact over a period.
  A later phase goes on with each source where the one before left it.
  """

  def __init__(self, phases: Sequence[tuple[int, Sequence[Fraction | int]]]):
    self._periods: list[_Period] = []
    for start, weights in phases:
      before_S = self.drawn(start) if self._periods else np.zeros(len(weights), np.int64)
      counts_S = _whole(weights)
      order_W = interleave(counts_S)
      rank_W = np.empty(len(order_W), np.int64)
      for source in range(len(counts_S)):
        rank_W[order_W == source] = np.arange(counts_S[source])
      self._periods.append(_Period(start, order_W, rank_W, counts_S, before_S))

  def draw(self, position: int) -> tuple[int, int]:
    """(source, how many rows of it were drawn before) for one row of the stream."""
    period = self._at(position)
    cycle, place = divmod(position - period.start, len(period.order_W))
    source = int(period.order_W[place])
    return source, int(period.before_S[source] + cycle * period.counts_S[source] + period.rank_W[place])

  def drawn(self, position: int) -> np.ndarray:
    """int64 [S]: rows drawn from each source before `position`."""
    period = self._at(position)
    cycle, place = divmod(position - period.start, len(period.order_W))
    begun_S = np.bincount(period.order_W[:place], minlength=len(period.counts_S))
    return period.before_S + cycle * period.counts_S + begun_S

  def _at(self, position: int) -> _Period:
    return next(period for period in reversed(self._periods) if position >= period.start)


def parse(mix: str) -> dict[str, Fraction]:
  """'wiki*0.5 + code*0.3' by name. Raises InputError for one without a weight and for a name that comes twice."""
  found: dict[str, Fraction] = {}
  for term in sources.terms([mix]):
    if term.weight is None or term.kind:
      raise InputError(f"data.mix: {mix!r} is not 'NAME*WEIGHT + NAME*WEIGHT'")
    if term.spec in found:
      raise InputError(f'data.mix: {term.spec!r} comes twice in {mix!r}')
    found[term.spec] = term.weight
  return found


def parse_phase(phase: str) -> tuple[float, dict[str, Fraction]]:
  """'0.9: books*0.5 + wiki*0.5' as the share of the steps after which it begins, and its weights."""
  share, colon, mix = phase.partition(':')
  try:
    begins = float(share)
  except ValueError:
    begins = -1.0
  if not colon or not 0.0 < begins < 1.0:
    raise InputError(f"data.phases: {phase!r} is not 'SHARE: MIX', SHARE of the steps between 0 and 1")
  return begins, parse(mix.strip())


def interleave(counts_S: np.ndarray) -> np.ndarray:
  """int64 [sum of counts]: a sequence in which source s comes `counts_S[s]` times, as evenly as can be.

  The quota method (Balinski and Young 1975): of the sources that are behind their share, the one whose next row is
  due first. After every n rows each source has its share of n, rounded up or down.
  """
  total, given_S = int(counts_S.sum()), np.zeros(len(counts_S), np.int64)
  due_S = np.where(counts_S > 0, 1.0 / np.maximum(counts_S, 1), np.inf)
  order = np.empty(total, np.int64)
  for n in range(total):
    behind_S = given_S * total < (n + 1) * counts_S
    source = int(np.argmin(np.where(behind_S, (given_S + 1) * due_S, np.inf)))
    order[n] = source
    given_S[source] += 1
  return order


def _whole(weights: Sequence[Fraction | int]) -> np.ndarray:
  """The weights as the smallest integers of their proportion."""
  exact = [Fraction(weight) for weight in weights]
  scale = lcm(*(weight.denominator for weight in exact))
  whole = [int(weight * scale) for weight in exact]
  counts = np.array(whole, np.int64) // max(1, gcd(*whole))
  if counts.sum() > LONGEST or not counts.sum():
    shown = ', '.join(f'{float(weight):g}' for weight in exact)
    raise InputError(f'data.mix: the weights {shown} have too many digits, or none is above 0; give at most four each')
  return counts
