"""Runs that begin with a base: adapters saved alone and put on it again, filters, refusals, export."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import furnish

from jaxlm import cli, interop, lora, models, report, tree
from jaxlm.data import prepare, tokenizer
from jaxlm.evals import perplexity
from jaxlm.interop import peft
from jaxlm.loops import bases, foreign, writing
from jaxlm.quickstart import SAMPLE
from jaxlm.train import metrics

TINY = (
  '--optim.warmup-steps',
  '0',
  '--mesh.fsdp',
  '4',
  '--mesh.data',
  '2',
  '--data.global-batch',
  '16',
  '--watch.eval-every',
  '0',
)
ADAPTERS = ('--lora.rank', '3', '--lora.where', 'attention', '--optim.name', 'adamw', '--optim.lr', '1e-2')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  home = furnish(tmp_path_factory.mktemp('tuning'))
  assert run(home, 'base', '--steps', '6') == 0
  return home


def run(home, name, *args):
  return cli.main(['pretrain', str(home / 'tiny.py'), *TINY, '--run', str(home / name), *args])


def params(home, name):
  return dict(tree.items(writing.load(home / name)[1]))


def losses(home, name):
  return [row['train/loss'] for row in metrics.read_rows(home / name / 'metrics.jsonl') if 'train/loss' in row]


def size(path):
  return sum(file.stat().st_size for file in Path(path).rglob('*') if file.is_file())


def tuned(home, name, *args):
  return run(home, name, '--init', str(home / 'base'), *ADAPTERS, *args)


@pytest.mark.slow
def test_adapters_alone_are_saved_and_go_on_bitwise(home):
  assert tuned(home, 'whole', '--steps', '8') == 0
  assert tuned(home, 'parts', '--steps', '8', '--watch.save-every', '4') == 0
  newest = bases.newest(home / 'parts')
  for step in newest.checkpoints.steps():
    if step > 4:
      shutil.rmtree(newest.checkpoints.path(step))
  assert tuned(home, 'parts', '--steps', '8', '--watch.save-every', '4') == 0
  whole, parts, base = (params(home, name) for name in ('whole', 'parts', 'base'))
  assert all(np.array_equal(x, parts[path]) for path, x in whole.items())
  assert losses(home, 'whole') == losses(home, 'parts') and losses(home, 'whole')[-1] < losses(home, 'whole')[0]
  learnt = {path for path in whole if lora.is_adapter(path, None)}
  assert len(learnt) == 8 and all(np.abs(whole[path]).max() > 0 for path in learnt)
  for path, x in base.items():
    there = path if path in whole else f'{path}/w'
    np.testing.assert_array_equal(whole[there], x)
  saved = bases.newest(home / 'whole')
  stored = size(saved.checkpoints.path(saved.step))
  assert stored < 0.4 * size(bases.newest(home / 'base').checkpoints.path(6)), stored


@pytest.mark.slow
def test_another_base_is_refused(home, capsys):
  assert tuned(home, 'moved', '--steps', '2') == 0
  assert run(home, 'other', '--steps', '1', '--seed', '5') == 0
  assert run(home, 'moved', '--init', str(home / 'other'), *ADAPTERS, '--steps', '4') == 1
  line = capsys.readouterr().err.strip().splitlines()[-1]
  assert 'is not the base that the adapters were trained on' in line
  assert run(home, 'none', *ADAPTERS, '--steps', '2') == 1
  assert 'adapters need a base' in capsys.readouterr().err


@pytest.mark.slow(but='kind2')
@pytest.mark.parametrize('kind', [('--lora.dora',), ('--lora.dropout', '0.2'), ('--optim.ema-decay', '0.9')])
def test_other_kinds_load_as_they_ended(home, kind):
  name = kind[0].split('.')[-1]
  assert tuned(home, name, '--steps', '4', *kind) == 0
  found = params(home, name)
  assert all(np.isfinite(x).all() for path, x in found.items() if not path.endswith('key_L'))
  assert cli.main(['generate', str(home / name), '--prompt', 'The ', '--max-new-tokens', '4']) == 0


@pytest.mark.slow
def test_export_of_adapters_and_of_what_they_make(home, capsys):
  assert tuned(home, 'out', '--steps', '4') == 0
  assert cli.main(['export', str(home / 'out'), str(home / 'hf'), '--merge']) == 0
  assert cli.main(['export', str(home / 'out'), str(home / 'adapter')]) == 0
  base = home / 'base'
  assert f'on {base}: peft needs it as a folder, by `jaxlm export {base} DIR`' in capsys.readouterr().out
  model = foreign.as_model(home / 'out')
  merged, tokens = interop.load(str(home / 'hf')), jnp.arange(12).reshape(2, 6)
  logits = lambda cfg, params: np.asarray(models.forward(cfg, params, tokens)[0])
  want = logits(model.cfg, model.params)
  np.testing.assert_allclose(logits(merged.cfg, merged.params), want, atol=1e-5)
  again = peft.load(home / 'adapter', model.cfg, lora.base(model.params))
  np.testing.assert_allclose(logits(model.cfg, again), want, atol=1e-5)
  there = home / 'adapter' / 'adapter_config.json'
  assert json.loads(there.read_text())['base_model_name_or_path'] == str(home / 'base')
  opened = foreign.open_model(str(home / 'adapter'))  # on the base that it names, which is a run
  np.testing.assert_allclose(logits(opened.cfg, opened.params), want, atol=1e-5)
  assert cli.main(['generate', str(home / 'adapter'), '--prompt', 'The ', '--max-new-tokens', '3']) == 0
  assert cli.main(['eval', str(home / 'adapter')]) == 1
  assert 'name prepared folders with --data' in capsys.readouterr().err
  figures = [perplexity.evaluate(str(home / name), [str(home / 'data')], seq_len=29) for name in ('adapter', 'out')]
  assert figures[0].whole.nll == pytest.approx(figures[1].whole.nll, rel=1e-5) and figures[0].step == 0
  there.write_text(json.dumps(json.loads(there.read_text()) | {'base_model_name_or_path': None}))
  assert cli.main(['generate', str(home / 'adapter'), '--prompt', 'The ']) == 1
  assert 'names no base_model_name_or_path' in capsys.readouterr().err


@pytest.mark.slow
def test_adapters_on_an_import_name_what_was_imported(home, tmp_path, capsys):
  assert cli.main(['export', str(home / 'base'), str(tmp_path / 'hf')]) == 0
  assert cli.main(['import', str(tmp_path / 'hf'), '--run', str(tmp_path / 'imported')]) == 0
  assert run(home, 'on_import', '--init', str(tmp_path / 'imported'), *ADAPTERS, '--steps', '1') == 0
  assert cli.main(['export', str(home / 'on_import'), str(tmp_path / 'adapter')]) == 0
  said, named = capsys.readouterr().out, tmp_path / 'adapter' / 'adapter_config.json'
  assert f'on {tmp_path / "hf"}\n' in said
  assert json.loads(named.read_text())['base_model_name_or_path'] == str(tmp_path / 'hf')
  assert foreign.published_base(str(home / 'on_import')) is None  # it has learnt
  assert foreign.published_base('hf://ORG/NAME@v2') == ('ORG/NAME', 'v2')
  shutil.rmtree(tmp_path / 'hf')  # the run is left, and named
  assert foreign.published_base(str(tmp_path / 'imported')) is None
  assert '`jaxlm import a.gguf --run RUN` and `jaxlm export RUN DIR` first' in foreign._first('a.gguf')


def test_a_filter_trains_what_it_picks(home, capsys):
  args = ('--init', str(home / 'base'), '--steps', '3', '--optim.name', 'adamw')
  assert run(home, 'some', *args, '--trainable', 'layers/1/mlp/*,final_norm/*') == 0
  now, before = params(home, 'some'), params(home, 'base')
  changed = {path for path in now if not np.array_equal(now[path], before[path])}
  assert changed == {'final_norm/scale', 'layers/mlp/up', 'layers/mlp/gate', 'layers/mlp/down'}
  for name in ('up', 'gate', 'down'):
    same = [np.array_equal(now[f'layers/mlp/{name}'][n], before[f'layers/mlp/{name}'][n]) for n in range(3)]
    assert same == [True, False, True]
  assert run(home, 'no', *args, '--trainable', 'layer/*') == 1
  assert "trainable: 'layer/*' matches no parameter" in capsys.readouterr().err


@pytest.mark.slow
def test_a_base_may_meet_positions_otherwise(home, capsys):
  args = ('--init', str(home / 'base'), '--steps', '1')
  assert run(home, 'long', *args, '--model.max-seq-len', '4096', '--model.rope-theta', '5e4') == 0
  assert run(home, 'wide', *args, '--model.d-ff', '180') == 1
  assert 'model.d_ff is 177, not 180' in capsys.readouterr().err


@pytest.mark.slow
def test_a_foreign_model_is_a_base(home):
  assert cli.main(['export', str(home / 'base'), str(home / 'exported')]) == 0
  assert run(home, 'from_hf', '--init', str(home / 'exported'), *ADAPTERS, '--steps', '2') == 0
  assert run(home, 'from_run', '--init', str(home / 'base'), *ADAPTERS, '--steps', '2') == 0
  a, b = params(home, 'from_hf'), params(home, 'from_run')
  for path in a:
    rows = slice(307) if path in ('embed', 'head') else slice(None)  # what fills the vocabulary up is not exported
    np.testing.assert_allclose(np.asarray(a[path])[rows], b[path][rows], atol=1e-6)


@pytest.mark.slow
def test_a_run_ends_when_it_gets_no_better(home, capsys):
  """A learning rate that only harms: after two evaluations without a better loss it is over, and stays so."""
  args = ('--init', str(home / 'base'), '--watch.eval-every', '2', '--watch.patience', '2', '--steps', '40')
  args = (
    *args,
    '--optim.name',
    'adamw',
    '--optim.lr',
    '0.3',
    '--optim.clip-norm',
    'None',
    '--optim.schedule',
    'constant',
  )
  assert run(home, 'worse', *args) == 0
  rows = [row for row in metrics.read_rows(home / 'worse' / 'metrics.jsonl') if 'eval/loss' in row]
  seen = [row['eval/loss'] for row in rows]
  best = seen.index(min(seen))
  assert len(seen) == best + 3 and rows[-1]['step'] < 40, seen
  assert 'no better held-out loss for 2 evaluations' in capsys.readouterr().out
  again = bases.newest(home / 'worse').step
  assert run(home, 'worse', *args) == 0
  assert 'no better held-out loss' in capsys.readouterr().out and bases.newest(home / 'worse').step == again


@pytest.mark.slow
def test_what_was_gained_and_what_was_forgotten(home):
  """Evaluated before the first step, with text that training never sees; in the report as perplexities."""
  args = ('--init', str(home / 'base'), '--watch.eval-every', '2', '--steps', '4', '--optim.name', 'adamw')
  vocabulary = tokenizer.load(home / 'tokenizer.json')
  prepare.prepare((str(SAMPLE / 'law.jsonl'),), vocabulary, home / 'other', val_fraction=0.3)
  assert run(home, 'domain', *args, '--data.held-out', str(home / 'other')) == 0
  rows = metrics.read_rows(home / 'domain' / 'metrics.jsonl')
  evaluated = [row for row in rows if 'eval/loss' in row]
  assert [row['step'] for row in evaluated] == [0, 2, 4]
  table = {kind: figures for kind, *figures in report.gained(rows)}
  assert set(table) == {'all', 'play', 'law'}
  for kind, (before, after, change) in table.items():
    name = 'eval/loss' if kind == 'all' else f'eval/{kind}/loss'
    assert before == pytest.approx(np.exp(evaluated[0][name])) and after == pytest.approx(np.exp(evaluated[-1][name]))
    assert change == pytest.approx(after / before - 1)
  assert table['play'][2] < 0
  text = report.write(home / 'domain').read_text()
  assert 'Gained and forgotten' in text and f'{table["play"][2]:+.1%}, gained' in text
  assert 'Gained and forgotten' not in report.write(home / 'base').read_text()
