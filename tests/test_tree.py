"""Filters, splits and paths over trees of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import tree
from jaxlm.models import LowRank

pytestmark = pytest.mark.usefixtures('strict')


def params():
  adapter = LowRank(jnp.ones((2, 3, 5)), jnp.ones((2, 3, 7)), jnp.zeros((2, 7, 5)), jnp.ones(2))
  layers = {'attn': {'q': adapter, 'k': jnp.ones(3)}, 'mlp': {'up': jnp.ones(13)}}
  return {'embed': jnp.arange(11.0), 'layers': layers}


def test_items_name_every_leaf_and_descend_into_adapters():
  assert [path for path, _ in tree.items(params())] == [
    'embed',
    'layers/attn/k',
    'layers/attn/q/w',
    'layers/attn/q/a',
    'layers/attn/q/b',
    'layers/attn/q/scale_L',
    'layers/mlp/up',
  ]


@pytest.mark.parametrize(
  'patterns, expected',
  [
    (('embed',), ['embed']),
    (('layers/attn/*',), ['layers/attn/k'] + [f'layers/attn/q/{n}' for n in ('w', 'a', 'b', 'scale_L')]),
    (('*/a', '*/b'), ['layers/attn/q/a', 'layers/attn/q/b']),
    (('layers/attn',), []),  # a pattern is of whole paths
    (('mbed', 'embe'), []),
    (('layers/*/?',), ['layers/attn/k'] + [f'layers/attn/q/{n}' for n in ('w', 'a', 'b')]),
    ((), []),
    (('layers/*/attn/q/a',), ['layers/attn/q/a']),
    (('layers/1/attn/q/*',), [f'layers/attn/q/{n}' for n in ('w', 'a', 'b', 'scale_L')]),  # the stack that it is in
    (('layers/7/attn/q/*',), []),
  ],
)
def test_matching(patterns, expected):
  where = tree.matching(*patterns)
  assert [path for path, leaf in tree.items(params()) if where(path, leaf)] == expected


@pytest.mark.parametrize(
  'where',
  [tree.everything, tree.matching('*/a', '*/b'), lambda path, leaf: False, lambda path, leaf: leaf.ndim == 1],
  ids=['everything', 'adapters', 'nothing', 'by leaf'],
)
def test_combine_inverts_split_and_each_leaf_is_on_one_side(where):
  whole = params()
  picked, rest = tree.split(whole, where)
  names = [path for path, _ in tree.items(picked)] + [path for path, _ in tree.items(rest)]
  assert sorted(names) == sorted(path for path, _ in tree.items(whole))
  assert [p for p, _ in tree.items(picked)] == [p for p, x in tree.items(whole) if where(p, x)]
  again = tree.combine(picked, rest)
  assert jax.tree.structure(again) == jax.tree.structure(whole)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True):
    assert a is b


def test_gradients_reach_only_the_picked():
  picked, rest = tree.split(params(), tree.matching('embed'))
  grads = jax.grad(lambda p: jnp.sum(tree.combine(p, rest)['embed'] ** 2))(picked)
  assert len(jax.tree.leaves(grads)) == 1
  np.testing.assert_array_equal(grads['embed'], 2 * np.arange(11.0))


def test_path_map_gives_the_path_and_the_matching_leaves():
  a, b = {'x': {'y': 2}, 'z': 3}, {'x': {'y': 5}, 'z': 7}
  assert tree.path_map(lambda path, p, q: f'{path}:{p * q}', a, b) == {'x': {'y': 'x/y:10'}, 'z': 'z:21'}


def test_size_and_bytes():
  some = {'a': jnp.zeros((3, 5)), 'b': jax.ShapeDtypeStruct((7,), jnp.bfloat16)}
  assert (tree.size(some), tree.nbytes(some)) == (22, 3 * 5 * 4 + 7 * 2)
