"""Advantages against loops written from the papers, and what they may not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from invariance import CHANGES, assert_unchanged

from jaxlm import masked
from jaxlm.rl import advantages

pytestmark = pytest.mark.usefixtures('strict')
B, T, P, G = 5, 7, 3, 5
RNG = np.random.default_rng(41)
REWARDS, VALUES, KL = RNG.normal(size=(3, B, T)).astype(np.float32)
SCORE, BOOTSTRAP = RNG.normal(size=(2, B)).astype(np.float32)
GROUPS = RNG.normal(size=(P, G)).astype(np.float32)
SOME = (RNG.random((P, G)) < 0.7).astype(np.float32)
SOME[:, :2] = 1.0
LENGTHS = np.array([3, 7, 1, 5, 4])
STEP = np.arange(T)
MASKS = {
  'right': LENGTHS[:, None] > STEP,
  'left': T - LENGTHS[:, None] <= STEP,
  'holes': (RNG.random((B, T)) < 0.6) | (STEP == 2),
  'all': np.ones((B, T), bool),
  'empty row': (LENGTHS[:, None] > STEP) & (np.arange(B)[:, None] != 1),
}
MASKS = {name: mask.astype(np.float32) for name, mask in MASKS.items()}


def gae_oracle(rewards, values, mask, gamma, lam, bootstrap):
  """A_t = sum over l of (gamma lam)^l delta_t+l, of each row's own tokens, without recursion."""
  adv = np.zeros((B, T))
  for b in range(B):
    own = [t for t in range(T) if mask[b, t]]
    r, v = [float(rewards[b, t]) for t in own], [float(values[b, t]) for t in own] + [float(bootstrap[b])]
    deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(own))]
    for i, t in enumerate(own):
      adv[b, t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(own)))
  return adv


@pytest.mark.parametrize('gamma, lam', [(1.0, 1.0), (0.9, 0.8), (0.99, 0.0)])
@pytest.mark.parametrize('mask', MASKS)
def test_gae_against_the_sums_of_the_paper(mask, gamma, lam):
  mask = MASKS[mask]
  how = {'gamma': gamma, 'lam': lam}
  fn = jax.jit(lambda *a, bootstrap: advantages.gae(*a, **how, bootstrap_B=bootstrap))
  adv, returns = fn(*map(jnp.asarray, (REWARDS, VALUES, mask)), bootstrap=jnp.asarray(BOOTSTRAP))
  want = gae_oracle(REWARDS, VALUES, mask, gamma, lam, BOOTSTRAP)
  np.testing.assert_allclose(adv, want, rtol=1e-5, atol=2e-6)
  np.testing.assert_allclose(returns, np.where(mask > 0, want + VALUES, 0), rtol=1e-5, atol=2e-6)


def test_a_truncated_row_goes_on_with_its_bootstrap():
  """One row cut in two, the value of its next state given, has the deltas of the whole one."""
  whole, _ = advantages.gae(*map(jnp.asarray, (REWARDS, VALUES, MASKS['all'])), gamma=0.9, lam=0.0)
  head = [jnp.asarray(x[:, :4]) for x in (REWARDS, VALUES, MASKS['all'])]
  cut, _ = advantages.gae(*head, gamma=0.9, lam=0.0, bootstrap_B=jnp.asarray(VALUES[:, 4]))
  np.testing.assert_allclose(cut, whole[:, :4], rtol=1e-6)
  ended, _ = advantages.gae(*head, gamma=0.9, lam=0.0)
  assert not np.allclose(ended[:, 3], cut[:, 3])


