"""Answers are learnt with their end, at the positions that a hand would write, where padding is the same token."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import models, objectives, sample
from jaxlm.data import chat, packing, prepare, prepared, tokenizer, turns
from jaxlm.evals import tasks
from jaxlm.losses import lm
from jaxlm.models import ModelConfig, Run
from jaxlm.train import state, step

ASKED = {'red': 'apples are', 'blue': 'the sea is so', 'grey': 'elephants'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Three questions in the plain template, of a tokenizer that pads with what ends a text."""
  home = tmp_path_factory.mktemp('traps')
  t = tokenizer.train(['What is red? apples are blue the sea is so grey elephants ###'] * 9, 300)
  t = tokenizer.Tokenizer(t.inner, t.names | {'pad': t.names['eos']})
  assert t.pad_id == t.eos_id
  rows = [{'prompt': f'What is {colour}?', 'response': answer} for colour, answer in ASKED.items()]
  (home / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  _, t, how = prepare.chat_of('plain', None, t)
  prepare.prepare([str(home / 'rows.jsonl')], t, home / 'data', val_fraction=0.0, chat=how)
  return prepared.load(home / 'data')


def batch_of(folder, seq_len=61):
  rows = packing.rows('best_fit', folder.split('train'), seq_len, folder.tokenizer)
  return {name: jnp.stack([rows[i][name] for i in range(len(rows))]) for name in rows[0]}


def test_the_gradient_by_logits_is_at_the_answers_and_their_ends(folder):
  batch, t = batch_of(folder), folder.tokenizer
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(*batch['tokens'].shape, t.vocab_size)), jnp.float32)
  grad = jax.grad(lambda l: lm.next_token(l, batch['targets'], batch['loss_mask']).total)(logits)
  there = np.abs(np.asarray(grad)).max(-1) > 0
  wanted = np.zeros_like(there)
  tokens, targets = np.asarray(batch['tokens']), np.asarray(batch['targets'])
  for answer in ASKED.values():  # by hand: after the heading, the answer's tokens and the end that stands in the text
    said = [*t.inner.encode(answer, add_special_tokens=False).ids, t.eos_id]
    head = t.inner.encode('### Response:\n', add_special_tokens=False).ids[-1]
    places = [
      (row, at)
      for row, line in enumerate(targets)
      for at in range(len(line) - len(said) + 1)
      if line[at : at + len(said)].tolist() == said and tokens[row, at] == head
    ]
    assert len(places) == 1, answer
    row, at = places[0]
    wanted[row, at : at + len(said)] = True
  np.testing.assert_array_equal(there, wanted)
  padding = np.asarray(batch['segment_ids']) == 0
  assert (tokens[padding] == t.eos_id).all() and padding.any() and not there[padding].any()


def test_an_overfit_model_stops(folder):
  t = folder.tokenizer
  cfg = ModelConfig(vocab_size=t.vocab_size, d_model=64, n_layers=2, n_heads=2, d_ff=128)
  optimizer = optax.adam(3e-3)
  train = jax.jit(step.make_train_step(objectives.next_token(cfg, Run()), optimizer))
  now, batch = state.create(models.init(cfg, jax.random.key(0)), optimizer, jax.random.key(1)), batch_of(folder)
  for _ in range(120):
    now, metrics = train(now, batch)
  assert metrics['loss'] < 0.02
  _, plain = turns.choose('plain', None)
  prompts = [chat.encode(plain, [{'role': 'user', 'content': f'What is {c}?'}], t, generation=True) for c in ASKED]
  out = sample.generate(
    cfg, now.params, prompts, jax.random.key(0), max_new_tokens=40, sampling=tasks.GREEDY, stop_ids=(t.eos_id,)
  )
  assert np.asarray(out.stopped_B).all()
  said = [t.decode(row[: n - 1].tolist()) for row, n in zip(np.asarray(out.tokens_BN), out.lengths_B, strict=True)]
  assert said == list(ASKED.values())
