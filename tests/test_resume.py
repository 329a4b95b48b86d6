"""A run killed at several moments, one of them inside a save, ends bitwise like one left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.config import Data, Optim, Pretrain, Watch
from jaxlm.data import prepare, sources, tokenizer
from jaxlm.models import ModelConfig
from jaxlm.quickstart import SAMPLE
from jaxlm.train.checkpoint import DIGEST, Checkpoints
from jaxlm.train.metrics import read_rows

CONFIG = """
from jaxlm import config
from pathlib import Path
config = config.from_json(config.Pretrain, (Path(__file__).parent / 'settings.json').read_text())
"""


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """A folder with prepared data and the config of a tiny run: 24 steps, everything happening at its own rhythm."""
  home = tmp_path_factory.mktemp('resume')
  specs = (str(SAMPLE / 'play.jsonl'),)
  vocabulary = tokenizer.train((d.text for d in sources.documents(specs)), 307)
  prepare.prepare(specs, vocabulary, home / 'data', val_fraction=0.1)
  config = Pretrain(
    model=ModelConfig(d_model=96, n_layers=3, n_heads=3, d_ff=177),
    data=Data(path=str(home / 'data'), seq_len=29, global_batch=5),
    optim=Optim(name='muon', lr=3e-3, warmup_steps=3),
    watch=Watch(
      log_every=2, eval_every=5, eval_batches=3, sample_every=7, sample_tokens=5, save_every=4, keep_last=100
    ),
    steps=24,
  )
  (home / 'settings.json').write_text(configs.to_json(config))
  (home / 'tiny.py').write_text(CONFIG)
  return home


def start(home: Path, run: Path) -> subprocess.Popen:
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  command = [sys.executable, '-m', 'jaxlm', 'pretrain', str(home / 'tiny.py'), '--run', str(run)]
  return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 0, out
  return out


def logged(run: Path) -> int:
  """The last step that metrics.jsonl holds."""
  lines = (run / 'metrics.jsonl').read_text().split('\n')[:-1] if (run / 'metrics.jsonl').exists() else []
  return json.loads(lines[-1])['step'] if lines else 0


def unfinished(run: Path) -> list[str]:
  """Checkpoint folders without their acknowledgement."""
  folder = run / 'checkpoints'
  return [p.name for p in folder.iterdir() if not (p / DIGEST).exists()] if folder.exists() else []


def kill_when(process: subprocess.Popen, moment) -> None:
  deadline = time.monotonic() + 300
  while not moment():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline, 'the moment never came'
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL


def outcome(run: Path, home: Path):
  """Everything a run leaves that must not depend on interruptions."""
  rows = [
    {k: v for k, v in row.items() if k != 'time' and not k.startswith('perf/')}
    for row in read_rows(run / 'metrics.jsonl')
  ]
  checkpoints = Checkpoints(run / 'checkpoints')
  assert checkpoints.steps() == [4, 8, 12, 16, 20, 24]
  from orbax.checkpoint import v1 as ocp

  states = {step: ocp.load(checkpoints.path(step), ocp.metadata(checkpoints.path(step)).metadata) for step in (12, 24)}
  return rows, read_rows(run / 'samples.jsonl'), jax.tree.map(np.asarray, states)


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

  rows, samples, states = outcome(killed, home)
  expected_rows, expected_samples, expected_states = outcome(alone, home)
  assert rows == expected_rows
  assert samples == expected_samples
  jax.tree.map(np.testing.assert_array_equal, states, expected_states)
  assert [row['step'] for row in rows if 'train/loss' in row] == list(range(2, 25, 2))
  assert [row['step'] for row in rows if 'eval/loss' in row] == [5, 10, 15, 20, 24]

  again = finish(start(home, killed))  # a finished run stays as it is
  assert 'continues from step 24 of 24' in again
  assert outcome(killed, home)[0] == expected_rows


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
