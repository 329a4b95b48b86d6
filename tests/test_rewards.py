"""Rewards by name, added up; what fails, is no number or takes too long is told and never a 0."""

import pytest

from jaxlm.errors import InputError
from jaxlm.rl import rewards

ROWS = [{'answer': '42', 'id': 1}, {'answer': '1/2', 'id': 2}, {'answer': 'blue', 'id': 3}]
SAID = [' 42\n', 'It is 0.5', 'Blue?']
PROMPTS = ['a', 'b', 'c']
OWN = """
import time
def ids(prompts, completions, rows):
  return [row['id'] for row in rows]
def fails(prompts, completions, rows):
  return [1 / 0]
def few(prompts, completions, rows):
  return [1.0]
def nan(prompts, completions, rows):
  return [0.0, float('nan'), 0.0]
def slow(prompts, completions, rows):
  time.sleep(9)
"""


def of(spec, **how):
  return rewards.parse(spec, **how)(PROMPTS, SAID, ROWS)


def test_each_by_hand():
  assert of('exact:answer') == [1, 0, 0]
  assert of('regex:^(It|Blue)') == [0, 1, 1]
  assert of('regex:x=|is') == [0, 1, 0]
  assert of('exact:answer*2 + regex:is*0.5') == [2, 0.5, 0]


def test_mathematics():
  pytest.importorskip('math_verify', reason="needs pip install -e '.[rl]'")
  assert of('math:answer')[:2] == [1, 1]
  two = rewards.parse('math:answer')
  assert two(['', ''], ['the answer is $\\frac{1}{2}$', ''], [ROWS[1], ROWS[1]]) == [1, 0]


def test_the_last_number():
  score = rewards.parse('number:answer')
  said = ['The answer is 1,234.', '1234.0', 'from 1234 to 5', '', 'none', '-1234', '1300 - 66']
  rows = [{'answer': '1234'}] * len(said)
  assert score([''] * len(said), said, rows) == [1, 1, 0, 0, 0, 0, 0]
  assert score([''], ['so it is -7'], [{'answer': '#### -7'}]) == [1]


@pytest.mark.parametrize(
  'name, why',
  [
    ('fails', 'ZeroDivisionError: division by zero'),
    ('few', 'gave 1 scores for 3 completions'),
    ('nan', "nan for the completion 'It is 0.5'"),
    ('slow', 'no scores within 0.3 s'),
    ('none', 'defines no none'),
  ],
)
def test_what_fails_is_told(tmp_path, name, why):
  (tmp_path / 'own.py').write_text(OWN)
  where = f'python:{tmp_path / "own.py"}'
  assert of(f'{where}:ids*0.5 + exact:answer*1') == [1.5, 1, 1.5]
  with pytest.raises(InputError, match=f'reward python:.*{why}'):
    of(f'{where}:{name}', timeout=0.3)


@pytest.mark.parametrize('spec', ['', 'exakt:answer', 'regex:(', 'python:there/is/none.py:f', 'exact:missing'])
def test_what_is_none(spec):
  with pytest.raises(InputError, match='reward'):
    of(spec)


@pytest.mark.parametrize('name', rewards.GYM)
def test_checkers_give_nothing_to_junk(name):
  """Right answers are right; an empty, a constant and a copied answer get at most a hundredth."""
  pytest.importorskip('reasoning_gym', reason="needs pip install -e '.[rl]'")
  rows, score = rewards.gym_rows(name, 20, 5), rewards.parse(f'gym:{name}')
  prompts = [row['prompt'] for row in rows]
  given = lambda said: sum(score(prompts, said, rows)) / len(rows)
  assert given([row['answer'] for row in rows]) == 1
  for junk in (['' for _ in rows], ['hello' for _ in rows], prompts):
    assert given(junk) <= 0.01
  assert [row['prompt'] for row in rewards.gym_rows(name, 20, 6)] != prompts
