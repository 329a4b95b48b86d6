"""Rotary positions, masks, grouped-query attention and the key/value cache.

B batch, T query positions, S key positions, H heads, K kv heads, G heads per kv head, N head width.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


@struct.dataclass
class Cache:
  """Keys and values seen so far. The slot of a key is its position, so a row's filled slots are 0..position.

  Stacked like the layers it belongs to: [L, B, S, K, N], or [B, S, K, N] for one layer.
  """

  k: Float[Array, '*layers B S K N']
  v: Float[Array, '*layers B S K N']

  def write(self, k: Float[Array, 'B T K N'], v: Float[Array, 'B T K N'], positions_BT: Int[Array, 'B T']) -> 'Cache':
    """One layer's cache with these keys and values at these positions; positions past the end are dropped."""
    rows_B1 = jnp.arange(k.shape[0])[:, None]
    return Cache(
      self.k.at[rows_B1, positions_BT].set(k.astype(self.k.dtype), mode='drop'),
      self.v.at[rows_B1, positions_BT].set(v.astype(self.v.dtype), mode='drop'),
    )


def rope_angles(positions: Int[Array, 'R T'], head_dim: int, theta: float) -> Float[Array, 'R T n']:
  """Angles of rotary embedding (Su et al. 2021, arXiv:2104.09864): position * theta^(-2i/N), float32, n = N/2."""
  inverse = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  return positions[..., None].astype(jnp.float32) * inverse


def rotate(x: Float[Array, 'B T h N'], angles_RTn: Float[Array, 'R T n']) -> Float[Array, 'B T h N']:
  """Turns each pair (i, i + N/2) by its angle, in float32; the result has the dtype of `x`."""
  cos, sin = jnp.cos(angles_RTn)[:, :, None], jnp.sin(angles_RTn)[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def causal_mask(
  q_positions: Int[Array, '#R T'],
  k_positions: Int[Array, '#R S'],
  q_segments: Int[Array, '#R T'] | None = None,
  k_segments: Int[Array, '#R S'] | None = None,
) -> Bool[Array, '#R T S']:
  """True where a query may look: at keys of its own segment, at or before its position."""
  mask = q_positions[:, :, None] >= k_positions[:, None, :]
  if q_segments is not None and k_segments is not None:
    mask &= q_segments[:, :, None] == k_segments[:, None, :]
  return mask


def attend(
  q: Float[Array, 'B T H N'],
  k: Float[Array, 'B S K N'],
  v: Float[Array, 'B S K N'],
  mask: Bool[Array, 'R T S'],
  scale: float | None = None,
) -> Float[Array, 'B T H N']:
  """softmax(q k^T * scale) v, each kv head shared by H/K query heads, scale 1/sqrt(N); scores and softmax float32."""
  B, T, H, N = q.shape
  K = k.shape[2]
  q_BTKGN = q.reshape(B, T, K, H // K, N) * (N**-0.5 if scale is None else scale)
  scores = jnp.einsum('BTKGN,BSKN->BKGTS', q_BTKGN, k.astype(q.dtype), preferred_element_type=jnp.float32)
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
  return jnp.einsum('BKGTS,BSKN->BTKGN', probs, v.astype(q.dtype)).reshape(B, T, H, N)
