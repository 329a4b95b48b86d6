"""Attention kernels, interpreted on the CPU, against the plain arithmetic: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.errors import InputError
from jaxlm.models import kernels, ring
from jaxlm.models.attention import attend, causal_mask

T, H, K, N = 256, 6, 2, 10
CASES = {'causal': {}, 'window': {'window': 37}, 'soft cap': {'softcap': 3.0, 'scale': 0.4}}


def inputs(B):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, N)), jnp.float32) for n in (H, K, K))
  cuts = np.sort(rng.integers(0, T, (B, 3)), axis=1)
  segments = (np.arange(T)[None, :, None] >= cuts[:, None]).sum(axis=2)
  return q, k, v, jnp.asarray(segments, jnp.int32)


def plain(q, k, v, segments, window=None, scale=None, softcap=None):
  order = jnp.arange(T)[None]
  return attend(q, k, v, causal_mask(order, order, segments, segments, window), scale, softcap)


def both(fn, q, k, v, segments):
  probe = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
  return jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sum(fn(q, k, v, segments) * probe), (0, 1, 2)))(q, k, v)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('packed', [True, False])
def test_splash_is_attention(case, packed):
  q, k, v, segments = inputs(2)
  segments = segments if packed else None
  how = CASES[case]
  want = both(lambda *x: plain(*x, **how), q, k, v, segments)
  got = both(lambda *x: kernels.splash(*x, kernels.Splash(**how, interpret=True)), q, k, v, segments)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_splash_on_a_mesh():
  q, k, v, segments = inputs(4)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  want = both(plain, q, k, v, segments)
  with jax.set_mesh(mesh):
    got = both(lambda *x: kernels.splash(*x, kernels.Splash(interpret=True), sharding.RULES), q, k, v, segments)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('sizes', [{'sequence': 8, 'fsdp': 1}, {'sequence': 2, 'tensor': 2, 'fsdp': 2}])
def test_a_ring_is_attention(case, sizes, monkeypatch):
  monkeypatch.setattr(ring, 'QUERIES', 24)
  q, k, v, segments = inputs(2)
  want = both(lambda *x: plain(*x, **CASES[case]), q, k, v, segments)
  with jax.set_mesh(sharding.make_mesh(**sizes)):
    got = both(lambda *x: ring.ring(*x, **CASES[case], rules=sharding.RULES), q, k, v, segments)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_splash_takes_whole_tiles():
  q, k, v, _ = inputs(1)
  with pytest.raises(InputError, match='multiple of 128 tokens, not 250'):
    kernels.splash(q[:, :250], k[:, :250], v[:, :250], None)
