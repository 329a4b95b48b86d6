"""Losses over preferred answers: against the papers' formulas in float64, and what they may not depend on."""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from invariance import CHANGES, assert_unchanged
from slopes import slopes

from jaxlm import masked
from jaxlm.config import Preference
from jaxlm.losses import preference

pytestmark = pytest.mark.usefixtures('strict')
B, T = 5, 7
RNG = np.random.default_rng(17)
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = RNG.normal(-9.0, 4.0, (4, B)).clip(max=-0.3).astype(np.float32)
LENGTH_C, LENGTH_R = RNG.integers(2, 11, (2, B)).astype(np.float32)
MARGIN = RNG.random(B).astype(np.float32)
DESIRABLE = np.array([1, 0, 0, 1, 1], np.float32)
WEIGHT = np.array([1, 0, 0.25, 1, 1], np.float32)


def log_sigmoid(x):
  return -np.log1p(np.exp(-x))


def sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def smoothed(h, e):
  return -(1 - e) * log_sigmoid(h) - e * log_sigmoid(-h)


def log_odds(x):
  return np.log(np.exp(x) / (1 - np.exp(x)))


def kto_oracle(c, _):
  z, r = 0.7, c - REF_CHOSEN
  return np.where(DESIRABLE > 0, 1.3 * (1 - sigmoid(0.2 * (r - z))), 0.6 * (1 - sigmoid(0.2 * (z - r))))


REFS, LENGTHS = (REF_CHOSEN, REF_REJECTED), (LENGTH_C, LENGTH_R)
# name: (ours, of arrays and a weight; the formula, a number a row, in float64)
LOSSES = {
  'bradley_terry': (
    lambda c, r, w: preference.bradley_terry(c, r, margin_B=jnp.asarray(MARGIN), center=0.03, weight_B=w),
    lambda c, r: -log_sigmoid(c - r - MARGIN) + 0.03 * (c + r) ** 2,
  ),
  'dpo': (
    lambda c, r, w: preference.dpo(c, r, *map(jnp.asarray, REFS), beta=0.3, weight_B=w),
    lambda c, r: -log_sigmoid(0.3 * ((c - REF_CHOSEN) - (r - REF_REJECTED))),
  ),
  'dpo smoothed': (
    lambda c, r, w: preference.dpo(c, r, *map(jnp.asarray, REFS), beta=0.3, label_smoothing=0.1, weight_B=w),
    lambda c, r: smoothed(0.3 * ((c - REF_CHOSEN) - (r - REF_REJECTED)), 0.1),
  ),
  'dpo without reference': (
    lambda c, r, w: preference.dpo(c, r, 0.0, 0.0, beta=0.3, weight_B=w),
    lambda c, r: -log_sigmoid(0.3 * (c - r)),
  ),
  'ipo': (
    lambda c, r, w: preference.ipo(c, r, *map(jnp.asarray, REFS + LENGTHS), beta=0.4, weight_B=w),
    lambda c, r: ((c - REF_CHOSEN) / LENGTH_C - (r - REF_REJECTED) / LENGTH_R - 1 / 0.8) ** 2,
  ),
  'kto': (
    lambda c, r, w: preference.kto(
      c,
      *map(jnp.asarray, (REF_CHOSEN, DESIRABLE)),
      0.7,
      beta=0.2,
      desirable_weight=1.3,
      undesirable_weight=0.6,
      weight_B=w,
    ),
    kto_oracle,
  ),
  'orpo': (
    lambda c, r, w: preference.orpo(c, r, *map(jnp.asarray, LENGTHS), beta=0.6, sft=0.9, weight_B=w),
    lambda c, r: -0.9 * c / LENGTH_C - 0.6 * log_sigmoid(log_odds(c / LENGTH_C) - log_odds(r / LENGTH_R)),
  ),
  'simpo': (
    lambda c, r, w: preference.simpo(
      c, r, *map(jnp.asarray, LENGTHS), beta=2.5, gamma=0.5, label_smoothing=0.05, weight_B=w
    ),
    lambda c, r: smoothed(2.5 * (c / LENGTH_C - r / LENGTH_R) - 0.5, 0.05),
  ),
  'cpo': (
    lambda c, r, w: preference.cpo(c, r, jnp.asarray(LENGTH_C), beta=0.2, sft=0.8, label_smoothing=0.05, weight_B=w),
    lambda c, r: smoothed(0.2 * (c - r), 0.05) - 0.8 * c / LENGTH_C,
  ),
}


