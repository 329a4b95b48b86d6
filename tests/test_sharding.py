"""Meshes, names to shardings, and the shardings of a whole train state."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from conftest import LLAMA
from flax.linen import LogicallyPartitioned
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm import models, sharding, tree
from jaxlm.errors import InputError
from jaxlm.models import LowRank
from jaxlm.train import optim, state

CFG = dataclasses.replace(LLAMA, d_model=12, n_heads=6, n_kv_heads=2, d_ff=20)  # every sharded axis divides by 2


def named_state(cfg, optimizer, change=lambda params: params):
  make = lambda: state.create(change(models.init(cfg, jax.random.key(0))), optimizer, jax.random.key(1))
  return state.abstract(make, models.abstract(cfg))


def names(abstract):
  return {p: getattr(x, 'names', None) for p, x in tree.items(abstract, is_leaf=sharding.is_named)}


@pytest.mark.parametrize(
  'sizes, expected',
  [
    ({}, {'fsdp': 8}),
    ({'data': 2}, {'data': 2, 'fsdp': 4}),
    ({'data': -1, 'fsdp': 1, 'tensor': 4}, {'data': 2, 'tensor': 4}),
    ({'data': 1, 'fsdp': 2, 'tensor': 2, 'sequence': 2}, {'fsdp': 2, 'sequence': 2, 'tensor': 2}),
    ({'expert': 4}, {'fsdp': 2, 'expert': 4}),
  ],
)
def test_make_mesh(sizes, expected):
  expected = dict.fromkeys(sharding.MESH_AXES, 1) | expected
  mesh = sharding.make_mesh(**sizes)
  assert dict(mesh.shape) == expected
  assert set(mesh.axis_types) == {AxisType.Auto}


def test_make_mesh_of_some_devices():
  assert sharding.make_mesh(devices=jax.devices()[3:5]).devices.flatten().tolist() == jax.devices()[3:5]


@pytest.mark.parametrize(
  'sizes, message',
  [
    ({'data': -1, 'fsdp': -1}, 'at most one is -1'),
    ({'data': 0}, 'sizes are positive'),
    ({'data': -2}, 'sizes are positive'),
    ({'data': 3}, 'data=3.*does not divide 8 devices'),
    ({'data': 2, 'fsdp': 2}, 'does not divide 8 devices'),
    ({'data': 4, 'fsdp': 4}, 'does not divide 8 devices'),
  ],
)
def test_make_mesh_refuses(sizes, message):
  with pytest.raises(InputError, match=message):
    sharding.make_mesh(**sizes)


def test_spec():
  rules = {'a': 'fsdp', 'b': ('data', 'fsdp'), 'c': None}
  assert sharding.spec(('a', None, 'b', 'c', 'unknown'), rules) == P('fsdp', None, ('data', 'fsdp'), None, None)


def test_batch_shardings():
  mesh = sharding.make_mesh(data=2, fsdp=2, sequence=2)
  batch = {'tokens': jnp.zeros((8, 6)), 'weight': jnp.zeros(8), 'scalar': jnp.zeros(())}
  got = sharding.batch_shardings(batch, mesh)
  assert got['tokens'].spec == P(('data', 'fsdp', 'expert'), 'sequence')
  assert got['weight'].spec == P(('data', 'fsdp', 'expert'))
  assert got['scalar'].spec == P()


def test_constrain_is_the_identity_without_rules_or_mesh():
  x = jnp.zeros((8, 3))
  assert sharding.constrain(x, ('batch', None), None) is x
  assert sharding.constrain(x, ('batch', None), sharding.RULES) is x


def test_constrain_lays_out_an_activation():
  with jax.set_mesh(sharding.make_mesh(data=2, fsdp=4)):
    y = jax.jit(lambda x: sharding.constrain(x, ('batch', None), sharding.RULES))(jnp.zeros((8, 3)))
  assert y.sharding.shard_shape(y.shape) == (1, 3)


@pytest.mark.parametrize('shape, local', [((8, 6), (2, 3)), ((8, 5), (8, 5)), ((6, 6), (6, 6))])
def test_own_tokens_are_a_devices_part_where_they_divide(shape, local):
  seen = []

  def fn(tokens, whole):
    seen.append((tokens.shape, whole.shape))
    return tokens * jnp.sum(whole)

  x, w = jnp.arange(float(shape[0] * shape[1])).reshape(shape), jnp.arange(4.0)
  with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, sequence=2)):
    y = jax.jit(lambda x, w: sharding.own_tokens(fn, x, w, sharding.RULES))(x, w)
  assert seen == [(local, (4,))]
  assert jnp.array_equal(y, 6 * x)
  assert jnp.array_equal(sharding.own_tokens(fn, x, w, sharding.RULES), y)  # no mesh
  assert seen[1] == (shape, (4,))


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_moments_carry_the_names_of_their_parameter(name):
  axes = models.axes(CFG)
  got = names(named_state(CFG, optim.make(name, 1e-3, axes=axes)))
  expected = dict(tree.items(axes, is_leaf=lambda x: isinstance(x, tuple)))
  seen = dict.fromkeys(expected, 0)
  for path, leaf_names in got.items():
    owner = [p for p in expected if path.endswith(f'/{p}')]
    if owner:
      assert leaf_names == expected[max(owner, key=len)], path
      seen[max(owner, key=len)] += 1
    else:
      assert leaf_names is None, path
  kinds = dict(tree.items(optim.kinds(models.init(CFG, jax.random.key(0)), axes)))
  moments = {p: 1 if (name, kind) == ('muon', 'matrix') else 2 for p, kind in kinds.items()}
  assert seen == {p: 1 + n for p, n in moments.items()}


def test_a_leaf_takes_the_names_of_its_whole_path():
  box = lambda *axes: LogicallyPartitioned(jax.ShapeDtypeStruct((3, 5), jnp.float32), axes)
  named = {'a': {'w': box('embed', 'mlp')}, 'w': box('mlp', 'embed')}
  got = sharding.with_names({'mu': jax.tree.map(lambda x: x.value, named, is_leaf=sharding.is_named)}, named)
  assert got['mu']['a']['w'].names == ('embed', 'mlp')
  assert got['mu']['w'].names == ('mlp', 'embed')


def test_an_adapter_carries_the_names_of_its_weight():
  rank = 3

  def adapt(params):
    w = params['layers']['attn']['q']
    L, i, o = w.shape
    q = LowRank(w, jnp.zeros((L, i, rank)), jnp.zeros((L, rank, o)), jnp.ones(L))
    return {**params, 'layers': {**params['layers'], 'attn': {**params['layers']['attn'], 'q': q}}}

  got = names(named_state(CFG, optim.make('adamw', 1e-3, axes=models.axes(CFG)), adapt))
  for prefix in ('params', 'opt_state/1/0/mu', 'opt_state/1/0/nu'):
    q = f'{prefix}/layers/attn/q'
    assert got[f'{q}/w'] == ('layers', 'embed', 'heads')
    assert got[f'{q}/a'] == ('layers', 'embed', None)
    assert got[f'{q}/b'] == ('layers', None, 'heads')
    assert got[f'{q}/scale_L'] is None


def test_state_shardings():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  cfg = dataclasses.replace(CFG, positions='learned', bias=True)
  shardings = dict(tree.items(sharding.state_shardings(named_state(cfg, optim.make('adamw', 1e-3)), mesh)))
  whole = ('fsdp', 'expert')  # an axis of experts is one more of fsdp to all else
  table = {
    'embed': P('tensor', whole),
    'head': P(whole, 'tensor'),
    'positions': P(None, whole),
    'final_norm/scale': P(None),
    'layers/attn_norm/scale': P(None, None),
    'layers/attn/q': P(None, whole, 'tensor'),
    'layers/attn/k': P(None, whole, 'tensor'),
    'layers/attn/o': P(None, 'tensor', whole),
    'layers/attn/q_bias': P(None, 'tensor'),
    'layers/attn/o_bias': P(None, whole),
    'layers/mlp/up': P(None, whole, 'tensor'),
    'layers/mlp/down': P(None, 'tensor', whole),
  }
  for prefix in ('params', 'opt_state/1/0/mu', 'opt_state/1/0/nu'):
    assert {p: shardings[f'{prefix}/{p}'].spec for p in table} == table
  assert all(shardings[p].spec == P() for p in ('step', 'cursor', 'skipped', 'key', 'opt_state/1/0/count'))
  assert shardings['params/layers/attn/q'].shard_shape((3, 12, 60)) == (3, 6, 30)


def test_another_strategy_is_another_table():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  named = named_state(CFG, optim.make('adamw', 1e-3))
  replicated = sharding.state_shardings(named, mesh, {'batch': ('data', 'fsdp')})
  assert all(s.is_fully_replicated for s in jax.tree.leaves(replicated))


def test_an_axis_that_does_not_divide_is_named():
  named = named_state(LLAMA, optim.make('adamw', 1e-3))
  with pytest.raises(InputError, match=r"params/.*axis 'embed' of size 11 does not divide by fsdp 8"):
    sharding.state_shardings(named, sharding.make_mesh(fsdp=8))


def test_an_axis_over_two_mesh_axes_divides_by_both():
  box = {'w': LogicallyPartitioned(jax.ShapeDtypeStruct((12,), jnp.float32), ('batch',))}
  with pytest.raises(InputError, match="axis 'batch' of size 12 does not divide by data 2 x fsdp 4"):
    sharding.state_shardings(box, sharding.make_mesh(data=2, fsdp=4))


LARGE = 8 * 2**20 // 4  # float32 elements of exactly the limit


@pytest.mark.parametrize(
  'size, leaf_names, sizes, fine',
  [
    (LARGE + 8, (None,), {'fsdp': 8}, False),
    (LARGE + 8, (None,), {'fsdp': 1, 'data': 4, 'tensor': 2}, False),
    (LARGE + 8, ('embed',), {'fsdp': 8}, True),
    (LARGE, (None,), {'fsdp': 8}, True),
    (LARGE + 8, (None,), {'fsdp': 1, 'data': 8}, True),  # plain data parallelism means replicas
  ],
)
def test_a_large_replicated_leaf_is_refused(size, leaf_names, sizes, fine):
  mesh = sharding.make_mesh(**sizes)
  abstract = {
    'small': jax.ShapeDtypeStruct((), jnp.float32),
    'big': LogicallyPartitioned(jax.ShapeDtypeStruct((size,), jnp.float32), leaf_names),
  }
  shardings = sharding.state_shardings(abstract, mesh)
  assert all(isinstance(s, NamedSharding) for s in shardings.values())
  if fine:
    sharding.check_replicated(abstract, shardings, mesh)
  else:
    with pytest.raises(InputError, match=r'big \(8 MiB\) would be replicated on every device'):
      sharding.check_replicated(abstract, shardings, mesh)
