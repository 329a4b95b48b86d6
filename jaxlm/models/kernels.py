"""Attention kernels of accelerators, under one mesh: the arithmetic is that of `attention.attend`.

B batch, T sequence, H heads, K kv heads, N head width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.errors import InputError
from jaxlm.sharding import Rules, spec

TILE = 128  # what a kernel's blocks are multiples of
BLOCK = 512


class Splash(NamedTuple):
  """What a splash kernel is built for, beside its shapes."""

  window: int | None = None
  scale: float | None = None  # None: 1 / sqrt(N)
  softcap: float | None = None
  interpret: bool = False  # for machines without a TPU


def splash(
  q: Float[Array, 'B T H N'],
  k: Float[Array, 'B T K N'],
  v: Float[Array, 'B T K N'],
  segments_BT: Int[Array, 'B T'] | None,
  how: Splash = Splash(),
  rules: Rules | None = None,
) -> Float[Array, 'B T H N']:
  """Causal attention by the Pallas splash kernel of TPUs: scores exist a block at a time, empty blocks are skipped.

  Each device does its own rows and heads. Raises InputError if T is no multiple of 128.
  """
  B, T, H, N = q.shape
  if T % TILE:
    raise InputError(f'splash attention takes rows of a multiple of {TILE} tokens, not {T}: or set attention to xla')
  if segments_BT is None:
    segments_BT = jnp.zeros((B, T), jnp.int32)
  q = q * (N**-0.5 if how.scale is None else how.scale)

  def own(q: Array, k: Array, v: Array, segments_BT: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    kernel = _kernel(q.shape[1], q.shape[2], how)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first, SegmentIds(segments_BT, segments_BT)), 1, 2)

  return _mapped(own, rules)(q, k, v, segments_BT)


def cudnn(
  q: Float[Array, 'B T H N'],
  k: Float[Array, 'B T K N'],
  v: Float[Array, 'B T K N'],
  segments_BT: Int[Array, 'B T'] | None,
  *,
  window: int | None = None,
  scale: float | None = None,
  rules: Rules | None = None,
) -> Float[Array, 'B T H N']:
  """Causal attention by cuDNN's flash kernel on GPUs, of 16 bits alone; the segments are a mask of T x T bits a row."""

  def own(q: Array, k: Array, v: Array, segments_BT: Array) -> Array:
    same_B1TT = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    reach = None if window is None else (window - 1, 0)
    how: dict[str, Any] = {'scale': scale, 'is_causal': True, 'local_window_size': reach, 'implementation': 'cudnn'}
    return jax.nn.dot_product_attention(q, k, v, mask=None if segments is None else same_B1TT, **how)

  segments = segments_BT
  return _mapped(own, rules)(q, k, v, jnp.zeros(q.shape[:2], jnp.int32) if segments is None else segments)


def _mapped(own: Any, rules: Rules | None) -> Any:
  """`own(q, k, v, segments)` with each device at its rows and heads."""
  if rules is None or jax.sharding.get_abstract_mesh().empty:
    return own
  of = lambda heads: spec(('batch', None, heads, None), rules)
  specs = (of('act_heads'), of('act_kv_heads'), of('act_kv_heads'), spec(('batch', None), rules))
  return jax.shard_map(own, in_specs=specs, out_specs=of('act_heads'), check_vma=False)


def _kernel(T: int, H: int, how: Splash) -> Any:
  from jax.experimental.pallas.ops.tpu import splash_attention as sa

  mask = sa.CausalMask((T, T)) if how.window is None else sa.LocalMask((T, T), (how.window - 1, 0), 0)
  block = next(n for n in (BLOCK, 256, TILE) if T % n == 0)
  return sa.make_splash_mha(
    sa.MultiHeadMask([mask] * H),
    block_sizes=sa.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_q_dq=block,
      block_kv_dq=block,
    ),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=how.softcap,
    residual_checkpoint_name='attn_values',
    interpret=how.interpret,
  )
