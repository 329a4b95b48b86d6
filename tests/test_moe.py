"""Experts against loops in NumPy and against every expert computed densely; the balance; a run that has them.

S tokens, D model, F ffn of an expert, E experts, k experts a token.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXPERTS, LLAMA, randomized
from tiny_run import BASE, furnish

from jaxlm import cli, models, program, sharding
from jaxlm.config import Data, Mesh, Pretrain
from jaxlm.errors import InputError
from jaxlm.models import LowRank, ModelConfig, Run, dense
from jaxlm.models.dispatch import Exchange
from jaxlm.models.linear import grouped
from jaxlm.models.moe import MoE, mix, route
from jaxlm.models.transformer import MLP, declare, fan_in
from jaxlm.train import metrics

S, D, F, E = 23, 7, 11, 5
IDLE = 3  # the expert that no token likes
RNG = np.random.default_rng(11)


def draw(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


X, LOGITS = draw(S, D), draw(S, E).at[:, IDLE].set(-9.0)
GATE, UP, DOWN = draw(E, D, F), draw(E, D, F), draw(E, F, D)


def silu64(x):
  return x / (1 + np.exp(-x))


def layer64(x_SD, logits_SE, weights, k, normalized):
  """Token by token, expert by expert: the k likeliest, weighed by their softmax (Mixtral, section 2.1)."""
  gate, up, down = (None if w is None else np.asarray(w, np.float64) for w in weights)
  out = np.zeros(x_SD.shape)
  for s, (x, logits) in enumerate(zip(np.asarray(x_SD, np.float64), np.asarray(logits_SE, np.float64), strict=True)):
    probs = np.exp(logits) / np.exp(logits).sum()
    chosen = sorted(range(len(probs)), key=lambda e: -probs[e])[:k]
    for e in chosen:
      h = silu64(x @ up[e]) if gate is None else silu64(x @ gate[e]) * (x @ up[e])
      out[s] += probs[e] / (probs[chosen].sum() if normalized else 1.0) * (h @ down[e])
  return out


def layer(x_SD, logits_SE, weights, k, normalized=True):
  experts_Sk, weights_Sk, _ = route(logits_SE, k, normalized)
  return mix(x_SD, experts_Sk, weights_Sk, weights, jax.nn.silu)


def densely(x_SD, logits_SE, weights, k, normalized=True):
  """Every expert for every token, of which all but k are weighed with 0."""
  gate, up, down = weights
  probs_SE = jax.nn.softmax(logits_SE)
  kept_SE = probs_SE * (probs_SE >= jnp.sort(probs_SE)[:, -k, None])
  kept_SE = kept_SE / kept_SE.sum(axis=1, keepdims=True) if normalized else kept_SE
  h_ESF = jnp.einsum('SD,EDF->ESF', x_SD, up)
  h_ESF = jax.nn.silu(h_ESF) if gate is None else jax.nn.silu(jnp.einsum('SD,EDF->ESF', x_SD, gate)) * h_ESF
  return jnp.einsum('ESF,EFD,SE->SD', h_ESF, down, kept_SE)


@pytest.mark.parametrize('gate', [GATE, None], ids=['gated', 'plain'])
@pytest.mark.parametrize('normalized', [True, False])
@pytest.mark.parametrize('k', [1, 2, E])
def test_experts_against_a_loop_and_their_gradient_against_all_of_them(k, normalized, gate):
  experts_Sk, _, _ = route(LOGITS, k, normalized)
  assert (IDLE in np.asarray(experts_Sk)) == (k == E)
  weights = (gate, UP, DOWN)
  got = jax.jit(layer, static_argnums=(3, 4))(X, LOGITS, weights, k, normalized)
  np.testing.assert_allclose(got, layer64(X, LOGITS, weights, k, normalized), rtol=1e-5, atol=1e-5)
  probe = draw(S, D)
  grad = lambda fn: jax.jit(jax.grad(lambda *args: jnp.sum(fn(*args, k, normalized) * probe), (0, 1, 2)))
  mine, theirs = grad(layer)(X, LOGITS, weights), grad(densely)(X, LOGITS, weights)
  for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('k', [1, 2])
def test_another_token_changes_no_bit_of_the_others(k):
  at = 6
  logits = LOGITS.at[at].set(jnp.roll(LOGITS[at], 1))  # to other experts, whose rows all move
  fn = jax.jit(lambda x, logits: layer(x, logits, (GATE, UP, DOWN), k))
  before, after = fn(X, LOGITS), fn(X.at[at].multiply(-1.0), logits)
  same = np.all(np.asarray(before == after), axis=1)
  assert not same[at] and same[np.arange(S) != at].all()


def shared_layer(cfg):
  declared = lambda module, name, shape, axes, scale: declare(module, name, shape, axes, fan_in(scale))
  return MoE(cfg, jax.nn.silu, declared, 1.0, lambda: MLP(cfg, Run(), cfg.shared_d_ff, name='shared'))


def test_the_shared_expert_against_numpy():
  p = jax.tree.map(lambda x: x[1], randomized(EXPERTS)['layers']['mlp'])
  x = draw(1, S, EXPERTS.d_model)
  got, _ = shared_layer(EXPERTS).apply({'params': p}, x)
  x64, p64 = np.asarray(x[0], np.float64), jax.tree.map(lambda w: np.asarray(w, np.float64), p)
  want = layer64(x64, x64 @ p64['router'], (p['gate'], p['up'], p['down']), 2, True)
  one = p64['shared']
  share = 1 / (1 + np.exp(-x64 @ p64['shared_gate']))
  want += share * ((silu64(x64 @ one['gate']) * (x64 @ one['up'])) @ one['down'])
  np.testing.assert_allclose(got[0], want, atol=1e-5)


def test_every_matrix_may_be_low_rank():
  """The layer with an update on every matrix, router and shared ones too, is that of the folded weights; so is its
  gradient, by the chain rule."""
  p = jax.tree.map(lambda x: x[0], randomized(EXPERTS)['layers']['mlp'])

  def low_rank(w):
    *stack, i, o = w.shape
    scale = np.linspace(0.5, 2.0, int(np.prod(stack))).reshape(stack)
    return LowRank(w, 0.3 * draw(*stack, i, 3), 0.3 * draw(*stack, 3, o), jnp.asarray(scale, jnp.float32))

  is_low_rank = lambda x: isinstance(x, LowRank)
  low = jax.tree.map(low_rank, p)
  folded = jax.tree.map(dense, low, is_leaf=is_low_rank)
  x, probe = draw(1, S, EXPERTS.d_model), draw(1, S, EXPERTS.d_model)
  fn = jax.jit(jax.value_and_grad(lambda p: jnp.sum(shared_layer(EXPERTS).apply({'params': p}, x)[0] * probe)))
  (value, grads), (expected, plain) = fn(low), fn(folded)
  assert float(value) == pytest.approx(float(expected), rel=1e-4)
  assert abs(float(value) - float(fn(p)[0])) > 0.1
  for leaf, mine, full in zip(*(jax.tree.leaves(t, is_leaf=is_low_rank) for t in (low, grads, plain)), strict=True):
    scale = leaf.scale_L[..., None, None]
    chain = full, scale * full @ jnp.swapaxes(leaf.b, -1, -2), scale * jnp.swapaxes(leaf.a, -1, -2) @ full
    for one, other in zip((mine.w, mine.a, mine.b), chain, strict=True):
      np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


def test_grouped_is_a_loop_over_groups():
  sizes = jnp.array([4, 0, 11, 1, 7], jnp.int32)
  got = grouped(X, UP, sizes)
  groups = np.split(np.asarray(X, np.float64), np.cumsum(sizes)[:-1])
  want = np.concatenate([x @ np.asarray(w) for x, w in zip(groups, UP, strict=True)])
  np.testing.assert_allclose(got, want, atol=1e-5)


# --- what keeps a router balanced


def aux64(logits, k):
  probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  share, likely = np.zeros(logits.shape[1]), probs.mean(axis=0)
  for row in probs:
    for e in np.argsort(-row)[:k]:
      share[e] += 1 / len(probs)
  return {'balance': len(share) * np.sum(share * likely), 'router_z': np.mean(np.log(np.exp(logits).sum(axis=1)) ** 2)}


@pytest.mark.parametrize('k', [1, 3])
def test_the_balance_and_the_z_loss_by_hand(k):
  aux = lambda logits: {name: float(x) for name, x in route(jnp.asarray(logits, jnp.float32), k, True)[2].items()}
  assert aux(LOGITS) == pytest.approx(aux64(np.asarray(LOGITS, np.float64), k), rel=1e-5)
  one = np.array([3.0, 2.0, 1.0, 0.0, -1.0])
  even = np.stack([np.roll(one, n) for n in range(E)])  # each expert is each token's first, second, ... once
  assert aux(even)['balance'] == pytest.approx(k, rel=1e-6)
  crowded = np.tile(one, (E, 1))  # all tokens go to the same
  probs = np.exp(one) / np.exp(one).sum()
  assert aux(crowded)['balance'] == pytest.approx(E * probs[:k].sum(), rel=1e-6)
  assert aux(np.log(np.full((S, E), 2.0)))['router_z'] == pytest.approx(np.log(2 * E) ** 2, rel=1e-6)


def test_the_balance_pulls_tokens_from_the_crowded_expert():
  logits = jnp.zeros((S, E)).at[:, 2].set(1.0)
  grad = jax.grad(lambda x: route(x, 1, True)[2]['balance'])(logits)
  assert np.all(grad[:, 2] > 0) and np.all(np.delete(np.asarray(grad), 2, axis=1) < 0)


def test_padding_does_not_count():
  real = jnp.arange(S) % 3 > 0
  some, alone = route(LOGITS, 2, True, real)[2], route(LOGITS[np.asarray(real)], 2, True)[2]
  whole = route(LOGITS, 2, True)[2]
  for name in ('balance', 'router_z'):
    assert float(some[name]) == pytest.approx(float(alone[name]), rel=1e-6)
    assert abs(float(some[name]) - float(whole[name])) > 1e-3
  assert {float(x) for x in route(LOGITS, 2, True, jnp.zeros(S, bool))[2].values()} == {0.0}


@pytest.mark.parametrize('mode', ['scan', 'loop'])
def test_a_models_padding_does_not_count(mode):
  """What stands where the segment is 0 changes nothing that the layers add to the loss."""
  params, rng = randomized(EXPERTS), np.random.default_rng(3)
  if mode == 'loop':
    params = {**params, 'layers': models.unstack(params['layers'], EXPERTS.n_layers)}
  ids = jnp.asarray(rng.integers(0, EXPERTS.vocab_size, (2, 13)), jnp.int32)
  lengths = np.array([[13], [6]])
  segments = jnp.asarray(np.where(np.arange(13) < lengths, 1 + (np.arange(13) > 3), 0), jnp.int32)
  other = jnp.where(segments > 0, ids, (ids + 1) % EXPERTS.vocab_size)
  fn = jax.jit(lambda ids, segments: models.hidden(EXPERTS, params, ids, segment_ids_BT=segments).aux)
  first, second = fn(ids, segments), fn(other, segments)
  assert first.keys() == {'balance', 'router_z'}
  jax.tree.map(np.testing.assert_array_equal, first, second)
  counted = fn(ids, jnp.maximum(segments, 1)), fn(other, jnp.maximum(segments, 1))
  assert abs(float(counted[0]['balance']) - float(counted[1]['balance'])) > 1e-3


# --- a run


@pytest.mark.slow
def test_a_run_with_experts_on_eight_devices_writes_what_its_routers_add(tmp_path):
  tiny = ModelConfig(d_model=16, n_layers=2, n_heads=2, d_ff=23, n_experts=5, shared_d_ff=13)
  config = dataclasses.replace(
    BASE,
    model=tiny,
    data=dataclasses.replace(BASE.data, global_batch=8),
    optim=dataclasses.replace(BASE.optim, lr=1e-2),
    mesh=Mesh(data=2, fsdp=4),
    watch=dataclasses.replace(BASE.watch, prompts=(), log_every=1),
    steps=20,
  )
  home = furnish(tmp_path, config)
  run = ['pretrain', str(home / 'tiny.py'), '--balance-loss', '0.3', '--router-z-loss', '0.07', '--run']
  assert cli.main([*run, str(home / 'run')]) == 0
  rows = [row for row in metrics.read_rows(home / 'run' / 'metrics.jsonl') if 'train/loss' in row]
  assert len(rows) == 20 and rows[-1]['train/nll'] < rows[0]['train/nll'] - 0.5
  for row in rows:
    added = 0.3 * row['train/balance'] + 0.07 * row['train/router_z']
    assert row['train/loss'] == pytest.approx(row['train/nll'] + added, rel=1e-5)
    assert 1 < row['train/balance'] < 5 and row['train/router_z'] > 0
  plain = ['--model.n-experts', '0', '--model.shared-d-ff', '0', '--steps', '5']
  assert cli.main([*run, str(home / 'plain'), *plain]) == 0
  (row,) = (row for row in metrics.read_rows(home / 'plain' / 'metrics.jsonl') if row['step'] == 4)
  assert row['train/loss'] == row['train/nll'] and not {'train/balance', 'train/router_z'} & row.keys()


@pytest.mark.slow(but='sizes1')
@pytest.mark.parametrize('sizes', [{'data': 8, 'fsdp': 1}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
def test_each_device_computes_its_own_tokens(sizes):
  """Read from the compiled step: left to itself, the compiler has each device do the experts of all of them."""
  model = ModelConfig(vocab_size=128, d_model=32, n_layers=1, n_heads=2, d_ff=64, n_experts=5)
  config = Pretrain(model=model, data=Data(seq_len=16, global_batch=8))

  def flops(sizes, devices):
    mesh = sharding.make_mesh(**sizes, devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
      built = program.build(config, mesh)
      return built.step.lower(built.abstract, built.batch).compile().cost_analysis()['flops']

  assert flops(sizes, 8) < flops({'data': 1, 'fsdp': 1}, 1) / 4


def test_weights_and_widths_that_cannot_be_are_refused():
  for field in ('balance_loss', 'router_z_loss'):
    with pytest.raises(InputError, match=rf'{field}=-0.1 must be in \[0, inf\)'):
      Pretrain(**{field: -0.1})
  with pytest.raises(InputError, match='shared_d_ff=5 is of a model with experts'):
    dataclasses.replace(LLAMA, shared_d_ff=5)
  with pytest.raises(InputError, match='model.shared_d_ff=-1 must be at least 0'):
    dataclasses.replace(EXPERTS, shared_d_ff=-1)


def test_flops_of_experts_and_of_windows_by_hand():
  sizes = {'vocab_size': 128, 'd_model': 6, 'n_layers': 3, 'n_heads': 2, 'n_kv_heads': 1, 'head_dim': 4}
  experts = ModelConfig(**sizes, d_ff=10, n_experts=7, experts_per_token=2, shared_d_ff=5)
  # attention 6*8 + 2*6*4 + 8*6 = 144; 2 experts of 3*6*10 and one of 3*6*5 = 450; router 6*7, share 6; head 6*128
  assert metrics.flops_per_token(experts, 11) == 6 * (3 * (144 + 450 + 42 + 6) + 768) + 12 * 3 * 11 * 8
  local = ModelConfig(**sizes, d_ff=10, pattern=('local', 'global'), window=4)  # two local layers and a global one
  assert metrics.flops_per_token(local, 11) == 6 * (3 * (144 + 180) + 768) + 12 * (4 + 11 + 4) * 8
  assert metrics.flops_per_token(local, 3) == 6 * (3 * (144 + 180) + 768) + 12 * 3 * 3 * 8


EXCHANGE = {'expert': 4, 'fsdp': 2}


@pytest.mark.slow(but='0')
@pytest.mark.parametrize('favourite', [None, 0, 7])
def test_experts_on_other_devices_are_those_here(favourite):
  """Rows of 8 devices with experts over 4; the worst case, all tokens to the experts of one device, too."""
  mesh = sharding.make_mesh(**EXCHANGE)
  x_BTD, weights = draw(8, 5, D), (draw(8, D, F), draw(8, D, F), draw(8, F, D))
  logits_SE = (
    draw(40, 8) if favourite is None else draw(40, 8).at[:, favourite].add(50.0).at[:, favourite ^ 1].add(40.0)
  )
  experts_Sk, weights_Sk, _ = route(logits_SE, 2, True)
  routed = (x_BTD, experts_Sk.reshape(8, 5, 2), weights_Sk.reshape(8, 5, 2))
  probe = draw(8, 5, D)

  def everywhere(x, weights):
    flat = lambda y: y.reshape(-1, y.shape[-1])

    def own(tokens, held):
      got = mix(*map(flat, tokens), held, jax.nn.silu, Exchange('expert', ragged=False))
      return got.reshape(tokens[0].shape)

    return sharding.own_tokens(own, (x, *routed[1:]), weights, sharding.RULES, ('experts',))

  def here(x, weights):
    return mix(x.reshape(-1, D), experts_Sk, weights_Sk, weights, jax.nn.silu).reshape(x.shape)

  with jax.set_mesh(mesh):
    np.testing.assert_allclose(jax.jit(everywhere)(x_BTD, weights), here(x_BTD, weights), rtol=1e-5, atol=1e-5)
    grad = lambda fn: jax.jit(jax.grad(lambda x, weights: jnp.sum(fn(x, weights) * probe), (0, 1)))(x_BTD, weights)
    for got, want in zip(jax.tree.leaves(grad(everywhere)), jax.tree.leaves(grad(here)), strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_no_device_gathers_the_experts_of_others():
  """Read from the compiled step: tokens travel, experts' matrices do not (over the axis of experts)."""
  model = ModelConfig(vocab_size=128, d_model=24, n_layers=1, n_heads=2, d_ff=40, n_experts=8)
  config = Pretrain(model=model, data=Data(seq_len=16, global_batch=8))
  mesh = sharding.make_mesh(expert=4, fsdp=2)
  with jax.set_mesh(mesh):
    built = program.build(config, mesh)
    text = built.step.lower(built.abstract, built.batch).compile().as_text()
  assert 'all-to-all(' in text
  assert 'f32[2,24,40]' in text and not re.search(r'f32\[(1,)?8,(24,40|40,24)\]', text)
