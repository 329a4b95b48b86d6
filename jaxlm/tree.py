"""Paths, filters and splits over trees of parameters: freezing is splitting, never masking."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import jax

Tree = Any
Where = Callable[[str, Any], bool]


def everything(path: str, leaf: Any) -> bool:
  """The filter that picks every leaf."""
  return True


def matching(*patterns: str) -> Where:
  """A filter from shell-style patterns over '/'-joined paths: `matching('layers/attn/*', 'head/*')`.

  'layers/3/attn/*' picks the stack that layer 3 is in, 'layers/*/attn/*' as 'layers/attn/*' does.
  """
  return lambda path, leaf: any(called(patterns, some) for some in names(path, leaf))


def called(patterns: Iterable[str], names: Iterable[str]) -> bool:
  """Whether one of the names matches one of the patterns."""
  return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def names(path: str, leaf: Any) -> list[tuple[str, ...]]:
  """What a leaf is called, or each layer of one in a stack: its path, and that with the layer's number."""
  inner, shape = path.removeprefix('layers/'), getattr(leaf, 'shape', ())
  return [(path, f'layers/{n}/{inner}') for n in range(shape[0])] if inner != path and shape else [(path,)]


def path_str(path: tuple) -> str:
  """A JAX key path as 'layers/attn/q'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def path_map(fn: Callable[..., Any], tree: Tree, *rest: Tree, is_leaf: Callable | None = None) -> Tree:
  """`jax.tree.map` whose function also gets the leaf's path as its first argument."""
  return jax.tree_util.tree_map_with_path(lambda p, *xs: fn(path_str(p), *xs), tree, *rest, is_leaf=is_leaf)


def items(tree: Tree, is_leaf: Callable | None = None) -> list[tuple[str, Any]]:
  """The leaves with their paths, in tree order."""
  return [(path_str(p), x) for p, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


def split(params: Tree, where: Where) -> tuple[Tree, Tree]:
  """`(picked, rest)`: two trees of the same shape, each with None where the other has its leaf.

  None is an empty tree to JAX, so `picked` alone is what gets gradients and optimizer state.
  """
  picked = path_map(lambda path, x: x if where(path, x) else None, params)
  rest = path_map(lambda path, x: None if where(path, x) else x, params)
  return picked, rest


def combine(picked: Tree, rest: Tree) -> Tree:
  """The inverse of `split`."""
  return jax.tree.map(lambda p, r: r if p is None else p, picked, rest, is_leaf=lambda x: x is None)


def size(tree: Tree) -> int:
  """Number of array elements in the tree (arrays or abstract arrays)."""
  return sum(x.size for x in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
  """Bytes of all arrays in the tree (arrays or abstract arrays)."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
