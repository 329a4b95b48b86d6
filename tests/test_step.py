"""The train step: accumulation, skipped steps, frozen leaves, someone else's model, and every mesh the same curve."""

import dataclasses
from functools import cache

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import EXPERTS, LLAMA, randomized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm import config, masked, objectives, program, sharding, tree
from jaxlm.masked import Max, Sum
from jaxlm.models import Run
from jaxlm.train import make_train_step, optim, state

RNG = np.random.default_rng(13)
ROUTED = dataclasses.replace(EXPERTS, qkv_bias=False)  # the gradient of a key's bias is nothing but rounding
ROUNDING = {LLAMA: 1e-6, ROUTED: 3e-6}  # in float64 the latter differs by 1e-15


def keep_gradient():
  """An optimizer whose state is the gradient it was given and whose update is none: read without rounding."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
  )


def language_batch(rows, length, vocab, seed=3):
  """Rows as `data.packing` makes them, of two documents each; the masks go from no label at all to every one."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
  tokens[:, 1::2] = (3 * tokens[:, :-1:2] + 1) % vocab  # something to learn: every other token follows from the last
  second = np.broadcast_to(np.arange(length) >= 3, (rows, length))
  mask = (np.arange(length) < np.linspace(0, length, rows).round()[:, None]).astype(np.float32)
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'loss_mask': mask,
    'segment_ids': (1 + second).astype(np.int32),
    'positions': (np.arange(length) - 3 * second).astype(np.int32),
    'target_bytes': (mask * 3).astype(np.int32),
  }


@cache
def whole_batch_gradient(cfg=LLAMA):
  return gradient(1, cfg=cfg)


def gradient(accum, devices=1, cfg=LLAMA):
  """(gradient, metrics) of one batch of eight rows of a language model, however it is cut."""
  batch = language_batch(8, 7, cfg.vocab_size)
  mesh = sharding.make_mesh(data=devices, fsdp=1, devices=jax.devices()[:devices])
  loss_fn = objectives.next_token(cfg, Run(), z_loss=1e-3)
  step = make_train_step(loss_fn, keep_gradient(), accum=accum)
  start = state.create(randomized(cfg), keep_gradient(), jax.random.key(0))
  rows = NamedSharding(mesh, P('data'))
  jitted = jax.jit(step, in_shardings=(NamedSharding(mesh, P()), rows))
  end, metrics = jitted(start, batch)
  return jax.device_get((end.opt_state, metrics))


@pytest.mark.slow(but='llama-2-4')
@pytest.mark.parametrize('accum, devices', [(2, 1), (8, 1), (1, 8), (2, 4)])
@pytest.mark.parametrize('cfg', [LLAMA, ROUTED], ids=['llama', 'experts'])
def test_accumulation_and_devices_leave_the_gradient(accum, devices, cfg):
  (expected, told), (got, metrics) = whole_batch_gradient(cfg), gradient(accum, devices, cfg)
  assert float(told['weight']) == language_batch(8, 7, 131)['loss_mask'].sum() > 0
  assert (told.keys() >= {'balance', 'router_z'}) == (cfg is ROUTED)
  routers = ('balance', 'router_z') if accum > 1 else ()  # of a micro-batch each
  keep = lambda found: {name: x for name, x in found.items() if name not in routers}
  chex.assert_trees_all_close(keep(metrics), keep(told), rtol=1e-6)
  for (path, mine), theirs in zip(tree.items(got), jax.tree.leaves(expected), strict=True):
    norm = np.linalg.norm(theirs)
    assert norm > 0, path
    assert np.linalg.norm(mine - theirs) <= ROUNDING[cfg] * norm, path


def test_the_gradient_is_the_sum_over_the_weight():
  """Against autodiff of the plain mean over all labels."""
  loss_fn = objectives.next_token(LLAMA, Run(), z_loss=1e-3)
  mean = lambda params, batch: loss_fn(params, batch, jax.random.key(0))[0].total / batch['loss_mask'].sum()
  expected = jax.jit(jax.grad(mean))(randomized(LLAMA), language_batch(8, 7, LLAMA.vocab_size))
  chex.assert_trees_all_close(whole_batch_gradient()[0], jax.device_get(expected), rtol=1e-5, atol=1e-6)


