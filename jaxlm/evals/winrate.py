"""How often one model's answer is preferred to another's, by scores or by a judge that reads both in both orders."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.errors import InputError
from jaxlm.rl.rewards import Reward

Row = Mapping[str, Any]
# (prompts, answers of A, answers of B, rows) -> for each 1 where A's is better, 0 where B's is, 0.5 for a tie
Compare = Callable[[Sequence[str], Sequence[str], Sequence[str], Sequence[Row]], np.ndarray]

RESAMPLES = 10_000
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
  """Of results in [0, 1], one a prompt; the interval is a bootstrap over prompts (percentiles of 10,000 resamples)."""
  if not len(results):
    raise InputError('a win-rate needs at least one prompt')
  drawn = np.random.default_rng(seed).integers(0, len(results), (RESAMPLES, len(results)))
  low, high = np.quantile(results[drawn].mean(1), [0.025, 0.975])
  counts = (int((results > 0.5).sum()), int((results == 0.5).sum()), int((results < 0.5).sum()))
  return Rate(float(results.mean()), float(low), float(high), *counts)


def by_reward(reward: Reward) -> Compare:
  """The higher score is better: a reward model, a verifier, or any other reward (see `rl.rewards`)."""

  def compare(prompts: Any, a: Any, b: Any, rows: Any) -> np.ndarray:
    better = np.asarray(reward(prompts, a, rows)) - np.asarray(reward(prompts, b, rows))
    return 0.5 * (1.0 + np.sign(better))

  return compare


def by_judge(url: str, model: str, *, key: str = '', timeout: float = 60.0) -> Compare:
  """An OpenAI-compatible server's model is asked in both orders; only what it says both times counts more than a half.

  `url` ends in /v1. Raises InputError for a server that does not answer, or answers with none of A, B and C.
  """

  def compare(prompts: Any, a: Any, b: Any, rows: Any) -> np.ndarray:
    ask = lambda prompt, first, second: _asked(url, model, key, timeout, prompt, first, second)
    return np.array([(ask(p, x, y) + 1.0 - ask(p, y, x)) / 2 for p, x, y in zip(prompts, a, b, strict=True)])

  return compare


def _asked(url: str, model: str, key: str, timeout: float, prompt: str, a: str, b: str) -> float:
  """1 for A, 0 for B, 0.5 for a tie."""
  content = ASKED.format(prompt=prompt, a=a, b=b)
  body = {'model': model, 'messages': [{'role': 'user', 'content': content}], 'temperature': 0, 'max_tokens': 8}
  headers = {'Content-Type': 'application/json'} | ({'Authorization': f'Bearer {key}'} if key else {})
  request = urllib.request.Request(f'{url.rstrip("/")}/chat/completions', json.dumps(body).encode(), headers)
  try:
    with urllib.request.urlopen(request, timeout=timeout) as answer:
      said = json.loads(answer.read())['choices'][0]['message']['content']
  except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
    raise InputError(f'judge {url}: {type(error).__name__}: {error}') from error
  letter = re.search(r'\b([ABC])\b', str(said))
  if not letter:
    raise InputError(f'judge {url}: said {said!r}, and none of A, B and C')
  return {'A': 1.0, 'B': 0.0, 'C': 0.5}[letter[1]]
