"""Reinforcement learning of a tiny run: every algorithm by its verb, what it logs, how it goes on and learns."""

import json
import re
import shutil

import numpy as np
import pytest
from tiny_run import furnish

from jaxlm import cli, tree
from jaxlm.loops import bases
from jaxlm.rl.algorithms import ALGORITHMS
from jaxlm.train import metrics

QUESTIONS = [f'What is {a} and {b}?' for a in ('red', 'green', 'blue') for b in range(7)]
SMALL = ('--prompts', '4', '--samples', '4', '--max-new-tokens', '7', '--held-out', '5', '--decode-rows', '5')
SMALL += ('--data.seq-len', '64', '--data.global-batch', '8', '--lora.rank', '0', '--optim.warmup-steps', '0')
SMALL += ('--watch.eval-every', '4', '--watch.save-every', '4', '--chat.template', 'plain')


OWN = """
import os, signal

calls = 0


def e(prompts, said, rows):
  global calls
  calls += 1
  if calls == int(os.environ.get('ENDS_AT', '0')):
    os.kill(os.getppid(), signal.SIGTERM)  # of the run: a reward has a process of its own
  return [text.count('e') / 7 for text in said]
"""


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  home = furnish(tmp_path_factory.mktemp('rl'))
  assert (
    cli.main(
      ['pretrain', str(home / 'tiny.py'), '--run', str(home / 'base'), '--steps', '8', '--data.global-batch', '8']
    )
    == 0
  )
  rows = [{'prompt': question, 'answer': question[8]} for question in QUESTIONS]
  (home / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (home / 'own.py').write_text(OWN)
  return home


def rl(home, name, *args, algo='grpo'):
  given = ('--init', str(home / 'base'), '--data.path', str(home / 'rows.jsonl'), '--run', str(home / name))
  reward = ('--reward', f'python:{home / "own.py"}:e')
  return cli.main(['rl', *given, '--algo', algo, *reward, *SMALL, *args])


def rows_of(home, name):
  return metrics.read_rows(home / name / 'metrics.jsonl')


def series(home, name, what):
  return [row[what] for row in rows_of(home, name) if what in row]


@pytest.mark.slow(but='grpo')
@pytest.mark.parametrize('algo', ALGORITHMS)
def test_every_algorithm_begins_at_ratio_one(home, algo):
  """Two updates a rollout; at the first the weights are those that wrote, and the sampler agrees with training."""
  assert rl(home, algo, '--steps', '4', '--kl-coef', '0.05', '--top-k', '50', '--temperature', '0.8', algo=algo) == 0
  trained = [row for row in rows_of(home, algo) if 'train/loss' in row]
  assert all(np.isfinite(row['train/loss']) for row in trained) and len(trained) == 4
  for row in trained[::2]:
    assert row['train/policy/ratio_min'] == pytest.approx(1, abs=1e-5)
    assert row['train/policy/ratio_max'] == pytest.approx(1, abs=1e-5)
  assert all(row['train/policy/sampler_gap_max'] < 2e-5 for row in trained)
  assert {'reward/mean', 'policy/kl', 'answers/length', 'answers/truncated'} <= rows_of(home, algo)[1].keys()
  assert ('reward/equal_groups' in rows_of(home, algo)[1]) == ALGORITHMS[algo].grouped  # else a warning of nothing
  assert series(home, algo, 'policy/kl')[0] == pytest.approx(0, abs=1e-6)  # the policy is its reference at first
  assert ('value' in bases.read(bases.newest(home / algo))[1]) == ALGORITHMS[algo].valued


@pytest.mark.slow
@pytest.mark.parametrize('algo', ALGORITHMS)
def test_it_goes_on_bitwise(home, algo, monkeypatch, capsys):
  """After a save that was made, and after a SIGTERM while a rollout is scored, which is learnt from in two steps."""
  how = ('--steps', '8', '--kl-coef', '0.05', '--watch.eval-every', '0')
  whole, parts = f'whole_{algo}', f'parts_{algo}'
  assert rl(home, whole, *how, algo=algo) == 0
  monkeypatch.setenv('ENDS_AT', '3')
  assert rl(home, parts, *how, algo=algo) == 75
  assert re.search(r'stopped and saved at step [246] of 8', capsys.readouterr().err)
  monkeypatch.delenv('ENDS_AT')
  assert rl(home, parts, *how, algo=algo) == 0
  shutil.rmtree(bases.newest(home / parts).checkpoints.path(8))
  assert rl(home, parts, *how, algo=algo) == 0
  trees = [dict(tree.items(bases.read(bases.newest(home / name))[1])) for name in (whole, parts)]
  for path, x in trees[0].items():
    np.testing.assert_array_equal(x, trees[1][path], err_msg=path)
  assert series(home, whole, 'reward/mean') == series(home, parts, 'reward/mean')
  shown = [metrics.read_rows(home / name / 'samples.jsonl') for name in (whole, parts)]
  assert shown[0] == shown[1] and all(row['reward'] == row['text'].count('e') / 7 for row in shown[0])
  assert cli.main(['export', str(home / whole), str(home / f'out_{algo}')]) == 0  # a value function is left out


@pytest.mark.slow
def test_warnings_look_at_what_was_before_it_went_on(home, capsys):
  how = ('--kl-coef', '0.05', '--kl-target', '1e-3', '--optim.lr', '1e-2', '--watch.eval-every', '0')
  assert rl(home, 'warned', '--steps', '8', *how) == 0
  assert 'policy/kl is' not in capsys.readouterr().out  # of four rollouts, too few
  assert rl(home, 'warned', '--steps', '12', *how) == 0
  assert capsys.readouterr().out.count('policy/kl is') == 1


@pytest.mark.slow
def test_it_learns(home):
  args = (
    '--steps',
    '60',
    '--optim.lr',
    '3e-3',
    '--samples',
    '8',
    '--data.global-batch',
    '32',
    '--watch.eval-every',
    '30',
  )
  assert rl(home, 'learns', *args) == 0
  rewards = series(home, 'learns', 'reward/mean')
  assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2


@pytest.mark.parametrize(
  'args, why',
  [
    (('--watch.save-every', '3'), 'watch.save_every=3: a rollout is learnt from in 2 steps'),
    (('--steps', '5'), 'steps=5: a rollout is learnt from in 2 steps'),
    (('--data.global-batch', '24'), 'do not divide by data.global_batch=24'),
    (('--samples', '1', '--prompts', '8'), '2 or more'),
    (('--kl-target', '0.1'), 'a reference is read where rl.kl_coef > 0 alone'),
    (('--algo', 'pppo'), 'there are ppo, grpo'),
    (('--reward', 'exact:wrong'), "no column 'wrong'"),
  ],
)
def test_bad_input_is_one_line(home, capsys, args, why):
  assert rl(home, 'bad', '--steps', '4', *args) == 1
  assert why in capsys.readouterr().err.strip().splitlines()[-1]
