"""Sums with their weights: any split of a batch adds up to the same value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import masked
from jaxlm.masked import Max, Min, Sum

pytestmark = pytest.mark.usefixtures('strict')
RNG = np.random.default_rng(3)
X = RNG.normal(size=(5, 7)).astype(np.float32)
MASK = (RNG.random((5, 7)) < 0.6).astype(np.float32)


def test_total_against_numpy():
  got = masked.total(jnp.asarray(X), jnp.asarray(MASK))
  assert got.total == pytest.approx(np.sum(X.astype(np.float64) * MASK), abs=1e-5)
  assert got.weight == MASK.sum()


def test_weights_between_0_and_1_scale():
  got = masked.total(jnp.asarray(X), jnp.asarray(MASK * 0.25))
  assert got.total == pytest.approx(0.25 * np.sum(X.astype(np.float64) * MASK), abs=1e-5)
  assert got.weight == 0.25 * MASK.sum()


def test_a_mask_is_broadcast_and_may_be_boolean():
  got = masked.total(jnp.asarray(X), jnp.array([[True], [False], [True], [True], [False]]))
  assert got.total == pytest.approx(X[[0, 2, 3]].sum(dtype=np.float64), abs=1e-5)
  assert got.weight == 21


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_masked_does_not_spread(bad):
  x = np.where(MASK > 0, X, bad).astype(np.float32)
  value, grad = jax.value_and_grad(lambda x: masked.total(x, jnp.asarray(MASK)).total)(jnp.asarray(x))
  assert value == masked.total(jnp.asarray(X), jnp.asarray(MASK)).total
  np.testing.assert_array_equal(grad, MASK)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_kept_stops_what_is_masked_before_it_is_computed_with(bad):
  x = jnp.asarray(np.where(MASK > 0, X, bad).astype(np.float32))
  for mask in (jnp.asarray(MASK), jnp.asarray(MASK > 0)):
    np.testing.assert_array_equal(masked.kept(x, mask, -2.0), np.where(MASK > 0, X, -2.0))
    grad = jax.grad(lambda x, m=mask: jnp.sum(jnp.exp(masked.kept(x, m))))(x)
    np.testing.assert_allclose(grad, np.where(MASK > 0, np.exp(X), 0.0), rtol=1e-6)
  half = masked.kept(jnp.ones(3, jnp.bfloat16), 1.0)
  assert half.dtype == jnp.float32 and half.shape == (3,)


def test_bfloat16_is_summed_in_float32():
  got = masked.total(jnp.ones(4099, jnp.bfloat16), True)  # bfloat16 alone stops counting at 256
  assert (got.total, got.total.dtype) == (4099, jnp.float32)


def test_merge_and_stack_reduce_alike():
  parts = [
    {'s': Sum(jnp.float32(t), jnp.float32(w)), 'max': Max(jnp.float32(t)), 'min': Min(jnp.float32(t))}
    for t, w in ((2.0, 3.0), (-7.0, 0.0), (5.0, 11.0))
  ]
  merged = masked.merge(masked.merge(parts[0], parts[1]), parts[2])
  reduced = masked.reduce_stacked(jax.tree.map(lambda *xs: jnp.stack(xs), *parts))
  for got in (merged, reduced):
    assert jax.tree.map(float, got) == {'s': Sum(0.0, 14.0), 'max': Max(5.0), 'min': Min(-7.0)}


def test_value_divides_once_and_is_nan_without_weight():
  got = masked.values(
    {'a': Sum(jnp.float32(6), jnp.float32(4)), 'none': Sum(jnp.float32(0), jnp.float32(0)), 'm': Max(jnp.float32(3))}
  )
  assert (got['a'], got['m']) == (1.5, 3)
  assert np.isnan(got['none'])


def test_the_gradient_of_a_value_without_weight_is_not_nan():
  assert jax.grad(lambda t: masked.value(Sum(t, jnp.float32(2))))(jnp.float32(1)) == 0.5
  assert jax.grad(lambda t: masked.value(Sum(t, jnp.float32(0))))(jnp.float32(1)) == 0
