"""Importance weights in the objective of reinforcement learning: 1 on one's own answers, NumPy's on others', capped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LLAMA, randomized

from jaxlm import episodic, masked
from jaxlm.config import Rl
from jaxlm.errors import InputError
from jaxlm.models import Run
from jaxlm.rl import algorithms

B, T, CAP = 3, 7, 1.3
RNG = np.random.default_rng(6)
MASK = (np.arange(T) >= np.array([[2], [3], [5]])).astype(np.float32)
BATCH = {
  'tokens': RNG.integers(3, 131, (B, T)),
  'targets': RNG.integers(3, 131, (B, T)),
  'loss_mask': MASK,
  'segment_ids': np.ones((B, T), np.int32),
  'positions': np.broadcast_to(np.arange(T), (B, T)),
  'advantages': RNG.normal(size=(B, 1)).astype(np.float32) * np.ones((B, T), np.float32),
}


def arrays(batch):
  return {name: jnp.asarray(x) for name, x in batch.items()}


def old_logp(params):
  return np.asarray(jax.jit(episodic.read(LLAMA, Run(), temperature=1.0))(params, arrays(BATCH))['old_logp'])


def learnt(algo, params, batch, **how):
  """(loss, metrics, gradient)."""
  loss_fn = episodic.learn(LLAMA, Run(), algorithms.by_name(algo), temperature=1.0, longest=5, **how)

  def of(params):
    loss, found = loss_fn(params, arrays(batch), jax.random.key(0))
    return loss.total / loss.weight, found

  (loss, found), grads = jax.jit(jax.value_and_grad(of, has_aux=True))(params)
  return float(loss), {name: float(masked.value(one)) for name, one in found.items()}, grads


def weights(old, sampled, level):
  """By loops."""
  found = np.zeros((B, T))
  for b in range(B):
    on = [t for t in range(T) if MASK[b, t]]
    logs = [float(old[b, t]) - float(sampled[b, t]) for t in on]
    for t, log in zip(on, logs, strict=True):
      found[b, t] = min(np.exp(log if level == 'token' else sum(logs)), CAP)
  return found


FIRST, LATER = (), ('old_logp',)  # what the batch of an update of a rollout has more


@pytest.mark.parametrize(
  'algo, level, more', [('grpo', 'token', FIRST), ('cispo', 'token', LATER), ('rloo', 'sequence', LATER)]
)
def test_answers_of_another_engine(algo, level, more):
  """The gradient is that of advantages which NumPy weighed; none goes into the weights; the clip sees none of them."""
  params = randomized(LLAMA)
  old = old_logp(params)
  sampled = (old + np.random.default_rng(0).normal(0.0, 0.4, (B, T))).astype(np.float32)
  sampled[MASK == 0] = np.nan
  want = weights(old, sampled, level)
  assert (want == CAP).any() and ((want > 0) & (want < CAP)).any()
  clean = np.where(MASK > 0, sampled, 0.0)
  how = {'importance': level, 'importance_cap': CAP}
  given = dict.fromkeys(more, old)
  loss, found, grads = learnt(algo, params, BATCH | given | {'sampled_logp': sampled}, **how)
  weighed = BATCH | given | {'sampled_logp': clean, 'advantages': (BATCH['advantages'] * want).astype(np.float32)}
  want_loss, plain, want_grads = learnt(algo, params, weighed)
  assert loss == pytest.approx(want_loss, rel=1e-4, abs=1e-6)
  for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5 + 1e-4 * float(jnp.abs(y).max()))
  assert found['policy/importance_mean'] == pytest.approx(want.sum() / MASK.sum(), rel=1e-4)
  assert found['policy/importance_max'] == pytest.approx(CAP)
  assert 'policy/importance_mean' not in plain
  assert found['policy/clip_fraction'] == plain['policy/clip_fraction']


@pytest.mark.parametrize('level', ['sequence'])
def test_on_ones_own_answers_they_are_one(level):
  params = randomized(LLAMA)
  own = BATCH | {'sampled_logp': old_logp(params)}
  loss, found, grads = learnt('grpo', params, own, importance=level, importance_cap=CAP)
  plain, _, want = learnt('grpo', params, own)
  assert found['policy/importance_mean'] == pytest.approx(1, abs=1e-5) == found['policy/importance_max']
  assert loss == pytest.approx(plain, abs=1e-6)
  for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5 + 1e-4 * float(jnp.abs(y).max()))


def test_a_cap_is_above_nothing():
  with pytest.raises(InputError, match=r'rl.importance_cap=0.0'):
    Rl(importance_cap=0.0)
