"""Answers as a batch, and scores as advantages: by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.rl import advantages, algorithms, episodes
from jaxlm.rl.algorithms import ALGORITHMS
from jaxlm.rl.rollout import Completions

PROMPTS = [[5, 6, 7], [8], [9, 9]]
MADE = Completions(
  np.array([[1, 2, 0, 0], [3, 3, 3, 3], [4, 0, 0, 0]], np.int32),
  np.array([2, 4, 1], np.int32),
  np.array([[-1.0, -2, 0, 0], [-3, -3, -3, -4], [-5, 0, 0, 0]], np.float32),
  np.zeros((3, 4), np.float32),
  np.array([True, False, True]),
)


def test_a_batch_by_hand():
  batch = episodes.batch_of(PROMPTS, MADE, limit=97, pad_id=77, multiple=5)
  assert batch['tokens'].tolist() == [[5, 6, 7, 1, 77], [8, 3, 3, 3, 77], [9, 9, 77, 77, 77]]
  assert batch['targets'].tolist() == [[6, 7, 1, 2, 77], [3, 3, 3, 3, 77], [9, 4, 77, 77, 77]]
  assert batch['loss_mask'].tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 1, 0], [0, 1, 0, 0, 0]]
  assert batch['sampled_logp'].tolist() == [[0, 0, -1, -2, 0], [-3, -3, -3, -4, 0], [0, -5, 0, 0, 0]]
  assert batch['segment_ids'].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
  assert batch['positions'].tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 3, 0], [0, 1, 0, 0, 0]]


@pytest.mark.parametrize('multiple', [16, 128, 48])
def test_widths_are_few_and_near(multiple):
  widths = [episodes.width_of(n, multiple) for n in range(1, 4097)]
  assert all(n <= width < n + max(multiple, n / 8) for n, width in enumerate(widths, 1))
  assert all(width % multiple == 0 for width in widths) and len(set(widths)) < 50


RNG = np.random.default_rng(2)
P, G, T = 3, 2, 7
SCORES = jnp.asarray(RNG.normal(size=(P, G)), jnp.float32)
MASK = jnp.asarray(np.arange(T) >= RNG.integers(0, 4, (P * G, 1)), jnp.float32)
KL, VALUES = (jnp.asarray(RNG.normal(size=(P * G, T)), jnp.float32) for _ in range(2))
STOPPED = jnp.asarray([True, False, True, True, False, True])
HOW = {'kl_coef': 0.3, 'gamma': 0.97, 'lam': 0.9}


def estimate(name, kl=KL):
  return algorithms.estimate(ALGORITHMS[name], SCORES, MASK, kl, VALUES, STOPPED, **HOW)


@pytest.mark.parametrize('name', ALGORITHMS)
def test_the_penalty_has_its_place(name):
  """In the score where the algorithm says so, else not here."""
  same = np.array_equal(estimate(name)['advantages'], estimate(name, 2 * KL)['advantages'])
  assert same == (ALGORITHMS[name].kl == 'loss')
  assert estimate(name)['advantages'].shape == MASK.shape
  assert ('returns' in estimate(name)) == ALGORITHMS[name].valued


def test_scores_less_the_penalty():
  less = SCORES.reshape(-1) - 0.3 * jnp.sum(KL * MASK, -1)
  want = advantages.leave_one_out(less.reshape(P, G)).reshape(-1, 1)
  np.testing.assert_allclose(estimate('rloo')['advantages'], np.broadcast_to(want, MASK.shape), rtol=1e-5)
  normal = advantages.group_advantages(SCORES).reshape(-1)
  np.testing.assert_allclose(estimate('grpo')['advantages'][:, 0], normal, rtol=1e-5)
  centered = (SCORES - SCORES.mean(1, keepdims=True)).reshape(-1)
  np.testing.assert_allclose(estimate('dr_grpo')['advantages'][:, 3], centered, rtol=1e-5, atol=1e-6)


def test_a_truncated_answer_goes_on_at_its_last_value():
  """Returns of the last token by hand: the score less the penalty, and where the answer was cut its value once more."""
  returns = np.asarray(estimate('ppo')['returns'])
  for m in range(P * G):
    end = SCORES.reshape(-1)[m] - 0.3 * KL[m, -1] + (0.0 if STOPPED[m] else 0.97 * VALUES[m, -1])
    assert returns[m, -1] == pytest.approx(float(end), rel=1e-5)
  adv, on = np.asarray(estimate('ppo')['advantages']), np.asarray(MASK) > 0
  assert abs(adv[on].mean()) < 1e-6 and adv[on].std() == pytest.approx(1, rel=1e-5) and (adv[~on] == 0).all()
