"""Adapters: nothing at first, folded in without a difference, frozen leaves untouched, few bits, foreign trees."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import EXPERTS, LLAMA, MIXED, randomized

from jaxlm import lora, models, tree
from jaxlm.errors import InputError
from jaxlm.models import LowRank
from jaxlm.models.linear import linear
from jaxlm.train import make_train_step, state

TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, 97, (2, 7)), jnp.int32)
KINDS = {
  'lora': {},
  'rslora': {'rank_stabilized': True},
  'dora': {'dora': True},
  'ranks': {'ranks': {'layers/attn/*': 2, 'layers/mlp/up': 5}},
}


def logits(cfg, params):
  return jax.jit(lambda p: models.forward(cfg, p, TOKENS)[0])(params)


def moved(params, by=0.3):
  """The same with what learns away from where it began."""
  rng = np.random.default_rng(5)
  draw = lambda x: x + by * jnp.asarray(rng.normal(size=x.shape), x.dtype)
  return tree.path_map(lambda path, x: draw(x) if lora.is_adapter(path, x) else x, params)


@pytest.mark.slow(but='llama-lora-attention')
@pytest.mark.parametrize('where', ['attention', 'all-linear', 'layers/mlp/up,layers/attn/q'])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('cfg', [LLAMA, MIXED, EXPERTS], ids=['llama', 'mixed', 'experts'])
def test_nothing_at_first_and_folded_in_the_same(cfg, kind, where):
  params = randomized(cfg)
  if cfg is EXPERTS and kind == 'dora' and where != 'attention':
    with pytest.raises(InputError, match='neither dora nor dropout'):
      lora.init(jax.random.key(1), params, rank=3, alpha=7.0, where=where, **KINDS[kind])
    return
  new = lora.init(jax.random.key(1), params, rank=3, alpha=7.0, where=where, **KINDS[kind])
  np.testing.assert_allclose(logits(cfg, new), logits(cfg, params), rtol=1e-4, atol=1e-4)
  new = moved(new)
  got = logits(cfg, new)
  assert np.abs(got - logits(cfg, params)).max() > 0.05
  np.testing.assert_allclose(logits(cfg, lora.merge(new)), got, rtol=1e-3, atol=1e-3)
  base = lora.base(new)
  assert jax.tree.structure(base) == jax.tree.structure(params)
  for mine, theirs in zip(jax.tree.leaves(base), jax.tree.leaves(params), strict=True):
    assert mine.unsafe_buffer_pointer() == theirs.unsafe_buffer_pointer()


def test_the_scale_and_the_ranks():
  params = randomized(LLAMA)
  for kind, scale in {'lora': 7.0 / 3, 'rslora': 7.0 / 3**0.5}.items():
    for w in lora.adapted(lora.init(jax.random.key(1), params, rank=3, alpha=7.0, **KINDS[kind])).values():
      np.testing.assert_allclose(w.scale_L, scale, rtol=1e-6)
      assert w.scale_L.shape == (LLAMA.n_layers,) and w.a.shape[-1] == w.b.shape[-2] == 3
      bound = 1 / w.a.shape[1] ** 0.5
      assert 0.8 * bound < jnp.abs(w.a).max() <= bound and not w.b.any()
  found = lora.adapted(lora.init(jax.random.key(1), params, rank=3, alpha=6.0, **KINDS['ranks']))
  sizes = {path: (w.a.shape[-1], float(w.scale_L[0])) for path, w in found.items()}
  assert sizes['layers/attn/q'] == (2, 3.0) and sizes['layers/mlp/down'] == (3, 2.0)
  assert sizes['layers/mlp/up'] == (5, pytest.approx(1.2))


def test_layers_of_a_stack_have_ranks_of_their_own():
  """Zeros that fill a rank up stay zeros, and a layer that is not picked never changes."""
  params = randomized(LLAMA)
  n = LLAMA.n_layers
  new = lora.init(
    jax.random.key(1), params, rank=3, alpha=6.0, where='layers/0/mlp/up,layers/attn/q', ranks={'layers/1/attn/q': 2}
  )
  found = lora.adapted(new)
  assert set(found) == {'layers/mlp/up', 'layers/attn/q'}
  up, q = found['layers/mlp/up'], found['layers/attn/q']
  np.testing.assert_allclose(up.scale_L, [2.0] + [0.0] * (n - 1))
  np.testing.assert_allclose(q.scale_L, [2.0, 3.0] + [2.0] * (n - 2))
  assert not up.a[1:].any() and not q.a[1, :, 2].any() and q.a[1, :, :2].all() and q.a[0].all()
  picked, rest = lora.split(new)
  for _ in range(2):
    grad = jax.grad(lambda p: jnp.sum(models.forward(LLAMA, tree.combine(p, rest), TOKENS)[0] ** 2))(picked)
    picked = jax.tree.map(lambda x, g: x - 0.01 * g, picked, grad)
  up, q = (lora.adapted(tree.combine(picked, rest))[path] for path in ('layers/mlp/up', 'layers/attn/q'))
  assert up.b[0].any() and not up.b[1:].any() and not q.a[1, :, 2].any() and not q.b[1, 2].any() and q.b[1, :2].any()


def test_several_adapters_on_one_base():
  params = randomized(LLAMA)
  new = [moved(lora.init(jax.random.key(n), params, rank=2 + n, alpha=4.0), 0.1 * (n + 1)) for n in range(2)]
  apart = {str(n): lora.split(one)[0] for n, one in enumerate(new)}
  for n, one in enumerate(new):
    again = tree.combine(apart[str(n)], lora.split(one)[1])
    np.testing.assert_array_equal(logits(LLAMA, again), logits(LLAMA, one))
  sizes = [tree.size(x) for x in apart.values()]
  assert sizes[0] < sizes[1] < 0.6 * tree.size(params)


def test_a_filter_that_picks_nothing_or_what_is_no_matrix_is_refused():
  params = randomized(LLAMA)
  for where, why in (('layers/atn/*', 'picks nothing'), ('final_norm/scale', 'is no matrix')):
    with pytest.raises(InputError, match=why):
      lora.init(jax.random.key(0), params, rank=2, alpha=2.0, where=where)
  once = lora.init(jax.random.key(0), params, rank=2, alpha=2.0)
  with pytest.raises(InputError, match='has an adapter already'):
    lora.init(jax.random.key(0), once, rank=2, alpha=2.0)


def test_frozen_leaves_stay_bitwise_and_have_no_moments():
  params = lora.init(jax.random.key(1), randomized(LLAMA), rank=2, alpha=4.0)

  def loss(params, batch, key):
    from jaxlm.masked import Sum

    return Sum(jnp.sum(models.forward(LLAMA, params, batch)[0] ** 2), jnp.ones(())), {}

  optimizer = optax.adamw(1e-2)
  now = state.create(params, optimizer, jax.random.key(0), trainable=lora.is_adapter)
  assert {path.split('/')[-1] for path, _ in tree.items(now.opt_state[0].mu)} == {'a', 'b'}
  step = jax.jit(make_train_step(loss, optimizer, trainable=lora.is_adapter))
  new, _ = step(now, TOKENS)
  new, _ = step(new, TOKENS)
  for path, x in tree.items(new.params):
    same = np.array_equal(x, dict(tree.items(params))[path])
    assert same == (not lora.is_adapter(path, x)), path


def test_dropped_inputs_by_hand():
  rng = np.random.default_rng(0)
  x, w, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((400, 11), (11, 5), (11, 3), (3, 5)))
  one = LowRank(w, a, b, jnp.full((), 2.0), rate=0.25)
  np.testing.assert_allclose(
    linear(x, one), x @ w + 2.0 * x @ a @ b, rtol=1e-4, atol=1e-4
  )  # no key: nothing is dropped
  keyed = lora.with_keys({'w': one}, jax.random.key(4))['w']
  keep = jax.random.bernoulli(keyed.key_L, 0.75, x.shape)
  dropped = jnp.where(keep, x / 0.75, 0.0)
  assert 0.7 < keep.mean() < 0.8
  np.testing.assert_allclose(linear(x, keyed), x @ w + 2.0 * dropped @ a @ b, rtol=1e-4, atol=1e-4)
  magnitude = jnp.asarray(rng.uniform(1, 2, 5), jnp.float32)
  ratio = magnitude / jnp.linalg.norm(w + 2.0 * a @ b, axis=0)
  want = x @ w + (ratio - 1) * (dropped @ w) + ratio * 2.0 * (dropped @ a @ b)  # as peft has it
  np.testing.assert_allclose(linear(x, keyed.replace(magnitude=magnitude)), want, rtol=1e-4, atol=1e-4)


def test_every_adapter_of_every_layer_has_its_own_key():
  params = lora.init(jax.random.key(1), randomized(LLAMA), rank=2, alpha=4.0, dropout=0.5)
  keys = [jax.random.key_data(w.key_L) for w in lora.adapted(lora.with_keys(params, jax.random.key(2))).values()]
  keys = np.concatenate([np.asarray(k).reshape(-1, 2) for k in keys])
  assert len(np.unique(keys, axis=0)) == len(keys) == 7 * LLAMA.n_layers
  params = moved(params)
  dropped = [logits(LLAMA, lora.with_keys(params, jax.random.key(n))) for n in (2, 2, 3)]
  np.testing.assert_array_equal(dropped[0], dropped[1])
  assert np.abs(dropped[0] - dropped[2]).max() > 1e-2


@pytest.mark.slow(but='int8-0.012-0.3')
@pytest.mark.parametrize('qtype, error, share', [('nf4', 0.11, 0.2), ('int8', 0.012, 0.3)])
def test_few_bits_within_their_error(qtype, error, share):
  """The stated error of a matrix; an adapter on one begins as nothing and learns, the bits do not."""
  cfg = dataclasses.replace(LLAMA, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=128)
  params = randomized(cfg)
  few = lora.quantize(params, qtype=qtype)
  for path in ('attn', 'mlp'):
    for name, w in few['layers'][path].items():
      exact = params['layers'][path][name]
      got = lora.merge({'w': lora.init(jax.random.key(0), {'w': w}, rank=2, alpha=2.0, where='w')['w']})['w']
      away = np.linalg.norm(got - exact) / np.linalg.norm(exact)
      assert 0 < away < error, (name, away)
  new = lora.init(jax.random.key(1), few, rank=3, alpha=6.0)
  np.testing.assert_array_equal(logits(cfg, new), logits(cfg, few))
  picked, rest = lora.split(moved(new))
  grad = jax.grad(lambda picked: jnp.sum(models.forward(cfg, tree.combine(picked, rest), TOKENS)[0] ** 2))(picked)
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grad))
  with pytest.raises(InputError, match='do not divide into tiles of 60'):
    lora.quantize(params, tile=60)


@pytest.mark.slow
def test_a_foreign_tree():
  """A stock Linen model through `merge`, which is differentiable."""

  class Stock(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3)(nn.relu(nn.Dense(5)(x)))

  x = jnp.ones((2, 7))
  params = Stock().init(jax.random.key(0), x)
  new = lora.init(jax.random.key(1), params, rank=2, alpha=2.0, where='*/kernel')
  out = lambda p: Stock().apply(lora.merge(p), x)
  np.testing.assert_allclose(out(new), Stock().apply(params, x), atol=1e-6)
  grads = jax.grad(lambda p: jnp.sum(out(p)))(moved(new))
  assert all(np.abs(w.b).max() > 0 for w in lora.adapted(grads).values())
