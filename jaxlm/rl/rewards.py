"""What an answer is worth: functions `reward(prompts, completions, rows) -> scores`, found by name and added up."""

import logging
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jaxlm.data import sources
from jaxlm.errors import InputError
from jaxlm.rl import apart, own

Row = Mapping[str, Any]
Reward = Callable[[Sequence[str], Sequence[str], Sequence[Row]], Sequence[float]]
Makers = Mapping[str, Callable[[str], Reward]]


def exact(column: str) -> Reward:
  """1 where the completion is the row's `column`, outer spaces left out, else 0."""
  return lambda prompts, completions, rows: [
    float(said.strip() == str(_field(row, column)).strip()) for said, row in zip(completions, rows, strict=True)
  ]


def pattern(regex: str) -> Reward:
  """1 where the regular expression is found in the completion, else 0."""
  try:
    known = re.compile(regex, re.DOTALL)
  except re.error as error:
    raise InputError(f'reward regex:{regex}: {error}') from error
  return lambda prompts, completions, rows: [float(bool(known.search(said))) for said in completions]


def mathematics(column: str) -> Reward:
  """1 where the completion says the same number or formula as the row's `column`, by math-verify, else 0.

  To it an expression is its value: where a prompt asks for the value of one, to say the prompt again is right. A policy
  finds that within ten steps; `number` does not fall for it.
  """
  try:
    import math_verify
  except ImportError as error:
    raise InputError("reward math: needs math-verify: pip install -e '.[rl]'") from error
  quiet: dict[str, Any] = {'parsing_timeout': None}  # its own is a signal, which no long product hears; `apart` holds
  logging.getLogger('math_verify').setLevel(logging.ERROR)  # it warns of that

  def one(said: str, row: Row) -> float:
    right, given = (math_verify.parse(text, **quiet) for text in (str(_field(row, column)), said))
    return float(bool(right and given and math_verify.verify(right, given, timeout_seconds=None)))

  return lambda prompts, completions, rows: list(map(one, completions, rows))


NUMBER = re.compile(
  r'(?:(?<![\w)\]}%])[-\u2212])?'  # 20-15 ends in 15, not in -15
  r'(?:\d+(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+)'  # 'Rs.500' is 500, '$.50' a half
)


def number(column: str) -> Reward:
  """1 where the last number of the completion is that of the row's `column`, else 0.

  As answers to GSM8K are judged. Unlike `mathematics` it takes no expression for its value: '4 - 1' is no 3.
  """

  def last(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(',', '').replace('\u2212', '-')) if found else None

  def one(said: str, row: Row) -> float:
    right = last(str(_field(row, column)))
    return float(right is not None and last(said) == right)

  return lambda prompts, completions, rows: list(map(one, completions, rows))


def function(where: str) -> Reward:
  """`FILE.py:NAME`, a function of one's own."""
  found = own.named(where, f'reward python:{where}')
  if not callable(found):
    raise InputError(f'reward python:{where}: is no function')
  return found


# Tasks of reasoning-gym whose checkers give nothing to an empty, a constant and a copied answer (see its test).
GYM = (
  'base_conversion',
  'basic_arithmetic',
  'chain_sum',
  'count_bits',
  'gcd',
  'lcm',
  'letter_counting',
  'number_sorting',
  'products',
  'simple_equations',
)


def gym(name: str) -> Reward:
  """The checker of a task of reasoning-gym, for rows of `gym_rows`."""
  task = _gym(name, 1, 0)
  return lambda prompts, completions, rows: [
    float(task.score_answer(said.strip(), _field(row, 'entry'))) for said, row in zip(completions, rows, strict=True)
  ]


def gym_rows(name: str, size: int, seed: int, **how: Any) -> list[Row]:
  """`size` rows `{prompt, answer, entry}` of a task of reasoning-gym; `how` are its own settings."""
  return [
    {'prompt': one['question'], 'answer': one['answer'], 'entry': one} for one in iter(_gym(name, size, seed, **how))
  ]


def _gym(name: str, size: int, seed: int, **how: Any) -> Any:
  try:
    import reasoning_gym
  except ImportError as error:
    raise InputError("tasks of reasoning-gym need it: pip install -e '.[rl]'") from error
  if name not in GYM:
    raise InputError(f'reward gym:{name}: its checker was not tried here; there are {", ".join(GYM)}')
  try:
    return reasoning_gym.create_dataset(name, size=size, seed=seed, **how)
  except (TypeError, AssertionError) as error:
    raise InputError(f'gym:{name}: {error}') from error


