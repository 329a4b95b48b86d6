"""Preferences end to end: rows to a run that prefers, resumed, refused, scored, and a table with its baselines."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import preferred
import pytest
from tiny_run import furnish, rows_and_samples, saved_state

from jaxlm import cli, models, report, tree
from jaxlm.data import prepared
from jaxlm.data.conversations import Conversation
from jaxlm.errors import InputError
from jaxlm.evals import rewards
from jaxlm.loops import bases, pairing, scoring, writing
from jaxlm.train import metrics

TINY = {
  'data.seq-len': 211,
  'data.global-batch': 5,
  'chat.template': 'plain',
  'chat.val-fraction': 0.25,
  'optim.lr': 1e-2,
  'optim.warmup-steps': 0,
  'watch.log-every': 1,
  'epochs': 0,
  'steps': 6,
}


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """Runs on one device compile and compute in half the time; what eight of them do is in `test_pairs`."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda *_, there=jax.devices(): there[:1])
    yield


def flags(**changed):
  named = {name.replace('__', '.').replace('_', '-'): value for name, value in changed.items()}
  return [part for name, value in (TINY | named).items() for part in (f'--{name}', str(value))]


@pytest.fixture(scope='module')
def home(tmp_path_factory, one_device):
  home = furnish(tmp_path_factory.mktemp('preference'))
  args = ['pretrain', str(home / 'tiny.py'), '--run', str(home / 'base'), '--steps', '4']
  assert cli.main(args) == 0
  rows = preferred.rows(48)
  for row in rows:  # something can be learnt: how an answer ends
    row['chosen'], row['rejected'] = row['chosen'].replace('.', '!'), row['rejected'].replace('!', '?')
  preferred.write(home / 'pairs.jsonl', rows)
  preferred.write(home / 'labels.jsonl', preferred.labelled(rows))
  return home


def run(home, verb, name, *more, rows='pairs.jsonl', **changed):
  given = ['--init', str(home / 'base'), '--data.path', str(home / rows), '--run', str(home / name)]
  return cli.main([verb, *given, *flags(**changed), *more])


def evaluated(home, name, what):
  rows = metrics.read_rows(home / name / 'metrics.jsonl')
  return [row[what] for row in rows if what in row]


@pytest.fixture(scope='module')
def full(home):
  """DPO of every weight, whose reference is cached, saved every second step."""
  assert run(home, 'preference', 'full', lora__rank=0, watch__save_every=2, optim__lr=3e-3) == 0
  return home / 'full'


@pytest.mark.slow
def test_adapters_learn_what_is_preferred(home, capsys):
  assert run(home, 'preference', 'dpo', lora__rank=3) == 0
  out = capsys.readouterr().out
  assert 'pairs: chosen and rejected (prompt, chosen, rejected, margin)' in out and 'learned: last' in out
  assert 'nats a token' in out and 'right 1' in out
  assert not (home / 'dpo' / 'reference').exists()
  losses, margins = evaluated(home, 'dpo', 'eval/loss'), evaluated(home, 'dpo', 'eval/rewards/margins')
  assert losses[0] == pytest.approx(np.log(2), rel=1e-5) and losses[-1] < 0.6 and margins[-1] > 0.2
  assert {'rewards/chosen', 'rewards/rejected', 'rewards/accuracies', 'logps/chosen', 'logps/rejected', 'nll'} <= {
    name.removeprefix('train/') for name in metrics.read_rows(home / 'dpo' / 'metrics.jsonl')[1]
  }
  table = report.gained(metrics.read_rows(home / 'dpo' / 'metrics.jsonl'))
  assert [line[0] for line in table] == ['chosen answers'] and table[0][1] > 1
  assert 'Rewards' in report.write(home / 'dpo').read_text()
  assert cli.main(['generate', str(home / 'dpo'), '--prompt', 'The ', '--max-new-tokens', '3']) == 0


