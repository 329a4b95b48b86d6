"""Estimators by enumeration: a policy over five tokens, every answer that it can give, weighed by its probability.

The mean over the policy's own samples is then exact, and so is the gradient it is compared with.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses import policy
from jaxlm.rl import advantages

V, LENGTH = 5, 3
RNG = np.random.default_rng(31)
THETA = RNG.normal(size=(V + 1, V)).astype(np.float32)  # logits by the token before, the first row where there is none
REF = RNG.normal(size=(V + 1, V)).astype(np.float32)
END = 0
WHOLE = np.array(list(itertools.product(range(V), repeat=LENGTH)))  # 125 answers of three tokens


def ended():
  """Every answer of up to three tokens that stops at END: (tokens, mask)."""
  on = np.cumsum(np.pad(WHOLE == END, ((0, 0), (1, 0)))[:, :-1], axis=-1) == 0
  tokens, first = np.unique(np.where(on, WHOLE, -1), axis=0, return_index=True)
  return np.maximum(tokens, 0), on[first].astype(np.float32)


ANSWERS, ON = ended()
REWARD = RNG.normal(size=len(ANSWERS)).astype(np.float32)


def logps(theta, tokens):
  """Of each token, its prefix given."""
  before = np.concatenate([np.zeros_like(tokens[:, :1]), tokens[:, :-1] + 1], axis=-1)
  return jnp.take_along_axis(jax.nn.log_softmax(theta)[before], jnp.asarray(tokens)[..., None], -1)[..., 0]


def chance(theta, tokens=ANSWERS, on=ON):
  return jnp.exp(jnp.sum(logps(theta, tokens) * on, axis=-1))


def expected(theta):
  """Of the reward."""
  return jnp.sum(chance(theta) * REWARD)


def mean_gradient(loss, theta):
  """The gradient of `loss(theta) -> one number an answer`, averaged over the answers of the policy as it is."""
  p = jax.lax.stop_gradient(chance(theta))
  return jax.grad(lambda theta: jnp.sum(p * loss(theta)))(theta)


def rows(loss):
  """A loss of one row at a time, each with its own weight."""
  return jax.vmap(lambda *args: (lambda s: s.total / s.weight)(loss(*(x[None] for x in args))))


def cosine(a, b):
  return float(jnp.sum(a * b) / jnp.linalg.norm(a) / jnp.linalg.norm(b))


def close(got, want):
  np.testing.assert_allclose(got, want, atol=3e-6)


# --- KL, one token -------------------------------------------------------------------------------------------------

ONE = np.arange(V)[:, None]


def kl_exact(a, b):
  return jnp.sum(jnp.exp(jax.nn.log_softmax(a)) * (jax.nn.log_softmax(a) - jax.nn.log_softmax(b)))


def estimate(theta, kind):
  return policy.kl(logps(theta, ONE), logps(REF, ONE), kind=kind)[:, 0]


@pytest.mark.parametrize('kind', ['k1', 'k3'])
def test_the_mean_of_k1_and_k3_is_the_kl(kind):
  p = chance(THETA, ONE, 1.0)
  close(jnp.sum(p * estimate(THETA, kind)), kl_exact(THETA[0], REF[0]))
  # of whole answers too, each token's estimate being given its prefix
  p = chance(THETA)
  true = jnp.sum(p * jnp.sum((logps(THETA, ANSWERS) - logps(REF, ANSWERS)) * ON, -1))
  each = policy.kl(logps(THETA, ANSWERS), logps(REF, ANSWERS), jnp.asarray(ON), kind=kind)
  close(jnp.sum(p * jnp.sum(each, -1)), true)
  assert true > 0.1


def test_k2_is_biased_and_second_order():
  near = lambda size: THETA + size * (REF - THETA)
  p = chance(THETA, ONE, 1.0)
  gap = []
  for size in (1.0, 0.1):
    k2 = policy.kl(logps(THETA, ONE), logps(near(size), ONE), kind='k2')[:, 0]
    exact = kl_exact(THETA[0], near(size)[0])
    gap.append(float(abs(jnp.sum(p * k2) - exact) / exact))
  assert gap[0] > 0.05 and gap[1] < gap[0] / 5


def test_k3_is_never_negative_and_k1_is():
  assert (estimate(THETA, 'k3') > 0).all() and (estimate(THETA, 'k1') < 0).any()


def test_gradients_of_kl_in_the_loss():
  p = chance(THETA, ONE, 1.0)
  grad = lambda kind: jax.grad(lambda theta: jnp.sum(p * estimate(theta, kind)))(THETA)
  close(grad('k1'), 0 * THETA)
  close(grad('k2'), jax.grad(lambda theta: kl_exact(theta[0], REF[0]))(THETA))
  close(grad('k3'), jax.grad(lambda theta: kl_exact(REF[0], theta[0]))(THETA))
  assert cosine(grad('k2'), grad('k3')) < 0.99


# --- the policy gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('loss', ['reinforce', 'ppo', 'cispo'])
def test_the_mean_gradient_is_that_of_the_expected_reward(loss):
  adv, clips = jnp.asarray(REWARD)[:, None], {'clip_low': 0.2, 'clip_high': 0.2, 'per': 1.0}
  fn = {
    'reinforce': lambda logp, adv, on: policy.reinforce(logp, adv, on, per=1.0),
    'ppo': lambda logp, adv, on: policy.ppo(logp, logp, adv, on, **clips),
    'cispo': lambda logp, adv, on: policy.cispo(logp, logp, adv, on, **clips),
  }[loss]
  got = mean_gradient(lambda theta: rows(fn)(logps(theta, ANSWERS), adv, jnp.asarray(ON)), THETA)
  close(got, -jax.grad(expected)(THETA))


def test_off_policy_answers_are_weighed_back():
  """Answers of another engine, weighed by their importance: without a cap exact, with one biased."""
  theirs = THETA + 0.3 * REF
  p = chance(theirs)

  def gradient(level, cap):
    def total(theta):
      logp, on = logps(theta, ANSWERS), jnp.asarray(ON)
      w = policy.importance_weights(logp, logps(theirs, ANSWERS), on, level=level, cap=cap)
      return jnp.sum(p * rows(partial(policy.reinforce, per=1.0))(logp, w * REWARD[:, None], on))

    return jax.grad(total)(THETA)

  exact = -jax.grad(expected)(THETA)
  close(gradient('sequence', 1e6), exact)
  for biased in (gradient('sequence', 1.05), gradient('token', 1e6)):
    assert jnp.abs(biased - exact).max() > 1e-3 and cosine(biased, exact) > 0.9


def of_groups(baseline, size=2):
  """The mean gradient over all groups of answers of one token, their advantages by `baseline`."""
  groups = np.array(list(itertools.product(range(V), repeat=size)))
  adv = baseline(jnp.asarray(REWARD[:V][groups]))
  p = jnp.prod(chance(THETA, ONE, 1.0)[groups], axis=-1)

  def total(theta):
    logp = logps(theta, groups.reshape(-1, 1))
    each = rows(partial(policy.reinforce, per=1.0))(logp, adv.reshape(-1, 1), jnp.ones_like(logp))
    return jnp.sum(p * jnp.mean(each.reshape(groups.shape), axis=-1))

  return jax.grad(total)(THETA)


def exact_one():
  return -jax.grad(lambda theta: jnp.sum(chance(theta, ONE, 1.0) * REWARD[:V]))(THETA)


@pytest.mark.slow(but='2')
@pytest.mark.parametrize('size', [2, 3])
def test_groups(size):
  """RLOO is exact; taking the whole group's mean off leaves (G - 1) / G of it; dividing by the spread turns it."""
  exact = exact_one()
  close(of_groups(advantages.leave_one_out, size), exact)
  close(of_groups(partial(advantages.group_advantages, normalize=False), size), (size - 1) / size * exact)
  assert cosine(of_groups(advantages.group_advantages, size), exact) < 0.999