def test_every_loss_of_the_stage_is_here():
  stage = {*typing.get_args(typing.get_type_hints(Preference)['loss']), 'bradley_terry'}
  assert stage <= LOSSES.keys() and stage <= set(OF_TOKENS)


@pytest.mark.parametrize('name', LOSSES)
def test_value_and_gradient_against_the_formula(name):
  ours, formula = LOSSES[name]
  w = WEIGHT.astype(np.float64)
  got = jax.jit(ours)(jnp.asarray(CHOSEN), jnp.asarray(REJECTED), jnp.asarray(WEIGHT))
  assert float(got.total) == pytest.approx(np.sum(w * formula(*np.float64((CHOSEN, REJECTED)))), rel=2e-6)
  assert float(got.weight) == w.sum()
  grads = jax.grad(lambda c, r: ours(c, r, jnp.asarray(WEIGHT)).total, (0, 1))(CHOSEN, REJECTED)
  want = [
    slopes(lambda c: np.sum(w * formula(c, np.float64(REJECTED))), CHOSEN),
    slopes(lambda r: np.sum(w * formula(np.float64(CHOSEN), r)), REJECTED),
  ]
  for mine, theirs in zip(grads, want, strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize('name', LOSSES)
def test_parts_of_a_batch_add_up(name):
  """Of the very rows: the other rows of each part have no weight and NaN."""
  ours, _ = LOSSES[name]
  whole = ours(*map(jnp.asarray, (CHOSEN, REJECTED, WEIGHT)))
  first = np.arange(B) < 3
  parts = []
  for part in (first, ~first):
    rows = [jnp.asarray(np.where(part, x, np.nan)) for x in (CHOSEN, REJECTED)]
    parts.append(ours(*rows, jnp.asarray(np.where(part, WEIGHT, 0).astype(np.float32))))
  merged = masked.merge(*parts)
  np.testing.assert_allclose([merged.total, merged.weight], [whole.total, whole.weight], rtol=1e-6)


TOKENS = [RNG.normal(-1.0, 0.5, (B, T)).astype(np.float32) for _ in range(4)]
MASKS = [(RNG.random((B, T)) < 0.7).astype(np.float32) for _ in range(2)]
for mask in MASKS:
  mask[:, 2] = 1.0


def pairs(c, r, ref_c, ref_r, mask_c, mask_r):
  """What every loss reads: summed log-probs, lengths, and the rows that there are."""
  (c, n_c), (r, n_r) = preference.summed(c, mask_c), preference.summed(r, mask_r)
  refs = preference.summed(ref_c, mask_c)[0], preference.summed(ref_r, mask_r)[0]
  return (c, r), refs, (n_c, n_r), (n_c > 0).astype(jnp.float32)


@functools.cache
def of_tokens(name):
  def fn(*arrays):
    both, refs, lengths, w = pairs(*arrays)
    desirable = (lengths[0] > 5).astype(jnp.float32)
    kl = preference.kto_baseline(refs[1], both[0], weight_B=w)
    loss = {
      'bradley_terry': lambda: preference.bradley_terry(*both, margin_B=lengths[0] * 0.1, center=0.1, weight_B=w),
      'dpo': lambda: preference.dpo(*both, *refs, beta=0.3, label_smoothing=0.1, weight_B=w),
      'ipo': lambda: preference.ipo(*both, *refs, *lengths, beta=0.4, weight_B=w),
      'kto': lambda: preference.kto(both[0], refs[0], desirable, kl, beta=0.3, desirable_weight=1.5, weight_B=w),
      'orpo': lambda: preference.orpo(*both, *lengths, beta=0.6, weight_B=w),
      'simpo': lambda: preference.simpo(*both, *lengths, beta=2.0, gamma=0.3, weight_B=w),
      'cpo': lambda: preference.cpo(*both, lengths[0], beta=0.2, weight_B=w),
      'kto_baseline': lambda: masked.Sum(preference.kto_baseline(both[0], refs[1] - 3.0, weight_B=w), jnp.ones(())),
      'margin': lambda: preference.pair_metrics(*both, weight_B=w)['margin'],
    }[name]()
    # metrics have no gradient, so that one is added
    return loss.total / loss.weight + (jnp.sum(both[0] * w) / jnp.sum(w) if name == 'margin' else 0.0)

  return fn


OF_TOKENS = ['bradley_terry', 'dpo', 'ipo', 'kto', 'orpo', 'simpo', 'cpo', 'kto_baseline', 'margin']


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('name', OF_TOKENS)
def test_padding_garbage_and_repeated_rows_change_nothing(name, change):
  assert_unchanged(of_tokens(name), TOKENS, MASKS, change, on=[0, 1, 0, 1])


ROWS = [CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, LENGTH_C, LENGTH_R, MARGIN, DESIRABLE]


@functools.cache
def of_rows(name):
  def fn(c, r, ref_c, ref_r, n_c, n_r, margin, desirable, w):
    kl = preference.kto_baseline(ref_r, c, weight_B=w)
    loss = {
      'bradley_terry': lambda: preference.bradley_terry(c, r, margin_B=margin, center=0.1, weight_B=w),
      'dpo': lambda: preference.dpo(c, r, ref_c, ref_r, beta=0.3, label_smoothing=0.1, weight_B=w),
      'ipo': lambda: preference.ipo(c, r, ref_c, ref_r, n_c, n_r, beta=0.4, weight_B=w),
      'kto': lambda: preference.kto(c, ref_c, desirable, kl, beta=0.3, weight_B=w),
      'orpo': lambda: preference.orpo(c, r, n_c, n_r, beta=0.6, weight_B=w),
      'simpo': lambda: preference.simpo(c, r, n_c, n_r, beta=2.0, gamma=0.3, weight_B=w),
      'cpo': lambda: preference.cpo(c, r, n_c, beta=0.2, weight_B=w),
    }[name]()
    return loss.total / loss.weight

  return fn


@pytest.mark.parametrize('change', ['garbage', 'rows', 'twice'])
@pytest.mark.parametrize('name', ['bradley_terry', 'dpo', 'ipo', 'kto', 'orpo', 'simpo', 'cpo'])
def test_rows_without_weight_may_hold_anything(name, change):
  assert_unchanged(of_rows(name), ROWS, [WEIGHT], change)


def test_summed_counts_what_is_on():
  logp_B, length_B = preference.summed(*map(jnp.asarray, (TOKENS[0], MASKS[0])))
  np.testing.assert_allclose(logp_B, [sum(x[m > 0]) for x, m in zip(TOKENS[0], MASKS[0], strict=True)], rtol=1e-6)
  np.testing.assert_array_equal(length_B, MASKS[0].sum(-1))


def test_references_margins_and_baselines_get_no_gradient():
  c, r, margin, desirable, *refs = map(jnp.asarray, (CHOSEN, REJECTED, MARGIN, DESIRABLE, *REFS))
  grads = jax.grad(lambda *refs: preference.dpo(c, r, *refs, beta=0.3).total, (0, 1))(*refs)
  grads += jax.grad(lambda *refs: preference.ipo(c, r, *refs, 3.0, 4.0, beta=0.3).total, (0, 1))(*refs)
  grads += jax.grad(lambda ref, kl: preference.kto(c, ref, desirable, kl, beta=0.3).total, (0, 1))(refs[0], 0.5)
  grads += (jax.grad(lambda m: preference.bradley_terry(c, r, margin_B=m).total)(margin),)
  assert not any(np.any(g) for g in grads)


def test_ipo_is_least_where_the_difference_is_half_of_one_over_beta():
  c = jnp.asarray([0.0, 3.0])
  grad = jax.grad(lambda c: preference.ipo(c, jnp.zeros(2), 0.0, 0.0, 2.0, 1.0, beta=1 / 3).total)(c)
  assert grad[0] < 0 and grad[1] == pytest.approx(0.0, abs=1e-6)  # 3 / 2 tokens


def test_kto_baseline_is_a_mean_and_never_negative():
  up = preference.kto_baseline(*map(jnp.asarray, REFS), weight_B=jnp.asarray(WEIGHT))
  down = preference.kto_baseline(*map(jnp.asarray, REFS[::-1]), weight_B=jnp.asarray(WEIGHT))
  want = np.sum(WEIGHT * (REF_CHOSEN - REF_REJECTED)) / WEIGHT.sum()
  np.testing.assert_allclose([up, down], np.maximum([want, -want], 0.0), rtol=1e-6)
  assert preference.kto_baseline(jnp.ones(B), 0.0, weight_B=0.0) == 0.0
  args = jnp.asarray(CHOSEN), jnp.asarray(REF_CHOSEN), jnp.asarray(DESIRABLE)
  assert preference.kto(*args, -2.0, beta=0.2).total == preference.kto(*args, 0.0, beta=0.2).total


@pytest.mark.parametrize('mean', [0.0, 1e-9, -1e-9, -1e-3, -90.0])
def test_odds_are_finite_at_either_end(mean):
  """An answer of probability 1 in float32 (or a little more) has odds without end."""
  c, r = jnp.full(B, mean), jnp.asarray(REJECTED)
  for args in ((c, r), (r, c)):
    value, grad = jax.value_and_grad(lambda c, args=args: preference.orpo(c, args[1], 1.0, 1.0, beta=1.0).total)(
      args[0]
    )
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_an_answer_without_tokens_has_a_mean_of_nothing():
  """And is as if each token had probability 1, less what keeps its odds finite."""
  odds = lambda mean: mean - np.log(-np.expm1(mean))
  empty = preference.orpo(jnp.full(1, -3.0), jnp.zeros(1), jnp.full(1, 2.0), jnp.zeros(1), beta=0.7, sft=0.0)
  assert float(empty.total) == pytest.approx(0.7 * np.log1p(np.exp(odds(-1e-6) - odds(-1.5))), rel=1e-5)


def test_extreme_log_probs_stay_finite():
  big = jnp.asarray([-1e5, -1e3, -1.0, -1e4, -1e6])
  for name in LOSSES:
    grad = jax.grad(lambda c, name=name: LOSSES[name][0](c, jnp.asarray(REJECTED), 1.0).total)(big)
    assert np.isfinite(grad).all(), name


def test_float32_inside():
  c, r = jnp.asarray(CHOSEN, jnp.bfloat16), jnp.asarray(REJECTED, jnp.bfloat16)
  for ours, formula in LOSSES.values():
    got = ours(c, r, jnp.ones(B))
    assert got.total.dtype == jnp.float32
    want = np.sum(formula(*np.float64((c.astype(jnp.float32), r.astype(jnp.float32)))))
    assert float(got.total) == pytest.approx(want, rel=1e-5)


def test_pair_metrics():
  got = preference.pair_metrics(
    jnp.asarray([3.0, 1.0, jnp.nan, 2.0]), jnp.asarray([1.0, 4.0, 0.0, 2.0]), weight_B=jnp.asarray([1.0, 1.0, 0.0, 1.0])
  )
  got = {name: float(x) for name, x in masked.values(got).items()}
  assert got == pytest.approx({'chosen': 2.0, 'rejected': 7 / 3, 'margin': -1 / 3, 'accuracy': 0.5})
