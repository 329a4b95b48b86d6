"""Sampling: the cache against the full forward pass, the distribution drawn from, and what a row depends on."""

import dataclasses
import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from conftest import EXPERTS, GPT2, LLAMA, MIXED, randomized

from jaxlm import draws, models, sample
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.models import Run
from jaxlm.models.linear import Turned
from jaxlm.sample import Sampling

pytestmark = pytest.mark.usefixtures('strict')
STYLES = {'llama': LLAMA, 'gpt2': GPT2, 'mixed': MIXED, 'experts': EXPERTS}
PROMPTS = [[5, 17, 3], [2], [11, 130, 7, 7, 101]]
NEW = 7


@cache
def forward(cfg):
  return jax.jit(lambda params, tokens: models.forward(cfg, params, tokens)[0])


def full_logits(cfg, ids):
  """Float64 logits [T, V] of one row on its own, without a cache; padded on the right so that all compile once."""
  row = np.zeros((1, 16), np.int32)
  row[0, : len(ids)] = ids
  return np.asarray(forward(cfg)(randomized(cfg), jnp.asarray(row))[0, : len(ids)], np.float64)


def log_softmax(x):
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def generate(cfg, prompts=PROMPTS, seed=0, new=NEW, **kwargs):
  out = sample.generate(cfg, randomized(cfg), prompts, jax.random.key(seed), max_new_tokens=new, **kwargs)
  return jax.tree.map(np.asarray, out)


def truncated64(logits, k=None, p=None):
  """Top-k, then top-p of what is left, one row, by sorting and walking: -inf for what is left out."""
  order = sorted(range(len(logits)), key=lambda i: -logits[i])
  kept = order[: k if k is not None else len(order)]
  if p is not None:
    weights = np.exp(np.array([logits[i] for i in kept]) - logits[kept[0]])
    mass, nucleus = 0.0, []
    for i, w in zip(kept, weights / weights.sum(), strict=True):
      if nucleus and mass >= p:
        break
      nucleus.append(i)
      mass += w
    kept = nucleus
  return np.array([x if i in kept else -np.inf for i, x in enumerate(logits)])


# --- the cache


@pytest.mark.slow(but='llama-stacked')
@pytest.mark.parametrize('form', ['stacked', 'unstacked', 'turned'])
@pytest.mark.parametrize('style', STYLES)
def test_cached_decoding_is_the_full_forward_pass(style, form):
  """Ragged prompts padded on the right with junk, then tokens one at a time, each row at its own position."""
  cfg = STYLES[style]
  params = randomized(cfg)
  if form == 'unstacked':
    params = sample.unstacked(cfg, params)
  if form == 'turned':
    params = sample.readied(cfg, params)
    assert isinstance(params['embed' if cfg.tie_embeddings else 'head'], Turned)
    assert isinstance(params['layers'][0]['attn']['q'], Turned)
  lengths = jnp.array([len(p) for p in PROMPTS], jnp.int32)
  padded = np.full((3, 6), 99, np.int32)
  for row, prompt in zip(padded, PROMPTS, strict=True):
    row[: len(prompt)] = prompt
  prefill = jax.jit(lambda *args: sample.prefill(cfg, *args, slots=6 + 4))
  decode = jax.jit(lambda params, token, *args: sample.decode(cfg, params, token[:, None], *args))
  logits, kept = prefill(params, jnp.asarray(padded), lengths)
  rows = [list(p) for p in PROMPTS]
  forced = np.random.default_rng(0).integers(0, cfg.vocab_size, (4, 3)).astype(np.int32)
  for n, tokens in enumerate(forced):
    np.testing.assert_allclose(logits, [full_logits(cfg, row)[-1] for row in rows], atol=1e-5)
    logits, kept = decode(params, jnp.asarray(tokens), lengths + n, kept)
    logits = logits[:, 0]
    rows = [[*row, int(t)] for row, t in zip(rows, tokens, strict=True)]
  np.testing.assert_allclose(logits, [full_logits(cfg, row)[-1] for row in rows], atol=1e-5)


def test_one_cpu_decodes_with_turned_matrices():
  params = sample.readied(LLAMA, randomized(LLAMA))
  assert isinstance(params['layers'][0]['mlp']['down'], Turned)


def test_the_cache_may_be_bfloat16():
  run = Run(jnp.bfloat16)
  logits, kept = sample.prefill(LLAMA, randomized(LLAMA), jnp.array([[5, 17, 3]]), jnp.array([3]), slots=5, run=run)
  assert (logits.dtype, kept[0].k.dtype) == (jnp.float32, jnp.bfloat16)


