"""Attention over a sequence that is cut over devices: keys and values go round, each device keeps its own queries.

B batch, t tokens of a device, H heads, K kv heads, G heads per kv head, N head width, c queries at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.errors import InputError
from jaxlm.models.attention import causal_mask
from jaxlm.sharding import Rules, spec

QUERIES = 512  # at a time: what bounds the scores in memory


def ring(
  q: Float[Array, 'B T H N'],
  k: Float[Array, 'B T K N'],
  v: Float[Array, 'B T K N'],
  segments_BT: Int[Array, 'B T'] | None,
  *,
  window: int | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  rules: Rules | None,
) -> Float[Array, 'B T H N']:
  """Causal attention as `attention.attend` has it, T laid on the axis of 'seq' (Liu et al. 2023, arXiv:2310.01889).

  Every device holds T / n keys and values at a time, and blocks that lie ahead of its queries are skipped. Raises
  InputError where there are no rules, and so no mesh.
  """
  if rules is None:
    raise InputError('ring attention goes round a mesh: give rules, or set attention to xla')
  axis = str(rules['seq'])
  if segments_BT is None:
    segments_BT = jnp.zeros(q.shape[:2], jnp.int32)
  q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
  of = lambda heads: spec(('batch', 'seq', heads, None), rules)
  specs = (of('act_heads'), of('act_kv_heads'), of('act_kv_heads'), spec(('batch', 'seq'), rules))
  own = partial(_own, axis=axis, window=window, softcap=softcap)
  return jax.shard_map(own, in_specs=specs, out_specs=of('act_heads'), check_vma=False)(q, k, v, segments_BT)


def _own(
  q: Array, k: Array, v: Array, segments_Bt: Array, *, axis: str, window: int | None, softcap: float | None
) -> Array:
  """A device's queries against the keys and values of all, as they pass by."""
  n, index = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  B, t, H, N = q.shape
  K = k.shape[2]
  q_BtKGN = q.reshape(B, t, K, H // K, N)
  onward = [(i, (i + 1) % n) for i in range(n)]

  def attended(kept: tuple, passing: tuple, owner: Array) -> tuple:
    block = partial(_block, passing, index * t, owner * t, window, softcap)
    return block(q_BtKGN, segments_Bt, kept)

  @jax.checkpoint
  def visit(carry: tuple, turn: Array) -> tuple[tuple, None]:
    kept, passing = carry
    owner = (index - turn) % n
    kept = jax.lax.cond(owner <= index, attended, lambda kept, *_: kept, kept, passing, owner)
    return (kept, jax.tree.map(lambda x: jax.lax.ppermute(x, axis, onward), passing)), None

  stats_BtKG = q_BtKGN[..., 0].astype(jnp.float32) * 0.0
  start = (stats_BtKG + jnp.finfo(jnp.float32).min, stats_BtKG, q_BtKGN.astype(jnp.float32) * 0.0)
  ((_, sum_BtKG, out_BtKGN), _), _ = jax.lax.scan(visit, (start, (k, v, segments_Bt)), jnp.arange(n))
  return (out_BtKGN / sum_BtKG[..., None]).astype(q.dtype).reshape(B, t, H, N)


def _block(
  passing: tuple,
  first_q: Array,
  first_k: Array,
  window: int | None,
  softcap: float | None,
  q: Array,
  segments: Array,
  kept: tuple,
) -> tuple:
  """Running softmax (max, sum, weighted values) of queries with one block of keys added, some queries at a time."""
  k, v, k_segments = passing
  t = q.shape[1]
  c = next(n for n in range(min(QUERIES, t), 0, -1) if t % n == 0)
  order_k = first_k + jnp.arange(t)[None]

  def some(xs: tuple) -> tuple:
    q_BcKGN, segments_Bc, order_c, (top, total, out) = xs
    scores = jnp.einsum('BcKGN,BSKN->BcKGS', q_BcKGN, k.astype(q_BcKGN.dtype), preferred_element_type=jnp.float32)
    if softcap is not None:
      scores = softcap * jnp.tanh(scores / softcap)
    mask_BcS = causal_mask(order_c[None], order_k, segments_Bc, k_segments, window)[:, :, None, None]
    new_top = jnp.maximum(top, jnp.max(jnp.where(mask_BcS, scores, jnp.finfo(jnp.float32).min), axis=-1))
    weights = jnp.where(mask_BcS, jnp.exp(scores - new_top[..., None]), 0.0)
    shrink = jnp.exp(top - new_top)
    values = jnp.einsum('BcKGS,BSKN->BcKGN', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return new_top, total * shrink + weights.sum(axis=-1), out * shrink[..., None] + values

  cut = lambda x: jnp.moveaxis(x.reshape(x.shape[0], t // c, c, *x.shape[2:]), 1, 0)
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], t, *x.shape[3:])
  order = (first_q + jnp.arange(t)).reshape(t // c, c)
  found = jax.lax.map(jax.checkpoint(some), (cut(q), cut(segments), order, jax.tree.map(cut, kept)))
  return jax.tree.map(join, found)
