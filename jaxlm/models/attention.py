"""Rotary positions, masks, grouped-query attention and the key/value cache.

B batch, T query positions, S key positions, H heads, K kv heads, G heads per kv head, N head width, n = N/2.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxlm.models.config import ModelConfig


@struct.dataclass
class Cache:
  """Keys and values seen so far: the key of position p is in slot p, or, in a ring of S slots, in slot p mod S.

  Heads stand before slots: a token's products with all keys of a head then read them in a row. Stacked like the
  layers it belongs to: [L, B, K, S, N], or [B, K, S, N] for one layer.
  """

  k: Float[Array, '*layers B K S N']
  v: Float[Array, '*layers B K S N']
  ring: bool = struct.field(pytree_node=False, default=False)

  @property
  def slots(self) -> int:
    return self.k.shape[-2]

  def write(self, k: Float[Array, 'B T K N'], v: Float[Array, 'B T K N'], positions_BT: Int[Array, 'B T']) -> 'Cache':
    """One layer's cache with these keys and values; negative positions and, without a ring, those past the end are
    dropped, and of two that would share a slot of a ring the earlier one."""
    S, slots_BT = self.slots, positions_BT
    kept_BT = positions_BT >= 0
    if self.ring:
      kept_BT &= positions_BT > positions_BT.max(axis=1, keepdims=True) - S
      slots_BT = positions_BT % S
    slots_BT = jnp.where(kept_BT, slots_BT, S)
    # a row at a time: a scatter over rows and slots would have every device gather what all others write
    own = jax.vmap(lambda old, slots, new: old.at[:, slots].set(new.astype(old.dtype).swapaxes(0, 1), mode='drop'))
    return self.replace(k=own(self.k, slots_BT, k), v=own(self.v, slots_BT, v))  # ty: ignore

  def positions(self, last_B1: Int[Array, 'B 1']) -> Int[Array, 'B S']:
    """The position whose key is in each slot once `last` is written; below 0 where there is none yet."""
    slots_1S = jnp.arange(self.slots, dtype=jnp.int32)[None]
    return (
      last_B1 - (last_B1 - slots_1S) % self.slots
      if self.ring
      else jnp.broadcast_to(slots_1S, (len(last_B1), self.slots))
    )


def rope_scaled(cfg: ModelConfig, kind: str) -> bool:
  """Whether layers of this kind are met with `rope_scaling`: local ones with a base of their own are not."""
  return cfg.rope_scaling != 'none' and not (kind == 'local' and cfg.rope_theta_local is not None)


def rope_frequencies(cfg: ModelConfig, kind: str) -> np.ndarray:
  """Radians a position of each pair, float32 [n]: theta^(-2i/N) (Su et al. 2021, arXiv:2104.09864), or as scaled.

  linear (Chen et al. 2023, arXiv:2306.15595), llama3 (Llama 3.1's, arXiv:2407.21783) and yarn (Peng et al. 2023,
  arXiv:2309.00071): fast frequencies stay, slow ones are divided by the factor, with a ramp between.
  """
  local = kind == 'local' and cfg.rope_theta_local is not None
  theta, N = (cfg.rope_theta_local if local else cfg.rope_theta) or 1.0, cfg.head_size
  inverse_n = theta ** (-np.arange(0, N, 2, dtype=np.float64) / N)
  if not rope_scaled(cfg, kind):
    return inverse_n.astype(np.float32)
  turns_n = cfg.rope_original_len * inverse_n / (2 * math.pi)
  if cfg.rope_scaling == 'linear':
    stays_n = np.zeros_like(inverse_n)
  elif cfg.rope_scaling == 'llama3':
    stays_n = np.clip((turns_n - cfg.rope_low) / (cfg.rope_high - cfg.rope_low), 0, 1)
  else:
    pair = lambda turns: N * math.log(cfg.rope_original_len / (turns * 2 * math.pi)) / (2 * math.log(theta))
    first = max(math.floor(pair(cfg.rope_high)), 0)
    last = min(math.ceil(pair(cfg.rope_low)), N - 1)
    stays_n = 1 - np.clip((np.arange(N // 2) - first) / max(last - first, 0.001), 0, 1)
  return (inverse_n * stays_n + inverse_n / cfg.rope_factor * (1 - stays_n)).astype(np.float32)


def rope_angles(positions: Int[Array, 'R T'], frequencies_n: Float[Array, ' n']) -> Float[Array, 'R T n']:
  """The angle of every pair at every position, float32."""
  return positions[..., None].astype(jnp.float32) * frequencies_n


def rotate(
  x: Float[Array, 'B T h N'], angles_RTn: Float[Array, 'R T n'], amplitude: float = 1.0
) -> Float[Array, 'B T h N']:
  """Turns each pair (i, i + N/2) by its angle, in float32, times `amplitude`; the result has the dtype of `x`."""
  cos, sin = amplitude * jnp.cos(angles_RTn)[:, :, None], amplitude * jnp.sin(angles_RTn)[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def causal_mask(
  q_positions: Int[Array, '#R T'],
  k_positions: Int[Array, '#R S'],
  q_segments: Int[Array, '#R T'] | None = None,
  k_segments: Int[Array, '#R S'] | None = None,
  window: int | None = None,
) -> Bool[Array, '#R T S']:
  """True where a query may look: at keys of its own segment, at or before its position and less than `window` away.

  Keys of negative positions are none.
  """
  distance = q_positions[:, :, None] - k_positions[:, None, :]
  mask = (distance >= 0) & (k_positions >= 0)[:, None, :]
  if window is not None:
    mask &= distance < window
  if q_segments is not None and k_segments is not None:
    mask &= q_segments[:, :, None] == k_segments[:, None, :]
  return mask


def attend(
  q: Float[Array, 'B T H N'],
  k: Float[Array, 'B S K N'],
  v: Float[Array, 'B S K N'],
  mask: Bool[Array, 'R T S'],
  scale: float | None = None,
  softcap: float | None = None,
) -> Float[Array, 'B T H N']:
  """softmax(q k^T * scale) v, each kv head shared by H/K query heads, scale 1/sqrt(N); scores and softmax float32.

  With `softcap` the scores are softcap * tanh(scores / softcap).
  """
  B, T, H, N = q.shape
  K = k.shape[2]
  q_BTKGN = q.reshape(B, T, K, H // K, N) * (N**-0.5 if scale is None else scale)
  scores = jnp.einsum('BTKGN,BSKN->BKGTS', q_BTKGN, k.astype(q.dtype), preferred_element_type=jnp.float32)
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
  probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
  return jnp.einsum('BKGTS,BSKN->BTKGN', probs, v.astype(q.dtype)).reshape(B, T, H, N)


def attend_back(
  q: Float[Array, 'B T H N'],
  k: Float[Array, 'B T K N'],
  v: Float[Array, 'B T K N'],
  mask: Bool[Array, 'R T T'],
  scale: float | None = None,
  softcap: float | None = None,
  blocks: int = 4,
) -> Float[Array, 'B T H N']:
  """`attend` of a row to itself under a causal mask: a block of queries leaves out the keys of later ones.

  (n + 1) / 2n of the work with n blocks; with one where they would be of less than 64 queries, or not of equal ones.
  """
  T = q.shape[1]
  size = T // blocks if T % blocks == 0 and T // blocks >= 64 else T
  ends = range(size, T + 1, size)
  some = lambda end: (q[:, end - size : end], k[:, :end], v[:, :end], mask[:, end - size : end, :end])
  return jnp.concatenate([attend(*some(end), scale, softcap) for end in ends], axis=1)


def attend_reached(
  q: Float[Array, 'B T H N'],
  k: Float[Array, 'B K S N'],
  v: Float[Array, 'B K S N'],
  mask: Bool[Array, 'R T S'],
  last: Int[Array, ''],
  scale: float | None = None,
  softcap: float | None = None,
  block: int = 64,
) -> Float[Array, 'B T H N']:
  """`attend`, but of a cache (as it lies: turned, all of it would be copied) only the blocks of keys up to slot `last`,
  with a running softmax (Milakov and Gimelshein 2018, arXiv:1805.02867).

  Blocks in which a row's mask is empty leave what it has as it is, to the last bit: a row's result does not depend on
  how far others reach. S has to be a multiple of `block`.
  """
  B, T, H, N = q.shape
  K, S = k.shape[1:3]
  q_BTKGN = q.reshape(B, T, K, H // K, N) * (N**-0.5 if scale is None else scale)
  lowest = jnp.finfo(jnp.float32).min

  def one(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    out_BKGTN, sum_BKGT, most_BKGT = carry
    some = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, i * block, block, axis)
    k_BKsN, v_BKsN = some(k, 2).astype(q.dtype), some(v, 2).astype(q.dtype)
    scores = jnp.einsum('BTKGN,BKsN->BKGTs', q_BTKGN, k_BKsN, preferred_element_type=jnp.float32)
    if softcap is not None:
      scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(some(mask, 2)[:, None, None], scores, lowest)
    new_BKGT = jnp.maximum(most_BKGT, scores.max(axis=-1))
    kept_BKGT = jnp.exp(most_BKGT - new_BKGT)
    probs = jnp.exp(scores - new_BKGT[..., None])
    seen = jnp.einsum('BKGTs,BKsN->BKGTN', probs.astype(q.dtype), v_BKsN, preferred_element_type=jnp.float32)
    return out_BKGTN * kept_BKGT[..., None] + seen, sum_BKGT * kept_BKGT + probs.sum(axis=-1), new_BKGT

  shape = (B, K, H // K, T)
  start = jnp.zeros((*shape, N), jnp.float32), jnp.zeros(shape, jnp.float32), jnp.full(shape, lowest)
  out_BKGTN, sum_BKGT, _ = jax.lax.fori_loop(0, jnp.minimum(last, S - 1) // block + 1, one, start)
  out_BTKGN = jnp.moveaxis(out_BKGTN / sum_BKGT[..., None], 3, 1)
  return out_BTKGN.reshape(B, T, H, N).astype(q.dtype)
