"""The leaf types a matmul weight may have, and the one function that multiplies by any of them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


@struct.dataclass
class LowRank:
  """A weight with a low-rank update: w + scale * a @ b (LoRA, Hu et al. 2021, arXiv:2106.09685, eq. 3).

  Every array may carry leading stack axes. `w` comes first: Linen checks the shape of a parameter's first leaf.
  """

  w: Float[Array, '*stack i o']
  a: Float[Array, '*stack i r']
  b: Float[Array, '*stack r o']
  scale_L: Float[Array, '*stack']


@struct.dataclass
class Float8:
  """A weight that is multiplied by in eight bits, forward and backward; it and its gradient keep their own dtype."""

  w: Float[Array, '*stack i o']


Weight = Float[Array, 'i o'] | LowRank | Float8


def float8(w: Any) -> Any:
  """The same weight, its large matmul in eight bits; an update of low rank is left as it is."""
  return w.replace(w=float8(w.w)) if isinstance(w, LowRank) else Float8(w)


def linear(x: Float[Array, '*batch i'], w: Weight, bias: Float[Array, ' o'] | None = None) -> Float[Array, '*batch o']:
  """x @ w + bias in the dtype of `x`, whatever kind of leaf `w` is."""
  if isinstance(w, LowRank):
    update = (x @ w.a.astype(x.dtype)) @ w.b.astype(x.dtype)
    y = linear(x, w.w) + update * w.scale_L.astype(x.dtype)
  elif isinstance(w, Float8):
    y = _float8_matmul(x.reshape(-1, x.shape[-1]), w.w.astype(x.dtype)).reshape(*x.shape[:-1], -1)
  else:
    y = x @ w.astype(x.dtype)
  return y if bias is None else y + bias.astype(x.dtype)


def _float8_dot(a: Array, b: Array, contracted: tuple[int, int], types: tuple[Any, Any]) -> Array:
  """Two matrices, quantized with a scale for each row that is not summed over, multiplied by qwix."""
  import qwix

  a8, b8 = (
    qwix.quantize(x, t, channelwise_axes=(1 - axis,)) for x, t, axis in zip((a, b), types, contracted, strict=True)
  )
  axes = (((contracted[0],), (contracted[1],)), ((), ()))
  return qwix.dot_general(a8, b8, axes, preferred_element_type=jnp.float32).astype(a.dtype)


@jax.custom_vjp
def _float8_matmul(x_Ri: Array, w_io: Array) -> Array:
  """x @ w: e4m3 forward, gradients in e5m2 (Micikevicius et al. 2022, arXiv:2209.05433)."""
  return _float8_dot(x_Ri, w_io, (1, 0), (E4M3, E4M3))


def _float8_backward(saved: tuple[Array, Array], g_Ro: Array) -> tuple[Array, Array]:
  x_Ri, w_io = saved
  dx_Ri = _float8_dot(g_Ro, w_io, (1, 1), (E5M2, E4M3))
  return dx_Ri, _float8_dot(x_Ri, g_Ro, (0, 0), (E4M3, E5M2))


_float8_matmul.defvjp(lambda x, w: (_float8_matmul(x, w), (x, w)), _float8_backward)


def grouped(x: Float[Array, 'A i'], w: Any, sizes: Int[Array, ' E']) -> Float[Array, 'A o']:
  """Rows of `x`, sorted into E groups of these sizes, each group times its own matrix of `w` [E, i, o]."""
  if isinstance(w, LowRank):
    rows_A = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(x))
    update = grouped(grouped(x, w.a, sizes), w.b, sizes)
    return grouped(x, w.w, sizes) + update * w.scale_L[rows_A, None].astype(x.dtype)
  return jax.lax.ragged_dot(x, w.astype(x.dtype), sizes)


def dense(w: Array | LowRank | Float8) -> Array:
  """The weight as one plain array, any update folded in; what is no matrix comes back as it is."""
  if isinstance(w, Float8):
    return w.w
  if isinstance(w, LowRank):
    return w.w + w.scale_L[..., None, None] * jnp.matmul(w.a, w.b)
  return w
