"""The loss that a rollout is learnt by, every term of it, against NumPy: its value and its gradient by both heads."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_oracle
from conftest import LLAMA, randomized

from jaxlm import episodic, masked
from jaxlm.models import Run
from jaxlm.rl.algorithms import ALGORITHMS

B, T, TEMPERATURE, LONGEST = 5, 7, 0.7, 11
WEIGHTS = {'kl_coef': 0.3, 'entropy_coef': 0.17, 'value_coef': 0.7, 'value_clip': 0.13}
RNG = np.random.default_rng(19)
ON = (np.arange(T) >= np.array([[2], [3], [5], [0], [1]])) & (np.arange(T) < np.array([[7], [5], [7], [4], [6]]))


def moved(x, by):
  """Something near, that is NaN where nothing may be read."""
  return np.where(ON, x + RNG.normal(0.0, by, x.shape), np.nan).astype(np.float32)


@pytest.mark.parametrize('algo', ALGORITHMS)
def test_the_loss_and_its_gradient(algo):
  params = {**randomized(LLAMA), 'value': jnp.asarray(RNG.normal(size=LLAMA.d_model), jnp.float32)}
  batch = {'tokens': RNG.integers(3, 131, (B, T), np.int32), 'targets': RNG.integers(3, 131, (B, T), np.int32)}
  batch |= {'loss_mask': ON.astype(np.float32), 'segment_ids': np.ones((B, T), np.int32)}
  batch['positions'] = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  x, log_all, values = rl_oracle.read(LLAMA, params, batch['tokens'], TEMPERATURE)
  logp = np.take_along_axis(log_all, batch['targets'][..., None], -1)[..., 0]
  one_a_row = RNG.normal(size=(B, 1)) * np.ones((B, T))
  batch |= {'old_logp': moved(logp, 0.3 if algo != 'gspo' else 3e-3), 'ref_logp': moved(logp, 0.5)}
  batch |= {'values': moved(values, 0.3), 'returns': moved(values, 0.5), 'sampled_logp': batch['old_logp']}
  batch['advantages'] = moved(one_a_row, 0.0)
  want, by_z, by_value = rl_oracle.loss(algo, log_all, values, batch, longest=LONGEST, **WEIGHTS)

  learn = episodic.learn(LLAMA, Run(), ALGORITHMS[algo], temperature=TEMPERATURE, longest=LONGEST, **WEIGHTS)

  def loss(params):
    found, metrics = learn(params, {name: jnp.asarray(one) for name, one in batch.items()}, jax.random.key(0))
    return found.total / found.weight, metrics

  (got, seen), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  assert float(got) == pytest.approx(want, rel=2e-5)
  assert 0 < float(seen['policy/clip_fraction'].total) < ON.sum() or algo == 'cispo'
  entropy = -(np.exp(log_all) * log_all).sum(-1)[ON].mean()
  assert float(masked.value(seen['policy/entropy'])) == pytest.approx(entropy, rel=1e-4)
  if ALGORITHMS[algo].valued:
    explained = 1 - np.var((batch['returns'] - values)[ON]) / np.var(batch['returns'][ON])
    assert float(masked.value(seen['value/explained_variance'])) == pytest.approx(explained, rel=1e-4)
  by_head = np.einsum('btd,btv->dv', x, by_z) / TEMPERATURE
  np.testing.assert_allclose(grads['head'][:, : LLAMA.vocab_size], by_head, atol=2e-5 * np.abs(by_head).max())
  if by_value is not None:
    assert (by_value[ON] == 0).any() and (by_value[ON] != 0).any()
    want_value = np.einsum('btd,bt->d', x, by_value)
    np.testing.assert_allclose(grads['value'], want_value, atol=2e-5 * np.abs(want_value).max())


@pytest.mark.slow
def test_logits_of_the_answers_alone_teach_the_same():
  """Answers at the beginning, in the middle, at the end, of one token, and none."""
  params = {**randomized(LLAMA), 'value': jnp.asarray(RNG.normal(size=LLAMA.d_model), jnp.float32)}
  batch = {name: RNG.integers(3, 131, (B, T), np.int32) for name in ('tokens', 'targets')}
  mask = np.zeros((B, T), np.float32)
  for row, (start, count) in enumerate([(0, 3), (2, 2), (4, 3), (6, 1), (0, 0)]):
    mask[row, start : start + count] = 1
  batch |= {
    'loss_mask': mask,
    'segment_ids': np.ones((B, T), np.int32),
    'positions': np.tile(np.arange(T, dtype=np.int32), (B, 1)),
  }
  batch |= {name: RNG.normal(size=(B, T)).astype(np.float32) for name in ('advantages', 'values', 'returns')}
  batch |= {name: -RNG.random((B, T), np.float32) - 4 for name in ('ref_logp', 'sampled_logp')}

  def taught(places):
    how = {'temperature': TEMPERATURE, 'places': places}
    learn = episodic.learn(LLAMA, Run(), ALGORITHMS['ppo'], longest=LONGEST, **WEIGHTS, **how)
    given = {name: jnp.asarray(x) for name, x in batch.items()}
    loss = lambda params: (lambda found, more: (found.total / found.weight, more))(
      *learn(params, given | {'old_logp': given['sampled_logp']}, None)
    )
    seen = episodic.read(LLAMA, Run(), valued=True, **how)(params, given)
    return jax.value_and_grad(loss, has_aux=True)(params), {name: x * mask for name, x in seen.items()}

  chex.assert_trees_all_close(taught(3), taught(None), rtol=2e-5, atol=1e-6)
