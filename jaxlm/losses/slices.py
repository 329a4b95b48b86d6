"""Softmax over a vocabulary, a slice of it at a time, forward and backward, with any part of the head in hand.

R rows, D model, P columns of the part, C columns of a slice.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

NEGATIVE = -1e30  # a logit that is never predicted, without the NaN that inf - inf gives


class How(NamedTuple):
  """The logits are softcap(x @ head) / temperature over `vocab` tokens; a part of the head is walked in `chunks`."""

  softcap: float | None
  temperature: float
  vocab: int
  chunks: int


class Seen(NamedTuple):
  """What of the slices so far is kept: max, sum of exp, sum of l * exp, and the target's logit, each [R]."""

  top: Array
  total: Array
  dot: Array
  picked: Array


def start(x_RD: Array) -> Seen:
  """Nothing seen."""
  zeros_R = jnp.zeros(x_RD.shape[0], jnp.float32)
  return Seen(zeros_R + NEGATIVE, zeros_R, zeros_R, zeros_R)


def ended(seen: Seen) -> tuple[Array, Array, Array]:
  """(logp_R, lse_R, entropy_R)."""
  lse_R = seen.top + jnp.log(seen.total)
  return seen.picked - lse_R, lse_R, lse_R - seen.dot / seen.total


def look(how: How, seen: Seen, x_RD: Array, w_DP: Array, targets_R: Array, first: Any = 0) -> Seen:
  """`seen` with a part of the head, whose columns begin at token `first`."""

  def visit(seen: Seen, chunk: Any) -> tuple[Seen, None]:
    logits_RC, _, ids_C = _slice(how, x_RD, w_DP, first, chunk)
    new_R = jnp.maximum(seen.top, jnp.max(logits_RC, axis=-1))
    weights_RC = jnp.exp(logits_RC - new_R[:, None])
    shrink_R = jnp.exp(seen.top - new_R)
    hit_RC = ids_C[None] == targets_R[:, None]
    return Seen(
      new_R,
      seen.total * shrink_R + jnp.sum(weights_RC, axis=-1),
      seen.dot * shrink_R + jnp.sum(weights_RC * logits_RC, axis=-1),
      seen.picked + jnp.sum(jnp.where(hit_RC, logits_RC, 0.0), axis=-1),
    ), None

  return jax.lax.scan(visit, seen, jnp.arange(how.chunks))[0]


def given(cotangents: Any) -> tuple[Array | None, ...]:
  """Those of (logp, lse, entropy), None for what nothing depends on."""
  return tuple(None if isinstance(g, jax.custom_derivatives.SymbolicZero) else g for g in cotangents)


def pull(
  how: How,
  x_RD: Array,
  w_DP: Array,
  targets_R: Array,
  lse_R: Array,
  entropy_R: Array,
  cotangents: tuple[Array | None, ...],
  first: Any = 0,
  *,
  learns: bool = True,
) -> tuple[Array, Array | None]:
  """(dx_RD, dw_DP) in float32 for one part of the head; for one that does not learn (dx_RD, None).

  With p = softmax(l): d logp = onehot - p, d lse = p, d entropy = -p (l - lse + entropy).
  """
  g_logp, g_lse, g_entropy = (None if g is None else g[:, None] for g in cotangents)

  def visit(carry: tuple, chunk: Any) -> tuple[tuple, None]:
    dx_RD, dw_DP = carry
    logits_RC, slope_RC, ids_C = _slice(how, x_RD, w_DP, first, chunk)
    probs_RC = jnp.exp(logits_RC - lse_R[:, None])
    scale_RC = (0.0 if g_lse is None else g_lse) - (0.0 if g_logp is None else g_logp)
    if g_entropy is not None:
      scale_RC = scale_RC - g_entropy * (logits_RC - lse_R[:, None] + entropy_R[:, None])
    d_RC = probs_RC * scale_RC
    if g_logp is not None:
      d_RC += jnp.where(ids_C[None] == targets_R[:, None], g_logp, 0.0)
    d_RC = (d_RC * slope_RC).astype(x_RD.dtype)
    C = d_RC.shape[1]
    w_DC = jax.lax.dynamic_slice_in_dim(w_DP, chunk * C, C, axis=1)
    dx_RD += jnp.matmul(d_RC, w_DC.astype(x_RD.dtype).T, preferred_element_type=jnp.float32)
    if learns:
      dw_DC = jnp.matmul(x_RD.T, d_RC, preferred_element_type=jnp.float32)
      dw_DP = jax.lax.dynamic_update_slice_in_dim(dw_DP, dw_DC, chunk * C, axis=1)
    return (dx_RD, dw_DP), None

  begin = jnp.zeros(x_RD.shape, jnp.float32), jnp.zeros(w_DP.shape, jnp.float32) if learns else None
  return jax.lax.scan(visit, begin, jnp.arange(how.chunks))[0]


def _slice(how: How, x_RD: Array, w_DP: Array, first: Any, chunk: Any) -> tuple[Array, Array, Array]:
  """The final logits of one slice, their derivative by the raw ones, and the ids of its columns."""
  C = w_DP.shape[1] // how.chunks
  w_DC = jax.lax.dynamic_slice_in_dim(w_DP, chunk * C, C, axis=1)
  raw_RC = jnp.matmul(x_RD, w_DC.astype(x_RD.dtype), preferred_element_type=jnp.float32)
  slope_RC = jnp.full((), 1.0 / how.temperature)
  if how.softcap is not None:
    bent_RC = jnp.tanh(raw_RC / how.softcap)
    raw_RC, slope_RC = how.softcap * bent_RC, slope_RC * (1.0 - bent_RC**2)
  ids_C = first + chunk * C + jnp.arange(C)
  return jnp.where(ids_C < how.vocab, raw_RC / how.temperature, NEGATIVE), slope_RC, ids_C
