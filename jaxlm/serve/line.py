"""Who waits for a slot. Short answers first, but whoever waits comes nearer with every answer that begins.

Self-clocked fair queueing (Golestani 1994) with requests as flows and tokens as work: a request for many or for long
answers waits for its own share of the work, not everybody for all of it.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

BRIEF = 64  # new tokens: answers of more than these leave some slots to others


class Waiting(Protocol):
  """What an answer takes."""

  prompt: Sequence[int]
  most: int
  cancelled: bool


W = TypeVar('W', bound=Waiting)


class Line(Generic[W]):
  """The asks of one bank."""

  def __init__(self):
    self._asks: list[tuple[int, int, W]] = []
    self._clock = self._joined = 0

  def __len__(self) -> int:
    return len(self._asks)

  def __iter__(self) -> Iterator[W]:
    return (ask for _, _, ask in self._asks)

  def join(self, asks: Sequence[W]) -> None:
    """Those of one request: each has the work of those before it to wait for, too."""
    at = self._clock
    for ask in asks:
      at += len(ask.prompt) + ask.most
      self._joined += 1
      bisect.insort(self._asks, (at, self._joined, ask))

  def take(self, brief: bool) -> W | None:
    """The next one; the next one with a short answer where it has to be `brief`."""
    for i, (at, _, ask) in enumerate(self._asks):
      if not brief or ask.most <= BRIEF:
        del self._asks[i]
        self._clock = max(self._clock, at)
        return ask
    return None

  def drop_cancelled(self) -> int:
    """How many were."""
    before = len(self._asks)
    self._asks = [one for one in self._asks if not one[2].cancelled]
    return before - len(self._asks)

  def clear(self) -> None:
    self._asks.clear()