# --- generate


@pytest.mark.parametrize('temperature', [1e-300, 2e-38, 1e-37, 9e-31, 1e-29])
def test_tiny_temperatures_take_the_likeliest_token(temperature):
  """Where logits divided by them would be infinite, too."""
  logits_BV, keys = jnp.float32([[1.0, 40.0, 2.0, 90.0, 89.5]]), jax.random.split(jax.random.key(1), 1)
  for more in ({}, {'top_p_B': 0.9}):
    token_B, logp_B, sampled_B = draws.draw(logits_BV, Sampling(temperature, **more), keys)
    assert token_B[0] == 3 and sampled_B[0] == 0.0 and jnp.isfinite(logp_B[0])


@pytest.mark.slow(but='llama')
@pytest.mark.parametrize('style', STYLES)
def test_greedy_is_the_argmax_of_the_full_forward_pass(style):
  cfg = STYLES[style]
  out = generate(cfg, sampling=Sampling(temperature_B=0.0))
  for prompt, tokens, logp, sampled in zip(PROMPTS, out.tokens_BN, out.logp_BN, out.sampled_logp_BN, strict=True):
    row = list(prompt)
    for token, lp in zip(tokens, logp, strict=True):
      logits = full_logits(cfg, row)[-1]
      assert token == np.argmax(logits)
      assert lp == pytest.approx(log_softmax(logits)[token], abs=1e-4)
      row.append(int(token))
    assert not sampled.any()  # certain: log 1
  assert out.lengths_B.tolist() == [NEW] * 3 and not out.stopped_B.any()


SETTINGS = {
  'plain': {},
  'temperature': {'temperature_B': 0.7},
  'top-k': {'top_k_B': 5, 'temperature_B': 1.3},
  'top-p': {'top_p_B': 0.6},
  'both, a value a row': {
    'temperature_B': np.float32([0.5, 1.0, 2.0]),
    'top_k_B': np.int32([3, 131, 7]),
    'top_p_B': np.float32([0.9, 0.5, 0.8]),
  },
}


@pytest.mark.slow(but='plain')
@pytest.mark.parametrize('setting', SETTINGS)
def test_logprobs_are_those_of_a_full_forward_pass(setting):
  """`logp` before truncation, `sampled_logp` after it, both at the temperature (trap 7's base)."""
  how = SETTINGS[setting]
  out = generate(LLAMA, sampling=Sampling(**how))
  at = lambda name, b, other: other if how.get(name) is None else float(np.broadcast_to(how[name], 3)[b])
  for b, prompt in enumerate(PROMPTS):
    ids = [*prompt, *out.tokens_BN[b].tolist()]
    logits = full_logits(LLAMA, ids)[len(prompt) - 1 : -1] / at('temperature_B', b, 1.0)
    k, p = at('top_k_B', b, 1000), at('top_p_B', b, None)
    cut = np.stack([truncated64(row, int(k), p) for row in logits])
    took = out.tokens_BN[b][:, None]
    np.testing.assert_allclose(out.logp_BN[b], np.take_along_axis(log_softmax(logits), took, 1)[:, 0], atol=2e-5)
    np.testing.assert_allclose(out.sampled_logp_BN[b], np.take_along_axis(log_softmax(cut), took, 1)[:, 0], atol=2e-5)
  if 'top' in setting:
    assert np.all(out.sampled_logp_BN >= out.logp_BN - 1e-6) and np.any(out.sampled_logp_BN > out.logp_BN + 0.1)


def test_the_same_key_gives_the_same_tokens_and_another_key_others():
  one, again, other = (generate(LLAMA, seed=seed) for seed in (1, 1, 2))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)
  assert np.any(one.tokens_BN != other.tokens_BN)


def test_a_row_does_not_depend_on_the_others():
  others = [PROMPTS[0], [77, 1, 2, 3, 4, 5], [0, 9]]
  one, two = generate(LLAMA), generate(LLAMA, prompts=others)
  for name in ('tokens_BN', 'logp_BN', 'sampled_logp_BN'):
    np.testing.assert_array_equal(getattr(one, name)[0], getattr(two, name)[0])
  assert np.any(one.tokens_BN[1:] != two.tokens_BN[1:])


def test_equal_prompts_are_drawn_apart():
  out = generate(LLAMA, prompts=[PROMPTS[0]] * 3)
  assert len({tuple(row) for row in out.tokens_BN.tolist()}) == 3
  assert len(set(out.tokens_BN[0].tolist())) > 1  # and so is each step


