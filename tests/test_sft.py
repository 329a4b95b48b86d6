"""Instruction tuning of a tiny run: rows made ready, new tokens, what is learned, answers scored, talked with."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LLAMA, randomized
from tiny_run import furnish

from jaxlm import cli, models, sharding, tree
from jaxlm.data import packing, prepared
from jaxlm.evals import tasks
from jaxlm.loops import bases, writing
from jaxlm.train import metrics

ROWS = [
  {'question': f'What is {a} and {b}?', 'answer': f'{a} {b}.'} for a in ('red', 'green', 'blue') for b in range(30)
]
ALL = (
  '--lora.rank',
  '0',
  '--data.seq-len',
  '64',
  '--data.global-batch',
  '8',
  '--optim.lr',
  '3e-3',
  '--chat.val-fraction',
  '0.2',
)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  home = furnish(tmp_path_factory.mktemp('sft'))
  args = ('--run', str(home / 'base'), '--steps', '8', '--data.global-batch', '8')
  assert cli.main(['pretrain', str(home / 'tiny.py'), *args]) == 0
  (home / 'rows.jsonl').write_text('\n'.join(map(json.dumps, ROWS)))
  return home


def sft(home, name, *args):
  rows = ('--init', str(home / 'base'), '--data.path', str(home / 'rows.jsonl'))
  return cli.main(['sft', *rows, '--run', str(home / name), *ALL, *args])


def losses(home, name, what='train/loss'):
  return [row[what] for row in metrics.read_rows(home / name / 'metrics.jsonl') if what in row]


@pytest.fixture(scope='module')
def tuned(home):
  args = ('--epochs', '20', '--watch.eval-every', '20', '--optim.warmup-steps', '5', '--optim.schedule', 'constant')
  assert sft(home, 'tuned', *args) == 0
  return home / 'tuned'


@pytest.mark.slow
def test_answers_are_learnt_and_end(home, tuned, capsys):
  """The control tokens are new to the base; after it, answers stop by themselves and are right more often."""
  assert losses(home, 'tuned', 'eval/loss')[-1] < 0.45 * losses(home, 'tuned', 'eval/loss')[0]
  folder = prepared.load(tuned / 'data')
  asked = tasks.examples(folder, 6)
  assert len(asked) == 6 and all('assistant' in folder.tokenizer.decode(e.prompt) for e in asked)
  assert cli.main(['eval', str(tuned), '--tasks', '6', '--max-new-tokens', '24']) == 0
  out = capsys.readouterr().out
  rows = [json.loads(line) for line in (tuned / 'answers.jsonl').read_text().splitlines()]
  assert len(rows) == len(asked) and 'exact match' in out
  assert np.mean([len(next(iter(row['answers'].values()))) < 20 for row in rows]) > 0.5  # they stop
  assert json.loads((tuned / 'generation_config.json').read_text())['eos_token_id']
  assert '<|im_start|>' in (tuned / 'chat_template.jinja').read_text()


def test_only_answers_have_a_loss(tuned):
  folder = prepared.load(tuned / 'data')
  tokens = folder.split('train')
  starts = tokens.document_starts()
  for a, b in zip(starts[:5].tolist(), starts[1:6].tolist(), strict=True):
    ids, _ = tokens.read(a, b)
    said = folder.tokenizer.decode([int(i) for i in ids[tokens.learned(a, b)]])
    asked = folder.tokenizer.decode([int(i) for i in ids[~tokens.learned(a, b)]])
    assert said.strip() in {row['answer'] for row in ROWS} and 'What is' in asked and 'What is' not in said


def test_epochs_are_steps_and_the_run_goes_on(home, tuned):
  config = bases.newest(tuned).config
  folder = prepared.load(tuned / 'data')
  rows = packing.rows('best_fit', folder.split('train'), 64, folder.tokenizer)
  assert config.steps == -(-20 * len(rows) // 8) == metrics.read_rows(tuned / 'metrics.jsonl')[-1]['step']
  before = losses(home, 'tuned')
  args = ('--epochs', '20', '--watch.eval-every', '20', '--optim.warmup-steps', '5', '--optim.schedule', 'constant')
  assert sft(home, 'tuned', *args) == 0  # at its end: nothing happens
  assert losses(home, 'tuned') == before


@pytest.mark.slow
def test_a_warm_up_longer_than_the_epochs_is_told(home, capsys):
  assert sft(home, 'few', '--epochs', '0.3', '--optim.warmup-steps', '99', '--watch.eval-every', '0') == 0
  steps = bases.newest(home / 'few').config.steps
  assert f'epochs of these rows: optim.warmup_steps is {steps // 2}, not 99' in capsys.readouterr().out
  assert bases.newest(home / 'few').config.optim.warmup_steps == steps // 2


@pytest.mark.slow
def test_new_tokens_that_could_not_be_learnt_are_refused(home, capsys):
  adapters = ('--lora.rank', '2', '--steps', '4', '--epochs', '0', '--optim.warmup-steps', '0')
  assert sft(home, 'frozen', *adapters) == 1
  assert 'would never be learnt: add --lora.also embed,head' in capsys.readouterr().err
  assert sft(home, 'also', *adapters, '--lora.also', 'embed') == 0
  assert cli.main(['export', str(home / 'also'), str(home / 'for_peft')]) == 1  # it has no place for the embedding
  assert 'embed learned too' in capsys.readouterr().err and not (home / 'for_peft').exists()
  new, old = (dict(tree.items(writing.load(home / name)[1])) for name in ('also', 'base'))
  assert np.abs(new['embed'][:307] - old['embed'][:307]).max() > 0
  np.testing.assert_array_equal(new['layers/attn/q/w'], old['layers/attn/q'])


def test_what_sft_needs_is_said(home, capsys):
  assert cli.main(['sft', '--run', str(home / 'x'), '--data.path', str(home / 'rows.jsonl')]) == 1
  assert 'set --init' in capsys.readouterr().err
  assert cli.main(['sft', '--run', str(home / 'x'), '--init', str(home / 'base')]) == 1
  assert 'needs --data.path' in capsys.readouterr().err


def test_a_fault_stops_the_run_with_the_row_shown(home, capsys):
  endless = home / 'endless.jinja'
  endless.write_text('{% for m in messages %}{{ m.role }}: {{ m.content }} .{% endfor %}')
  assert sft(home, 'endless', '--chat.template', str(endless)) == 1
  out, err = capsys.readouterr()
  assert 'no token ends the turn' in err and out.count('-- segment') == 1 and 'user: What is' in out
  assert not (home / 'endless' / 'checkpoints').exists()


@pytest.mark.slow(but='False')
@pytest.mark.parametrize('tied', [True, False])
def test_a_grown_vocabulary_begins_as_the_mean(tied):
  cfg = dataclasses.replace(
    LLAMA, vocab_size=131, tie_embeddings=tied, d_model=16, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24
  )
  params = randomized(cfg)
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  layout = sharding.state_shardings(models.abstract(cfg), mesh)
  for size in (133, 300):  # within what fills the old one up, and beyond
    new, grown = models.grow(cfg, jax.device_put(params, layout), size)
    assert new.vocab_size == size and grown['embed'].shape == (new.padded_vocab, 16)
    np.testing.assert_array_equal(grown['embed'][:131], params['embed'][:131])
    mean = np.asarray(params['embed'][:131]).mean(0)
    np.testing.assert_allclose(grown['embed'][131:size], np.broadcast_to(mean, (size - 131, 16)), rtol=1e-5, atol=1e-6)
    tokens = jnp.arange(10).reshape(2, 5)
    old, now = models.forward(cfg, params, tokens)[0], models.forward(new, grown, tokens)[0]
    np.testing.assert_allclose(now[..., :131], old, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(now[..., 131:], np.repeat(np.mean(old, -1, keepdims=True), size - 131, -1), atol=1e-3)
  with pytest.raises(ValueError, match='does not shrink'):
    models.grow(cfg, params, 100)
