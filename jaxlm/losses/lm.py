"""Next-token log-probabilities and cross entropy, whole or in slices of the vocabulary.

B batch, T sequence, D model, V vocabulary, C a slice of it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm import masked
from jaxlm.masked import Sum

NEGATIVE = -1e30  # a logit that is never predicted, without the NaN that inf - inf gives


def next_token(
  logits_BTV: Float[Array, 'B T V'],
  targets_BT: Int[Array, 'B T'],
  mask_BT: Float[Array, 'B T'],
  *,
  z_loss: float = 0.0,
) -> Sum:
  """Cross entropy of the targets, summed where the mask is on: -log softmax(logits)[target] + z_loss * lse^2.

  In nats; the weight is the number of targets. The z term keeps the normaliser near 1 (PaLM, arXiv:2204.02311).
  """
  logp_BT, lse_BT = from_logits(logits_BTV, targets_BT)
  return masked.total(z_loss * lse_BT**2 - logp_BT, mask_BT)


def from_logits(
  logits_BTV: Float[Array, 'B T V'], targets_BT: Int[Array, 'B T']
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
  """`(logp_BT, lse_BT)` of the targets under softmax(logits), float32."""
  logits_BTV = logits_BTV.astype(jnp.float32)
  lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  return jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0] - lse_BT, lse_BT


def next_token_chunked(
  x_BTD: Float[Array, 'B T D'],
  head_DV: Float[Array, 'D V'],
  targets_BT: Int[Array, 'B T'],
  mask_BT: Float[Array, 'B T'],
  *,
  z_loss: float = 0.0,
  chunks: int,
  vocab: int | None = None,
) -> Sum:
  """`next_token` from activations: the logits exist one slice of the vocabulary at a time (see `logprobs`)."""
  logp_BT, lse_BT, _ = logprobs(x_BTD, head_DV, targets_BT, chunks=chunks, vocab=vocab)
  return masked.total(z_loss * lse_BT**2 - logp_BT, mask_BT)


def logprobs(
  x_BTD: Float[Array, 'B T D'],
  head_DV: Float[Array, 'D V'],
  targets_BT: Int[Array, 'B T'],
  *,
  softcap: float | None = None,
  temperature: float = 1.0,
  chunks: int,
  vocab: int | None = None,
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T'], Float[Array, 'B T']]:
  """`(logp_BT, lse_BT, entropy_BT)` of softmax(l), l = softcap(x @ head) / temperature, float32, differentiable.

  The vocabulary is walked in `chunks` slices with a running log-sum-exp (Milakov and Gimelshein 2018,
  arXiv:1805.02867), forward once and backward once, so that [B, T, V] never exists. `vocab` masks the columns of a
  padded head. Raises ValueError when V does not divide by `chunks`.
  """
  if head_DV.shape[1] % chunks:
    raise ValueError(f'a vocabulary of {head_DV.shape[1]} does not divide into {chunks} chunks')
  rows = x_BTD.reshape(-1, x_BTD.shape[-1]), head_DV, targets_BT.reshape(-1)
  static = (softcap, temperature, chunks, vocab or head_DV.shape[1])
  return tuple(y.reshape(targets_BT.shape) for y in _logprobs(static, *rows))  # pyright: ignore[reportReturnType]


def _slice(static: tuple, x_RD: Array, head_DV: Array, chunk: Any) -> tuple[Array, Array, Array]:
  """The final logits of one slice, their derivative by the raw ones, and the ids of its columns."""
  softcap, temperature, chunks, vocab = static
  C = head_DV.shape[1] // chunks
  w_DC = jax.lax.dynamic_slice_in_dim(head_DV, chunk * C, C, axis=1)
  raw_RC = jnp.matmul(x_RD, w_DC.astype(x_RD.dtype), preferred_element_type=jnp.float32)
  slope_RC = jnp.full((), 1.0 / temperature)
  if softcap is not None:
    bent_RC = jnp.tanh(raw_RC / softcap)
    raw_RC, slope_RC = softcap * bent_RC, slope_RC * (1.0 - bent_RC**2)
  ids_C = chunk * C + jnp.arange(C)
  return jnp.where(ids_C < vocab, raw_RC / temperature, NEGATIVE), slope_RC, ids_C


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(static: tuple, x_RD: Array, head_DV: Array, targets_R: Array) -> tuple[Array, Array, Array]:
  """logprobs over flattened rows: one pass that keeps (max, sum exp, sum l * exp, the target's logit)."""

  def visit(carry: tuple, chunk: Any) -> tuple[tuple, None]:
    top_R, sum_R, dot_R, picked_R = carry
    logits_RC, _, ids_C = _slice(static, x_RD, head_DV, chunk)
    new_R = jnp.maximum(top_R, jnp.max(logits_RC, axis=-1))
    weights_RC = jnp.exp(logits_RC - new_R[:, None])
    shrink_R = jnp.exp(top_R - new_R)
    hit_RC = ids_C[None] == targets_R[:, None]
    return (
      new_R,
      sum_R * shrink_R + jnp.sum(weights_RC, axis=-1),
      dot_R * shrink_R + jnp.sum(weights_RC * logits_RC, axis=-1),
      picked_R + jnp.sum(jnp.where(hit_RC, logits_RC, 0.0), axis=-1),
    ), None

  zeros_R = jnp.zeros(x_RD.shape[0], jnp.float32)
  start = (zeros_R + NEGATIVE, zeros_R, zeros_R, zeros_R)
  (top_R, sum_R, dot_R, picked_R), _ = jax.lax.scan(visit, start, jnp.arange(static[2]))
  lse_R = top_R + jnp.log(sum_R)
  return picked_R - lse_R, lse_R, lse_R - dot_R / sum_R


def _forward(static: tuple, x_RD: Any, head_DV: Any, targets_R: Any) -> tuple[tuple, tuple]:
  out = _logprobs(static, x_RD.value, head_DV.value, targets_R.value)
  return out, (x_RD.value, head_DV.value, targets_R.value, out[1], out[2])


def _backward(static: tuple, saved: tuple, cotangents: tuple) -> tuple[Array, Array, None]:
  """With p = softmax(l): d logp = onehot - p, d lse = p, d entropy = -p (l - lse + entropy)."""
  x_RD, head_DV, targets_R, lse_R, entropy_R = saved
  zero = [isinstance(g, jax.custom_derivatives.SymbolicZero) for g in cotangents]
  g_logp, g_lse, g_entropy = (None if z else g[:, None] for z, g in zip(zero, cotangents, strict=True))

  def visit(carry: tuple, chunk: Any) -> tuple[tuple, None]:
    dx_RD, dhead_DV = carry
    logits_RC, slope_RC, ids_C = _slice(static, x_RD, head_DV, chunk)
    probs_RC = jnp.exp(logits_RC - lse_R[:, None])
    scale_RC = (0.0 if g_lse is None else g_lse) - (0.0 if g_logp is None else g_logp)
    if g_entropy is not None:
      scale_RC = scale_RC - g_entropy * (logits_RC - lse_R[:, None] + entropy_R[:, None])
    d_RC = probs_RC * scale_RC
    if g_logp is not None:
      d_RC += jnp.where(ids_C[None] == targets_R[:, None], g_logp, 0.0)
    d_RC = (d_RC * slope_RC).astype(x_RD.dtype)
    C = d_RC.shape[1]
    w_DC = jax.lax.dynamic_slice_in_dim(head_DV, chunk * C, C, axis=1)
    dx_RD += jnp.matmul(d_RC, w_DC.astype(x_RD.dtype).T, preferred_element_type=jnp.float32)
    dw_DC = jnp.matmul(x_RD.T, d_RC, preferred_element_type=jnp.float32)
    return (dx_RD, jax.lax.dynamic_update_slice_in_dim(dhead_DV, dw_DC, chunk * C, axis=1)), None

  start = jnp.zeros(x_RD.shape, jnp.float32), jnp.zeros(head_DV.shape, jnp.float32)
  (dx_RD, dhead_DV), _ = jax.lax.scan(visit, start, jnp.arange(static[2]))
  return dx_RD.astype(x_RD.dtype), dhead_DV.astype(head_DV.dtype), None


_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)
