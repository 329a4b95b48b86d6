"""Schedules at points worked out by hand, which leaf gets which optimizer, AdamW and Muon against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import EXPERTS, GPT2, LLAMA, randomized

from jaxlm import models, tree
from jaxlm.errors import InputError
from jaxlm.train import optim

LLAMA_KINDS = {
  'embed': 'table',
  'final_norm/scale': 'vector',
  'head': 'table',
  'layers/attn/k': 'matrix',
  'layers/attn/o': 'matrix',
  'layers/attn/q': 'matrix',
  'layers/attn/v': 'matrix',
  'layers/attn_norm/scale': 'vector',
  'layers/mlp/down': 'matrix',
  'layers/mlp/gate': 'matrix',
  'layers/mlp/up': 'matrix',
  'layers/mlp_norm/scale': 'vector',
}
GPT2_KINDS = {
  'embed': 'table',
  'positions': 'table',
  'final_norm/scale': 'vector',
  'final_norm/bias': 'vector',
  'layers/attn/k': 'matrix',
  'layers/attn/k_bias': 'vector',
  'layers/attn/o': 'matrix',
  'layers/attn/o_bias': 'vector',
  'layers/attn/q': 'matrix',
  'layers/attn/q_bias': 'vector',
  'layers/attn/v': 'matrix',
  'layers/attn/v_bias': 'vector',
  'layers/attn_norm/scale': 'vector',
  'layers/attn_norm/bias': 'vector',
  'layers/mlp/down': 'matrix',
  'layers/mlp/down_bias': 'vector',
  'layers/mlp/up': 'matrix',
  'layers/mlp/up_bias': 'vector',
  'layers/mlp_norm/scale': 'vector',
  'layers/mlp_norm/bias': 'vector',
}
EXPERTS_KINDS = LLAMA_KINDS | {
  'layers/attn/q_bias': 'vector',
  'layers/attn/k_bias': 'vector',
  'layers/attn/v_bias': 'vector',
  'layers/attn/q_norm/scale': 'vector',
  'layers/attn/k_norm/scale': 'vector',
  'layers/attn_post_norm/scale': 'vector',
  'layers/mlp_post_norm/scale': 'vector',
  'layers/mlp/router': 'matrix',
  'layers/mlp/shared/down': 'matrix',
  'layers/mlp/shared/gate': 'matrix',
  'layers/mlp/shared/up': 'matrix',
  'layers/mlp/shared_gate': 'matrix',
}
del EXPERTS_KINDS['layers/attn_norm/scale'], EXPERTS_KINDS['layers/mlp_norm/scale']
KINDS = {'llama': (LLAMA, LLAMA_KINDS), 'gpt2': (GPT2, GPT2_KINDS), 'experts': (EXPERTS, EXPERTS_KINDS)}


def shapes(cfg):
  return jax.eval_shape(lambda: models.init(cfg, jax.random.key(0)))


@pytest.mark.parametrize('cfg, expected', KINDS.values(), ids=KINDS)
def test_the_kind_of_every_leaf(cfg, expected):
  assert dict(tree.items(optim.kinds(shapes(cfg), models.axes(cfg)))) == expected


def test_the_kinds_of_a_tree_without_names():
  params = {'kernel': jnp.zeros((3, 5)), 'bias': jnp.zeros(5), 'conv': jnp.zeros((2, 3, 5)), 'x': jnp.zeros(())}
  assert optim.kinds(params) == {'kernel': 'matrix', 'bias': 'vector', 'conv': 'matrix', 'x': 'vector'}


def test_a_leaf_takes_the_names_of_its_whole_path():
  axes = {'a': {'w': ('vocab', 'embed')}, 'w': ('embed', 'mlp')}
  params = {'a': {'w': jnp.zeros((3, 5))}, 'w': jnp.zeros((5, 7))}
  assert optim.kinds(params, axes) == {'a': {'w': 'table'}, 'w': 'matrix'}


@pytest.mark.parametrize('cfg, expected', KINDS.values(), ids=KINDS)
def test_the_optimizer_of_every_leaf(cfg, expected):
  """Read from the state: Muon keeps one moment of a leaf, AdamW two."""
  state = jax.eval_shape(optim.make('muon', 1e-3, axes=models.axes(cfg)).init, shapes(cfg))
  moments = [path for path, leaf in tree.items(state) if leaf.ndim and 'ns_coeffs' not in path]
  for leaf, kind in expected.items():
    mine = [p for p in moments if p.endswith(f'/{leaf}')]
    mine = [p for p in mine if max((e for e in expected if p.endswith(f'/{e}')), key=len) == leaf]
    assert [p.split('/')[2] for p in mine] == (['matrix'] if kind == 'matrix' else ['rest', 'rest']), leaf


@pytest.mark.parametrize(
  'name, points',
  [
    # warm-up over 10 of 110 steps: (step + 1) / 10; then half a cosine from 0.2 to a tenth of it
    ('cosine', {0: 0.02, 4: 0.1, 9: 0.2, 10: 0.2, 35: 0.173639610307, 60: 0.11, 110: 0.02, 500: 0.02}),
    # the last fifth, 22 steps, from 88 on: linear
    ('wsd', {0: 0.02, 9: 0.2, 50: 0.2, 88: 0.2, 99: 0.11, 110: 0.02, 500: 0.02}),
    ('constant', {0: 0.02, 9: 0.2, 50: 0.2, 108: 0.2}),
    ('linear', {0: 0.02, 9: 0.2, 10: 0.2, 60: 0.11, 85: 0.065, 110: 0.02, 500: 0.02}),
    # four cosines of 25 steps: at 35 the second begins, and its fifth is where 5/25 of a cosine is
    ('restarts', {0: 0.02, 10: 0.2, 15: 0.182811529494, 35: 0.2, 40: 0.182811529494, 110: 0.02, 500: 0.02}),
  ],
)
def test_schedules(name, points):
  lr = optim.schedule(name, lr=0.2, steps=110, warmup_steps=10, decay_fraction=0.2, final_ratio=0.1)
  for step, expected in points.items():
    assert float(lr(jnp.int32(step))) == pytest.approx(expected, rel=1e-6), step


def test_a_constant_schedule_never_falls():
  lr = optim.schedule('constant', lr=0.2, steps=7)
  assert [float(lr(step)) for step in (0, 6, 7, 100)] == pytest.approx([0.2] * 4)


@pytest.mark.parametrize('name, warmup', [('cosine', 110), ('cosine', 200), ('wsd', 89), ('constant', 110)])
def test_a_schedule_that_does_not_fit_is_refused(name, warmup):
  with pytest.raises(InputError, match=f'warmup_steps={warmup} and the decay do not fit into steps=110'):
    optim.schedule(name, lr=0.1, steps=110, warmup_steps=warmup)


RNG = np.random.default_rng(7)
PARAMS = {'kernel': RNG.normal(size=(3, 5)).astype(np.float32), 'bias': RNG.normal(size=5).astype(np.float32)}
SCALES = (3, 0.1, 1, 0.01, 2)  # some are clipped, some are not
GRADS = [{k: (s * RNG.normal(size=v.shape)).astype(np.float32) for k, v in PARAMS.items()} for s in SCALES]


def trained(optimizer, params, grads):
  """The parameters after each of the gradients was applied."""
  params = jax.tree.map(jnp.asarray, params)
  state = optimizer.init(params)
  for g in grads:
    updates, state = optimizer.update(jax.tree.map(jnp.asarray, g), state, params)
    params = optax.apply_updates(params, updates)
  return params


@pytest.mark.parametrize('clip_norm', [1.0, None])
def test_adamw_against_numpy(clip_norm):
  b1, b2, eps, decay = 0.8, 0.9, 1e-3, 0.3
  lr = optim.schedule('cosine', lr=0.05, steps=7, warmup_steps=2)
  optimizer = optim.make('adamw', lr, weight_decay=decay, b1=b1, b2=b2, eps=eps, clip_norm=clip_norm)
  got = trained(optimizer, PARAMS, GRADS)

  expected = {k: v.astype(np.float64) for k, v in PARAMS.items()}
  mu, nu = ({k: np.zeros(v.shape) for k, v in PARAMS.items()} for _ in range(2))
  for n, grads in enumerate(GRADS):
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
    for k, g in grads.items():
      g = g * (min(1.0, clip_norm / norm) if clip_norm else 1.0)
      mu[k] = b1 * mu[k] + (1 - b1) * g
      nu[k] = b2 * nu[k] + (1 - b2) * g**2
      step = mu[k] / (1 - b1 ** (n + 1)) / (np.sqrt(nu[k] / (1 - b2 ** (n + 1))) + eps)
      step += decay * expected[k] if k == 'kernel' else 0.0  # none on a bias
      expected[k] = expected[k] - float(lr(n)) * step
  for k in PARAMS:
    np.testing.assert_allclose(got[k], expected[k], atol=2e-6)


def test_lion_against_numpy():
  b1, b2, lr, decay = 0.8, 0.95, 0.03, 0.3
  got = trained(optim.make('lion', lr, weight_decay=decay, b1=b1, b2=b2, clip_norm=None), PARAMS, GRADS)
  for k, w in PARAMS.items():
    w, mu = w.astype(np.float64), np.zeros(w.shape)
    for grads in GRADS:
      w = w - lr * (np.sign(b1 * mu + (1 - b1) * grads[k]) + decay * w * (k == 'kernel'))
      mu = b2 * mu + (1 - b2) * grads[k]
    np.testing.assert_allclose(got[k], w, atol=2e-6)


def test_adafactor_against_numpy():
  """Algorithm 4 of the paper; with equal rows and columns left out, a factored moment is not the whole one."""
  lr, decay, shape = 0.03, 0.3, (2, 131, 137)  # a stack of two: each layer has its own rows and columns
  params = {'up': RNG.normal(size=shape), 'scale': RNG.normal(size=(2, 131))}
  axes = {'up': ('layers', 'embed', 'mlp'), 'scale': ('layers', 'norm')}
  params = {k: v.astype(np.float32) for k, v in params.items()}
  grads = [{k: (s * RNG.normal(size=v.shape)).astype(np.float32) for k, v in params.items()} for s in (1, 5, 0.1)]
  optimizer = optim.make('adafactor', lr, axes=axes, weight_decay=decay, clip_norm=None)
  got = trained(optimizer, params, grads)
  assert max(x.size for x in jax.tree.leaves(optimizer.init(params))) == 2 * 137  # no second moment of a matrix

  for k, w in params.items():
    w, row, column, whole = w.astype(np.float64), 0.0, 0.0, 0.0
    for t, g in enumerate(grads, 1):
      beta, square = 1 - t**-0.8, g[k].astype(np.float64) ** 2 + 1e-30
      if k == 'up':
        row = beta * row + (1 - beta) * square.mean(2, keepdims=True)
        column = beta * column + (1 - beta) * square.mean(1, keepdims=True)
        whole = row * column / row.mean(1, keepdims=True)
      else:
        whole = beta * whole + (1 - beta) * square
      u = g[k] / np.sqrt(whole)
      u = u / max(1.0, np.sqrt((u**2).mean()))
      w = w - lr * (u + decay * w * (k == 'up'))
    np.testing.assert_allclose(got[k], w, atol=1e-5)


@pytest.mark.parametrize('name', ['adamw', 'muon', 'lion', 'adafactor', 'schedule_free'])
def test_a_group_learns_at_its_multiple(name):
  axes = {'embed': ('vocab', 'embed'), 'mlp': {'up': ('embed', 'mlp'), 'down': ('mlp', 'embed')}}
  params = {'embed': RNG.normal(size=(5, 3)), 'mlp': {'up': RNG.normal(size=(3, 7)), 'down': RNG.normal(size=(7, 3))}}
  params = jax.tree.map(lambda x: x.astype(np.float32), params)
  grads = [jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), params)]
  make = lambda groups: optim.make(name, 0.1, axes=axes, group_lr=groups)
  plain, grouped = (trained(make(groups), params, grads) for groups in ((), ('mlp/up=0', 'mlp/*=3', '*=0.5')))
  moved = jax.tree.map(lambda new, old, was: (new - was) / (old - was), grouped, plain, params)
  for path, factor in {'embed': 0.5, 'mlp/up': 0.0, 'mlp/down': 3.0}.items():
    np.testing.assert_allclose(dict(tree.items(moved))[path], factor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', ['adamw', 'muon', 'lion', 'adafactor', 'schedule_free'])
def test_a_group_decays_at_its_multiple(name):
  """What decay adds to an update is multiplied, the rest of it is not; a group's learning rate comes on top."""
  axes = {'embed': ('vocab', 'embed'), 'mlp': {'up': ('embed', 'mlp'), 'down': ('mlp', 'embed')}}
  params = {'embed': RNG.normal(size=(5, 3)), 'mlp': {'up': RNG.normal(size=(3, 7)), 'down': RNG.normal(size=(7, 3))}}
  params = jax.tree.map(lambda x: x.astype(np.float32), params)
  grads = [jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), params)]
  make = lambda **how: optim.make(name, 0.1, axes=axes, group_lr=('embed=0.5',), **how)
  free, plain = trained(make(weight_decay=0.0), params, grads), trained(make(weight_decay=0.5), params, grads)
  grouped = trained(make(weight_decay=0.5, group_decay=('mlp/up=0', 'mlp/*=3')), params, grads)
  decayed = jax.tree.map(lambda new, old, was: (new - was) / (old - was), grouped, plain, free)
  for path, factor in {'embed': 1.0, 'mlp/up': 0.0, 'mlp/down': 3.0}.items():
    np.testing.assert_allclose(dict(tree.items(decayed))[path], factor, rtol=1e-2, atol=1e-6)
  np.testing.assert_allclose((plain['embed'] - free['embed']) / params['embed'], -0.5 * 0.1 * 0.5, rtol=1e-2)