def test_a_stop_id_ends_its_row_and_no_other():
  free = generate(LLAMA, seed=1)
  stop = int(free.tokens_BN[0, 2])
  assert stop not in free.tokens_BN[0, :2] and stop not in free.tokens_BN[1:], 'choose another seed'
  out = generate(LLAMA, seed=1, stop_ids=(140, stop))
  assert out.lengths_B.tolist() == [3, NEW, NEW]
  assert out.stopped_B.tolist() == [True, False, False]
  np.testing.assert_array_equal(out.tokens_BN[0, :3], free.tokens_BN[0, :3])  # the stop id is kept
  for padded in (out.tokens_BN, out.logp_BN, out.sampled_logp_BN):
    assert not padded[0, 3:].any()
  np.testing.assert_array_equal(out.tokens_BN[1:], free.tokens_BN[1:])


def words(eos):
  """A tokenizer whose token i is two letters, the first of a to k, the second of n to y; `eos` is a control token."""
  vocabulary = {chr(97 + i // 12) + chr(110 + i % 12): i for i in range(131) if i != eos} | {'<eos>': eos}
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='an'))
  inner.decoder = tokenizers.decoders.Fuse()
  inner.add_special_tokens(['<eos>'])
  return Tokenizer(inner, {'eos': '<eos>'})


@pytest.mark.slow(but='draft')
@pytest.mark.parametrize('draft', [None, sample.Lookup(3)], ids=['plain', 'draft'])
def test_a_stop_string_ends_its_row_at_the_token_that_completes_it(draft):
  """One that lies across two tokens, past the first piece; rows that do not have it go on."""
  new, tokenizer = 3 * sample.PIECE, words(eos=0)
  free = generate(LLAMA, new=new, sampling=Sampling(0.7))
  ids = free.tokens_BN[1].tolist()
  across = lambda row: [(a % 12, b // 12) for a, b in itertools.pairwise(row)]
  at = next(n for n in range(sample.PIECE + 2, new) if across(ids)[n] not in across(ids[: n + 1]))
  stop = tokenizer.decode(ids[at : at + 2])[1:3]
  how = {'new': new, 'stop': (stop, 'zz'), 'tokenizer': tokenizer}
  out = generate(LLAMA, **how, sampling=Sampling(0.7), draft=draft)
  if draft is None:
    assert out.lengths_B[1] == at + 2 and out.stopped_B[1]
    np.testing.assert_array_equal(out.tokens_BN[1, : at + 2], ids[: at + 2])
  for tokens, logp, n, stopped in zip(out.tokens_BN, out.logp_BN, out.lengths_B, out.stopped_B, strict=True):
    assert (stop in tokenizer.decode(tokens[:n].tolist())) == bool(stopped)
    assert stop not in tokenizer.decode(tokens[: n - 1].tolist())
    assert n == new or stopped
    assert not tokens[n:].any() and not logp[n:].any()


def test_a_stop_string_that_is_a_control_token_stops_at_its_id():
  free = generate(LLAMA)
  eos = int(free.tokens_BN[0, 3])
  out = generate(LLAMA, stop=('<eos>',), tokenizer=words(eos))
  assert out.lengths_B[0] == free.tokens_BN[0].tolist().index(eos) + 1 and out.stopped_B[0]


def test_stop_strings_need_a_tokenizer():
  with pytest.raises(InputError, match='stop strings need the tokenizer'):
    generate(LLAMA, stop=('x',))


def test_padded_vocabulary_is_never_drawn():
  out = generate(GPT2, prompts=[[1]] * 3, sampling=Sampling(temperature_B=1e6))  # all but uniform
  assert out.tokens_BN.max() < GPT2.vocab_size


@pytest.mark.parametrize('prompts', [[], [[1], []]])
def test_an_empty_prompt_is_refused(prompts):
  with pytest.raises(InputError, match='at least one token'):
    generate(LLAMA, prompts=prompts)


def test_ids_that_the_model_does_not_have_are_refused():
  with pytest.raises(InputError, match='the prompts have the id 131, and the model 131 tokens'):
    generate(LLAMA, prompts=[[1], [5, 131]])


def test_learned_positions_end():
  with pytest.raises(InputError, match="5 \\+ 57 tokens exceed the model's 61 positions"):
    generate(GPT2, new=57)


def test_learned_positions_reach_to_the_last():
  cfg = dataclasses.replace(GPT2, max_seq_len=12)
  params = {**randomized(GPT2), 'positions': randomized(GPT2)['positions'][:12]}
  out = sample.generate(
    cfg, params, PROMPTS, jax.random.key(0), max_new_tokens=NEW, sampling=Sampling(temperature_B=0.0)
  )
  np.testing.assert_array_equal(out.tokens_BN, generate(GPT2, sampling=Sampling(temperature_B=0.0)).tokens_BN)


# --- one draw

RNG = np.random.default_rng(23)
LOGITS = (2.0 * RNG.normal(size=(5, 13))).astype(np.float32)


@pytest.mark.parametrize('k', [None, 1, 3, 13, 50])
@pytest.mark.parametrize('p', [None, 0.0, 0.3, 0.9, 1.0])
def test_truncation_against_numpy(k, p):
  got = np.asarray(draws.truncate(jnp.asarray(LOGITS), Sampling(top_k_B=k, top_p_B=p)))
  expected = np.stack([truncated64(row.astype(np.float64), k, p) for row in LOGITS])
  np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
  np.testing.assert_array_equal(got[np.isfinite(got)], LOGITS[np.isfinite(got)])


def test_top_p_of_1_leaves_nothing_out_of_a_large_vocabulary():
  logits = jnp.asarray(10 * np.random.default_rng(0).normal(size=(3, 50021)), jnp.float32)  # rounding: 400 were left
  np.testing.assert_array_equal(draws.truncate(logits, Sampling(top_p_B=1.0)), logits)


def test_truncation_may_differ_by_row():
  k, p = [1, 2, 3, 5, 13], [1.0, 0.2, 0.9, 0.5, 0.7]
  got = np.asarray(draws.truncate(jnp.asarray(LOGITS), Sampling(top_k_B=jnp.array(k), top_p_B=jnp.array(p))))
  expected = np.stack([truncated64(row.astype(np.float64), a, b) for row, a, b in zip(LOGITS, k, p, strict=True)])
  np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))


