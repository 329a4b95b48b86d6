"""Attention to a part of the keys, of a cache or of a row: `attend`'s values, whatever others use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import models, sample
from jaxlm.models import ModelConfig, Run
from jaxlm.models.attention import attend, attend_back, attend_reached, causal_mask

B, T, S, H, K, N = 3, 5, 192, 6, 2, 11


@pytest.fixture(scope='module')
def inputs():
  rng = np.random.default_rng(3)
  return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, H, N), (B, K, S, N), (B, K, S, N)))


def masked(starts, window=None):
  positions_BT = jnp.asarray(starts)[:, None] + jnp.arange(T)
  return positions_BT.max(), causal_mask(positions_BT, jnp.arange(S)[None] * jnp.ones((B, 1), int), window=window)


@pytest.mark.parametrize('starts', [(0, 3, 7), (60, 0, 62), (187, 100, 64)])
@pytest.mark.parametrize('window, softcap', [(None, None), (9, None), (None, 5.0)])
def test_values_are_those_of_attend(inputs, starts, window, softcap):
  last, mask = masked(starts, window)
  q, k, v = inputs
  expected = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask, softcap=softcap)
  np.testing.assert_allclose(attend_reached(*inputs, mask, last, softcap=softcap), expected, rtol=2e-5, atol=2e-6)


def test_a_row_does_not_see_how_far_others_reach(inputs):
  apart = jax.jit(attend_reached)
  near, far = masked((2, 0, 7)), masked((2, 187, 100))
  (last, mask), (last_far, mask_far) = near, far
  np.testing.assert_array_equal(apart(*inputs, mask, last)[0], apart(*inputs, mask_far, last_far)[0])
  assert (apart(*inputs, mask, last)[1] != apart(*inputs, mask_far, last_far)[1]).any()


def test_what_is_not_reached_is_not_read(inputs):
  q, k, v = inputs
  last, mask = masked((2, 0, 7))
  gone = v.at[:, :, 64:].set(jnp.nan)
  assert np.isfinite(attend_reached(q, k, gone, mask, last)).all()


def test_a_step_does_not_copy_its_cache():
  """Not even the keys of one layer: turned for the loop, all of every layer was copied for each token."""
  cfg = ModelConfig(d_model=24, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=32, vocab_size=31, max_seq_len=512)
  rows, run = 16, Run(attention='reached')
  params = sample.readied(cfg, models.init(cfg, jax.random.key(0)))
  cache = models.init_cache(cfg, rows, 512, run.dtype)
  step = jax.jit(lambda *given: sample.decode(cfg, *given, run=run), donate_argnums=3)
  compiled = step.lower(params, jnp.ones((rows, 1), int), jnp.full(rows, 7), cache).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < cache[0].k.nbytes


@pytest.mark.parametrize('length, blocks', [(256, 4), (384, 3), (192, 4), (331, 4)])
@pytest.mark.parametrize('window, softcap', [(None, None), (70, 5.0)])
def test_later_keys_of_a_row_are_left_out(length, blocks, window, softcap):
  """Values and gradients of `attend`, for segments too; the products of equal blocks are fewer."""
  rng = np.random.default_rng(4)
  rows = [jnp.asarray(rng.normal(size=(B, length, n, N)), jnp.float32) for n in (H, K, K)]
  order, segments = jnp.arange(length)[None], jnp.asarray(np.sort(rng.integers(1, 4, (B, length)), axis=1))
  mask = causal_mask(order, order, segments, segments, window)
  how = {'softcap': softcap}
  loss = lambda fn, rows, **more: jnp.sum(jnp.sin(fn(*rows, mask, **how, **more)))
  got = jax.jit(jax.value_and_grad(lambda rows: loss(attend_back, rows, blocks=blocks)))
  want = jax.jit(jax.value_and_grad(lambda rows: loss(attend, rows)))
  for a, b in zip(jax.tree.leaves(got(rows)), jax.tree.leaves(want(rows)), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
  flops = [fn.lower(rows).compile().cost_analysis()['flops'] for fn in (got, want)]
  cut = length in (256, 384)
  assert flops[0] < (0.75 if cut else 1.01) * flops[1] and (cut or flops[0] > 0.99 * flops[1])