MAKERS: Makers = {
  'exact': exact,
  'regex': pattern,
  'number': number,
  'math': mathematics,
  'python': function,
  'gym': gym,
}


def terms(spec: str) -> list[tuple[str, str, float]]:
  """(name, argument, weight) of each part of a reward."""
  found = []
  for term in sources.terms([spec]):
    named = f'{term.kind}={term.spec}' if term.kind else term.spec  # an argument may have an equals sign
    name, _, argument = named.partition(':')
    found.append((name, argument, 1.0 if term.weight is None else float(term.weight)))
  return found


def parse(
  spec: str,
  makers: Makers = MAKERS,
  *,
  timeout: float = 60.0,
  everywhere: Makers = MappingProxyType({}),
  once: Callable[[Callable[[], list[float]]], list[float]] = lambda make: make(),
) -> Reward:
  """'math:answer*0.8 + regex:^<think>*0.2' as one reward: the sum of the parts by their weights (1 without one).

  Of several processes one calls a function for all, which is what `once` is for; those of `everywhere` are called by
  all, without a time-out: they are programs on the devices of all. Raises InputError for a name that is none of both;
  its calls raise it as `checked` does.
  """
  parts = []
  for name, argument, weight in terms(spec):
    named = f'{name}:{argument}' if argument else name
    if name not in makers and name not in everywhere:
      raise InputError(f'reward {named!r}: there are {", ".join([*makers, *everywhere])}')
    if name in everywhere:
      reward = checked(named, everywhere[name](argument))
    elif name in apart.KINDS:
      reward = _once(checked(named, apart.Apart(name, argument, timeout=timeout)), once)
    else:
      reward = _once(checked(named, within(makers[name](argument), timeout)), once)
    parts.append((weight, reward))
  if not parts:
    raise InputError('reward: none is named')

  def total(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
    scores = [[weight * score for score in reward(prompts, completions, rows)] for weight, reward in parts]
    return [sum(of) for of in zip(*scores, strict=True)]

  return total


def _once(reward: Reward, once: Callable[[Callable[[], list[float]]], list[float]]) -> Reward:
  return lambda prompts, completions, rows: once(lambda: list(reward(prompts, completions, rows)))


def within(reward: Reward, timeout: float) -> Reward:
  """The reward, of code that leaves the interpreter to others now and then. Raises InputError where it takes longer."""

  def call(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> Sequence[float]:
    found: dict[str, Any] = {}

    def work() -> None:
      try:
        found['scores'] = reward(prompts, completions, rows)
      except BaseException as error:  # it is told below
        found['error'] = error

    thread = threading.Thread(target=work, daemon=True, name='reward')
    thread.start()
    thread.join(timeout)
    if isinstance(found.get('error'), Exception):
      raise found['error']
    if 'error' in found:  # an end of the program, which is not for a reward to say
      raise InputError(f'{type(found["error"]).__name__}: {found["error"]}')
    if 'scores' not in found:
      raise InputError(f'no scores within {timeout:g} s')
    return found['scores']

  return call


def checked(name: str, reward: Reward) -> Reward:
  """The reward, whose failures are told by its name: what it raises, and what is no number.

  Raises InputError for each of them: no answer gets a silent 0.
  """

  def call(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
    try:
      scores = [float(score) for score in reward(prompts, completions, rows)]
    except InputError as error:
      raise InputError(f'reward {name}: {error}') from error
    except Exception as error:  # whatever the owner's code raises
      raise InputError(f'reward {name}: {type(error).__name__}: {error}') from error
    if len(scores) != len(completions):
      raise InputError(f'reward {name}: gave {len(scores)} scores for {len(completions)} completions')
    if bad := [i for i, score in enumerate(scores) if not math.isfinite(score)]:
      raise InputError(f'reward {name}: {scores[bad[0]]} for the completion {completions[bad[0]]!r}')
    return scores

  return call


def _field(row: Row, column: str) -> Any:
  if column not in row:
    raise InputError(f'no column {column!r}; the columns are {", ".join(row)}')
  return row[column]
