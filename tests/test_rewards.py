"""Rewards by name, added up; what fails, is no number or takes too long is told and never a 0."""

import datetime
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm import child
from jaxlm.errors import InputError
from jaxlm.rl import rewards

ROWS = [{'answer': '42', 'id': 1}, {'answer': '1/2', 'id': 2}, {'answer': 'blue', 'id': 3}]
SAID = [' 42\n', 'It is 0.5', 'Blue?']
PROMPTS = ['a', 'b', 'c']
OWN = """
import os, re, subprocess, sys, time
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
def holds(prompts, completions, rows):
  re.search('^(a+)+$', 'a' * 50 + 'b')
def exits(prompts, completions, rows):
  sys.exit('enough')
def dies(prompts, completions, rows):
  os._exit(3)
def reads(prompts, completions, rows):
  raise RuntimeError(subprocess.run([sys.executable, '-c', 'input()'], capture_output=True).stderr[-99:])
def starts(prompts, completions, rows):
  print(subprocess.Popen(['sleep', '99']).pid, file=open('started', 'w'), flush=True)
  time.sleep(9)
def prints(prompts, completions, rows):
  print('looks at', rows)
  return [len(str(row.get('day', ''))) for row in rows]
"""


def of(spec, **how):
  return rewards.parse(spec, **how)(PROMPTS, SAID, ROWS)


def test_each_by_hand():
  assert of('exact:answer') == [1, 0, 0]
  assert of('regex:^(It|Blue)') == [0, 1, 1]
  assert of('regex:x=|is') == [0, 1, 0]
  assert of('exact:answer*2 + regex:is*0.5') == [2, 0.5, 0]


def test_functions_are_called_once_for_all_and_models_by_all():
  called, longer = [], lambda argument: lambda prompts, said, rows: [float(argument)] * len(said)
  once = lambda make: (called.append(1), make())[1]
  assert of('exact:answer*2 + model:3*0.5', everywhere={'model': longer}, once=once) == [3.5, 1.5, 1.5]
  assert called == [1]
  with pytest.raises(InputError, match='there are .*gym, model'):
    of('models:3', everywhere={'model': longer})


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
  ends = {'5': '20-15 is 20 - 5', '15': '20-15', '-0.5': 'x = -.5', '0.25': 'about .25', '3': 'v1.2.3', '7': '१२ और ७'}
  ends |= {'500': 'It costs Rs.500', '6': 'so it is...6', '8': 'No.8', '-9': 'Answer.-9', '0.75': '$.75', '-2': 'is −2'}
  ends |= {'11': r'\frac{1}{2}-11', '10': '5%-10%', '4': '[2]-4', '2345': '1,2345', '1234567.5': '1,234,567.5'}
  given = score([''] * len(ends), list(ends.values()), [{'answer': right} for right in ends])
  assert [said for said, right in zip(ends.values(), given, strict=True) if not right] == []


@pytest.mark.parametrize(
  'name, why',
  [
    ('fails', 'ZeroDivisionError: division by zero'),
    ('few', 'gave 1 scores for 3 completions'),
    ('nan', "nan for the completion 'It is 0.5'"),
    ('slow', 'no scores within 0.3 s'),
    ('holds', 'no scores within 0.3 s'),
    ('exits', 'SystemExit: enough'),
    ('dies', 'ran out of memory or died'),
    ('reads', 'RuntimeError: .*EOF when reading'),
    ('none', 'defines no none'),
  ],
)
def test_what_fails_is_told(tmp_path, name, why):
  (tmp_path / 'own.py').write_text(OWN)
  where = f'python:{tmp_path / "own.py"}'
  assert of(f'{where}:ids*0.5 + exact:answer*1') == [1.5, 1, 1.5]
  with pytest.raises(InputError, match=f'reward python:.*{why}'):
    of(f'{where}:{name}', timeout=0.3 if '0.3' in why else 60.0)


def test_a_function_may_print_and_dates_are_text(tmp_path):
  (tmp_path / 'own.py').write_text(OWN)
  score = rewards.parse(f'python:{tmp_path / "own.py"}:prints')
  assert score(['', ''], ['', ''], [{'day': datetime.date(2026, 1, 2)}, {}]) == [10, 0]


