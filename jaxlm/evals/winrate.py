"""How often one model's answer is preferred to another's, by scores or by a judge that reads both in both orders."""

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import numpy as np

from jaxlm.errors import InputError
from jaxlm.evals.rewards import wilson
from jaxlm.rl.rewards import Reward

Row = Mapping[str, Any]
Told = Callable[[int, int], None] | None
# (prompts, answers of A, answers of B, rows) -> for each 1 where A's is better, 0 where B's is, 0.5 for a tie; NaN
# where a judge named none
Compare = Callable[[Sequence[str], Sequence[str], Sequence[str], Sequence[Row]], np.ndarray]

RESAMPLES = 10_000
AT_ONCE = 8  # questions to a judge
BUSY, TRIES = (429, 500, 502, 503, 504), 3  # answers of a server upon which it is asked again, and how often
LETTER = re.compile(r'\W*(?:(?:my |the )?(?:better )?(?:answer|verdict|choice)?(?: is)?)\W*([abc])\W*', re.IGNORECASE)
UNREAD = 0.1  # of its answers may name no letter
ASKED = """Two answers to one request follow. Which one is better: more helpful, more correct, better written? \
Answer with one letter: A, B, or C for a tie.

Request:
{prompt}

Answer A:
{a}

Answer B:
{b}
"""


class Rate(NamedTuple):
  """The share of prompts at which A is preferred, ties as halves, with the 95 % interval, and how it comes about."""

  rate: float
  low: float
  high: float
  wins: int
  ties: int
  losses: int

  @property
  def said(self) -> str:
    """In words."""
    counts = f'{self.wins} wins, {self.ties} ties, {self.losses} losses'
    return f'{self.rate:.1%} ({self.low:.1%} to {self.high:.1%}): {counts}'


def rate(results: np.ndarray, seed: int = 0) -> Rate:
  """Of results in [0, 1], one a prompt; the interval is a bootstrap over prompts (percentiles of 10,000 resamples).

  Where all are alike (wins, ties or losses) no resample is another: the interval is then Wilson's.
  """
  if not len(results):
    raise InputError('a win-rate needs at least one prompt')
  mean = float(results.mean())
  if (results == results[0]).all():
    low, high = wilson(mean, len(results))
  else:
    drawn = np.random.default_rng(seed).integers(0, len(results), (RESAMPLES, len(results)))
    low, high = np.quantile(results[drawn].mean(1), [0.025, 0.975])
  counts = (int((results > 0.5).sum()), int((results == 0.5).sum()), int((results < 0.5).sum()))
  return Rate(mean, float(low), float(high), *counts)


def by_reward(reward: Reward) -> Compare:
  """The higher score is better: a reward model, a verifier, or any other reward (see `rl.rewards`)."""

  def compare(prompts: Any, a: Any, b: Any, rows: Any) -> np.ndarray:
    better = np.asarray(reward(prompts, a, rows)) - np.asarray(reward(prompts, b, rows))
    return 0.5 * (1.0 + np.sign(better))

  return compare


def by_judge(url: str, model: str, *, key: str = '', timeout: float = 60.0, on_progress: Told = None) -> Compare:
  """An OpenAI-compatible server's model is asked in both orders; only what it says both times counts more than a half.

  `url` ends in /v1. Equal answers are ties, and not asked about. Raises InputError for a server that does not answer,
  and where more than a tenth of the answers name none of A, B and C; fewer are NaN.
  """
  ask = lambda prompt, a, b: _asked(url, model, key, timeout, prompt, a, b)

  def compare(prompts: Any, a: Any, b: Any, rows: Any) -> np.ndarray:
    pairs = list(zip(prompts, a, b, strict=True))
    found = np.full((len(pairs), 2), 0.5)
    with ThreadPoolExecutor(AT_ONCE) as pool:
      asked = {}
      for i, (prompt, x, y) in enumerate(pairs):
        if x != y:
          asked |= {pool.submit(ask, prompt, x, y): (i, 0), pool.submit(ask, prompt, y, x): (i, 1)}
      try:
        for done, future in enumerate(as_completed(asked), 1):
          found[asked[future]] = _letter(future.result())
          if on_progress:
            on_progress(done, len(asked))
      except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    if np.isnan(found).sum() > UNREAD * len(asked):
      said = next(future.result() for future in asked if np.isnan(_letter(future.result())))
      raise InputError(f'judge {url}: said {said[:200]!r}, and none of A, B and C')
    return (found[:, 0] + 1.0 - found[:, 1]) / 2

  return compare


def _letter(said: str) -> float:
  """1 for A, 0 for B, 0.5 for a tie, NaN for none of these: the first or the last line says it, and nothing else."""
  lines = said.rpartition('</think>')[2].strip().splitlines() or ['']
  letter = LETTER.fullmatch(lines[0]) or LETTER.fullmatch(lines[-1])
  return {'A': 1.0, 'B': 0.0, 'C': 0.5}[letter[1].upper()] if letter else float('nan')


def _asked(url: str, model: str, key: str, timeout: float, prompt: str, a: str, b: str) -> str:
  content = ASKED.format(prompt=prompt, a=a, b=b)
  body = {'model': model, 'messages': [{'role': 'user', 'content': content}], 'temperature': 0}
  headers = {'Content-Type': 'application/json'} | ({'Authorization': f'Bearer {key}'} if key else {})
  request = urllib.request.Request(f'{url.rstrip("/")}/chat/completions', json.dumps(body).encode(), headers)
  for again in range(TRIES):
    try:
      with urllib.request.urlopen(request, timeout=timeout) as answer:
        return str(json.loads(answer.read())['choices'][0]['message']['content'])
    except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
      if getattr(error, 'code', None) not in BUSY or again == TRIES - 1:
        raise InputError(f'judge {url}: {type(error).__name__}: {error}{_more(error)}') from error
      time.sleep(0.5 * 4**again)
  raise AssertionError


def _more(error: Exception) -> str:
  """What a server said of its error."""
  return f': {error.read(200).decode(errors="replace")}' if isinstance(error, urllib.error.HTTPError) else ''