# what follows needs no language model: a masked linear regression with the same contract

WEIGHTS = {'w': RNG.normal(size=(5, 3)).astype(np.float32), 'b': RNG.normal(size=3).astype(np.float32)}


def regression(params, batch, key):
  error = jnp.sum((batch['x'] @ params['w'] + params['b'] - batch['y']) ** 2, axis=-1)
  total = masked.total(error, batch['mask'])
  return total, {'error': total, 'worst': Max(jnp.max(error))}


def rows(seed, n=4, bad=None, empty=False):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, 5)).astype(np.float32)
  if bad is not None:
    x[1, 2] = bad
  mask = np.zeros(n, np.float32) if empty else np.array([1, 1, 0, 1] * (n // 4), np.float32)
  return {'x': x, 'y': rng.normal(size=(n, 3)).astype(np.float32), 'mask': mask}


def optimizer(name):
  lr = optim.schedule('cosine', lr=0.1, steps=11, warmup_steps=3)
  return optim.make(name, lr, axes={'w': ('embed', 'mlp'), 'b': ('mlp',)})


def fresh(opt, **kwargs):
  return state.create(jax.tree.map(jnp.asarray, WEIGHTS), opt, jax.random.key(0), **kwargs)


def assert_bitwise(a, b):
  for (path, x), y in zip(tree.items(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=path)


BAD = {'nan': {'bad': np.nan}, 'inf': {'bad': np.inf}, 'overflow': {'bad': 1e30}, 'empty': {'empty': True}}
BAD_CASES = [(kind, 'adamw', accum) for kind in BAD for accum in (1, 2)] + [('nan', 'muon', 1), ('empty', 'muon', 2)]


@pytest.mark.parametrize('kind, name, accum', BAD_CASES)
def test_a_bad_batch_costs_exactly_one_step(kind, name, accum):
  bad = BAD[kind]
  opt = optimizer(name)
  step = jax.jit(make_train_step(regression, opt, accum=accum))
  with_bad = without = fresh(opt)
  for batch in (rows(1), rows(2)):
    with_bad, _ = step(with_bad, batch)
    without, metrics = step(without, batch)
    assert (metrics['skipped'], metrics['empty']) == (0, 0)
    assert metrics['update_norm'] > 0
  before = with_bad
  with_bad, metrics = step(with_bad, rows(3, **bad))
  assert_bitwise((with_bad.params, with_bad.opt_state), (before.params, before.opt_state))
  assert (with_bad.step, with_bad.cursor, with_bad.skipped) == (3, 3, 1)
  assert (metrics['skipped'], metrics['empty'], metrics['update_norm']) == (1, float('empty' in bad), 0)
  if 'empty' in bad:
    assert np.isnan(metrics['loss']) and metrics['weight'] == 0 and metrics['grad_norm'] == 0
  else:
    assert not np.isfinite(metrics['grad_norm'])
  for batch in (rows(4), rows(5)):
    with_bad, _ = step(with_bad, batch)
    without, _ = step(without, batch)
  assert_bitwise((with_bad.params, with_bad.opt_state), (without.params, without.opt_state))
  assert (without.step, without.cursor, without.skipped) == (4, 4, 0)
  assert (with_bad.step, with_bad.cursor, with_bad.skipped) == (5, 5, 1)


def test_one_empty_micro_batch_of_two_is_no_reason_to_skip():
  opt = optimizer('adamw')
  batch = rows(1)
  batch['mask'] = np.array([1, 0, 1, 0], np.float32)  # micro-batches take every other row
  whole, told = jax.jit(make_train_step(regression, opt))(fresh(opt), batch)
  cut, metrics = jax.jit(make_train_step(regression, opt, accum=2))(fresh(opt), batch)
  assert cut.skipped == 0
  chex.assert_trees_all_close((cut.params, metrics), (whole.params, told), rtol=1e-6)


def test_metrics_against_numpy():
  batch, x64 = rows(1), lambda v: np.asarray(v, np.float64)
  lr = 0.5
  end, metrics = jax.jit(make_train_step(regression, optax.sgd(lr), accum=2))(fresh(optax.sgd(lr)), batch)
  miss = x64(batch['x']) @ x64(WEIGHTS['w']) + x64(WEIGHTS['b']) - x64(batch['y'])
  error = np.sum(miss**2, axis=-1)
  gw = 2 * x64(batch['x']).T @ (miss * batch['mask'][:, None]) / 3
  gb = 2 * np.sum(miss * batch['mask'][:, None], axis=0) / 3
  norm = np.sqrt(np.sum(gw**2) + np.sum(gb**2))
  assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
    {
      'loss': np.sum(error * batch['mask']) / 3,
      'error': np.sum(error * batch['mask']) / 3,
      'worst': error.max(),
      'weight': 3,
      'grad_norm': norm,
      'update_norm': lr * norm,
      'skipped': 0,
      'empty': 0,
    },
    rel=1e-5,
  )
  np.testing.assert_allclose(end.params['w'], WEIGHTS['w'] - lr * gw, rtol=1e-5, atol=1e-6)


def test_randomness_follows_the_key_the_step_and_the_micro_batch():
  def noisy(params, batch, key):
    noise = jax.random.uniform(key)
    return Sum(jnp.sum(params['b']) * 0.0 + noise, jnp.float32(batch['x'].shape[0])), {'noise': Max(noise)}

  step = jax.jit(make_train_step(noisy, optax.sgd(0.1), accum=2))
  start = fresh(optax.sgd(0.1))
  at = lambda n, i: float(jax.random.uniform(jax.random.fold_in(jax.random.fold_in(start.key, n), i)))
  first, metrics = step(start, rows(1))
  assert float(metrics['noise']) == max(at(0, 0), at(0, 1))
  assert float(metrics['loss']) == pytest.approx((at(0, 0) + at(0, 1)) / 4)
  assert float(step(first, rows(1))[1]['noise']) == max(at(1, 0), at(1, 1))


def test_frozen_leaves_have_no_optimizer_state_and_never_change():
  opt = optim.make('adamw', 0.1)
  trainable = tree.matching('w')
  step = jax.jit(make_train_step(regression, opt, trainable=trainable))
  end = fresh(opt, trainable=trainable)
  assert sorted({leaf.shape for leaf in jax.tree.leaves(end.opt_state)}) == [(), (5, 3)]
  for seed in range(3):
    end, _ = step(end, rows(seed))
  np.testing.assert_array_equal(end.params['b'], WEIGHTS['b'])
  assert np.all(np.asarray(end.params['w']) != WEIGHTS['w'])
  # nothing is computed for a frozen leaf: its gradient would be the sum of the residuals over the rows
  whole, part = (
    str(
      jax.make_jaxpr(make_train_step(regression, optax.sgd(0.1), trainable=where))(
        fresh(optax.sgd(0.1), trainable=where), rows(0)
      )
    ).count('reduce_sum')
    for where in (tree.everything, trainable)
  )
  assert part < whole


def test_a_batch_must_divide():
  with pytest.raises(ValueError, match='4 rows does not divide into 3 micro-batches'):
    jax.jit(make_train_step(regression, optax.sgd(0.1), accum=3))(fresh(optax.sgd(0.1)), rows(1))


def test_it_compiles_once():
  opt = optimizer('muon')
  step = jax.jit(chex.assert_max_traces(make_train_step(regression, opt, accum=2), n=1))
  end = fresh(opt)
  for seed in range(4):
    end, _ = step(end, rows(seed))
  assert step._cache_size() == 1
  assert end.step == 4


def test_it_trains_a_model_of_someone_elses():
  """A stock Linen classifier: the step knows no model of ours, and the loss is three lines."""
  model = nn.Sequential([nn.Dense(13), nn.relu, nn.Dense(3)])
  rng = np.random.default_rng(0)
  x = rng.normal(size=(28, 5)).astype(np.float32)
  batch = {'x': x, 'label': np.argmax(x @ rng.normal(size=(5, 3)), axis=-1)}

  def loss_fn(params, batch, key):
    nats = optax.softmax_cross_entropy_with_integer_labels(model.apply(params, batch['x']), batch['label'])
    return masked.total(nats, 1.0), {}

  opt = optim.make('muon', 0.1)
  end = state.create(model.init(jax.random.key(0), x), opt, jax.random.key(1))
  step = jax.jit(make_train_step(loss_fn, opt, accum=4))
  losses = []
  for _ in range(60):
    end, metrics = step(end, batch)
    losses.append(float(metrics['loss']))
  assert losses[-1] < 0.25 * losses[0]
  assert end.skipped == 0


# whole programs on meshes: sharded axes divide by 8, the rest is prime

STEPS = 43
MODEL = dataclasses.replace(
  LLAMA, d_model=16, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=6, d_ff=23, vocab_size=127, tie_embeddings=True
)
MODELS = {'dense': MODEL, 'experts': dataclasses.replace(MODEL, n_experts=5, shared_d_ff=11)}
MODELS['all experts'] = dataclasses.replace(MODELS['experts'], experts_per_token=5)
MESHES = {f'data={d} x fsdp={f}': {'data': d, 'fsdp': f} for d, f in ((8, 1), (1, 8), (2, 4))}

COMPILED: list[str] = []  # grows by one with every program that is compiled
jax.monitoring.register_event_duration_secs_listener(
  lambda name, seconds, **_: COMPILED.append(name) if name == '/jax/core/compile/backend_compile_duration' else None
)


@cache
def curve(optimizer_name, sizes, devices, model='dense'):
  """([loss, gradient norm] of every step, specs of the last parameters), by `program.build` and `program.put`."""
  run = config.Pretrain(
    model=MODELS[model],
    data=config.Data(seq_len=11, global_batch=8),
    optim=config.Optim(name=optimizer_name, lr=1e-2, warmup_steps=5),
    steps=STEPS,
  )
  mesh = sharding.make_mesh(**dict(sizes), devices=jax.devices()[:devices])
  with jax.set_mesh(mesh):
    built = program.build(run, mesh)
    now, rows = built.create(), []
    for n in range(STEPS):
      COMPILED.clear()
      before = now
      now, metrics = built.step(before, program.put(language_batch(8, 11, 13, seed=n), built.batch))
      assert len(COMPILED) == (n == 0)
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # donated
      rows.append((float(metrics['loss']), float(metrics['grad_norm'])))
  for leaf, spec in zip(jax.tree.leaves(now), jax.tree.leaves(built.abstract), strict=True):
    assert leaf.sharding.is_equivalent_to(spec.sharding, leaf.ndim)
  return np.array(rows), jax.tree.map(lambda x: x.sharding.spec, now.params)


ALIKE = [(mesh, 'adamw', model) for model in ('dense', 'experts') for mesh in MESHES]
EXTRA = (('muon', 'dense'), ('adafactor', 'dense'), ('muon', 'experts'), ('adamw', 'all experts'))
ALIKE += [('data=2 x fsdp=4', name, model) for name, model in EXTRA]


@pytest.mark.slow
@pytest.mark.parametrize('mesh, name, model', ALIKE)
def test_every_mesh_trains_alike(mesh, name, model):
  alone, _ = curve(name, (('data', 1), ('fsdp', 1)), 1, model)
  many, specs = curve(name, tuple(MESHES[mesh].items()), 8, model)
  assert alone[-1, 0] < 0.8 * alone[0, 0]  # it did learn: a constant would agree too
  same = 11 if model == 'experts' else STEPS  # later a rounding may send a token to another expert
  amplified = 2e-5 if name == 'adafactor' else 1e-5  # its clipped updates make more of a rounding
  np.testing.assert_allclose(many[:same, 0], alone[:same, 0], rtol=1e-5)
  np.testing.assert_allclose(many[:same, 1], alone[:same, 1], rtol=amplified)
  assert specs['layers']['attn']['q'] == P(None, ('fsdp', 'expert'), 'tensor')