def test_without_values_lam_1_gives_discounted_sums():
  adv, returns = advantages.gae(*map(jnp.asarray, (REWARDS, 0 * VALUES, MASKS['right'])), gamma=0.9, lam=1.0)
  for b, n in enumerate(LENGTHS):
    want = [sum(0.9 ** (j - t) * REWARDS[b, j] for j in range(t, n)) for t in range(n)]
    np.testing.assert_allclose(adv[b, :n], want, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(adv, returns)


@pytest.mark.parametrize('some', [False, True])
def test_groups_against_loops(some):
  mask = {'mask_PG': jnp.asarray(SOME)} if some else {}
  plain = advantages.group_advantages(jnp.asarray(GROUPS), normalize=False, **mask)
  scaled = advantages.group_advantages(jnp.asarray(GROUPS), **mask)
  alone = advantages.leave_one_out(jnp.asarray(GROUPS), **mask)
  for p in range(P):
    own = [g for g in range(G) if SOME[p, g] or not some]
    r = {g: float(GROUPS[p, g]) for g in own}
    mean = sum(r.values()) / len(own)
    std = (sum((x - mean) ** 2 for x in r.values()) / (len(own) - 1)) ** 0.5
    for g in range(G):
      others = [r[o] for o in own if o != g]
      want = (r[g] - mean, (r[g] - mean) / (std + 1e-4), r[g] - sum(others) / len(others)) if g in own else (0, 0, 0)
      np.testing.assert_allclose([plain[p, g], scaled[p, g], alone[p, g]], want, rtol=1e-5, atol=1e-6)


def test_groups_of_equal_rewards_teach_nothing():
  """Exactly: a mean of seven times 0.1 has a rest, which a spread of 1e-4 would blow up; one of 1 has none."""
  rewards = jnp.asarray([[0.1] * 7, [1.0] * 7])
  for normalize in (True, False):
    adv = advantages.group_advantages(rewards, normalize=normalize)
    grad = jax.grad(lambda r, n=normalize: advantages.group_advantages(r, normalize=n)[:, 0].sum())(rewards)
    assert not np.any(adv) and not np.any(grad)
  rewards = jnp.asarray([[0.1, 0.1, 0.1], [0.0, 1.0, 1.0], [1.0, 1.0, 7.0]])
  np.testing.assert_array_equal(advantages.mixed_groups(rewards), [0, 1, 1])
  mask = jnp.asarray([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
  np.testing.assert_array_equal(advantages.mixed_groups(rewards, mask_PG=mask), [0, 0, 0])
  np.testing.assert_array_equal(advantages.mixed_groups(rewards, mask_PG=0 * mask), [0, 0, 0])
  for fn in (advantages.leave_one_out, advantages.group_advantages):
    assert not np.any(fn(jnp.asarray([[3.0], [5.0]])))  # nobody to compare with


@pytest.mark.parametrize('mask', ['right', 'left', 'holes'])
def test_whiten(mask):
  mask = MASKS[mask]
  x = 7.0 + 3.0 * REWARDS
  on = np.float64(x)[mask > 0]
  white = advantages.whiten(*map(jnp.asarray, (x, mask)))
  np.testing.assert_allclose(white[mask > 0], (on - on.mean()) / np.sqrt(on.var() + 1e-8), rtol=1e-5, atol=1e-5)
  assert not np.any(white[mask == 0])
  kept = advantages.whiten(*map(jnp.asarray, (x, mask)), shift_mean=False)
  np.testing.assert_allclose(kept[mask > 0], white[mask > 0] + on.mean(), rtol=1e-5)
  assert not np.any(kept[mask == 0])
  assert not np.any(advantages.whiten(*map(jnp.asarray, (x, 0 * mask))))


@pytest.mark.parametrize('mask', MASKS)
def test_the_score_is_at_the_last_token(mask):
  mask = MASKS[mask]
  got = advantages.kl_rewards(*map(jnp.asarray, (SCORE, KL, mask)), kl_coef=0.3)
  want = -0.3 * KL * mask
  for b in range(B):
    if mask[b].any():
      want[b, max(t for t in range(T) if mask[b, t])] += SCORE[b]
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_reinforce_plus_plus_against_loops():
  mask = MASKS['right']
  to_come = np.zeros((B, T))
  for b, n in enumerate(LENGTHS):
    for t in range(n):
      to_come[b, t] = SCORE[b] * 0.9 ** (n - 1 - t) - 0.2 * sum(0.9 ** (j - t) * KL[b, j] for j in range(t, n))
  on = to_come[mask > 0]
  got = advantages.reinforce_plus_plus(*map(jnp.asarray, (SCORE, KL, mask)), kl_coef=0.2, gamma=0.9)
  np.testing.assert_allclose(got[mask > 0], (on - on.mean()) / on.std(), rtol=1e-4, atol=1e-5)
  assert not np.any(got[mask == 0])


def test_overlong():
  """DAPO's figures: 20,480 tokens, of which 4,096 are the buffer."""
  lengths = jnp.asarray([0.0, 16384.0, 17408.0, 18432.0, 20480.0, 20481.0, 99999.0])
  for each in (lengths, lengths.astype(jnp.int32)):
    got = advantages.overlong(each, limit=20480, buffer=4096)
    np.testing.assert_array_equal(got, [0, 0, -0.25, -0.5, -1, -1, -1])


COTANGENT = RNG.normal(size=(B, T)).astype(np.float32)


@functools.cache
def pulled(name):
  """Each output times a number of its own, so that a gradient of every output is seen."""

  def fn(rewards, values, kl, cotangent, score, mask):
    how = {'gamma': 0.9, 'lam': 0.8, 'bootstrap_B': score}
    adv = {
      'gae': lambda: advantages.gae(rewards, values, mask, **how)[0],
      'returns': lambda: advantages.gae(rewards, values, mask, **how)[1],
      'whiten': lambda: advantages.whiten(rewards, mask),
      'whiten in place': lambda: advantages.whiten(rewards, mask, shift_mean=False),
      'kl_rewards': lambda: advantages.kl_rewards(score, kl, mask, kl_coef=0.3),
      'reinforce_plus_plus': lambda: advantages.reinforce_plus_plus(score, kl, mask, kl_coef=0.3, gamma=0.9),
    }[name]()
    assert adv.dtype == jnp.float32
    return jnp.sum(masked.kept(cotangent, mask) * adv) / jnp.sum(mask)

  return fn


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('mask', ['right', 'holes', 'empty row'])
@pytest.mark.parametrize('name', ['gae', 'returns', 'whiten', 'whiten in place', 'kl_rewards', 'reinforce_plus_plus'])
def test_padding_garbage_and_repeated_rows_change_nothing(name, mask, change):
  assert_unchanged(pulled(name), [REWARDS, VALUES, KL, COTANGENT, SCORE], [MASKS[mask]], change, atol=5e-6)


@functools.cache
def of_groups(name):
  def fn(rewards, cotangent, mask):
    adv = {
      'grpo': lambda: advantages.group_advantages(rewards, mask_PG=mask),
      'dr_grpo': lambda: advantages.group_advantages(rewards, normalize=False, mask_PG=mask),
      'rloo': lambda: advantages.leave_one_out(rewards, mask_PG=mask),
    }[name]()
    mixed = advantages.mixed_groups(rewards, mask_PG=mask)
    return jnp.sum(mixed[:, None] * adv * masked.kept(cotangent, mask)) / jnp.sum(mask)

  return fn


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('name', ['grpo', 'dr_grpo', 'rloo'])
def test_masked_answers_and_repeated_groups_change_nothing(name, change):
  assert_unchanged(of_groups(name), [GROUPS, COTANGENT[:P, :G]], [SOME], change)


def test_every_output_is_0_where_masked():
  for mask in MASKS.values():
    off, nan = mask == 0, np.where(mask > 0, REWARDS, np.nan)
    args = [jnp.asarray(x) for x in (nan, np.where(mask > 0, VALUES, np.inf), mask)]
    for out in advantages.gae(*args, gamma=0.9, lam=0.8):
      assert not np.any(out[off])
    assert not np.any(advantages.kl_rewards(jnp.asarray(SCORE), args[0], args[2], kl_coef=0.1)[off])
    assert not np.any(advantages.reinforce_plus_plus(jnp.asarray(SCORE), args[0], args[2], kl_coef=0.1)[off])
