"""Generation: prefill a ragged batch of prompts, then decode it token by token with a key/value cache.

B rows, P prompt length (padded), N new tokens, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxlm import models
from jaxlm.errors import InputError
from jaxlm.models import ModelConfig, Run

PROMPT_MULTIPLE = 64  # prompts are padded to a multiple of this, so that few lengths mean few compilations


@struct.dataclass
class Sampling:
  """How the next token is drawn, one value a row. None leaves the step out; temperature 0 is greedy."""

  temperature_B: Any = 1.0
  top_k_B: Any = None  # only the k likeliest tokens
  top_p_B: Any = None  # only the likeliest tokens that together reach this probability
  min_p_B: Any = None  # only tokens of at least this share of the likeliest one's probability
  repetition_B: Any = None  # logits of tokens seen before are divided by it, or multiplied if negative
  seed_B: Any = None  # a row's own randomness, whatever batch it is in


@struct.dataclass
class Rollout:
  """What was generated. Entries at or past `lengths_B` are padding."""

  tokens_BN: Int[Array, 'B N']
  lengths_B: Int[Array, ' B']  # new tokens of each row, the stop id included
  logp_BN: Float[Array, 'B N']  # at the temperature, before truncation: what training compares with
  sampled_logp_BN: Float[Array, 'B N']  # after truncation: what was really drawn from
  stopped_B: Any  # whether the row ended by a stop id rather than for want of room


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


def draw(
  logits_BV: Float[Array, 'B V'], sampling: Sampling, keys_B: Array, bent_BV: Float[Array, 'B V'] | None = None
) -> tuple[Int[Array, ' B'], Float[Array, ' B'], Float[Array, ' B']]:
  """`(token_B, logp_B, sampled_logp_B)`: one token a row, drawn with the row's own key.

  `bent_BV` are the logits after penalties: what is drawn from, where `logp_B` is of the model's own.
  """
  bent_BV = logits_BV if bent_BV is None else bent_BV
  temperature_B1 = _column(sampling.temperature_B, logits_BV)
  greedy_B1 = temperature_B1 <= 0
  temperature_B1 = jnp.where(greedy_B1, 1.0, temperature_B1)
  cut_BV = truncate(bent_BV / temperature_B1, sampling)
  drawn_B = jax.vmap(jax.random.categorical)(keys_B, cut_BV)
  token_B = jnp.where(greedy_B1[:, 0], jnp.argmax(bent_BV, axis=-1), drawn_B).astype(jnp.int32)
  pick = lambda x_BV: jnp.take_along_axis(jax.nn.log_softmax(x_BV, axis=-1), token_B[:, None], axis=-1)[:, 0]
  return token_B, pick(logits_BV / temperature_B1), jnp.where(greedy_B1[:, 0], 0.0, pick(cut_BV))


def prefill(
  cfg: ModelConfig,
  params: Any,
  prompts_BP: Int[Array, 'B P'],
  lengths_B: Int[Array, ' B'],
  *,
  slots: int,
  run: Run = Run(),
) -> tuple[Float[Array, 'B V'], Any]:
  """Logits after each row's last prompt token, and a cache of `slots` positions; prompts are padded on the right."""
  cache = models.init_cache(cfg, prompts_BP.shape[0], slots, run.dtype)
  order_1P = jnp.arange(prompts_BP.shape[1], dtype=jnp.int32)[None]
  positions_BP = jnp.where(order_1P < lengths_B[:, None], order_1P, -1)
  out = models.hidden(cfg, params, prompts_BP, run=run, positions_BT=positions_BP, cache=cache, first=True)
  last_B1D = jnp.take_along_axis(out.x_BTD, (lengths_B - 1)[:, None, None], axis=1)
  return models.unembed(cfg, params, last_B1D)[:, 0], out.cache


def decode(
  cfg: ModelConfig,
  params: Any,
  token_B: Int[Array, ' B'],
  position_B: Int[Array, ' B'],
  cache: Any,
  *,
  run: Run = Run(),
) -> tuple[Float[Array, 'B V'], Any]:
  """Logits after one more token in each row, at its own position, and the cache with it."""
  out = models.hidden(cfg, params, token_B[:, None], run=run, positions_BT=position_B[:, None], cache=cache)
  return models.unembed(cfg, params, out.x_BTD)[:, 0], out.cache


@struct.dataclass
class Decoding:
  """A batch in the middle of being continued; `advance` goes on with it."""

  logits_BV: Array  # for the token that comes next
  cache: Any
  seen_BV: Any  # tokens of prompt and continuation, where a repetition penalty needs them
  n: Array  # tokens made so far
  lengths_B: Array  # of the prompts
  keys_B: Array
  out: Rollout


def unstacked(cfg: ModelConfig, params: Any) -> Any:
  """The parameters with their layers as a tuple, as decoding reads them: half the time of a scanned step."""
  if isinstance(params['layers'], tuple):
    return params
  return {**params, 'layers': models.unstack(params['layers'], cfg.n_layers)}


