"""Speculative decoding is lossless: greedy tokens are the same, sampled ones are distributed the same."""

import dataclasses
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXPERTS, GPT2, LLAMA, MIXED, randomized
from scipy import stats

from jaxlm import draws, models, sample, speculate
from jaxlm.errors import InputError
from jaxlm.sample import Draft, Lookup, Sampling

pytestmark = pytest.mark.usefixtures('strict')
STYLES = {'llama': LLAMA, 'gpt2': GPT2, 'mixed': MIXED, 'experts': EXPERTS}
PROMPTS = [[5, 17, 3], [2], [11, 130, 7, 7, 101]]
NEW = 13


def small(cfg, **changes):
  """A draft model of its own shape and weights, for the vocabulary of `cfg`."""
  cfg = dataclasses.replace(cfg, **{'n_layers': 2, 'd_ff': 13, **changes})
  return cfg, randomized(cfg, seed=9)


def drafts(cfg):
  return {'look-up': Lookup(5, 2), 'itself': Draft(cfg, randomized(cfg), 3), 'another': Draft(*small(cfg), 4)}


def generate(cfg, prompts=PROMPTS, new=NEW, **kwargs):
  out = sample.generate(cfg, randomized(cfg), prompts, jax.random.key(3), max_new_tokens=new, **kwargs)
  return jax.tree.map(np.asarray, out)


# --- greedy


@pytest.mark.slow(but='llama-look-up')
@pytest.mark.parametrize('kind', ['look-up', 'itself', 'another'])
@pytest.mark.parametrize('style', STYLES)
def test_greedy_tokens_are_the_same(style, kind):
  """Beyond the window of the local layers, in ragged rows, one of which stops early."""
  cfg = STYLES[style]
  plain = generate(cfg, sampling=Sampling(0.0))
  stop = (int(plain.tokens_BN[1, 6]),)
  for stop_ids in ((), stop):
    want = generate(cfg, sampling=Sampling(0.0), stop_ids=stop_ids)
    got = generate(cfg, sampling=Sampling(0.0), stop_ids=stop_ids, draft=drafts(cfg)[kind])
    for name in ('tokens_BN', 'lengths_B', 'stopped_B', 'sampled_logp_BN'):
      np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    np.testing.assert_allclose(got.logp_BN, want.logp_BN, atol=1e-4)
    assert (want.passes_B == want.lengths_B - 1).all()
    assert (got.passes_B <= want.passes_B).all()
    if kind == 'itself' and not stop_ids:
      assert got.passes_B.tolist() == [3, 3, 3]  # 12 tokens after the first, 4 a pass


@pytest.mark.slow(but='itself')
@pytest.mark.parametrize('kind', ['look-up', 'itself', 'another'])
def test_greedy_tokens_are_the_same_up_to_the_last_learned_position(kind):
  """Drafts reach beyond it, and what is there may not spoil the rest."""
  new = GPT2.max_seq_len - max(map(len, PROMPTS))
  want = generate(GPT2, new=new, sampling=Sampling(0.0))
  got = generate(GPT2, new=new, sampling=Sampling(0.0), draft=drafts(GPT2)[kind])
  np.testing.assert_array_equal(got.tokens_BN, want.tokens_BN)
  np.testing.assert_allclose(got.logp_BN, want.logp_BN, atol=1e-4)


@pytest.mark.slow
def test_looking_up_saves_passes_where_a_text_repeats_itself():
  prompt = [5, 17, 3, 40, 41] * 4
  params = randomized(LLAMA)
  params = {**params, 'layers': jax.tree.map(jnp.zeros_like, params['layers'])}  # a bigram: it will go round
  how = {'max_new_tokens': 41, 'sampling': Sampling(0.0)}
  want = sample.generate(LLAMA, params, [prompt], jax.random.key(0), **how)
  got = sample.generate(LLAMA, params, [prompt], jax.random.key(0), draft=Lookup(6), **how)
  np.testing.assert_array_equal(got.tokens_BN, want.tokens_BN)
  assert len(set(want.tokens_BN[0, 20:].tolist())) < 20, 'it does not repeat itself: choose other weights'
  assert int(got.passes_B[0]) < 20 < int(want.passes_B[0])


# --- sampled

FEW = dataclasses.replace(MIXED, vocab_size=11, n_layers=2)


