"""A loss spike and what it costs; the weights of one run in another; a run moved to another mesh; a trace."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import cli
from jaxlm import tree as trees
from jaxlm.config import Data, Mesh, Optim, Pretrain, Watch
from jaxlm.data import prepare, tokenizer
from jaxlm.errors import InputError, Stopped
from jaxlm.evals import perplexity
from jaxlm.loops import writing
from jaxlm.loops.pretrain import pretrain
from jaxlm.loops.rewind import Rewinds, Spike
from jaxlm.models import ModelConfig, Run
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.metrics import read_rows

PROMPTS = ('the ', 'w', ' sea', 'ऀ', 'whale an', '12')


@pytest.fixture(scope='module')
def home(tmp_path_factory) -> Path:
  """Easy text, and little of another kind, whose loss is a spike for a model that has seen the first only."""
  home = tmp_path_factory.mktemp('rewind')
  rng = np.random.default_rng(0)
  texts = {
    'easy': ['the whale and the sea ' * 9 + str(i) for i in range(40)],
    'hard': [''.join(map(chr, rng.integers(0x900, 0x970, 150))) for _ in range(10)],
  }
  for name, some in texts.items():
    (home / f'{name}.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in some))
  vocabulary = tokenizer.train([*texts['easy'], *texts['hard']], 300)
  prepare.prepare([f'{home}/easy.jsonl + {home}/hard.jsonl'], vocabulary, home / 'data', val_fraction=0.2)
  return home


def settings(home: Path, run: str, **changes) -> Pretrain:
  base = Pretrain(
    run=str(home / run),
    model=ModelConfig(d_model=16, n_layers=1, n_heads=2, d_ff=24),
    data=Data(str(home / 'data'), 'easy*1', ('0.6: hard*1', '0.7: easy*1'), 17, 'concat', 8),
    optim=Optim(lr=3e-2, warmup_steps=2),
    watch=Watch(log_every=1, eval_every=0, prompts=(), save_every=10, spike=1.5, most_rewinds=5),
    steps=40,
  )
  return dataclasses.replace(base, **changes)


def rows(run: Path):
  kept = read_rows(run / 'metrics.jsonl')
  return [{k: v for k, v in row.items() if k != 'time' and not k.startswith('perf/')} for row in kept]


@pytest.mark.slow
def test_a_spike_goes_back_and_its_data_is_skipped_also_after_a_kill(home):
  said: list[str] = []
  state = pretrain(settings(home, 'spiked'), say=said.append)
  run = home / 'spiked'
  entries = json.loads((run / 'rewinds.json').read_text())
  # batches 24 to 27 are hard: each run into them spikes at its first hard batch, and goes on behind it
  assert entries == [
    {'step': 20, 'spike': spike, 'cursor': cursor} for spike, cursor in ((25, 25), (21, 26), (21, 27), (21, 28))
  ]
  assert sum('back to step 20' in line for line in said) == 4
  assert int(state.step) == 40 and int(state.cursor) == 40 + 8
  assert [row['step'] for row in rows(run) if 'train/loss' in row] == list(range(1, 41))
  assert [row['train/rewinds'] for row in rows(run) if 'train/rewinds' in row][-1] == 4
  assert max(row['train/loss'] for row in rows(run)[20:] if 'train/loss' in row) < 1.5

  killed = home / 'killed'  # what a kill between the second rewind and the next save leaves
  shutil.copytree(run, killed)
  for step in (30, 40):
    shutil.rmtree(killed / 'checkpoints' / f'{step:08d}')
  (killed / 'rewinds.json').write_text(json.dumps(entries[:2]))
  again = pretrain(settings(home, 'killed'), say=said.append)
  jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
  assert int(again.cursor) == 48
  assert rows(killed) == rows(run)
  assert json.loads((killed / 'rewinds.json').read_text()) == entries


@pytest.mark.slow
def test_too_many_spikes_end_the_run_and_cost_nothing(home):
  watch = dataclasses.replace(settings(home, '').watch, most_rewinds=2)
  with pytest.raises(InputError, match='spiked again at step 21 after 2 rewinds: lower optim.lr'):
    pretrain(settings(home, 'hopeless', watch=watch))
  assert Checkpoints(home / 'hopeless' / 'checkpoints').steps() == [10, 20]


def test_what_is_a_spike(tmp_path):
  rewinds = Rewinds(tmp_path, 2.0, 5)
  for step, loss in enumerate([9.0, 1, 1, 1, float('nan'), 1, 1, 1, 1], 1):
    rewinds.check(step, loss)
    rewinds.row(loss)
  with pytest.raises(Spike, match=r'step 10: loss 2\.100 against a recent median of 1\.000'):
    rewinds.check(10, 2.1)


@pytest.mark.slow
def test_no_step_inside_of_a_spike_is_saved(home):
  """Rows are written every second step, saves fall on others: step 25, the first hard one, is both unlogged and due."""
  watch = Watch(log_every=2, eval_every=0, prompts=(), save_every=5, keep_last=9, spike=1.5, most_rewinds=9)
  pretrain(settings(home, 'between', watch=watch))
  entries = json.loads((home / 'between' / 'rewinds.json').read_text())
  assert [entry['step'] for entry in entries] == [20] * 4 and entries[0]['spike'] == 25


@pytest.mark.slow
def test_what_is_evaluated_sampled_and_kept_is_the_average_and_the_best(home):
  watch = Watch(log_every=1, eval_every=5, save_every=5, sample_every=20, keep_last=1, keep_best=1, prompts=PROMPTS)
  data = Data(str(home / 'data'), 'easy*0.5 + hard*0.5', ('0.5: easy*1',), 17, 'concat', 8)  # and then it forgets
  ema = Optim(lr=0.1, warmup_steps=2, ema_decay=0.5)
  run = home / 'averaged'
  state = pretrain(settings(home, 'averaged', data=data, optim=ema, watch=watch, steps=20))
  losses = {row['step']: row['eval/loss'] for row in rows(run) if 'eval/loss' in row}
  best = min(losses, key=losses.__getitem__)
  assert best < 20 and Checkpoints(run / 'checkpoints').steps() == [best, 20]
  found = perplexity.evaluate(str(run), batch=8)
  assert found.whole.nll == pytest.approx(losses[20], rel=1e-5)

  config, average, vocabulary, _ = writing.load(run)
  key, how = jax.random.fold_in(jax.random.key(config.seed), 20), {'new': 64, 'run': Run()}
  texts = [writing.complete(config.model, x, vocabulary, PROMPTS, key, **how) for x in (average, state.params)]
  assert [row['text'] for row in read_rows(run / 'samples.jsonl')][-len(PROMPTS) :] == texts[0] != texts[1]


@pytest.mark.slow
def test_a_run_of_another_tokenizer_is_neither_begun_with_nor_evaluated(home, tmp_path):
  watch = Watch(log_every=1, eval_every=0, prompts=())
  pretrain(settings(home, 'own', steps=3, watch=watch))
  other = tokenizer.train([path.read_text() for path in home.glob('*.jsonl')], 290)
  prepare.prepare([f'{home}/easy.jsonl'], other, tmp_path / 'data', val_fraction=0.2)
  theirs = settings(tmp_path, 'begun', steps=3, watch=watch, init=str(home / 'own'), data=Data(str(tmp_path / 'data')))
  with pytest.raises(InputError, match='has another tokenizer than the data'):
    pretrain(dataclasses.replace(theirs, data=dataclasses.replace(theirs.data, seq_len=17, global_batch=8)))
  with pytest.raises(InputError, match='was prepared with another tokenizer than that of'):
    perplexity.evaluate(str(home / 'own'), [str(tmp_path / 'data')])

  other.save(home / 'own' / 'tokenizer.json')
  with pytest.raises(InputError, match='tokenizer.json: is not the tokenizer that the run was trained with'):
    writing.load(home / 'own')
  assert cli.main(['verify', str(home / 'own')]) == 1


@pytest.mark.slow
def test_weights_of_a_run_begin_another(home, capsys):
  watch = Watch(log_every=1, eval_every=0, prompts=())
  ema = Optim(lr=1e-2, warmup_steps=1, ema_decay=0.9)
  first = pretrain(settings(home, 'first', steps=5, optim=ema, watch=watch))
  _, average, _, step = writing.load(home / 'first')
  assert step == 5
  assert any(
    (np.asarray(a) != np.asarray(p)).any()
    for (_, a), (_, p) in zip(trees.items(average), trees.items(first.params), strict=True)
  )
  said: list[str] = []
  tuned = settings(home, 'second', steps=1, init=str(home / 'first'), watch=watch, optim=Optim(lr=0.0, warmup_steps=0))
  second = pretrain(tuned, say=said.append)
  jax.tree.map(np.testing.assert_array_equal, second.params, average)
  assert any('begins with the weights of' in line for line in said)
  with pytest.raises(InputError, match=r'first: is another model: model.d_ff is 24, not 32'):
    pretrain(
      dataclasses.replace(tuned, run=str(home / 'third'), model=ModelConfig(d_model=16, n_layers=1, n_heads=2, d_ff=32))
    )
  with pytest.raises(InputError, match='holds no finished checkpoint'):
    pretrain(dataclasses.replace(tuned, run=str(home / 'third'), init=str(home / 'none')))

  code = cli.main(['eval', str(home / 'first'), '--batch', '3', '--baselines'])
  out = capsys.readouterr().out
  assert code == 0 and '| easy' in out and 'xz -9' in out
  found = json.loads((home / 'first' / 'eval.json').read_text())
  assert found['step'] == 5
  whole = found['all']
  facts = json.loads((home / 'first' / 'facts.json').read_text())['perplexity, step 5']
  assert facts.keys() == {*found['kinds'], 'all'} and f'{np.exp(whole["nll"]):.2f} (' in facts['all']
  for key in ('tokens', 'bytes'):
    assert whole[key] == sum(kind[key] for kind in found['kinds'].values())
  prepared = prepare.load(home / 'data')
  assert whole['bytes'] == prepared.split('validation').bytes
  other = perplexity.evaluate(
    str(home / 'first'), [str(home / 'data')], batch=8
  )  # batches do not change what is scored
  assert other.whole.nll == pytest.approx(whole['nll'], rel=1e-6)


def test_steps_to_profile():
  assert Pretrain(profile='5:8').profiled == (5, 8)
  for profile in ('5', '8:5', '5:5', 'a:b'):
    with pytest.raises(InputError, match='profile'):
      Pretrain(profile=profile)
  with pytest.raises(InputError, match="profile='5:8' goes beyond the 7 steps of the run"):
    Pretrain(profile='5:8', steps=7)


@pytest.mark.slow
def test_a_profile_holds_the_steps_that_were_asked_for(home):
  pretrain(settings(home, 'profiled', steps=6, profile='2:4', watch=Watch(log_every=1, eval_every=0, prompts=())))
  traces = list((home / 'profiled' / 'profile').rglob('*.xplane.pb'))
  assert len(traces) == 1
  planes = jax.profiler.ProfileData.from_file(str(traces[0])).planes
  events = [event for plane in planes for line in plane.lines for event in line.events]
  assert [dict(event.stats)['step_num'] for event in events if event.name == 'train'] == [2, 3]
  assert sum(event.name == 'PjitFunction(step)' for event in events) == 4  # a call, and within it the C++ one


@pytest.mark.slow
def test_a_run_moved_to_another_mesh_sees_the_same_batches(home):
  watch = Watch(log_every=1, eval_every=0, prompts=(), save_every=4)
  model = ModelConfig(d_model=16, n_layers=2, n_heads=4, d_ff=24)
  one = dataclasses.replace(settings(home, 'whole', steps=9, watch=watch), model=model, mesh=Mesh(data=8, fsdp=1))
  pretrain(one)
  moved = dataclasses.replace(one, run=str(home / 'moved'), mesh=Mesh(data=2, fsdp=4))
  steps = iter(range(9))
  with pytest.raises(Stopped, match='saved at step 5'):
    pretrain(moved, stop=lambda: next(steps) == 4)
  said: list[str] = []
  last = pretrain(dataclasses.replace(moved, mesh=Mesh(data=1, fsdp=2, tensor=4)), say=said.append)
  assert any('continues from step 5' in line for line in said) and any('mesh.fsdp was 4' in line for line in said)
  assert int(last.cursor) == 9
  losses = lambda run: [row['train/loss'] for row in rows(home / run) if 'train/loss' in row]
  assert len(losses('moved')) == 9
  np.testing.assert_allclose(losses('moved'), losses('whole'), rtol=1e-5)
