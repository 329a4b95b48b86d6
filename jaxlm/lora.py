"""Adapters as functions of the tree: put on, folded in, taken off, kept apart. No model and no step knows of them."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.models.linear import LowRank, Quantized, dense, is_weight, plain, shape

ADAPTED = re.compile(r'(^|/)(a|b|magnitude)$')  # what of a LowRank learns
WHERE = {
  'attention': r'(^|/)attn/[qkvo]$',
  'all-linear': r'(^|/)(attn/[qkvo]|(mlp|shared)/(up|gate|down))$',
}
Where = str | tree.Where


def picks(where: Where) -> tree.Where:
  """A filter: 'attention', 'all-linear', shell-style patterns with commas ('layers/attn/q,layers/mlp/*'), or itself."""
  if not isinstance(where, str):
    return where
  if where in WHERE:
    known = re.compile(WHERE[where])
    return lambda path, leaf: bool(known.search(path))
  return tree.matching(*where.split(','))


def init(
  key: Array,
  params: Any,
  *,
  rank: int,
  alpha: float,
  where: Where = 'all-linear',
  ranks: Mapping[str, int] | None = None,
  rank_stabilized: bool = False,
  dora: bool = False,
  dropout: float = 0.0,
) -> Any:
  """The tree with an update of low rank, 0 at first, on every matrix that `where` picks.

  `a` is uniform within 1 / sqrt(inputs), `b` is 0 (as in peft). The update is scaled by alpha / rank, or alpha /
  sqrt(rank) if `rank_stabilized` (Kalajdzievski 2023, arXiv:2312.03732). `ranks` gives the rank of paths that match a
  pattern, the first that matches counting. `dora` learns each column's magnitude too. A layer of a stack goes by its
  number ('layers/3/attn/q'): ranks that differ are filled up with zeros, which stay, and a rank of 0 is no update.
  Nothing of `params` is copied. Raises InputError if nothing is picked, or what is picked is no matrix.
  """
  found = []

  def one(path: str, w: Any) -> Any:
    sizes = _ranks(path, w, where, rank, ranks or {})
    if not any(sizes):
      return w
    if isinstance(w, LowRank) or len(shape(w)) < 2:
      raise InputError(f'{path}: {"has an adapter already" if isinstance(w, LowRank) else "is no matrix"}')
    found.append(path)
    *stack, i, o = shape(w)
    if len(stack) > 1 and (dora or dropout):
      raise InputError(f'{path}: matrices of experts have neither dora nor dropout here; leave them out with `where`')
    r, bound = max(sizes), 1.0 / math.sqrt(i)
    a = jax.random.uniform(jax.random.fold_in(key, len(found)), (*stack, i, r), jnp.float32, -bound, bound)
    each = jnp.asarray(sizes).reshape([-1, *[1] * (len(stack) - 1)]) if len(sizes) > 1 else jnp.asarray(sizes[0])
    a = jnp.where(jnp.arange(r) < each[..., None, None], a, 0.0)
    scale = jnp.where(each > 0, alpha / (jnp.sqrt(each) if rank_stabilized else each), 0.0)
    magnitude = jnp.linalg.norm(plain(w).astype(jnp.float32), axis=-2) if dora else None
    scale = jnp.broadcast_to(scale, stack).astype(jnp.float32)
    return LowRank(w, a, jnp.zeros((*stack, r, o)), scale, magnitude, rate=dropout)

  new = tree.path_map(one, params, is_leaf=is_weight)
  if not found:
    raise InputError(f'lora: {where!r} picks nothing; paths are as {", ".join(p for p, _ in tree.items(params)[:3])}')
  return new


def _ranks(path: str, w: Any, where: Where, rank: int, ranks: Mapping[str, int]) -> list[int]:
  """The rank of each layer of a stack, or of what is none; 0 where it is not picked."""
  called = tree.names(path, jax.ShapeDtypeStruct(shape(w), jnp.float32))
  if isinstance(where, str) and where not in WHERE:
    chosen = [tree.called(where.split(','), names) for names in called]
  else:
    chosen = [picks(where)(path, w)] * len(called)
  sizes = [next((n for p, n in ranks.items() if tree.called([p], names)), rank) for names in called]
  return [n * picked for n, picked in zip(sizes, chosen, strict=True)]


def adapted(params: Any) -> dict[str, LowRank]:
  """The adapters of a tree by the path of their matrix."""
  return {path: w for path, w in tree.items(params, is_leaf=is_weight) if isinstance(w, LowRank)}


def _each(fn: Any, params: Any) -> Any:
  return jax.tree.map(lambda w: fn(w) if isinstance(w, LowRank) else w, params, is_leaf=is_weight)


def merge(params: Any) -> Any:
  """The tree with every update folded into its matrix, differentiable: what a foreign model's `apply` takes."""
  return _each(dense, params)


def base(params: Any) -> Any:
  """The tree without its adapters; every array is the very one of `params`."""
  return _each(lambda w: w.w, params)


def is_adapter(path: str, leaf: Any) -> bool:
  """The filter that picks what of a tree belongs to adapters and learns."""
  return bool(ADAPTED.search(path))


def split(params: Any) -> tuple[Any, Any]:
  """`(adapters, rest)`, as `tree.split`: several adapters of one base are several of the first."""
  return tree.split(params, is_adapter)


def with_keys(params: Any, key: Array) -> Any:
  """The tree whose adapters drop a share of their inputs, each by its own key."""
  number = iter(range(1 << 30))

  def one(w: LowRank) -> LowRank:
    own, stack = jax.random.fold_in(key, next(number)), w.a.shape[:-2]
    keys = jax.random.split(own, stack) if stack else own
    return dataclasses.replace(w, key_L=keys) if w.rate else w

  return _each(one, params)


def quantize(params: Any, *, where: Where = 'all-linear', qtype: str = 'nf4', tile: int = 64) -> Any:
  """The tree with the picked matrices in few bits: 'nf4' (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), 'int8', ...

  A scale for every output and `tile` inputs, which must divide them. They can no longer learn.
  """
  import qwix

  chosen = picks(where)

  def one(path: str, w: Any) -> Any:
    if not chosen(path, w) or is_weight(w):
      return w
    if w.shape[-2] % tile:
      raise InputError(f'{path}: {w.shape[-2]} inputs do not divide into tiles of {tile}; set another')
    kept = {axis for axis in range(w.ndim) if axis != w.ndim - 2}
    return Quantized(qwix.quantize(w, qtype, channelwise_axes=kept, tiled_axes={w.ndim - 2: tile}))

  return tree.path_map(one, params, is_leaf=is_weight)
