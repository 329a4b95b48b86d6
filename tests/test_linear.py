"""The product whose gradient is made the cheaper way: equal to the derived one, and what it turns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.linear import matmul

RNG = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize('shape', [(7, 3, 11), (5, 3, 13, 2)])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_gradients_are_the_derived_ones(shape, dtype):
  *rows, i, o = shape
  x, w, c = (y.astype(dtype) for y in (normal(*rows, i), normal(i, o), normal(*rows, o)))
  loss = lambda product: lambda x, w: jnp.sum((product(x, w) * c).astype(jnp.float32))
  found = jax.grad(loss(matmul), (0, 1))(x, w)
  want = jax.grad(loss(jnp.matmul), (0, 1))(x, w)
  near = 1e-5 if dtype == jnp.float32 else 2e-2  # of the largest
  for mine, theirs in zip(found, want, strict=True):
    assert mine.dtype == dtype
    mine, theirs = mine.astype(jnp.float32), theirs.astype(jnp.float32)
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=near * np.abs(theirs).max())
  vmapped = jax.vmap(jax.grad(loss(matmul), 1), (None, 0))(x, jnp.stack([w, 2 * w]))
  np.testing.assert_allclose(vmapped[0].astype(jnp.float32), theirs, rtol=0, atol=near * np.abs(theirs).max())


@pytest.mark.parametrize('sizes', [(4, 96), (96, 4)])
def test_the_narrower_factor_comes_first(sizes):
  """It is the first of a product over rows that CPUs turn."""
  i, o = sizes
  traced = jax.make_jaxpr(jax.grad(lambda w: jnp.sum(matmul(normal(512, i), w) ** 2)))(normal(i, o)).jaxpr
  (last,) = [eqn for eqn in traced.eqns if eqn.params.get('dimension_numbers') == (((0,), (0,)), ((), ()))]
  assert last.invars[0].aval.shape == (512, 4)


def test_nothing_is_kept_for_what_is_frozen():
  x, w = normal(31, 3), normal(3, 11)
  kept = lambda fn, arg: {y.shape for y in jax.tree.leaves(jax.vjp(fn, arg)[1])}
  assert kept(lambda x: matmul(x, w), x) == {(3, 11)} and kept(lambda w: matmul(x, w), w) == {(31, 3)}