ENDLESS = ['a' * 50 + 'b', 'a']


def test_a_pattern_that_does_not_end_is_told():
  score = rewards.parse('regex:^(a+)+$', timeout=2.0)
  with pytest.raises(InputError, match=r'reward regex:.* no scores within 2 s; it was at the completion .aaa'):
    score(['', ''], ENDLESS[::-1], [{}, {}])
  assert score([''], ['aa'], [{}]) == [1]


@pytest.mark.slow
def test_a_sum_that_does_not_end_is_not_right_and_is_told(caplog):
  pytest.importorskip('math_verify', reason="needs pip install -e '.[rl]'")
  said, rows = ['9^{9^{9^{9}}}', '4', '$7^{99999999}$', '2+2'], [{'answer': '4'}] * 4
  assert rewards.parse('math:answer')([''] * 4, said, rows) == [0, 1, 0, 1]
  assert len(caplog.messages) >= 1 and all('reward math:answer: counts as not right' in m for m in caplog.messages)
  with pytest.raises(InputError, match='reward math:answer: no scores within 0.5 s; it was at the completion'):
    rewards.parse('math:answer', timeout=0.5)([''] * 4, said, rows)
  with pytest.raises(InputError, match="reward math:none: no column 'none'"):
    rewards.parse('math:none')([''], ['4'], [{'answer': '4'}])


ORPHAN = """
import os, re, signal, sys, threading
from jaxlm import child
child.ORPHAN = 0
if sys.argv[1:]:
  child.answer(lambda _: re.search('^(a+)+$', 'a' * 50 + 'b'))
held = child.Child("import runpy, sys; sys.argv = ['', 'child']; runpy.run_path('orphan.py', run_name='__main__')")
held.start()
print(held.pid, flush=True)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
held.ask(None, 1.0)
"""


def lives(pid):
  stat = Path(f'/proc/{pid}/stat')
  return stat.exists() and stat.read_text().rpartition(')')[2].split()[0] != 'Z'


def test_no_process_is_left_behind():
  held = child.Child('from jaxlm import child; child.answer(lambda x: x)')
  assert held.ask([1, 'ä'], 9.0) == [1, 'ä']
  pid = held.pid
  os.kill(pid, signal.SIGTERM)
  assert held.ask(2, 9.0) == 2 and held.pid == pid  # who ends all of a run's processes so leaves it a moment
  del held
  gc.collect()
  assert not lives(pid)


def test_what_a_reward_started_ends_with_it(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'own.py').write_text(OWN)
  (tmp_path / 'signal.py').write_text('raise SystemExit("not the library")')  # a folder is not looked into for modules
  score = rewards.parse('python:own.py:starts', timeout=3.0)
  with pytest.raises(InputError, match='no scores within 3 s'):
    score([''], [''], [{}])
  pid = int((tmp_path / 'started').read_text())
  for _ in range(100):  # it is killed; that it is gone is for the system to get to
    if not lives(pid):
      break
    time.sleep(0.1)
  assert not lives(pid)


def test_a_child_that_does_not_read_is_not_waited_for():
  held = child.Child('import sys, time; print("ready", flush=True); time.sleep(99)')
  with pytest.raises(TimeoutError, match=r'more than 0\.5 seconds'):
    held.ask('x' * (1 << 20), 0.5)
  with pytest.raises(ChildProcessError, match='did not start: ran out of memory or died'):
    child.Child('raise SystemExit').ask(0, 9.0)


def test_an_orphan_ends_by_itself(tmp_path):
  """Its parent was killed: at its limit the system ends what holds the interpreter."""
  (tmp_path / 'orphan.py').write_text(ORPHAN)
  parent = subprocess.run([sys.executable, 'orphan.py'], cwd=tmp_path, stdout=subprocess.PIPE, timeout=60, check=False)
  for _ in range(100):
    if not lives(int(parent.stdout)):
      return
    time.sleep(0.1)
  raise AssertionError(f'{parent.stdout} is still there')


@pytest.mark.parametrize('spec', ['', 'exakt:answer', 'regex:(', 'python:there/is/none.py:f', 'exact:missing'])
def test_what_is_none(spec):
  with pytest.raises(InputError, match='reward'):
    of(spec)


@pytest.mark.slow(but='chain_sum')
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
