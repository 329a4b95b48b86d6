"""How one token is drawn: temperature, truncation, penalties. Arrays in, arrays out.

B rows, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

COLD = 1e-30  # temperatures below it are 0: logits divided by them overflow, or they are no float32 at all


@struct.dataclass
class Sampling:
  """How the next token is drawn, one value a row. None leaves the step out; a temperature below COLD is greedy."""

  temperature_B: Any = 1.0
  top_k_B: Any = None  # only the k likeliest tokens
  top_p_B: Any = None  # only the likeliest tokens that together reach this probability
  min_p_B: Any = None  # only tokens of at least this share of the likeliest one's probability
  repetition_B: Any = None  # logits of tokens seen before are divided by it, or multiplied if negative
  seed_B: Any = None  # a row's own randomness, whatever batch it is in


def truncate(logits_BV: Float[Array, 'B V'], sampling: Sampling) -> Float[Array, 'B V']:
  """Logits with what top-k, top-p (Holtzman et al. 2019, arXiv:1904.09751) and min-p (Nguyen et al. 2024,
  arXiv:2407.01082) leave out set to -inf, in this order.

  The token that crosses `top_p` is kept, so at least one always is.
  """
  if sampling.min_p_B is not None:
    best_B1, share_B1 = logits_BV.max(axis=-1, keepdims=True), _column(sampling.min_p_B, logits_BV)
    rest_BV = truncate(logits_BV, sampling.replace(min_p_B=None))  # ty: ignore
    return jnp.where(logits_BV >= best_B1 + jnp.log(share_B1), rest_BV, -jnp.inf)
  if sampling.top_k_B is None and sampling.top_p_B is None:
    return logits_BV
  ordered_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  floor_B1 = ordered_BV[:, -1:]
  if sampling.top_k_B is not None:
    k_B = jnp.clip(jnp.broadcast_to(sampling.top_k_B, logits_BV.shape[:1]), 1, logits_BV.shape[1])
    floor_B1 = jnp.take_along_axis(ordered_BV, k_B[:, None] - 1, axis=-1)
  if sampling.top_p_B is not None:
    p_B1 = _column(sampling.top_p_B, logits_BV)
    probs_BV = jax.nn.softmax(jnp.where(ordered_BV >= floor_B1, ordered_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    kept_BV = (before_BV < p_B1) | (p_B1 >= 1.0)  # 1 leaves nothing out, however the sum is rounded
    kept_BV = (kept_BV & (ordered_BV >= floor_B1)).at[:, 0].set(True)
    floor_B1 = jnp.min(jnp.where(kept_BV, ordered_BV, jnp.inf), axis=-1, keepdims=True)
  return jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)


def _column(value_B: Any, logits_BV: Array) -> Array:
  """A value a row, or one for all, as float32 [B, 1]."""
  return jnp.broadcast_to(jnp.asarray(value_B, jnp.float32), logits_BV.shape[:1])[:, None]


def penalized(logits_BV: Float[Array, 'B V'], seen_BV: Bool[Array, 'B V'], penalty_B: Any) -> Float[Array, 'B V']:
  """Logits of seen tokens divided by the penalty where positive, else multiplied (Keskar et al. 2019,
  arXiv:1909.05858, as transformers has it)."""
  penalty_B1 = _column(penalty_B, logits_BV)
  return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1), logits_BV)


def log_chances(
  logits_BV: Float[Array, 'B V'], sampling: Sampling, seen_BV: Bool[Array, 'B V'] | None = None
) -> Float[Array, 'B V']:
  """The log-probabilities that are drawn from: after penalties, temperature and truncation; certainty where greedy."""
  if sampling.repetition_B is not None and seen_BV is not None:
    logits_BV = penalized(logits_BV, seen_BV, sampling.repetition_B)
  temperature_B1 = _column(sampling.temperature_B, logits_BV)
  greedy_B1 = temperature_B1 < COLD
  cut_BV = jax.nn.log_softmax(truncate(logits_BV / jnp.where(greedy_B1, 1.0, temperature_B1), sampling), axis=-1)
  best_BV = jnp.arange(logits_BV.shape[-1]) == likeliest(logits_BV)[:, None]
  return jnp.where(greedy_B1, jnp.where(best_BV, 0.0, -jnp.inf), cut_BV)


def log_model(logits_BV: Float[Array, 'B V'], sampling: Sampling) -> Float[Array, 'B V']:
  """The model's own log-probabilities at the temperature (1 where greedy): what training compares with."""
  temperature_B1 = _column(sampling.temperature_B, logits_BV)
  return jax.nn.log_softmax(logits_BV / jnp.where(temperature_B1 < COLD, 1.0, temperature_B1), axis=-1)


def pick(x_BV: Float[Array, '*B V'], token_B: Int[Array, '*B']) -> Float[Array, '*B']:
  """The entry of each row's token."""
  return jnp.take_along_axis(x_BV, token_B[..., None], axis=-1)[..., 0]


def draw(
  logits_BV: Float[Array, 'B V'], sampling: Sampling, keys_B: Array, seen_BV: Bool[Array, 'B V'] | None = None
) -> tuple[Int[Array, ' B'], Float[Array, ' B'], Float[Array, ' B']]:
  """`(token_B, logp_B, sampled_logp_B)`: one token a row, drawn with the row's own key."""
  cut_BV = log_chances(logits_BV, sampling, seen_BV)
  token_B = drawn(cut_BV, keys_B)
  return token_B, pick(log_model(logits_BV, sampling), token_B), pick(cut_BV, token_B)


def drawn(log_chances_BV: Float[Array, 'B V'], keys_B: Array) -> Int[Array, ' B']:
  """A token a row of these log-probabilities, which need not add up to one: that of `jax.random.categorical`."""
  noise = lambda key, x_V: jax.random.gumbel(key, x_V.shape, x_V.dtype)
  return likeliest(jax.vmap(noise)(keys_B, log_chances_BV) + log_chances_BV)


def likeliest(x_BV: Float[Array, 'B V']) -> Int[Array, ' B']:
  """Where each row is largest, the first of equals. CPUs do the two passes many entries at a time, an argmax one."""
  order_V = jnp.arange(x_BV.shape[-1], dtype=jnp.int32)
  first_B = jnp.min(jnp.where(x_BV == x_BV.max(axis=-1, keepdims=True), order_V, len(order_V)), axis=-1)
  return jnp.minimum(first_B, len(order_V) - 1)
