"""Win-rates: intervals, scores, and a judge on a real socket that is asked in both orders."""

import numpy as np
import pytest
from servers import Json, judge, served

from jaxlm.errors import InputError
from jaxlm.evals import winrate
from jaxlm.evals.rewards import wilson

PROMPTS, A, B = ['p', 'q', 'r'], ['long one', 'x', 'same'], ['short', 'yy', 'same']
LONGER = lambda a, b: f' {"A" if len(a) >= len(b) else "B"}.'


def test_the_interval_of_a_rate():
  results = np.array([1.0] * 30 + [0.0] * 10 + [0.5] * 7)
  found = winrate.rate(results)
  assert found[3:] == (30, 7, 10) and found.rate == pytest.approx(33.5 / 47)
  spread = 1.96 * results.std() / np.sqrt(47)
  assert found.low == pytest.approx(found.rate - spread, abs=0.02)
  assert found.high == pytest.approx(found.rate + spread, abs=0.02)
  assert '30 wins, 7 ties, 10 losses' in found.said
  with pytest.raises(InputError, match='at least one'):
    winrate.rate(np.zeros(0))


@pytest.mark.parametrize('of', [0.0, 0.5, 1.0])
def test_a_few_wins_are_no_certainty(of):
  found = winrate.rate(np.full(8, of))
  assert (found.low, found.high) == wilson(of, 8) and found.high - found.low > 0.3


def test_by_scores():
  longer = lambda prompts, said, rows: [len(text) for text in said]
  assert winrate.by_reward(longer)(PROMPTS, A, B, [{}] * 3).tolist() == [1, 0, 0.5]


def test_a_judge_is_asked_in_both_orders():
  """What it prefers for its place alone is a tie; equal answers are not asked about."""
  told = []
  with judge(LONGER) as (url, seen):
    compare = winrate.by_judge(url, 'm', key='secret', on_progress=lambda *of: told.append(of))
    assert compare(PROMPTS, A, B, [{}] * 3).tolist() == [1, 0, 0.5]
    assert seen == [('/v1/chat/completions', 'm', 'Bearer secret')] * 4 and told[-1] == (4, 4)
  with judge(lambda a, b: 'A') as (url, _):
    assert winrate.by_judge(url, 'm')(PROMPTS, A, B, [{}] * 3).tolist() == [0.5] * 3


@pytest.mark.parametrize(
  'said, means',
  [
    ('A', 1),
    (' **B**.', 0),
    ('Answer: C', 0.5),
    ('The better answer is A.', 1),
    ('<think>A or B? A.</think>\nB', 0),
    ('A\n\nIt says why.', 1),
    ('Both have their merits.\n\nC', 0.5),
    ('A good question.', None),
    ('', None),
  ],
)
def test_what_a_judge_says(said, means):
  """One in ten may say nothing of use; more may not."""
  many = [f'answer {i}' for i in range(20)], [f'other {i}' for i in range(20)]
  with judge(lambda a, b: said if a == 'answer 3' else LONGER(a, b)) as (url, _):
    found = winrate.by_judge(url, 'm')(['p'] * 20, *many, [{}] * 20)
  assert np.isnan(found[3]) if means is None else found[3] == (means + 1) / 2
  assert (np.delete(found, 3) == 1).all()
  if means is None:
    with judge(lambda a, b: said) as (url, _), pytest.raises(InputError, match='none of A, B and C'):
      winrate.by_judge(url, 'm')(PROMPTS, A, B, [{}] * 3)


def test_a_busy_judge_is_asked_again(monkeypatch):
  monkeypatch.setattr(winrate.time, 'sleep', lambda seconds: None)
  times = []

  class Busy(Json):
    def do_POST(self):
      self.body()
      times.append(1)
      self.answer(*((b'wait', 429) if len(times) < 3 else ({'choices': [{'message': {'content': 'A'}}]}, 200)))

  with served(Busy) as url:
    assert winrate.by_judge(f'{url}/v1', 'm')(['p'], ['a'], ['b'], [{}]).tolist() == [0.5] and len(times) == 4


@pytest.mark.parametrize(
  'reply, why',
  [((b'<html>', 200), 'JSONDecodeError'), (({'error': 1}, 200), 'KeyError'), ((b'no model', 404), 'no model')],
)
def test_nonsense_is_one_line(reply, why):
  class Nonsense(Json):
    def do_POST(self):
      self.body()
      self.answer(*reply)

  with served(Nonsense) as url, pytest.raises(InputError, match=why):
    winrate.by_judge(f'{url}/v1', 'm')(PROMPTS, A, B, [{}] * 3)
  with pytest.raises(InputError, match=f'judge {url}/v1: URLError'):
    winrate.by_judge(f'{url}/v1', 'm', timeout=2)(PROMPTS, A, B, [{}] * 3)