@pytest.mark.slow(but='simpo')
@pytest.mark.parametrize('loss', ['ipo', 'kto', 'orpo', 'simpo', 'cpo'])
def test_every_loss_is_a_run(home, loss):
  rows = 'labels.jsonl' if loss == 'kto' else 'pairs.jsonl'
  assert run(home, 'preference', loss, '--loss', loss, '--beta', '0.2', lora__rank=3, steps=4, rows=rows) == 0
  config = bases.newest(home / loss).config
  assert (config.preference.loss, config.preference.beta) == (loss, 0.2)
  losses, right = evaluated(home, loss, 'eval/loss'), evaluated(home, loss, 'eval/rewards/accuracies')
  assert losses[-1] < losses[0] and right[-1] > 0.5
  assert (home / loss / 'reference').exists() is False


@pytest.mark.slow
def test_kto_reads_pairs_too(home):
  assert run(home, 'preference', 'kto_pairs', '--loss', 'kto', lora__rank=3, steps=2) == 0
  assert evaluated(home, 'kto_pairs', 'eval/loss')[-1] < 0.5


@pytest.mark.slow
def test_a_run_goes_on_bitwise_in_the_middle_of_an_epoch(home, full):
  assert run(home, 'preference', 'parts', lora__rank=0, watch__save_every=2, optim__lr=3e-3) == 0
  for step in (4, 6):
    shutil.rmtree(bases.newest(home / 'parts').checkpoints.path(step))
  kept = [(home / 'parts' / 'reference' / name).read_bytes() for name in ('train-0.npy', 'held_out-0.npy')]
  assert run(home, 'preference', 'parts', lora__rank=0, watch__save_every=2, optim__lr=3e-3) == 0
  assert kept == [(full / 'reference' / name).read_bytes() for name in ('train-0.npy', 'held_out-0.npy')]
  assert rows_and_samples(home / 'parts') == rows_and_samples(full)
  for a, b in zip(*(jax.tree.leaves(saved_state(home / name, 6)) for name in ('full', 'parts')), strict=True):
    np.testing.assert_array_equal(a, b)
  config, rows = bases.newest(full).config, evaluated(home, 'full', 'data/epochs')
  stream = next(pairing.leaves(pairing.rows(config, prepared.load(full / 'data'), held_out=False)))
  assert rows[3] == pytest.approx(4 * 5 / len(stream)) and rows[3] % 1  # step 4 is in the middle of an epoch


