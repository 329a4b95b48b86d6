"""One matmul in eight bits, forward and backward."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def _dot(a: Array, b: Array, contracted: tuple[int, int], types: tuple[Any, Any]) -> Array:
  """Two matrices, quantized with a scale for each row that is not summed over, multiplied by qwix."""
  import qwix

  a8, b8 = (
    qwix.quantize(x, t, channelwise_axes=(1 - axis,)) for x, t, axis in zip((a, b), types, contracted, strict=True)
  )
  axes = (((contracted[0],), (contracted[1],)), ((), ()))
  return qwix.dot_general(a8, b8, axes, preferred_element_type=jnp.float32).astype(a.dtype)


@jax.custom_vjp
def matmul(x_Ri: Array, w_io: Array) -> Array:
  """x @ w: e4m3 forward, gradients in e5m2 (Micikevicius et al. 2022, arXiv:2209.05433)."""
  return _dot(x_Ri, w_io, (1, 0), (E4M3, E4M3))


def _backward(saved: tuple[Array, Array], g_Ro: Array) -> tuple[Array, Array]:
  x_Ri, w_io = saved
  dx_Ri = _dot(g_Ro, w_io, (1, 1), (E5M2, E4M3))
  return dx_Ri, _dot(x_Ri, g_Ro, (0, 0), (E4M3, E5M2))


matmul.defvjp(lambda x, w: (matmul(x, w), (x, w)), _backward)