# --- length --------------------------------------------------------------------------------------------------------


def test_length_bias_of_grpo_and_its_absence_in_dr_grpo():
  """A token of a long answer counts less where each row has its own mean, so that long wrong answers are wrong less."""
  logp, on = jnp.full((2, 7), -1.0), (jnp.arange(7) < jnp.array([[2], [7]])).astype(jnp.float32)
  adv = -jnp.ones((2, 1))
  per_token = {}
  for name, per in {'grpo': 'sequence', 'dr_grpo': 7.0, 'dapo': 'token'}.items():
    loss = lambda x, per=per: (lambda s: s.total / s.weight)(
      policy.ppo(x, logp, adv, on, clip_low=0.2, clip_high=0.2, per=per)
    )
    grad = jax.grad(loss)(logp)
    per_token[name] = float(grad[0, 0] / grad[1, 0])
  assert per_token == pytest.approx({'grpo': 3.5, 'dr_grpo': 1.0, 'dapo': 1.0})


def test_only_a_constant_keeps_the_direction_of_the_gradient():
  adv, on = jnp.asarray(REWARD)[:, None], jnp.asarray(ON)
  exact = -jax.grad(expected)(THETA)
  clips = {'clip_low': 0.2, 'clip_high': 0.2}
  got = {
    per: mean_gradient(
      lambda theta, per=per: rows(lambda *a: policy.ppo(a[0], *a, **clips, per=per))(logps(theta, ANSWERS), adv, on),
      THETA,
    )
    for per in (3.0, 'sequence')
  }
  close(3.0 * got[3.0], exact)
  assert cosine(got['sequence'], exact) < 0.999


# --- the KL in the reward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('lam', [1.0, 0.7])
def test_kl_in_the_reward_has_the_gradient_of_the_whole_objective(lam):
  """E[reward] - c KL(pi | ref) over whole answers: k1 in `kl_rewards`, `gae`, `reinforce`.

  With the true value function every lam has the same mean gradient; with none, lam 1 alone.
  """
  c, on = 0.4, jnp.asarray(ON)
  ref = logps(REF, ANSWERS)
  objective = lambda theta: jnp.sum(chance(theta) * (REWARD - c * jnp.sum((logps(theta, ANSWERS) - ref) * on, -1)))
  logp = logps(THETA, ANSWERS)
  rewards = advantages.kl_rewards(jnp.asarray(REWARD), policy.kl(logp, ref, on, kind='k1'), on, kl_coef=c)
  to_come = np.flip(np.cumsum(np.flip(np.asarray(rewards), 1), 1), 1)
  values = np.zeros_like(ON)
  p = np.asarray(chance(THETA))
  for t in range(LENGTH):  # the mean of what is to come after a prefix
    for prefix in np.unique(ANSWERS[:, :t], axis=0):
      same = (ANSWERS[:, :t] == prefix).all(-1) & (ON[:, t] > 0)
      if same.any():
        values[same, t] = np.sum(p[same] * to_come[same, t]) / p[same].sum()
  exact = -jax.grad(objective)(THETA)

  def gradient(values):
    adv, _ = advantages.gae(rewards, jnp.asarray(values), on, gamma=1.0, lam=lam)
    return mean_gradient(lambda theta: rows(partial(policy.reinforce, per=1.0))(logps(theta, ANSWERS), adv, on), THETA)

  close(gradient(values), exact)
  if lam == 1.0:
    close(gradient(0 * values), exact)
  else:
    assert jnp.abs(gradient(0 * values) - exact).max() > 1e-3
