"""The product whose gradient is made the cheaper way, and weights that lie turned: equal to the plain ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LLAMA, randomized

from jaxlm import models
from jaxlm.models.linear import FEW, LowRank, Turned, as_computed, by_columns, dense, linear, matmul, shape, turn

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


@pytest.mark.parametrize('rows', [(1,), (2, 3), (FEW + 5,)], ids=['one', 'few', 'many'])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_turned_weight_multiplies_as_it_would_have(rows, dtype):
  x, w, bias = normal(*rows, 7).astype(dtype), normal(7, 11), normal(11)
  lying = turn(w)
  assert lying.w.shape == (11, 7) and shape(lying) == (7, 11) and as_computed(lying, dtype, False).w.dtype == dtype
  near = 1e-5 if dtype == jnp.float32 else 0.1
  found = jax.jit(linear)(x, lying, bias)
  assert found.dtype == dtype
  np.testing.assert_allclose(found.astype(jnp.float32), linear(x, w, bias).astype(jnp.float32), atol=near)
  assert by_columns(x, lying, jnp.float32).dtype == jnp.float32
  adapted = LowRank(w, normal(7, 2), normal(2, 11), jnp.float32(0.5), magnitude=normal(11))
  assert isinstance(turn(adapted).w, Turned)
  np.testing.assert_allclose(dense(turn(adapted)), dense(adapted), rtol=1e-6)
  np.testing.assert_allclose(
    linear(x, turn(adapted)).astype(jnp.float32), linear(x, adapted).astype(jnp.float32), atol=near
  )


def test_few_rows_are_columns_in_the_compiled_product():
  """Else XLA makes the product of rows of it again, at half the speed."""
  lying = turn(normal(64, 96))
  for rows, product in ((FEW, f'f32[96,{FEW}]'), (FEW + 1, f'f32[{FEW + 1},96]')):
    text = jax.jit(linear).lower(normal(rows, 64), lying).compile().as_text()
    assert re.findall(r'= (f32\[[\d,]+\])\S* dot\(', text) == [product]


def test_a_turned_weight_of_another_shape_is_refused():
  """Linen checks arrays alone."""
  params = models.turned(LLAMA, {**(p := randomized(LLAMA)), 'layers': models.unstack(p['layers'], LLAMA.n_layers)})
  params['layers'][0]['attn']['q'] = Turned(params['layers'][0]['attn']['q'].w.T[:, :-1])
  with pytest.raises(ValueError, match='attn/q: '):
    models.forward(LLAMA, params, jnp.zeros((1, 3), jnp.int32))
