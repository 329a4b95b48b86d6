"""The leaf types a matmul weight may have, and the one function that multiplies by any of them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class LowRank:
  """A weight with a low-rank update: w + scale * a @ b (LoRA, Hu et al. 2021, arXiv:2106.09685, eq. 3).

  Every array may carry leading stack axes. `w` comes first: Linen checks the shape of a parameter's first leaf.
  """

  w: Float[Array, '*stack i o']
  a: Float[Array, '*stack i r']
  b: Float[Array, '*stack r o']
  scale_L: Float[Array, '*stack']


Weight = Float[Array, 'i o'] | LowRank


def linear(x: Float[Array, '*batch i'], w: Weight, bias: Float[Array, ' o'] | None = None) -> Float[Array, '*batch o']:
  """x @ w + bias in the dtype of `x`, whatever kind of leaf `w` is."""
  if isinstance(w, LowRank):
    update = (x @ w.a.astype(x.dtype)) @ w.b.astype(x.dtype)
    y = linear(x, w.w) + update * w.scale_L.astype(x.dtype)
  else:
    y = x @ w.astype(x.dtype)
  return y if bias is None else y + bias.astype(x.dtype)


def grouped(x: Float[Array, 'A i'], w: Any, sizes: Int[Array, ' E']) -> Float[Array, 'A o']:
  """Rows of `x`, sorted into E groups of these sizes, each group times its own matrix of `w` [E, i, o]."""
  if isinstance(w, LowRank):
    rows_A = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(x))
    update = grouped(grouped(x, w.a, sizes), w.b, sizes)
    return grouped(x, w.w, sizes) + update * w.scale_L[rows_A, None].astype(x.dtype)
  return jax.lax.ragged_dot(x, w.astype(x.dtype), sizes)


def dense(w: Array | LowRank) -> Array:
  """The weight as one plain array, any update folded in; what is no matrix comes back as it is."""
  if isinstance(w, LowRank):
    return w.w + w.scale_L[..., None, None] * jnp.matmul(w.a, w.b)
  return w