def near(cfg):
  """A draft model that is often, and not always, of the same mind."""
  other = randomized(cfg, seed=9)
  return Draft(cfg, jax.tree.map(lambda a, b: a + 0.1 * b, randomized(cfg), other), 2)


SETTINGS = {
  'plain': Sampling(0.8),
  'top-k': Sampling(1.3, 3),
  'top-p and min-p': Sampling(2.0, 5, 0.9, 0.3),
  'penalty': Sampling(1.5, 3, repetition_B=1.7),
}


def exact(cfg, prompt, sampling, new):
  """{continuation: probability}, by the model's full forward pass over every one of them."""
  found = {(): 1.0}
  for _ in range(new):
    heads = list(found)
    rows = jnp.asarray([[*prompt, *head] for head in heads], jnp.int32)
    logits_BV = models.forward(cfg, randomized(cfg), rows)[0][:, -1]
    seen_BV = jnp.zeros(logits_BV.shape, bool).at[jnp.arange(len(rows))[:, None], rows].set(True)
    chances_BV = np.exp(np.asarray(draws.log_chances(logits_BV, sampling, seen_BV), np.float64))
    found = {
      (*head, int(token)): found[head] * row[token]
      for head, row in zip(heads, chances_BV, strict=True)
      for token in np.flatnonzero(row)
    }
  return found


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['look-up', 'near'])
@pytest.mark.parametrize('setting', SETTINGS)
def test_sampled_continuations_are_distributed_the_same(setting, kind):
  """Chi-square over all continuations of three tokens."""
  sampling, prompt, rows = SETTINGS[setting], [5, 9, 5], 5003
  draft = {'look-up': Lookup(3, 2), 'near': near(FEW)}[kind]
  out = generate(FEW, [prompt] * rows, 3, sampling=sampling, draft=draft)
  want = exact(FEW, prompt, sampling, 3)
  tokens, counts = np.unique(out.tokens_BN, axis=0, return_counts=True)
  got = dict(zip(map(tuple, tokens.tolist()), counts, strict=True))
  assert got.keys() <= want.keys()
  often = [key for key, p in want.items() if p * rows >= 8]
  expected, seen = ([count[key] for key in often] for count in ({k: p * rows for k, p in want.items()}, Counter(got)))
  if sum(expected) < rows - 8:
    expected, seen = [*expected, rows - sum(expected)], [*seen, rows - sum(seen)]
  assert len(often) > 5
  chi = sum((s - e) ** 2 / e for s, e in zip(seen, expected, strict=True))
  assert chi < stats.chi2.ppf(1 - 1e-4, len(expected) - 1), (chi, len(expected))
  assert 1.02 < out.passes_B.mean() < 1.98, out.passes_B.mean()  # some drafts stood, and some fell


@pytest.mark.slow
def test_the_logprobs_are_of_the_full_forward_pass():
  sampling = Sampling(0.8, 40)
  out = generate(MIXED, sampling=sampling, draft=Draft(*small(MIXED), 3))
  for prompt, tokens, logp, cut in zip(PROMPTS, out.tokens_BN, out.logp_BN, out.sampled_logp_BN, strict=True):
    ids = jnp.asarray([[*prompt, *tokens.tolist()]], jnp.int32)
    logits_NV = models.forward(MIXED, randomized(MIXED), ids)[0][0, len(prompt) - 1 : -1]
    token_N = jnp.asarray(tokens)
    np.testing.assert_allclose(logp, draws.pick(draws.log_model(logits_NV, sampling), token_N), atol=2e-5)
    np.testing.assert_allclose(cut, draws.pick(draws.log_chances(logits_NV, sampling), token_N), atol=2e-5)


@pytest.mark.slow(but='look-up')
@pytest.mark.parametrize('kind', ['look-up', 'another'])
def test_a_row_depends_on_its_prompt_and_key_alone(kind):
  draft = drafts(LLAMA)[kind]
  one, two = (generate(LLAMA, [PROMPTS[0], other], draft=draft) for other in ([9], [77, 1, 2, 3]))
  np.testing.assert_array_equal(one.tokens_BN[0], two.tokens_BN[0])
  seeded = [generate(LLAMA, prompts, sampling=Sampling(seed_B=np.int32(seeds)), draft=draft)
            for prompts, seeds in ((PROMPTS, [1, 2, 3]), (PROMPTS[::-1], [3, 2, 1]))]  # fmt: skip
  np.testing.assert_array_equal(seeded[0].tokens_BN, seeded[1].tokens_BN[::-1])


