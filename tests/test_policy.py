"""Policy losses against loops written from the papers, and what they may not depend on."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from invariance import CHANGES, assert_unchanged
from slopes import slopes

from jaxlm import masked
from jaxlm.losses import policy

pytestmark = pytest.mark.usefixtures('strict')
B, T = 5, 7
RNG = np.random.default_rng(23)
LOGP = RNG.normal(-2.0, 0.7, (B, T)).astype(np.float32)
OLD = (LOGP + RNG.normal(0.0, 0.3, (B, T))).astype(np.float32)
REF = (LOGP + RNG.normal(0.0, 0.5, (B, T))).astype(np.float32)
ADV = RNG.normal(size=(B, T)).astype(np.float32)
ADV_ROW = RNG.normal(size=(B, 1)).astype(np.float32)
MASK = (RNG.random((B, T)) < 0.6).astype(np.float32)
MASK[3] = 0.0
PERS = ['token', 'sequence', 11.0]
RATIOS = ['token', 'sequence', 'product']


def arrays(*xs):
  return [jnp.asarray(x) for x in xs]


def averaged(x, per):
  """By loops: (total, weight)."""
  rows = [[x[b, t] for t in range(T) if MASK[b, t]] for b in range(B)]
  rows = [row for row in rows if row]
  if per == 'token':
    return sum(map(sum, rows)), sum(map(len, rows))
  if per == 'sequence':
    return sum(sum(row) / len(row) for row in rows), len(rows)
  return sum(map(sum, rows)), per * len(rows)


def ratios(logp, ratio):
  r = np.zeros((B, T))
  for b in range(B):
    logs = [float(logp[b, t]) - float(OLD[b, t]) for t in range(T) if MASK[b, t]]
    for t in range(T):
      if MASK[b, t]:
        own = float(logp[b, t]) - float(OLD[b, t])
        r[b, t] = math.exp({'token': own, 'sequence': sum(logs) / len(logs), 'product': sum(logs)}[ratio])
  return r


def ppo_oracle(logp, adv, ratio, per, low, high):
  r, loss = ratios(logp, ratio), np.zeros((B, T))
  for b, t in np.ndindex(B, T):
    loss[b, t] = -min(r[b, t] * adv[b, t], min(max(r[b, t], 1 - low), 1 + high) * adv[b, t])
  total, weight = averaged(loss, per)
  return total / weight


def mean(loss):
  return loss.total / loss.weight


@pytest.mark.parametrize('per', PERS)
def test_average(per):
  got = policy.average(*arrays(ADV, MASK), per=per)
  np.testing.assert_allclose([got.total, got.weight], averaged(np.float64(ADV), per), rtol=2e-6)


@pytest.mark.parametrize('per', PERS)
@pytest.mark.parametrize('ratio', RATIOS)
def test_ppo_against_loops(ratio, per):
  """Clips so tight that a part of the tokens is clipped. The gradient is by differences of the oracle."""
  clips = {'clip_low': 0.1, 'clip_high': 0.17}
  adv = np.broadcast_to(ADV_ROW, (B, T)).astype(np.float64)
  loss = lambda logp: mean(policy.ppo(logp, *arrays(OLD, ADV_ROW, MASK), **clips, ratio=ratio, per=per))
  value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(LOGP))
  oracle = lambda logp: ppo_oracle(logp, adv, ratio, per, 0.1, 0.17)
  assert float(value) == pytest.approx(oracle(LOGP), rel=3e-6)
  want = slopes(oracle, LOGP)
  np.testing.assert_allclose(grad, want, rtol=1e-4, atol=1e-6)
  unclipped = np.abs(want[MASK > 0]) > 0
  assert unclipped.any() and not unclipped.all()


def test_ppo_with_an_advantage_for_each_token():
  value, grad = jax.value_and_grad(
    lambda logp: mean(policy.ppo(logp, *arrays(OLD, ADV, MASK), clip_low=0.1, clip_high=0.3))
  )(jnp.asarray(LOGP))
  oracle = lambda logp: ppo_oracle(logp, np.float64(ADV), 'token', 'token', 0.1, 0.3)
  assert float(value) == pytest.approx(oracle(LOGP), rel=3e-6)
  np.testing.assert_allclose(grad, slopes(oracle, LOGP), rtol=1e-4, atol=1e-6)


def test_gspo_scales_each_token_by_its_own_advantage():
  """The token form: sg(s) pi / sg(pi) A_t, far from the clips."""
  grad = jax.grad(
    lambda logp: policy.ppo(logp, *arrays(OLD, ADV, MASK), clip_low=0.9, clip_high=9.0, ratio='sequence').total
  )(jnp.asarray(LOGP))
  np.testing.assert_allclose(grad, -ratios(LOGP, 'sequence') * ADV * MASK, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize('per', PERS)
@pytest.mark.parametrize('ratio', ['token', 'sequence'])
def test_on_policy_every_loss_has_the_gradient_of_reinforce(ratio, per):
  fresh = [lambda logp: policy.ppo(logp, logp, adv, mask, clip_low=0.2, clip_high=0.2, ratio=ratio, per=per)]
  fresh += [lambda logp: policy.cispo(logp, logp, adv, mask, clip_high=0.2, ratio=ratio, per=per)]
  adv, mask = arrays(ADV, MASK)
  want = jax.grad(lambda logp: mean(policy.reinforce(logp, adv, mask, per=per)))(jnp.asarray(LOGP))
  for loss in fresh:
    np.testing.assert_allclose(jax.grad(lambda x, loss=loss: mean(loss(x)))(jnp.asarray(LOGP)), want, atol=1e-6)
  # and that one is -A, over what it is averaged by
  lengths = np.maximum(MASK.sum(-1, keepdims=True), 1)
  by = {'token': MASK.sum(), 'sequence': lengths * 4, 11.0: 44.0}[per]
  np.testing.assert_allclose(want, -ADV * MASK / by, rtol=1e-5, atol=1e-8)


def test_cispo_clips_weights_and_keeps_gradients():
  loss = lambda logp: policy.cispo(logp, *arrays(OLD, ADV, MASK), clip_low=0.2, clip_high=0.1)
  weight = np.clip(ratios(LOGP, 'token'), 0.8, 1.1) * MASK
  assert float(loss(jnp.asarray(LOGP)).total) == pytest.approx(-np.sum(weight * ADV * LOGP), rel=1e-5)
  grad = jax.grad(lambda logp: loss(logp).total)(jnp.asarray(LOGP))
  np.testing.assert_allclose(grad, -weight * ADV, rtol=2e-5, atol=1e-8)
  unbound = policy.cispo(jnp.asarray(LOGP), *arrays(OLD, ADV, MASK), clip_high=0.1)
  below = np.minimum(ratios(LOGP, 'token'), 1.1) * MASK
  assert float(unbound.total) == pytest.approx(-np.sum(below * ADV * LOGP), rel=1e-5)


def test_value_clip_against_loops():
  values, old, returns = RNG.normal(size=(3, B, T)).astype(np.float32)

  def oracle(v, clip):
    loss = np.zeros((B, T))
    for b, t in np.ndindex(B, T):
      clipped = min(max(v[b, t], old[b, t] - clip), old[b, t] + clip)
      loss[b, t] = 0.5 * max((v[b, t] - returns[b, t]) ** 2, (clipped - returns[b, t]) ** 2)
    total, weight = averaged(loss, 'token')
    return total / weight

  for clip in (0.2, 0.9, math.inf):
    loss = lambda v, old, returns, clip=clip: mean(policy.value_clip(v, old, returns, jnp.asarray(MASK), clip=clip))
    value, grads = jax.value_and_grad(loss, (0, 1, 2))(*arrays(values, old, returns))
    want = slopes(lambda v, clip=clip: oracle(v, clip), values)
    assert float(value) == pytest.approx(oracle(values, clip), rel=2e-6)
    np.testing.assert_allclose(grads[0], want, rtol=1e-4, atol=1e-6)
    assert not np.any(grads[1]) and not np.any(grads[2])
    assert np.any(want[MASK > 0] == 0) == (clip != math.inf)  # some are clipped


def test_importance_weights():
  token = policy.importance_weights(*arrays(LOGP, OLD, MASK), cap=1.2)
  np.testing.assert_allclose(token, np.minimum(ratios(LOGP, 'token'), 1.2), rtol=1e-5)
  whole = policy.importance_weights(*arrays(LOGP, OLD, MASK), level='sequence', cap=1.5)
  np.testing.assert_allclose(whole, np.minimum(ratios(LOGP, 'product'), 1.5), rtol=1e-5)
  for got, cap in ((token, 1.2), (whole, 1.5)):
    assert np.any(got == np.float32(cap)) and np.any((got > 0) & (got < cap)) and not np.any(got[MASK == 0])
  assert not np.any(jax.grad(lambda x: jnp.sum(policy.importance_weights(x, *arrays(OLD, MASK), cap=2.0)))(LOGP))


def test_weighted_advantages_weigh_the_loss_of_each_token():
  """Clipping goes by the sign of the advantage alone, which a weight does not change."""
  w = policy.importance_weights(*arrays(OLD, REF, MASK), cap=1.2)
  clips = {'clip_low': 0.1, 'clip_high': 0.1}
  got = policy.ppo(*arrays(LOGP, OLD), jnp.asarray(ADV) * w, jnp.asarray(MASK), **clips)
  alone = lambda b, t: policy.ppo(*arrays(LOGP, OLD, ADV, np.eye(B * T)[b * T + t].reshape(B, T) * MASK), **clips).total
  want = sum(float(w[b, t]) * float(alone(b, t)) for b, t in np.argwhere(MASK))
  assert float(got.total) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize('ratio', RATIOS)
def test_ratio_stats_against_loops(ratio):
  got = policy.ratio_stats(*arrays(LOGP, OLD, ADV, MASK), clip_low=0.1, clip_high=0.2, ratio=ratio)
  got = {name: float(x) for name, x in masked.values(got).items()}
  r, own, n = ratios(LOGP, ratio), ratios(LOGP, 'token'), MASK.sum()
  on = [tuple(i) for i in np.argwhere(MASK)]
  low = sum(r[i] < 0.9 and ADV[i] < 0 for i in on) / n
  high = sum(r[i] > 1.2 and ADV[i] > 0 for i in on) / n
  kl = sum(own[i] - 1 - math.log(own[i]) for i in on) / n
  want = {'clip_low': low, 'clip_high': high, 'clip_fraction': low + high, 'approx_kl': kl}
  assert low > 0 and high > 0
  assert got == pytest.approx(want | {'ratio_min': r[MASK > 0].min(), 'ratio_max': r.max()}, rel=2e-5)
  nothing = policy.ratio_stats(*arrays(LOGP, OLD, ADV, 0 * MASK), clip_low=0.1, clip_high=0.2, ratio=ratio)
  assert (nothing['ratio_min'].value, nothing['ratio_max'].value) == (np.inf, -np.inf)


def test_the_clip_fraction_is_the_share_without_gradient():
  args = arrays(OLD, ADV, MASK)
  clips = {'clip_low': 0.1, 'clip_high': 0.2}
  grad = jax.grad(lambda logp: policy.ppo(logp, *args, **clips).total)(jnp.asarray(LOGP))
  stats = policy.ratio_stats(jnp.asarray(LOGP), *args, **clips)
  stopped = np.mean(np.asarray(grad)[MASK > 0] == 0)
  assert 0 < stopped < 1 and float(masked.value(stats['clip_fraction'])) == pytest.approx(stopped)


def test_explained_variance():
  returns, values = RNG.normal(size=(2, B, T)).astype(np.float32)
  values += returns
  on = MASK > 0
  want = 1 - np.var((returns - values)[on]) / np.var(returns[on])
  assert masked.value(policy.explained_variance(*arrays(values, returns, MASK))) == pytest.approx(want, rel=1e-5)
  assert masked.value(policy.explained_variance(*arrays(returns, returns, MASK))) == 1.0


def test_no_gradient_but_into_the_policy():
  args = arrays(LOGP, OLD, ADV, MASK)
  clips = {'clip_low': 0.2, 'clip_high': 0.2}
  for ratio in RATIOS:
    grads = jax.grad(lambda *a, ratio=ratio: policy.ppo(*a, **clips, ratio=ratio).total, (1, 2))(*args)
    grads += jax.grad(lambda *a, ratio=ratio: policy.cispo(*a, clip_high=0.2, ratio=ratio).total, (1, 2))(*args)
    assert not any(np.any(g) for g in grads)
  assert not np.any(jax.grad(lambda adv: policy.reinforce(args[0], adv, args[3]).total)(args[2]))
  for kind in ('k1', 'k2', 'k3'):
    ref = jax.grad(lambda ref, kind=kind: jnp.sum(policy.kl(args[0], ref, kind=kind)))(jnp.asarray(REF))
    assert not np.any(ref)


def with_kl(logp, ref, mask, kind):
  return policy.average(policy.kl(logp, ref, mask, kind=kind), mask, per='sequence')


CLIPS = {'clip_low': 0.2, 'clip_high': 0.3}
LOSSES = {
  f'ppo {ratio} {per}': lambda logp, old, adv, mask, how=(ratio, per): policy.ppo(
    logp, old, adv, mask, **CLIPS, ratio=how[0], per=how[1]
  )
  for ratio in RATIOS
  for per in PERS
}
LOSSES |= {
  'cispo': lambda logp, old, adv, mask: policy.cispo(logp, old, adv, mask, clip_high=0.3),
  'reinforce': lambda logp, old, adv, mask: policy.reinforce(logp, adv, mask, per=1.0),
  'value_clip': lambda v, old, returns, mask: policy.value_clip(v, old, returns, mask, clip=0.2),
  'k1': lambda logp, ref, adv, mask: with_kl(logp, ref, mask, 'k1'),
  'k2': lambda logp, ref, adv, mask: with_kl(logp, ref, mask, 'k2'),
  'k3': lambda logp, ref, adv, mask: with_kl(logp, ref, mask, 'k3'),
  'importance_weights': lambda logp, old, adv, mask: policy.reinforce(
    logp, adv * policy.importance_weights(logp, old, mask, level='sequence', cap=1.1), mask
  ),
  # metrics have no gradient, so that one is added
  'ratio_stats': lambda logp, old, adv, mask: masked.merge(
    policy.ratio_stats(logp, old, adv, mask, **CLIPS)['clip_fraction'], policy.average(logp, mask)
  ),
  'explained_variance': lambda v, old, returns, mask: masked.Sum(
    mean(policy.explained_variance(v, returns, mask)) + mean(policy.average(v, mask)), jnp.ones(())
  ),
}


@functools.cache
def of_mean(name):
  return lambda *args: mean(LOSSES[name](*args))


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('name', LOSSES)
def test_padding_garbage_and_repeated_rows_change_nothing(name, change):
  assert_unchanged(of_mean(name), [LOGP, OLD, ADV], [MASK], change)


@pytest.mark.parametrize('name', [n for n in LOSSES if n != 'explained_variance'])
def test_parts_of_a_batch_add_up(name):
  whole = LOSSES[name](*arrays(LOGP, OLD, ADV, MASK))
  parts = [LOSSES[name](*arrays(*(x[rows] for x in (LOGP, OLD, ADV, MASK)))) for rows in (slice(2), slice(2, B))]
  merged = masked.merge(*parts)
  np.testing.assert_allclose([merged.total, merged.weight], [whole.total, whole.weight], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize('ratio', RATIOS)
def test_a_broken_token_does_not_overflow(ratio):
  old = OLD.copy()
  old[0, 0], old[1, 0] = -1e4, 1e4
  for adv in (ADV, 0 * ADV):
    loss = lambda logp, adv=adv: policy.ppo(logp, *arrays(old, adv, np.ones_like(MASK)), **CLIPS, ratio=ratio).total
    value, grad = jax.value_and_grad(loss)(jnp.asarray(LOGP))
    assert np.isfinite(value) and np.isfinite(grad).all()
  for kind in ('k1', 'k2', 'k3'):
    assert np.isfinite(policy.kl(*arrays(LOGP, old), kind=kind)).all()


def test_what_is_no_option_is_refused():
  """Asked without the type checks that tests run under."""
  args = arrays(LOGP, OLD, ADV, MASK)
  with pytest.raises(ValueError, match="not 'row'"):
    inspect.unwrap(policy.average)(args[0], args[3], per='row')
  with pytest.raises(ValueError, match="not 'row'"):
    inspect.unwrap(policy._ratio)(args[0], args[3], 'row')
  with pytest.raises(ValueError, match="not 'k4'"):
    inspect.unwrap(policy.kl)(*args[:2], kind='k4')
  with pytest.raises(ValueError, match="not 'row'"):
    inspect.unwrap(policy.importance_weights)(*args[:2], args[3], level='row', cap=2.0)
