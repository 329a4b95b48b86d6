"""Next-token log-probabilities and cross entropy, whole or in slices of the vocabulary.

B batch, T sequence, D model, V vocabulary.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm import masked
from jaxlm.losses import slices
from jaxlm.masked import Sum


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
  how = slices.How(softcap, temperature, vocab or head_DV.shape[1], chunks)
  return tuple(y.reshape(targets_BT.shape) for y in _logprobs(how, *rows))  # pyright: ignore[reportReturnType]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(how: slices.How, x_RD: Array, head_DV: Array, targets_R: Array) -> tuple[Array, Array, Array]:
  """logprobs over flattened rows."""
  return slices.ended(slices.look(how, slices.start(x_RD), x_RD, head_DV, targets_R))


def _forward(how: slices.How, x_RD: Any, head_DV: Any, targets_R: Any) -> tuple[tuple, tuple]:
  out = _logprobs(how, x_RD.value, head_DV.value, targets_R.value)
  learns = () if head_DV.perturbed else None
  return out, (x_RD.value, head_DV.value, targets_R.value, out[1], out[2], learns)


def _backward(how: slices.How, saved: tuple, cotangents: tuple) -> tuple[Array, Array | None, None]:
  """A frozen head has no gradient, and none is computed."""
  x_RD, head_DV, targets_R, lse_R, entropy_R, learns = saved
  rows = targets_R, lse_R, entropy_R, slices.given(cotangents)
  dx_RD, dhead_DV = slices.pull(how, x_RD, head_DV, *rows, learns=learns is not None)
  return dx_RD.astype(x_RD.dtype), None if dhead_DV is None else dhead_DV.astype(head_DV.dtype), None


_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)
