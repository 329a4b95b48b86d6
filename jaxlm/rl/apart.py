"""Rewards that run code which may not end, a user's or an answer's: scored by a process that can be killed."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm import child
from jaxlm.errors import InputError

# each: one answer at a time, so that the one it fails at can be told; memory: bytes of address space; unproved: seconds
# after which an answer counts as not right, as in math-verify itself, and is told, for a policy does write such sums
KINDS: Mapping[str, Mapping[str, Any]] = {
  'regex': {'each': True, 'memory': 1 << 31},
  'gym': {'each': True, 'memory': 1 << 32},
  'math': {'each': True, 'memory': 1 << 32, 'unproved': 5.0},
  'python': {'each': False, 'memory': None},
}
ASKED = 'prompts', 'completions', 'rows'
FAILURES = child.Failed, OSError
Row = Mapping[str, Any]
SHOWN = 80  # characters of an answer that is told


def worker(kind: str, argument: str) -> None:
  """The child: {prompts, completions, rows} in, scores out; made by its first question, which is no batch."""
  from jaxlm.rl import rewards

  made: list[rewards.Reward] = []

  def work(asked: Any) -> Any:
    if not asked:
      made.append(rewards.MAKERS[kind](argument))
      return None
    return [float(score) for score in made[0](*(asked[name] for name in ASKED))]

  child.answer(work, memory=KINDS[kind]['memory'])


class Apart:
  """A reward of `KINDS` by its name and argument, in a process of its own.

  It sees rows as JSON has them (a date is its text). Raises InputError for what cannot be made.
  """

  def __init__(self, kind: str, argument: str, *, timeout: float):
    self._name, self._how, self._timeout = f'{kind}:{argument}', KINDS[kind], timeout
    code = f'from jaxlm.rl import apart; apart.worker({kind!r}, {argument!r})'
    self._child = child.Child(code, first={}, start=max(timeout, child.START))
    self._begin()

  def _begin(self) -> None:
    try:
      self._child.start()
    except FAILURES as error:
      raise InputError(f'reward {self._name}: {error}') from error

  def __call__(self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """As a reward is called. Raises InputError for what fails or takes longer than `timeout`."""
    self._end = time.monotonic() + self._timeout
    batch = [list(prompts), list(completions), json.loads(json.dumps(list(map(dict, rows)), default=str))]
    batches = [[[x] for x in one] for one in zip(*batch, strict=True)] if self._how['each'] else [batch]
    return [score for some in batches for score in self._scores(some)]

  def _scores(self, batch: list[Any]) -> list[float]:
    began = time.monotonic()
    left = max(0.0, self._end - began)
    limit = min(left, self._how.get('unproved', left))
    at = f'; it was at the completion {batch[1][0][:SHOWN]!r}' if self._how['each'] else ''
    try:
      return self._child.ask(dict(zip(ASKED, batch, strict=True)), limit)
    except FAILURES as error:
      late = isinstance(error, TimeoutError)
      if 'unproved' not in self._how or not _hopeless(error) or (late and limit == left):
        raise InputError((f'no scores within {self._timeout:g} s' if late else str(error)) + at) from error
      logging.getLogger(__name__).warning(f'reward {self._name}: counts as not right: {error}{at}')
    self._begin()
    self._end += time.monotonic() - began  # a policy that writes such answers does not end its run by it
    return [0.0]


def _hopeless(error: Exception) -> bool:
  """Whether it says that an answer is too much, rather than that something is wrong with the reward."""
  return isinstance(error, OSError) or str(error).startswith(('MemoryError', 'RecursionError'))