def test_settings_may_differ_by_row():
  sampling = Sampling(np.float32([0.0, 1.0, 0.0]), np.int32([1, 50, 7]))
  out = generate(LLAMA, sampling=sampling, draft=Lookup(4))
  greedy = generate(LLAMA, sampling=Sampling(0.0))
  np.testing.assert_array_equal(out.tokens_BN[[0, 2]], greedy.tokens_BN[[0, 2]])
  assert (out.tokens_BN[1] != greedy.tokens_BN[1]).any()


# --- the parts

P = np.array([0.5, 0.2, 0.0, 0.2, 0.1])
QS = {'other': [0.1, 0.1, 0.3, 0.4, 0.1], 'one': [0, 0, 0, 1, 0], 'none of it': [0, 0, 1, 0, 0], 'same': P}


@pytest.mark.parametrize('q', QS)
def test_accepted_tokens_are_distributed_as_the_model_says(q):
  """One drafted token of q against p, then a certain second distribution after it."""
  n, key = 20011, jax.random.key(1)
  with np.errstate(divide='ignore'):
    logp, logq = np.log(P).astype(np.float32), np.log(np.array(QS[q])).astype(np.float32)
  after = np.log(np.eye(5)[4] + 1e-30).astype(np.float32)
  over = lambda x: jnp.broadcast_to(jnp.asarray(x), (n, *x.shape))
  drafted_B = draws.drawn(over(logq), jax.random.split(jax.random.fold_in(key, 1), n))
  tokens, counts = speculate.accept(
    over(np.stack([logp, after])), drafted_B[:, None], over(logq[None]), jax.random.split(key, n)
  )
  first = np.bincount(np.asarray(tokens[:, 0]), minlength=5)
  assert not first[2]
  alive = P > 0
  assert np.sum((first - n * P)[alive] ** 2 / (n * P)[alive]) < stats.chi2.ppf(1 - 1e-4, 3)
  stood = np.asarray(counts) == 2
  assert stood.mean() == pytest.approx(np.minimum(P, QS[q]).sum(), abs=0.02)
  assert (np.asarray(tokens)[stood, 1] == 4).all()
  assert (np.asarray(tokens)[stood, 0] == np.asarray(drafted_B)[stood]).all()


@pytest.mark.parametrize(
  'text, want',
  [
    ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1, 2]),  # the whole n-gram
    ([7, 2, 3, 4, 9, 2, 3, 6, 8, 2, 3], [6, 8, 2, 3]),  # the latest of two
    ([1, 2, 3, 4, 9, 2, 3, 6, 1, 2, 3], [4, 9, 2, 3]),  # the longest before the latest
    ([5, 6, 5, 6], [5, 6, 5, 6]),  # round and round
    ([4, 4], [4, 4, 4, 4]),
  ],
)
def test_what_is_looked_up(text, want):
  padded = np.zeros((1, 17), np.int32)
  padded[0, : len(text)] = text
  got = speculate.look_up(jnp.asarray(padded), jnp.array([len(text) - 1], jnp.int32), Lookup(4, 3))
  assert got[0].tolist() == want


def test_one_token_alone_drafts_something():
  got = speculate.look_up(jnp.array([[3, 0, 0, 0]], jnp.int32), jnp.array([0], jnp.int32), Lookup(4, 3))
  assert got.shape == (1, 4)


def test_a_draft_model_of_another_vocabulary_is_refused():
  with pytest.raises(InputError, match='the draft model has 137 tokens, and the model 131'):
    generate(LLAMA, draft=Draft(GPT2, randomized(GPT2)))


def test_a_draft_model_s_learned_positions_end_too():
  cfg, params = small(GPT2, vocab_size=131, max_seq_len=17)
  with pytest.raises(InputError, match="5 \\+ 13 tokens exceed the model's 17 positions"):
    generate(LLAMA, draft=Draft(cfg, params))


@pytest.mark.slow
def test_drafts_do_not_recompile():
  lengths = []
  for prompts, draft in itertools.product((PROMPTS, PROMPTS[::-1]), (Lookup(4), Lookup(4))):
    generate(LLAMA, prompts, draft=draft)
    lengths.append(sample.advance._cache_size())
  assert len(set(lengths)) == 1