def test_a_row_is_drawn_with_its_own_key():
  keys, sampling = jax.random.split(jax.random.key(3), 5), Sampling(temperature_B=jnp.linspace(0.5, 2.0, 5))
  turned = np.array([3, 0, 4, 1, 2])
  token_B, *_ = draws.draw(jnp.asarray(LOGITS), sampling, keys)
  again = draws.draw(jnp.asarray(LOGITS[turned]), Sampling(sampling.temperature_B[turned]), keys[turned])
  np.testing.assert_array_equal(again[0], token_B[turned])


@pytest.mark.parametrize(
  'how, critical',
  # the values that chi-square with 12, 12, 4 and few degrees of freedom passes once in ten thousand
  [({}, 39.1), ({'temperature_B': 2.5}, 39.1), ({'top_k_B': 5}, 23.5), ({'top_p_B': 0.8}, 23.5)],
  ids=['plain', 'temperature', 'top-k', 'top-p'],
)
def test_draws_follow_the_distribution(how, critical):
  n = 20011
  rows = jnp.broadcast_to(jnp.asarray(LOGITS[1]), (n, 13))
  tokens, logp, sampled_logp = jax.jit(draws.draw)(rows, Sampling(**how), jax.random.split(jax.random.key(0), n))
  scaled = LOGITS[1].astype(np.float64) / how.get('temperature_B', 1.0)
  cut = truncated64(scaled, how.get('top_k_B'), how.get('top_p_B'))
  expected, counts = n * np.exp(log_softmax(cut)), np.bincount(tokens, minlength=13)
  assert not counts[expected == 0].any()
  alive = expected > 0
  assert np.sum((counts - expected)[alive] ** 2 / expected[alive]) < critical
  np.testing.assert_allclose(logp, log_softmax(scaled)[tokens], atol=1e-5)
  np.testing.assert_allclose(sampled_logp, log_softmax(cut)[tokens], atol=1e-5)


def test_a_draw_is_that_of_categorical_and_the_first_of_equals():
  logits = np.random.default_rng(0).normal(size=(7, 131)).astype(np.float32)
  logits[:, ::3], logits[3] = -np.inf, 0.0
  keys = jax.random.split(jax.random.key(2), 7)
  np.testing.assert_array_equal(
    draws.drawn(jnp.asarray(logits), keys), jax.vmap(jax.random.categorical)(keys, jnp.asarray(logits))
  )
  ties = np.round(logits)
  np.testing.assert_array_equal(draws.likeliest(jnp.asarray(ties)), ties.argmax(axis=1))
