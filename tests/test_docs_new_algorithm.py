"""docs/new-algorithm.md is run as it stands: its algorithm trains, its test passes, and what holds for others holds."""

import functools
import json
import re
import shlex
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from invariance import CHANGES, assert_unchanged
from tiny_run import furnish

from jaxlm import cli, masked, tree
from jaxlm.errors import InputError
from jaxlm.loops import bases
from jaxlm.rl import algorithms
from jaxlm.train import metrics

PAGE = (Path(__file__).parents[1] / 'docs' / 'new-algorithm.md').read_text()
ALGORITHM, TEST = re.findall(r'^```python\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE)
(COMMAND,) = re.findall(r'^```bash\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE)
RNG = np.random.default_rng(4)
LOGP, OLD, ADV = (RNG.normal(size=(5, 7)).astype(np.float32) for _ in range(3))
MASK = (RNG.random((5, 7)) < 0.6).astype(np.float32)
MASK[3] = 0.0


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """`mirror.py` of the page, a tiny base, questions and a reward."""
  home = furnish(tmp_path_factory.mktemp('page'))
  (home / 'mirror.py').write_text(ALGORITHM)
  args = ('--run', str(home / 'base'), '--steps', '4', '--data.global-batch', '8', '--watch.eval-every', '0')
  assert cli.main(['pretrain', str(home / 'tiny.py'), *args, '--watch.sample-every', '0']) == 0
  rows = [{'prompt': f'What is {a} and {b}?'} for a in ('red', 'green', 'blue') for b in range(7)]
  (home / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (home / 'own.py').write_text('def e(prompts, said, rows):\n  return [text.count("e") / 7 for text in said]\n')
  return home


@pytest.fixture(scope='module')
def mirror(home):
  sys.path.insert(0, str(home))
  yield __import__('mirror')
  sys.path.remove(str(home))


def test_it_is_short():
  lines = [line for line in (ALGORITHM + TEST).splitlines() if line.strip()]
  assert len(lines) < 40


def test_its_test_passes(mirror):
  names: dict = {}
  exec(compile(TEST, 'page', 'exec'), names)
  tests = [one for name, one in names.items() if name.startswith('test_')]
  assert tests
  for one in tests:
    one()


@functools.cache
def of_mean(loss):
  def mean(logp, old, adv, mask):
    found = loss(logp, old, adv, mask, clip_low=0.2, clip_high=0.2, ratio='product', per='sequence')
    return found.total / found.weight

  return mean


@pytest.mark.parametrize('change', CHANGES)
def test_padding_garbage_and_repeated_rows_change_nothing(mirror, change):
  assert_unchanged(of_mean(mirror.mirror_descent), [LOGP, OLD, ADV], [MASK], change, atol=5e-6)


def test_micro_batches_are_one_batch(mirror):
  rows = [(slice(0, 5),), (slice(0, 2), slice(2, 5))]

  def over(logp, parts):
    sums = [mirror.mirror_descent(logp[p], OLD[p], ADV[p], MASK[p]) for p in parts]
    whole = functools.reduce(masked.merge, sums)
    return whole.total / whole.weight

  one, two = (jax.grad(over)(LOGP, parts) for parts in rows)
  np.testing.assert_allclose(one, two, atol=1e-6)


def trained(home, name, *more):
  """The command of the page, on tiny rows."""
  args = dict(zip(*[iter(shlex.split(COMMAND)[2:])] * 2, strict=True))
  args['--algo'] = str(home / args['--algo'])
  args |= {'--init': str(home / 'base'), '--data.path': str(home / 'rows.jsonl'), '--run': str(home / name)}
  args |= {'--reward': f'python:{home / "own.py"}:e', '--prompts': '4', '--samples': '4', '--max-new-tokens': '5'}
  args |= {'--held-out': '3', '--data.seq-len': '64', '--data.global-batch': '16', '--lora.rank': '0', '--steps': '4'}
  args |= {'--optim.warmup-steps': '0', '--optim.lr': '1e-3', '--watch.eval-every': '0', '--watch.save-every': '2'}
  args |= {'--chat.template': 'plain'} | dict(zip(*[iter(more)] * 2, strict=True))
  return cli.main(['rl', *(part for pair in args.items() for part in pair)])


@pytest.mark.slow
def test_its_command_trains(home):
  """From a ratio of 1 on, moved by the second update; stopped half way it goes on bitwise."""
  assert trained(home, 'whole') == 0
  rows = [row for row in metrics.read_rows(home / 'whole' / 'metrics.jsonl') if 'train/loss' in row]
  assert all(np.isfinite(row['train/loss']) for row in rows) and len(rows) == 4
  for first, second in zip(rows[::2], rows[1::2], strict=True):
    assert first['train/policy/ratio_min'] == pytest.approx(1, abs=1e-5)
    assert first['train/policy/ratio_max'] == pytest.approx(1, abs=1e-5)
    assert second['train/policy/ratio_max'] > 1.001
  assert trained(home, 'parts', '--steps', '2', '--optim.schedule', 'constant') == 0
  assert trained(home, 'parts') == 0
  whole, parts = (dict(tree.items(bases.read(bases.newest(home / name))[1])) for name in ('whole', 'parts'))
  for path, x in whole.items():
    np.testing.assert_array_equal(x, parts[path], err_msg=path)


@pytest.mark.parametrize(
  'name, why',
  [
    ('mirror.py:MIROR', 'defines no MIROR'),
    ('nowhere.py:MIRROR', 'with a file that is there'),
    ('mirror.py:TAU', 'is a float'),
    ('broken.py:ONE', 'ZeroDivisionError'),
    ('miror', 'there are ppo, grpo'),
  ],
)
def test_what_is_no_algorithm_is_one_line(home, name, why):
  (home / 'broken.py').write_text('ONE = 1 / 0\n')
  with pytest.raises(InputError, match=f'rl.algo=.*{why}'):
    algorithms.by_name(str(home / name) if '.py' in name else name)
