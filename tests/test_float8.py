"""Matmuls in eight bits: against NumPy's own rounding to those types, and a model that learns with them."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import LLAMA, randomized
from test_step import language_batch

from jaxlm import config, models, program, sharding
from jaxlm.errors import InputError
from jaxlm.models import LowRank, Run
from jaxlm.models.linear import Float8, as_computed, dense, linear

RNG = np.random.default_rng(2)
X, W, G = (RNG.normal(size=s).astype(np.float32) for s in ((2, 7, 131), (131, 61), (2, 7, 61)))
LARGEST = {ml_dtypes.float8_e4m3fn: 448.0, ml_dtypes.float8_e5m2: 57344.0}


def rounded(x, type_, axis):
  """Scaled by the largest along what is summed over, rounded to eight bits, and back, in float64."""
  scale = np.abs(x).max(axis=axis, keepdims=True) / LARGEST[type_]
  return (x / scale).astype(type_).astype(np.float64) * scale


def test_forward_and_gradients_are_those_of_rounded_factors():
  e4, e5 = LARGEST
  x, g = X.reshape(-1, 131), G.reshape(-1, 61)
  want = {
    'y': rounded(x, e4, 1) @ rounded(W, e4, 0),
    'dx': rounded(g, e5, 1) @ rounded(W, e4, 1).T,
    'dw': rounded(x, e4, 0).T @ rounded(g, e5, 0),
  }
  y, pull = jax.vjp(lambda x, w: linear(x, Float8(w)), jnp.asarray(X), jnp.asarray(W))
  dx, dw = pull(jnp.asarray(G))
  exact = {'y': x @ W, 'dx': g @ W.T, 'dw': x.T @ g}
  for name, got in {'y': y, 'dx': dx, 'dw': dw}.items():
    got = np.asarray(got).reshape(want[name].shape)
    away = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)
    assert away(got, want[name]) < 1e-3, name
    assert 0.01 < away(got, exact[name]) < 0.08, name


def test_an_update_of_low_rank_is_not_rounded():
  a, b = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((131, 3), (3, 61)))
  w = LowRank(jnp.zeros((131, 61)), a, b, jnp.ones(()))
  np.testing.assert_allclose(
    linear(jnp.asarray(X), as_computed(w, jnp.float32, True)), X @ np.asarray(a @ b), rtol=1e-4, atol=1e-3
  )
  assert isinstance(as_computed(w, jnp.float32, True).w, Float8) and dense(Float8(a)) is a


def test_only_the_layers_large_matmuls_change():
  """What is not a matmul of a layer keeps its dtype: no rounding in norms, biases, embedding, head."""
  params, tokens = randomized(LLAMA), jnp.arange(10).reshape(2, 5)
  still = jax.tree.map(lambda x: x, params)
  for group in ('attn', 'mlp'):
    still['layers'][group] = {
      name: jnp.zeros_like(w) if w.ndim == 3 else w for name, w in params['layers'][group].items()
    }
  same = [models.hidden(LLAMA, still, tokens, run=Run(float8=on)).x_BTD for on in (False, True)]
  np.testing.assert_array_equal(*same)
  differ = [models.hidden(LLAMA, params, tokens, run=Run(float8=on)).x_BTD for on in (False, True)]
  assert 1e-3 < np.linalg.norm(differ[0] - differ[1]) / np.linalg.norm(differ[0]) < 0.3


@pytest.mark.slow(but='sizes0')
@pytest.mark.parametrize('sizes', [{'fsdp': 1}, {'fsdp': 4, 'tensor': 2}])
def test_a_model_learns_in_eight_bits(sizes):
  model = dataclasses.replace(LLAMA, d_model=24, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=40, vocab_size=128)

  def last(on):
    run = config.Pretrain(
      model=model,
      data=config.Data(seq_len=16, global_batch=8),
      optim=config.Optim(lr=1e-2, warmup_steps=5),
      compute=config.Compute(float8=on),
      steps=60,
    )
    mesh = sharding.make_mesh(**sizes, devices=jax.devices()[: np.prod(list(sizes.values()))])
    with jax.set_mesh(mesh):
      built = program.build(run, mesh)
      now, losses = built.create(), []
      for n in range(60):
        now, metrics = built.step(now, program.put(language_batch(8, 16, 13, seed=n), built.batch))
        losses.append(float(metrics['loss']))
    return losses[0], np.mean(losses[-5:])

  (first, plain), (_, eight) = last(False), last(True)
  assert eight < 0.7 * first and abs(eight - plain) < 0.05 * first and eight != plain


def test_without_qwix_it_is_one_line(monkeypatch):
  monkeypatch.setattr(program.importlib.util, 'find_spec', lambda name: None)
  run = config.Pretrain(model=dataclasses.replace(LLAMA), compute=config.Compute(float8=True))
  with pytest.raises(InputError, match=r"pip install -e '\.\[quant\]'"):
    program.build(run, sharding.make_mesh(devices=jax.devices()[:1]))
