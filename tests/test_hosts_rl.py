"""Learning from a reward model as two processes of four devices: the numbers of one process of eight."""

import json

import preferred
import pytest
import tiny_rl
from conftest import randomized
from test_hosts import finish, process, reaped, rows, two  # noqa: F401, a fixture too
from test_scoring import MODEL

from jaxlm import interop

# no rounding decides what a token is: by and large the likeliest, of a model whose next tokens are far apart
FLAGS = {
  'data.seq-len': 64,
  'data.global-batch': 8,
  'optim.lr': 3e-3,
  'optim.schedule': 'constant',
  'optim.warmup-steps': 0,
  'watch.eval-every': 0,
  'watch.sample-every': 0,
  'watch.save-every': 0,
  'mesh.fsdp': 4,
  'mesh.tensor': 2,
}
PAIRS = {'lora.rank': 0, 'steps': 3, 'epochs': 0, 'preference.folds': 0}
RL = {
  'rl.algo': 'ppo',
  'rl.prompts': 4,
  'rl.samples': 2,
  'rl.max-new-tokens': 8,
  'rl.held-out': 0,
  'steps': 2,
  'rl.temperature': 0.01,
}


def flags(**more):
  return [part for name, value in (FLAGS | more).items() for part in (f'--{name}', str(value))]


@pytest.mark.slow
def test_two_processes_learn_as_one_from_a_reward_model(tmp_path):
  home = tiny_rl.furnish(tmp_path)
  words = preferred.vocabulary()
  interop.export(interop.Model(MODEL, randomized(MODEL, 1), words, None, {}), home / 'even')
  pairs = [{'prompt': 'Q' * (1 + i % 7), 'chosen': 'a' * (1 + i % 5), 'rejected': 'b' * (1 + i % 3)} for i in range(40)]
  (home / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, pairs)))
  common = ['--init', str(home / 'even')]
  judge = [*common, '--data.path', str(home / 'pairs.jsonl'), '--run', str(home / 'judge'), *flags(**PAIRS)]
  finish(process(home, ['-m', 'jaxlm', 'reward', *judge], devices=8))
  learn = ['-m', 'jaxlm', 'rl', *common, '--data.path', str(home / 'rows.jsonl'), *flags(**RL)]
  learn += ['--rl.reward', f'run:{home / "judge"}*0.5 + python:{home / "own.py"}:letters*0.1']
  for p in two(home, [*learn, '--run', str(home / 'many')]):
    finish(p)
  finish(process(home, [*learn, '--run', str(home / 'one')], devices=8))
  for name in ('reward/mean', 'train/loss', 'train/grad_norm'):
    found, want = rows(home / 'many', name), rows(home / 'one', name)
    assert found.keys() == want.keys() != set()
    assert list(found.values()) == pytest.approx(list(want.values()), rel=1e-3, abs=1e-5), name
  assert len(set(rows(home / 'one', 'reward/mean').values())) > 1
