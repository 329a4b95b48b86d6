"""The leaf types a matmul weight may have, and the one function that multiplies by any of them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Key

from jaxlm.models import float8

FEW = 48  # rows of input up to which a CPU is faster with them as columns


@struct.dataclass
class LowRank:
  """A weight with a low-rank update: w + scale * a @ b (LoRA, Hu et al. 2021, arXiv:2106.09685, eq. 3).

  With a `magnitude` each column of that sum is scaled to it (DoRA, Liu et al. 2024, arXiv:2402.09353, eq. 5). With keys
  a share `rate` of the inputs of `a` is dropped. Every array may carry leading stack axes.
  """

  w: Any  # [*stack, i, o], Quantized or Turned
  a: Float[Array, '*stack i r']
  b: Float[Array, '*stack r o']
  scale_L: Float[Array, '*stack']
  magnitude: Float[Array, '*stack o'] | None = None
  key_L: Key[Array, '*stack'] | None = None
  rate: float = struct.field(pytree_node=False, default=0.0)


@struct.dataclass
class Quantized:
  """A frozen weight in few bits, a `qwix.QArray` of [*stack, i, o]."""

  q: Any


@struct.dataclass
class Float8:
  """A weight that is multiplied by in eight bits, forward and backward; it and its gradient keep their own dtype."""

  w: Float[Array, '*stack i o']


@struct.dataclass
class Turned:
  """A weight kept as its transpose, for decoding on a CPU: XLA multiplies a few columns there twice as fast as rows."""

  w: Float[Array, '*stack o i']


Weight = Float[Array, 'i o'] | LowRank | Quantized | Float8 | Turned


def is_weight(x: Any) -> bool:
  """Whether a node of a tree is one of these types, rather than an array or a dict of them."""
  return isinstance(x, (LowRank, Quantized, Float8, Turned))


def shape(w: Any) -> tuple[int, ...]:
  """[*stack, i, o] of any of them, or of an array."""
  if isinstance(w, (LowRank, Float8)):
    return shape(w.w)
  if isinstance(w, Turned):
    return (*w.w.shape[:-2], w.w.shape[-1], w.w.shape[-2])
  return w.q.qvalue.shape if isinstance(w, Quantized) else w.shape


def linear(x: Float[Array, '*batch i'], w: Weight, bias: Float[Array, ' o'] | None = None) -> Float[Array, '*batch o']:
  """x @ w + bias in the dtype of `x`, whatever kind of leaf `w` is."""
  match w:
    case LowRank():
      y = _low_rank(x, w)
    case Float8():
      y = float8.matmul(x.reshape(-1, x.shape[-1]), w.w.astype(x.dtype)).reshape(*x.shape[:-1], -1)
    case Turned():
      y = by_columns(x, w)
    case _:
      y = matmul(x, plain(w).astype(x.dtype))
  return y if bias is None else y + bias.astype(x.dtype)


@jax.custom_vjp
def matmul(x: Float[Array, '*batch i'], w: Float[Array, 'i o']) -> Float[Array, '*batch o']:
  """x @ w, whose gradient by `w` is made by turning the narrower of the two that it is the product of.

  CPUs turn the first: derived by itself that is the gradient of the output, which they work out once more while they
  walk across memory, at a third of the time of a whole step. A frozen `w` has no gradient, and none is computed.
  There is no forward mode (`jax.jvp`) through it.
  """
  return x @ w


def _forward(x: Any, w: Any) -> tuple[Array, tuple]:
  """Of what is not differentiated nothing is kept."""
  return x.value @ w.value, (x.value if w.perturbed else None, w.value if x.perturbed else None)


def _backward(saved: tuple, dy: Array) -> tuple[Array | None, Array | None]:
  x, w = saved
  return None if w is None else dy @ w.T, None if x is None else _outer(x, dy)


def _outer(x: Array, dy: Array) -> Array:
  """The sum over rows of x^T dy, [i, o]."""
  rows = tuple(range(dy.ndim - 1))
  over = lambda a, b: jax.lax.dot_general(a, b, ((rows, rows), ((), ())))
  return over(x, dy) if x.shape[-1] <= dy.shape[-1] else over(dy, x).T


matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def by_columns(x: Float[Array, '*batch i'], w: Turned, dtype: Any = None) -> Float[Array, '*batch o']:
  """x @ w, in `dtype` if one is given; the barriers keep XLA from making it a product of rows again."""
  w_oi, x_Ri = w.w.astype(x.dtype), x.reshape(math.prod(x.shape[:-1]), -1)
  over = lambda a, b, axes: jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=dtype)
  if len(x_Ri) > FEW:
    y_Ro = over(x_Ri, w_oi, ((1,), (1,)))
  else:
    hold = jax.lax.optimization_barrier
    y_Ro = hold(over(w_oi, hold(x_Ri.T), ((1,), (0,)))).T
  return y_Ro.reshape(*x.shape[:-1], -1)


def _low_rank(x: Array, w: LowRank) -> Array:
  dropped = x
  if w.key_L is not None and w.rate:
    keep = jax.random.bernoulli(w.key_L, 1.0 - w.rate, x.shape)
    dropped = jnp.where(keep, x / (1.0 - w.rate), 0.0).astype(x.dtype)
  update = matmul(matmul(dropped, w.a.astype(x.dtype)), w.b.astype(x.dtype)) * w.scale_L.astype(x.dtype)
  if w.magnitude is None:
    return linear(x, w.w) + update
  ratio_o = (w.magnitude / _column_norms(w)).astype(x.dtype)
  if dropped is x:
    return ratio_o * (linear(x, w.w) + update)
  return linear(x, w.w) + (ratio_o - 1.0) * linear(dropped, w.w) + ratio_o * update


def _column_norms(w: LowRank) -> Array:
  """Of w + scale * a @ b, [*stack, o]; a constant to gradients (DoRA, section 4.3)."""
  whole = jax.lax.stop_gradient(plain(w.w) + w.scale_L[..., None, None] * jnp.matmul(w.a, w.b))
  return jnp.linalg.norm(whole.astype(jnp.float32), axis=-2)


def grouped(x: Float[Array, 'A i'], w: Any, sizes: Int[Array, ' E']) -> Float[Array, 'A o']:
  """Rows of `x`, sorted into E groups of these sizes, each group times its own matrix of `w` [E, i, o]."""
  if isinstance(w, LowRank):
    rows_A = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=len(x))
    update = grouped(grouped(x, w.a, sizes), w.b, sizes)
    return grouped(x, w.w, sizes) + update * w.scale_L[rows_A, None].astype(x.dtype)
  return jax.lax.ragged_dot(x, plain(w).astype(x.dtype), sizes)


def plain(w: Any) -> Array:
  """A weight without its updates as an array; few bits are widened."""
  if isinstance(w, Quantized):
    import qwix

    return qwix.dequantize(w.q)
  if isinstance(w, Turned):
    return jnp.swapaxes(w.w, -1, -2)
  return plain(w.w) if isinstance(w, (LowRank, Float8)) else w


def dense(w: Any) -> Array:
  """The weight as one plain array, any update folded in; what is no matrix comes back as it is."""
  if not isinstance(w, LowRank):
    return plain(w)
  whole = plain(w.w) + w.scale_L[..., None, None] * jnp.matmul(w.a, w.b)
  return whole if w.magnitude is None else whole * (w.magnitude / _column_norms(w))[..., None, :]


def as_computed(w: Any, dtype: Any, eight: bool) -> Any:
  """A weight with its arrays cast as a matmul in `dtype` reads them, or for one in eight bits; few bits stay."""
  cast = lambda x: x.astype(dtype)
  match w:
    case LowRank():
      return dataclasses.replace(w, w=as_computed(w.w, dtype, eight), a=cast(w.a), b=cast(w.b))
    case Quantized():
      return w
    case Turned():
      return Turned(cast(w.w))
    case _:
      return Float8(cast(w)) if eight else cast(w)


def turn(w: Any) -> Any:
  """A matrix, or what adapters are added to, as `Turned`; few bits stay."""
  if isinstance(w, LowRank):
    return dataclasses.replace(w, w=turn(w.w))
  return w if is_weight(w) else Turned(jnp.swapaxes(w, -1, -2))