@pytest.mark.slow
@pytest.mark.parametrize('loss', ['ipo', 'kto', 'orpo', 'simpo', 'cpo'])
def test_every_loss_goes_on_bitwise(home, loss):
  """From step 3, in the middle of an epoch, after a save that was made."""
  rows = 'labels.jsonl' if loss == 'kto' else 'pairs.jsonl'
  how = {'lora__rank': 3, 'watch__save_every': 3, 'optim__lr': 3e-3, 'rows': rows}
  for name in (whole := f'whole_{loss}', parts := f'parts_{loss}'):
    assert run(home, 'preference', name, '--loss', loss, **how) == 0
  shutil.rmtree(bases.newest(home / parts).checkpoints.path(6))
  assert run(home, 'preference', parts, '--loss', loss, **how) == 0
  for a, b in zip(*(jax.tree.leaves(saved_state(home / name, 6)) for name in (whole, parts)), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_cached_reference_gives_the_curve_of_the_one_in_the_step(home):
  """Adapters both times: read in the step, and computed before it."""
  assert run(home, 'preference', 'in_step', lora__rank=3, steps=3) == 0
  assert run(home, 'preference', 'cached', lora__rank=3, steps=3, preference__reference='cached') == 0
  for name in ('train/loss', 'train/grad_norm', 'eval/loss'):
    np.testing.assert_allclose(evaluated(home, 'cached', name), evaluated(home, 'in_step', name), rtol=1e-4)


@pytest.mark.slow
def test_another_base_or_data_is_refused(home, full, capsys):
  again = {'lora__rank': 0, 'watch__save_every': 2, 'optim__lr': 3e-3, 'steps': 7}
  other = ['pretrain', str(home / 'tiny.py'), '--run', str(home / 'other'), '--steps', '5']
  assert cli.main(other) == 0
  copy = home / 'copy'
  shutil.copytree(full, copy)
  assert run(home, 'preference', 'copy', '--init', str(home / 'other'), **again) == 1
  assert 'holds the reference of another base' in capsys.readouterr().err
  about = json.loads((copy / 'reference' / 'reference.json').read_text())
  (copy / 'reference' / 'reference.json').write_text(json.dumps(about | {'data': 'x'}))
  assert run(home, 'preference', 'copy', **again) == 1
  assert 'holds the reference of other data' in capsys.readouterr().err
  (copy / 'reference' / 'reference.json').write_text(json.dumps(about))
  raw = (copy / 'reference' / 'train-0.npy').read_bytes()
  (copy / 'reference' / 'train-0.npy').write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
  assert run(home, 'preference', 'copy', **again) == 1
  assert 'train-0.npy' in capsys.readouterr().err
  shutil.rmtree(copy / 'reference')
  assert run(home, 'preference', 'copy', **again) == 1
  assert 'missing, the reference of a run that has begun' in capsys.readouterr().err


def test_what_is_wrong_is_said(home, full, capsys):
  data, labels = str(full / 'data'), home / 'kto' / 'data'
  assert cli.main(['sft', '--init', str(home / 'base'), '--data.path', data, '--run', str(home / 'no')]) == 1
  assert 'holds preferences' in capsys.readouterr().err
  assert run(home, 'preference', 'no', rows='data') == 1
  assert 'holds no preferences' in capsys.readouterr().err
  if labels.exists():
    assert run(home, 'preference', 'no', rows='kto/data') == 1
    assert 'dpo needs pairs (kto does not)' in capsys.readouterr().err
  assert run(home, 'preference', 'no', data__seq_len=61, rows='full/data') == 1
  assert 'no preference fits into data.seq_len=61' in capsys.readouterr().err
  assert run(home, 'preference', 'no', lora__rank=0, preference__reference='adapters') == 1
  assert 'needs lora.rank' in capsys.readouterr().err
  assert run(home, 'preference', 'no', '--loss', 'kto', preference__reference='none') == 1
  assert 'kto needs one' in capsys.readouterr().err
  assert cli.main(['reward', '--run', str(home / 'no'), '--data.path', data]) == 1
  assert 'reward: begins with a model: set --init' in capsys.readouterr().err
  with pytest.raises(InputError, match='is no reward model'):
    scoring.open_model(full)


@pytest.fixture(scope='module')
def judge(home):
  """Two folds and the whole, with adapters."""
  assert run(home, 'reward', 'rm', '--folds', '2', lora__rank=3, steps=36, watch__eval_every=0) == 0
  return home / 'rm'


@pytest.mark.slow
def test_a_reward_model_is_told_from_lengths(home, judge, capsys):
  found = json.loads((judge / 'rewards.json').read_text())
  folds = {line['what']: line for line in found['folds']['table']}
  assert folds['reward model']['pairs'] == 48 and folds['reward model']['right'] > 0.7
  assert folds['reward model']['from'] > 0.5 and folds['the longer answer']['right'] < 0.7
  held = found['held_out']['table'][0]['pairs']
  assert 0 < held < 24 and sum(line['pairs'] for what, line in folds.items() if what.startswith('- margin')) == 48
  assert cli.main(['eval', str(judge)]) == 0
  out = capsys.readouterr().out
  assert 'regression on length' in out and 'paired bootstrap' in out
  again = json.loads((judge / 'rewards.json').read_text())
  assert again == found
  assert cli.main(['eval', str(judge), '--against', str(judge)]) == 1
  assert 'is a reward model, which --against compares with no other' in capsys.readouterr().err
  assert cli.main(['eval', str(judge), '--data', str(home / 'rm' / 'data'), '--out', str(home / 'table.json')]) == 0
  assert json.loads((home / 'table.json').read_text())['held_out'] == found['held_out']
  text = report.write(judge).read_text()
  assert 'pairs told right, folds' in text and 'the longer answer' in text and 'Gained and forgotten' not in text


def test_folds_hold_out_every_pair_once(judge):
  configs = [bases.newest(judge / 'folds' / str(i)).config for i in range(2)]
  folder = prepared.load(judge / 'data')
  of = lambda config, held_out: list(pairing.leaves(pairing.rows(config, folder, held_out=held_out)))
  held = [sum(len(one.units) for one in of(config, True)) for config in configs]
  assert sum(held) == 48 and min(held) > 10
  for config in configs:
    for seen, out in zip(of(config, False), of(config, True), strict=True):
      assert not set(seen.units) & set(out.units) and len(seen.units) + len(out.units) == seen.count


@pytest.mark.slow
def test_scores_of_conversations_are_those_of_the_rows(home, judge):
  model = scoring.open_model(judge)
  rows = [json.loads(line) for line in (home / 'pairs.jsonl').read_text().splitlines()]
  turns = lambda row, side: [{'role': 'user', 'content': row['prompt']}, {'role': 'assistant', 'content': row[side]}]
  talks = [Conversation(turns(row, side)) for row in rows for side in ('chosen', 'rejected')]
  scores = scoring.score(model, talks, batch=7).reshape(-1, 2)
  alone, padded = scoring.score(model, talks[5:6], batch=1), scoring.score(model, talks[5:6])
  np.testing.assert_allclose(padded, alone, rtol=1e-5)  # rows repeated to fill a batch change nothing but the rounding
  held = rewards.judge(str(judge))
  there = np.stack([held.chosen, held.rejected], 1)
  assert np.abs(there[:, None] - scores).max(-1).min(1).max() < 1e-4 * np.abs(scores).max() and len(there) > 5
  empty = [{'role': 'user', 'content': rows[0]['prompt']}, {'role': 'assistant', 'content': ''}]
  assert np.isfinite(scoring.score(model, [Conversation(empty)])).all()  # a policy may say nothing
  with pytest.raises(InputError, match='ends with a turn of the user'):
    scoring.score(model, [Conversation([*talks[0].messages, {'role': 'user', 'content': 'And?'}])])


@pytest.mark.slow
def test_a_value_head_is_the_reward_models_alone(home, judge, capsys):
  params = writing.load(judge)[1]
  assert params['value'].shape == (96,) and float(jnp.abs(params['value']).max()) > 0
  learnt = {path for path, _ in tree.items(bases.newest(judge).checkpoints.meta(36)) if path}  # it can be read
  assert learnt
  assert cli.main(['export', str(judge), str(home / 'exported')]) == 1
  assert 'reward model' in capsys.readouterr().err
  assert run(home, 'preference', 'after', '--init', str(judge), lora__rank=3, steps=2) == 0
  assert 'value' not in writing.load(home / 'after')[1]
  assert run(home, 'reward', 'on', '--init', str(judge), lora__rank=3, steps=2, trainable='') == 0
  first = evaluated(home, 'on', 'eval/loss')[0]
  assert first == pytest.approx(evaluated(home, 'rm', 'eval/loss')[-1], rel=1e-3)


def test_intervals_and_the_baseline_of_lengths():
  """Wilson's interval from its paper's formula; the regression finds the side that lengths point to."""
  low, high = rewards.wilson(0.8, 50)
  solve = lambda p: abs(p - 0.8) - rewards.Z * np.sqrt(p * (1 - p) / 50)
  assert solve(low) == pytest.approx(0, abs=1e-9) and solve(high) == pytest.approx(0, abs=1e-9) and low < 0.8 < high
  rng = np.random.default_rng(0)
  shorter, longer = rng.integers(5, 40, 200).astype(float), rng.integers(50, 90, 200).astype(float)
  weights = rewards._fit(shorter, longer)
  assert (rewards._features(shorter, longer) @ weights > 0).all()
  low, high = rewards.bootstrap(np.repeat([1.0, 0.0], [60, 40]))
  assert 0.48 < low < 0.56 and 0.64 < high < 0.72
  assert models.value({'value': jnp.ones(3)}, jnp.ones((2, 5, 3), jnp.bfloat16)).dtype == jnp.float32


HEAD = {'lora__rank': 0, 'trainable': 'value', 'optim__weight_decay': 0.1, 'watch__save_every': 2}


@pytest.fixture(scope='module')
def frozen(home):
  """Two folds and the whole of a value head alone."""
  assert run(home, 'reward', 'frozen', '--folds', '2', **HEAD) == 0
  return home / 'frozen'


@pytest.mark.slow
def test_a_head_on_features_learns_as_on_the_trunk(home, frozen):
  """The curves of the run and of a fold, the weights and the table; what folds share is computed once."""
  assert run(home, 'reward', 'trunk', '--folds', '2', '--preference.features', '', **HEAD) == 0
  folders = [home / name / part / 'features' for name in ('trunk', 'frozen') for part in ('', 'folds/0', 'folds/1')]
  assert [path.exists() for path in folders] == [False] * 3 + [True] + [False] * 2
  for part in ('', 'folds/1'):
    for name in ('train/loss', 'train/grad_norm', 'train/rewards/margins', 'eval/loss', 'eval/rewards/accuracies'):
      there = evaluated(home, f'trunk/{part}', name)
      np.testing.assert_allclose(evaluated(home, f'frozen/{part}', name), there, rtol=1e-5, atol=1e-5)
    values = [writing.load(home / name / part)[1]['value'] for name in ('frozen', 'trunk')]
    np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6)
  assert sum(len(np.load(path)) for path in (frozen / 'features').glob('*.npy')) == 48
  told = [json.loads((home / name / 'rewards.json').read_text())['folds']['table'] for name in ('frozen', 'trunk')]
  assert [line['right'] for line in told[0][:3]] == [line['right'] for line in told[1][:3]]