def begin(
  cfg: ModelConfig,
  params: Any,
  prompts: Sequence[Sequence[int]],
  key: Array,
  *,
  max_new_tokens: int,
  sampling: Sampling = Sampling(),
  run: Run = Run(),
) -> Decoding:
  """The prompts (non-empty token ids, of any lengths) read, with room for `max_new_tokens` more.

  Raises InputError for an empty prompt, or when a model of learned positions would run past its last.
  """
  lengths = np.array([len(p) for p in prompts], np.int32)
  if not len(lengths) or not lengths.min():
    raise InputError('every prompt needs at least one token (the BOS)')
  if cfg.positions == 'learned' and lengths.max() + max_new_tokens > cfg.max_seq_len:
    raise InputError(f"{lengths.max()} + {max_new_tokens} tokens exceed the model's {cfg.max_seq_len} positions")
  width = -(-int(lengths.max()) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
  if cfg.positions == 'learned':
    width = min(width, cfg.max_seq_len)
  padded = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(padded, prompts, strict=True):
    row[: len(prompt)] = prompt
  return _begin(cfg, run, max_new_tokens, params, jnp.asarray(padded), jnp.asarray(lengths), sampling, key)


def generate(
  cfg: ModelConfig,
  params: Any,
  prompts: Sequence[Sequence[int]],
  key: Array,
  *,
  max_new_tokens: int,
  sampling: Sampling = Sampling(),
  stop_ids: Sequence[int] = (),
  run: Run = Run(),
) -> Rollout:
  """Continues every prompt until a stop id or `max_new_tokens`.

  A row's tokens depend on its prompt, its place in the batch (or its seed) and `key`, not on the other rows' prompts.
  Raises InputError as `begin` does.
  """
  state = begin(cfg, params, prompts, key, max_new_tokens=max_new_tokens, sampling=sampling, run=run)
  stop = jnp.asarray(list(stop_ids), jnp.int32)
  return advance(cfg, run, max_new_tokens, params, state, sampling, stop).out


@partial(jax.jit, static_argnums=(0, 1, 2))
def _begin(
  cfg: ModelConfig, run: Run, new: int, params: Any, prompts_BP: Array, lengths_B: Array, sampling: Any, key: Any
) -> Decoding:
  B, P = prompts_BP.shape
  logits_BV, cache = prefill(cfg, unstacked(cfg, params), prompts_BP, lengths_B, slots=P + new, run=run)
  if sampling.seed_B is None:
    keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(B))
  else:
    keys_B = jax.vmap(jax.random.key)(jnp.broadcast_to(sampling.seed_B, B))
  seen_BV = None
  if sampling.repetition_B is not None:
    real_BP = jnp.arange(P)[None] < lengths_B[:, None]
    rows_B1 = jnp.arange(B)[:, None]
    seen_BV = jnp.zeros((B, cfg.vocab_size), bool).at[rows_B1, prompts_BP].max(real_BP)
  zeros_BN = jnp.zeros((B, new))
  tokens_BN, none_B = jnp.zeros((B, new), jnp.int32), jnp.zeros(B, jnp.int32)
  out = Rollout(tokens_BN, none_B, zeros_BN, zeros_BN, jnp.zeros(B, bool))
  return Decoding(logits_BV, cache, seen_BV, jnp.int32(0), lengths_B, keys_B, out)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def advance(
  cfg: ModelConfig, run: Run, steps: int, params: Any, state: Decoding, sampling: Sampling, stop: Int[Array, ' s']
) -> Decoding:
  """Up to `steps` more tokens in each row that has not stopped, as long as there is room; `state` is used up."""
  params = unstacked(cfg, params)
  last = jnp.minimum(state.n + steps, state.out.tokens_BN.shape[1])

  def body(state: Decoding) -> Decoding:
    n, out, seen_BV = state.n, state.out, state.seen_BV
    live_B, keys_B = ~out.stopped_B, jax.vmap(partial(jax.random.fold_in, data=n))(state.keys_B)
    bent_BV = None if seen_BV is None else penalized(state.logits_BV, seen_BV, sampling.repetition_B)
    token_B, *logps = draw(state.logits_BV, sampling, keys_B, bent_BV)
    put = lambda x_BN, x_B: x_BN.at[:, n].set(jnp.where(live_B, x_B, 0))
    if seen_BV is not None:
      seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    out = Rollout(
      put(out.tokens_BN, token_B),
      out.lengths_B + live_B.astype(jnp.int32),
      put(out.logp_BN, logps[0]),
      put(out.sampled_logp_BN, logps[1]),
      out.stopped_B | jnp.isin(token_B, stop),
    )
    logits_BV, cache = decode(cfg, params, token_B, state.lengths_B + n, state.cache, run=run)
    return Decoding(logits_BV, cache, seen_BV, n + 1, state.lengths_B, state.keys_B, out)

  return jax.lax.while_loop(lambda state: (state.n < last) & ~jnp.all(state.out.stopped_B), body, state)
