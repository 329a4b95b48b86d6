"""A run killed at several moments, one of them inside a save, ends bitwise like one left alone."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import finish, furnish, logged, rows_and_samples, saved_state, start, unfinished

from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.metrics import read_rows


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """Prepared data, the config of a tiny run of 24 steps, and that run left alone."""
  home = furnish(tmp_path_factory.mktemp('resume'))
  finish(start(home, home / 'alone'))
  return home


def kill_when(process: subprocess.Popen, moment) -> None:
  deadline = time.monotonic() + 300
  while not moment():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline, 'the moment never came'
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL


def outcome(run: Path):
  """Everything a run leaves that must not depend on interruptions."""
  assert Checkpoints(run / 'checkpoints').steps() == [4, 8, 12, 16, 20, 24]
  return *rows_and_samples(run), {step: saved_state(run, step) for step in (12, 24)}


@pytest.mark.slow
def test_killed_runs_end_bitwise_like_one_left_alone(home):
  alone, killed = home / 'alone', home / 'killed'
  kill_when(start(home, killed), lambda: logged(killed) >= 2)  # before the first save
  for _ in range(5):  # inside a save: seen on disk, and still there once the process is gone
    process = start(home, killed)
    first = set(unfinished(killed))
    kill_when(process, lambda first=first: set(unfinished(killed)) - first)
    if unfinished(killed):
      break
  assert unfinished(killed), 'no kill fell into a save'
  saved = lambda: max([0, *Checkpoints(killed / 'checkpoints').steps()])
  before = saved()
  kill_when(start(home, killed), lambda: saved() > before and logged(killed) > saved())  # after a save, between two
  out = finish(start(home, killed))
  assert 'continues from step' in out

  rows, samples, states = outcome(killed)
  expected_rows, expected_samples, expected_states = outcome(alone)
  assert rows == expected_rows
  assert samples == expected_samples
  jax.tree.map(np.testing.assert_array_equal, states, expected_states)
  assert [row['step'] for row in rows if 'train/loss' in row] == list(range(2, 25, 2))
  assert [row['step'] for row in rows if 'eval/loss' in row] == [5, 10, 15, 20, 24]

  again = finish(start(home, killed))  # a finished run stays as it is
  assert 'continues from step 24 of 24' in again
  assert outcome(killed)[0] == expected_rows


@pytest.mark.slow
def test_sigterm_saves_once_and_a_second_writer_is_refused(home):
  run = home / 'terminated'
  process = start(home, run)
  while logged(run) < 5:
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.01)
  process.send_signal(signal.SIGSTOP)  # it would be done before the other has begun
  second = start(home, run)
  out, _ = second.communicate(timeout=120)
  assert second.returncode == 1 and f'is being written by process {process.pid}' in out
  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGCONT)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 75, out
  steps = Checkpoints(run / 'checkpoints').steps()
  newest = steps[-1]
  assert steps == sorted({*range(4, newest, 4), newest})
  assert f'saved at step {newest} of 24' in out
  assert newest >= logged(run)
  finish(start(home, run))
  losses = lambda run: [row['train/loss'] for row in read_rows(run / 'metrics.jsonl') if 'train/loss' in row]
  assert losses(run) == losses(home / 'alone')


def signalled_twice(process: subprocess.Popen, moment) -> tuple[int, float, str]:
  """(exit code, seconds from the second signal on, output) of a process that gets two SIGTERMs at a moment."""
  while not moment():
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.001)
  process.send_signal(signal.SIGTERM)
  time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  began = time.monotonic()
  out, _ = process.communicate(timeout=120)
  return process.returncode, time.monotonic() - began, out


@pytest.mark.slow
def test_a_second_sigterm_leaves_at_once_while_compiling_and_while_saving(home):
  run = home / 'twice'
  compiling = lambda: (run / 'samples.jsonl').exists()  # made right before the first step, which compiles for seconds
  code, seconds, out = signalled_twice(start(home, run, JAX_ENABLE_COMPILATION_CACHE='false'), compiling)
  assert (code, logged(run)) == (143, 0), out
  assert seconds < 2
  code, seconds, out = signalled_twice(start(home, run), lambda: unfinished(run))
  assert code == 143, out
  assert seconds < 2
  finish(start(home, run))
  rows, samples, states = outcome(run)
  expected_rows, expected_samples, expected_states = outcome(home / 'alone')
  assert (rows, samples) == (expected_rows, expected_samples)
  jax.tree.map(np.testing.assert_array_equal, states, expected_states)


DEAF = """
import hashlib
from jaxlm.console import terminable
with terminable():
  print('deaf', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'', b'', 50_000_000)  # as inside of a compiler: no bytecode runs for many seconds
"""


def test_a_second_sigterm_is_seen_where_no_bytecode_runs():
  process = subprocess.Popen([sys.executable, '-c', DEAF], stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == 'deaf\n'
  code, seconds, _ = signalled_twice(process, lambda: True)
  assert code == 143
  assert seconds < 2


@pytest.mark.slow
def test_a_full_disk_costs_the_saves_it_refuses_and_nothing_else(home, kill_points, tmp_path):
  run = tmp_path / 'full'
  full = {'LD_PRELOAD': str(kill_points), 'KILL_POINTS_BELOW': str(run)}
  for step, left in ((8, [4, 12, 16, 20, 24]), (24, [4, 12, 16, 20])):  # in the middle, then what the end asks for
    process = start(home, run, **full, KILL_POINTS_FULL=f'/{step:08d}')
    out = finish(process, code=int(step == 24))
    said = f'checkpoints: step {step} could not be saved: No space left on device'
    assert [line for line in out.splitlines() if said in line]
    assert 'Traceback' not in out
    assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == [f'{s:08d}' for s in left]
    rows = [row for row in read_rows(run / 'metrics.jsonl') if 'train/loss' in row]
    counted = {row['step']: row.get('train/failed_saves') for row in rows}
    if step == 8:
      assert counted[6] is None and counted[24] == 1
      (run / 'checkpoints' / '00000024' / 'digest.json').unlink()
    else:
      assert out.splitlines()[-1].startswith('jaxlm: ') and out.splitlines()[-1].endswith(said.split(': ', 1)[1])
  finish(start(home, run))
  expected, found = saved_state(home / 'alone', 24), saved_state(run, 24)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