def test_folds_are_judged_by_what_they_share(home, frozen):
  """The scores are those of the trunk; that the folder is read is seen where it is damaged."""
  kept, read = (rewards.judge(str(frozen / 'folds/1'), kept=kept) for kept in (True, False))
  assert kept and read and len(kept.chosen) > 10
  np.testing.assert_allclose(kept.chosen, read.chosen, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(kept.rejected, read.rejected, rtol=1e-5, atol=1e-5)
  copy = home / 'shared'
  shutil.copytree(frozen, copy)
  for path in (copy / 'features').glob('*.npy'):
    path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(InputError, match='damaged'):
    rewards.judge(str(copy / 'folds/1'), kept=True)


def test_a_head_on_features_goes_on_bitwise_and_on_its_own_base_alone(home, frozen, capsys):
  copy = home / 'head'
  shutil.copytree(frozen, copy)
  for step in (4, 6):
    shutil.rmtree(bases.newest(copy).checkpoints.path(step))
  assert run(home, 'reward', 'head', **HEAD) == 0
  assert 'continues from step 2' in capsys.readouterr().out
  assert evaluated(home, 'head', 'train/loss') == evaluated(home, 'frozen', 'train/loss')
  for a, b in zip(*(jax.tree.leaves(saved_state(home / name, 6)) for name in ('frozen', 'head')), strict=True):
    np.testing.assert_array_equal(a, b)
  assert run(home, 'reward', 'head', '--init', str(frozen), **HEAD) == 1
  assert 'holds the features of another base' in capsys.readouterr().err
  damaged = next((copy / 'features').glob('*.npy'))
  raw = damaged.read_bytes()
  damaged.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
  assert run(home, 'reward', 'head', **HEAD) == 1
  assert f'damaged: {damaged.name}' in capsys.readouterr().err
  shutil.rmtree(copy / 'features')
  assert run(home, 'reward', 'head', **HEAD) == 1
  assert 'missing, the features of a run that has begun' in capsys.readouterr().err


@pytest.mark.slow
def test_weight_decay_reaches_the_value_head(home, frozen):
  assert run(home, 'reward', 'free', **HEAD | {'optim__weight_decay': 0, 'steps': 2}) == 0
  assert run(home, 'reward', 'held', **HEAD | {'optim__weight_decay': 50, 'steps': 2}) == 0
  size = lambda name: float(jnp.abs(writing.load(home / name)[1]['value']).max())
  assert 0 < size('held') < 0.9 * size('free')
