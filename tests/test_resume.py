"""A run killed at several moments, one of them inside a save, ends bitwise like one left alone."""

import signal
import subprocess
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
  """A folder with prepared data and the config of a tiny run: 24 steps, everything happening at its own rhythm."""
  return furnish(tmp_path_factory.mktemp('resume'))


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
  finish(start(home, alone))

  kill_when(start(home, killed), lambda: logged(killed) >= 2)  # before the first save
  for _ in range(5):  # inside a save: seen on disk, and still there once the process is gone
    process = start(home, killed)
    first = set(unfinished(killed))
    kill_when(process, lambda first=first: set(unfinished(killed)) - first)
    if unfinished(killed):
      break
  assert unfinished(killed), 'no kill fell into a save'
  last_saved = max([0, *Checkpoints(killed / 'checkpoints').steps()])
  kill_when(start(home, killed), lambda: logged(killed) >= last_saved + 6)  # after some save, between two
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
  second = start(home, run)
  out, _ = second.communicate(timeout=120)
  assert second.returncode == 1 and f'is being written by process {process.pid}' in out
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 75, out
  newest = Checkpoints(run / 'checkpoints').steps()[-1]
  assert f'saved at step {newest} of 24' in out
  assert newest >= logged(run)
  finish(start(home, run))
  finish(start(home, home / 'alone'))
  losses = lambda run: [row['train/loss'] for row in read_rows(run / 'metrics.jsonl') if 'train/loss' in row]
  assert losses(run) == losses(home / 'alone')