def test_layers_of_a_stack_have_rates_of_their_own():
  axes = {'embed': ('vocab', 'embed'), 'layers': {'up': ('layers', 'embed', 'mlp'), 'scale': ('layers', 'norm')}}
  shapes = {'embed': (5, 3), 'layers': {'up': (3, 3, 7), 'scale': (3, 3)}}
  draw = lambda: jax.tree.map(
    lambda s: RNG.normal(size=s).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
  )
  params, grads = draw(), [draw()]
  groups = ('layers/0/*=0', 'layers/2/up=3', 'layers/*=0.5')
  plain, grouped = (trained(optim.make('adamw', 0.1, axes=axes, group_lr=g), params, grads) for g in ((), groups))
  moved = jax.tree.map(lambda new, old, was: (new - was) / (old - was), grouped, plain, params)
  np.testing.assert_allclose(moved['embed'], 1.0, rtol=1e-3)
  for n, (up, scale) in enumerate(((0.0, 0.0), (0.5, 0.5), (3.0, 0.5))):
    np.testing.assert_allclose(moved['layers']['up'][n], up, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(moved['layers']['scale'][n], scale, rtol=1e-3, atol=1e-5)
  np.testing.assert_array_equal(grouped['layers']['up'][0], params['layers']['up'][0])
  with pytest.raises(InputError, match="'layers/3/up' matches no parameter"):
    optim.make('adamw', 0.1, group_lr=('layers/3/up=2',)).init(params)


@pytest.mark.parametrize('group', ['embed', '=2', 'embed=', 'embed=fast', 'embed=-1', 'embed=inf', 'embed=nan'])
def test_a_group_that_is_none_is_refused(group):
  with pytest.raises(InputError, match='is not PATTERN=FACTOR'):
    optim.make('adamw', 0.1, group_lr=(group,))
  with pytest.raises(InputError, match='optim.group_decay: .* is not PATTERN=FACTOR'):
    optim.make('adamw', 0.1, group_decay=(group,))


def test_a_group_without_a_leaf_is_refused():
  with pytest.raises(InputError, match="'embd' matches no parameter; there are bias, kernel"):
    optim.make('adamw', 0.1, group_lr=('embd=0.5',)).init(PARAMS)
  with pytest.raises(InputError, match="optim.group_decay: 'embd' matches no parameter"):
    optim.make('adamw', 0.1, group_decay=('embd=0.5',)).init(PARAMS)


def orthogonalized(m):
  """Newton and Schulz's quintic iteration as in Jordan et al. 2024, in float64."""
  a, b, c = 3.4445, -4.7750, 2.0315
  x = m / np.linalg.norm(m)
  x = x.T if m.shape[0] > m.shape[1] else x
  for _ in range(5):
    xx = x @ x.T
    x = a * x + (b * xx + c * xx @ xx) @ x
  return x.T if m.shape[0] > m.shape[1] else x


STACK_SHAPES = {'up': (2, 5, 7), 'down': (2, 7, 3)}
STACK = {'layers': {name: RNG.normal(size=shape).astype(np.float32) for name, shape in STACK_SHAPES.items()}}
STACK_AXES = {'layers': {'up': ('layers', 'embed', 'mlp'), 'down': ('layers', 'mlp', 'embed')}}
# the layers differ in scale: orthogonalized together, the small one would hardly move
STACK_GRADS = [
  jax.tree.map(lambda x: (RNG.normal(size=x.shape) * np.array([1.0, 100.0])[:, None, None]).astype(np.float32), STACK)
  for _ in range(2)
]


def test_muon_against_numpy_layer_by_layer():
  lr, beta, decay = 0.03, 0.9, 0.2
  optimizer = optim.make('muon', lr, axes=STACK_AXES, weight_decay=decay, muon_momentum=beta, clip_norm=None)
  got = trained(optimizer, STACK, STACK_GRADS)
  for name in ('up', 'down'):
    for layer in range(2):
      w = STACK['layers'][name][layer].astype(np.float64)
      mu = np.zeros_like(w)
      for n, grads in enumerate(STACK_GRADS):
        g = grads['layers'][name][layer].astype(np.float64)
        mu = beta * mu + (1 - beta) * g
        ahead = beta * mu / (1 - beta ** (n + 2)) + (1 - beta) * g / (1 - beta ** (n + 1))  # Nesterov, unbiased
        w = w - lr * (orthogonalized(ahead) * 0.2 * max(w.shape) ** 0.5 + decay * w)
      np.testing.assert_allclose(got['layers'][name][layer], w, atol=2e-5)


def test_muon_of_a_stack_is_muon_of_each_layer():
  make = lambda axes: optim.make('muon', 0.03, axes=axes, clip_norm=None)
  stacked = trained(make(STACK_AXES), STACK, STACK_GRADS)
  alone_axes = jax.tree.map(lambda names: names[1:], STACK_AXES, is_leaf=lambda x: isinstance(x, tuple))
  for layer in range(2):
    pick = lambda params, layer=layer: jax.tree.map(lambda x: x[layer], params)
    alone = trained(make(alone_axes), pick(STACK), [pick(g) for g in STACK_GRADS])
    for mine, theirs in zip(jax.tree.leaves(pick(stacked)), jax.tree.leaves(alone), strict=True):
      np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.slow
def test_muon_moves_each_matrix_of_each_expert_on_its_own_and_decays_it():
  """Leaf by leaf of a model with experts: matrices as if alone under Muon, all else as under AdamW."""
  params, axes, rng = randomized(EXPERTS), models.axes(EXPERTS), np.random.default_rng(5)
  size = lambda x: np.exp(rng.normal(0, 3, (*x.shape[:-2], *[1] * min(2, x.ndim))))  # apart in scale, so that it shows
  grads = [jax.tree.map(lambda x: (rng.normal(size=x.shape) * size(x)).astype(np.float32), params)]
  make = lambda name, axes=None: optim.make(name, 0.03, axes=axes, weight_decay=0.2, clip_norm=None)
  got, adamw = (dict(tree.items(trained(make(name, axes), params, grads))) for name in ('muon', 'adamw'))
  started, gradient = dict(tree.items(params)), dict(tree.items(grads[0]))
  alone = jax.jit(lambda w, g: trained(make('muon'), {'w': w}, [{'w': g}])['w'])
  for path, kind in EXPERTS_KINDS.items():
    if kind != 'matrix':
      np.testing.assert_array_equal(got[path], adamw[path], err_msg=path)
      continue
    assert got[path].ndim == 3 + (path in ('layers/mlp/gate', 'layers/mlp/up', 'layers/mlp/down'))
    for index in np.ndindex(got[path].shape[:-2]):
      w, g = started[path][index], gradient[path][index]
      np.testing.assert_allclose(got[path][index], alone(w, g), atol=1e-5, err_msg=f'{path} {index}')
  still = dict(tree.items(trained(make('muon', axes), params, [jax.tree.map(np.zeros_like, params)])))
  for path, kind in EXPERTS_KINDS.items():
    left = 1.0 if kind == 'vector' else 1 - 0.03 * 0.2
    np.testing.assert_allclose(still[path], left * started[path], rtol=1e-5, atol=1e-7, err_msg=path)


def test_what_is_no_matrix_gets_adamw_under_muon():
  axes = {'embed': ('vocab', 'embed'), 'up': ('embed', 'mlp'), 'scale': ('layers', 'norm')}
  sizes = {'embed': (5, 3), 'up': (3, 7), 'scale': (2, 3)}
  params = {name: np.ones(shape, np.float32) for name, shape in sizes.items()}
  grads = [{k: RNG.normal(size=v.shape).astype(np.float32) for k, v in params.items()} for _ in range(2)]
  muon, adamw = (trained(optim.make(n, 0.01, axes=axes, clip_norm=None), params, grads) for n in ('muon', 'adamw'))
  np.testing.assert_array_equal(muon['embed'], adamw['embed'])
  np.testing.assert_array_equal(muon['scale'], adamw['scale'])
  assert np.abs(muon['up'] - adamw['up']).max() > 1e-3


def test_decay_spares_norms_and_biases():
  zero = [jax.tree.map(np.zeros_like, {'up': np.ones((3, 7)), 'scale': np.ones((2, 3)), 'embed': np.ones((5, 3))})]
  params = jax.tree.map(np.ones_like, zero[0])
  axes = {'embed': ('vocab', 'embed'), 'up': ('embed', 'mlp'), 'scale': ('layers', 'norm')}
  for name in ('adamw', 'muon', 'lion', 'adafactor'):
    got = trained(optim.make(name, 0.1, axes=axes, weight_decay=0.5), params, zero)
    assert {k: float(v[0, 0]) for k, v in got.items()} == pytest.approx({'up': 0.95, 'scale': 1.0, 'embed': 0.95})


def test_schedule_free_against_numpy():
  b1, b2, eps, decay, lr = 0.8, 0.9, 1e-3, 0.3, 0.05
  make = {'weight_decay': decay, 'b1': b1, 'b2': b2, 'eps': eps, 'clip_norm': None}
  optimizer = optim.make('schedule_free', lr, **make)
  params = jax.tree.map(jnp.asarray, PARAMS)
  state = optimizer.init(params)
  y = {k: v.astype(np.float64) for k, v in PARAMS.items()}  # where gradients are taken
  z, x = dict(y), dict(y)  # the fast iterate, and the average that is evaluated
  second = {k: np.zeros(v.shape) for k, v in PARAMS.items()}
  for t, g in enumerate(GRADS, 1):
    updates, state = optimizer.update(jax.tree.map(jnp.asarray, g), state, params)
    params = optax.apply_updates(params, updates)
    for k in y:
      second[k] = b2 * second[k] + (1 - b2) * g[k].astype(np.float64) ** 2
      step = g[k] / (np.sqrt(second[k] / (1 - b2**t)) + eps) + (decay * y[k] if k == 'kernel' else 0)
      z[k] = z[k] - lr * step
      x[k] = (1 - 1 / t) * x[k] + z[k] / t
      y[k] = b1 * x[k] + (1 - b1) * z[k]
  for k in y:
    np.testing.assert_allclose(params[k], y[k], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(optim.eval_params(state, params)[k], x[k], rtol=2e-5, atol=1e-6)
    assert np.abs(x[k] - y[k]).max() > 1e-3


def test_schedule_free_by_groups_is_one_of_each_group_alone():
  """Gradients are taken, and weights evaluated, where a run of that leaf alone at its own rate and decay has them."""
  lr = optim.schedule('constant', lr=0.05, steps=7, warmup_steps=3)
  groups = {'group_lr': ('kernel=0.25', 'bias=3'), 'group_decay': ('kernel=8',)}
  make = lambda factor=1.0, decay=0.3, **how: optim.make(
    'schedule_free', lambda n: factor * lr(n), weight_decay=decay, eps=1e-3, clip_norm=None, **how
  )
  grouped, alone = make(**groups), {'kernel': make(0.25, 2.4), 'bias': make(3.0)}
  params = jax.tree.map(jnp.asarray, PARAMS)
  state, states = grouped.init(params), {k: one.init({k: params[k]}) for k, one in alone.items()}
  mine = {k: {k: params[k]} for k in alone}
  for g in GRADS:
    updates, state = grouped.update(jax.tree.map(jnp.asarray, g), state, params)
    params = optax.apply_updates(params, updates)
    for k, one in alone.items():
      updates, states[k] = one.update({k: jnp.asarray(g[k])}, states[k], mine[k])
      mine[k] = optax.apply_updates(mine[k], updates)
  for k in alone:
    np.testing.assert_allclose(params[k], mine[k][k], rtol=1e-5, atol=1e-6)
    evaluated = optim.eval_params(states[k], mine[k])[k]
    np.testing.assert_allclose(optim.eval_params(state, params)[k], evaluated, rtol=1e-5, atol=1e-6)
    assert np.abs(evaluated - params[k]).max() > 1e-3


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_the_average_of_the_weights_against_numpy(name):
  decay, lr = 0.3, 0.1
  optimizer = optim.make(name, lr, group_lr=('bias=0.5',), ema_decay=decay)
  params = jax.tree.map(jnp.asarray, PARAMS)
  state = optimizer.init(params)
  jax.tree.map(np.testing.assert_array_equal, optim.eval_params(state, params), params)
  mean = {k: v.astype(np.float64) for k, v in PARAMS.items()}
  for t, g in enumerate(GRADS):
    updates, state = optimizer.update(jax.tree.map(jnp.asarray, g), state, params)
    params = optax.apply_updates(params, updates)
    d = min(decay, (1 + t) / (10 + t))
    mean = {k: d * mean[k] + (1 - d) * np.asarray(params[k], np.float64) for k in mean}
  averaged = optim.eval_params(state, params)
  for k in mean:
    np.testing.assert_allclose(averaged[k], mean[k], rtol=1e-5)
    assert np.abs(mean[k] - params[k]).max() > 1e-3
  plain = trained(optim.make(name, lr, group_lr=('bias=0.5',)), PARAMS, GRADS)
  jax.tree.map(np.testing.assert_array_equal, params, plain)


def test_without_an_average_the_weights_are_evaluated():
  optimizer = optim.make('adamw', 0.1)
  assert optim.eval_params(optimizer.init(PARAMS), PARAMS) is PARAMS
