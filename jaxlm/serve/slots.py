"""The device's part of serving: a prompt is read in pieces apart, then joins rows that are continued together.

B slots, C tokens of a prompt read at once, S positions of a cache, V vocabulary, w words of 32 bits, t steps, k
alternatives. Shapes never change, so that what a row computes does not depend on the others.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxlm import draws, models, sample, sharding
from jaxlm.models import ModelConfig, Run
from jaxlm.rl import rollout
from jaxlm.sample import Sampling

TOP = 20  # alternatives that are told of a token


@struct.dataclass
class Chosen:
  """What each row was asked for, on the host: one value a row. Dead rows are computed and mean nothing."""

  live_B: Any
  seed_B2: Any  # two words of 32 bits
  index_B: Any  # which of several answers of one seed
  temperature_B: Any
  top_k_B: Any  # V: all
  top_p_B: Any  # 1: all
  min_p_B: Any  # 0: all
  repetition_B: Any  # 1: none
  presence_B: Any  # taken from the logits of tokens that were made
  frequency_B: Any  # the same, for every time
  told_B: Any  # whether alternatives are wanted


@struct.dataclass
class Slots:
  """Rows in the middle of being continued."""

  cache: Any
  token_B: Array  # the last one made: the cache does not know it yet
  position_B: Array  # and its place
  count_B: Array  # tokens made
  seen_BV: Array  # tokens of prompt and answer
  made_BV: Array  # how often each token was made
  bias_BV: Array


@struct.dataclass
class Made:
  """Tokens, and the model's own log-probabilities: at temperature 1, before penalties, bias and masks."""

  token_tB: Array
  logp_tB: Array
  top_tBk: Array
  top_logp_tBk: Array


def resharded(cfg: ModelConfig, params: Any, mesh: Mesh) -> Any:
  """Parameters laid out for decoding, adapters in them too."""
  layout = sharding.state_shardings(sharding.with_names(params, models.abstract(cfg)), mesh, rollout.DECODE)
  return jax.device_put(params, layout)


def _laid(tree: Any, run: Run) -> Any:
  """Rows over the mesh's axes for a batch, heads of a cache over those for heads; what is not divisible is whole."""

  def lay(x: Array) -> Array:
    names = ('act_kv_heads', None, None) if x.ndim == 4 else (None,) * (x.ndim - 1)
    return sharding.constrain(x, ('batch', *names), run.rules)

  return jax.tree.map(lay, tree)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty(cfg: ModelConfig, run: Run, rows: int, slots: int, ahead: int = 1) -> Any:
  """An empty cache for so many rows, of `slots` positions; `ahead` is the most tokens that are read at once."""
  return _laid(models.init_cache(cfg, rows, slots, run.dtype, ahead=ahead), run)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def vacant(cfg: ModelConfig, run: Run, rows: int, slots: int, ahead: int) -> Slots:
  """Slots that nobody has taken; caches are as large as those that prompts are read into with `ahead`."""
  zeros, blank_BV = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, cfg.vocab_size), jnp.float32)
  cache = models.init_cache(cfg, rows, slots, run.dtype, ahead=ahead)
  counts = zeros, zeros, zeros, blank_BV.astype(bool), blank_BV.astype(jnp.int32)
  return _laid(Slots(cache, *counts, blank_BV), run)


@jax.jit
def copied(cache: Any) -> Any:
  """A cache of its own with the same in it: what reads into one uses it up."""
  return jax.tree.map(jnp.copy, cache)


def words(cfg: ModelConfig) -> int:
  """Words of 32 bits that a mask of the vocabulary has."""
  return -(-cfg.vocab_size // 32)


def unpacked(mask_Bw: UInt32[Array, 'B w'], vocab: int) -> Bool[Array, 'B V']:
  """The bits of a mask, the lowest of a word first."""
  bits_Bw32 = (mask_Bw[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
  return bits_Bw32.reshape(len(mask_Bw), -1)[:, :vocab].astype(bool)


def _alternatives(logp_BV: Array, wanted: Array) -> tuple[Array, Array]:
  """The likeliest tokens and their log-probabilities, [B, k], where anybody wants them."""
  k = min(TOP, logp_BV.shape[-1])
  shape = (*logp_BV.shape[:-1], k)
  none = lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
  found = lambda: tuple(jax.lax.top_k(logp_BV, k)[::-1])
  return jax.lax.cond(wanted, found, none)


def _draw(logits_BV: Array, chosen: Chosen, count_B: Array, slots: Slots, mask_Bw: Array) -> Made:
  """One token a row. What only some rows ask for is computed if any does, and leaves the others as they are."""
  V = logits_BV.shape[-1]
  logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
  column = lambda x_B: x_B[:, None]
  shifted_BV = logits_BV + slots.bias_BV - column(chosen.presence_B) * (slots.made_BV > 0)
  shifted_BV = shifted_BV - column(chosen.frequency_B) * slots.made_BV.astype(jnp.float32)
  shifted_BV = draws.penalized(shifted_BV, slots.seen_BV, chosen.repetition_B)
  shifted_BV = jnp.where(unpacked(mask_Bw, V), shifted_BV, -jnp.inf)
  scaled_BV = shifted_BV / column(jnp.where(chosen.temperature_B < draws.COLD, 1.0, chosen.temperature_B))
  truncation: Any = Sampling(1.0, chosen.top_k_B, chosen.top_p_B, chosen.min_p_B)
  asked = jnp.any((chosen.top_k_B < V) | (chosen.top_p_B < 1) | (chosen.min_p_B > 0))
  cut_BV = jax.lax.cond(asked, lambda: draws.truncate(scaled_BV, truncation), lambda: scaled_BV)
  left_BV = jnp.where(cut_BV > -jnp.inf, shifted_BV, -jnp.inf)
  keys_B = jax.vmap(partial(jax.random.wrap_key_data, impl='threefry2x32'))(chosen.seed_B2)
  keys_B = jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.fold_in)(keys_B, chosen.index_B), count_B)
  by_chance = lambda: draws.drawn(draws.log_chances(left_BV, Sampling(chosen.temperature_B)), keys_B)
  warm = jnp.any(chosen.live_B & (chosen.temperature_B >= draws.COLD))
  token_B = jax.lax.cond(warm, by_chance, lambda: draws.likeliest(left_BV))
  top_Bk, top_logp_Bk = _alternatives(logp_BV, jnp.any(chosen.told_B & chosen.live_B))
  return Made(token_B, draws.pick(logp_BV, token_B), top_Bk, top_logp_Bk)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def advance(
  cfg: ModelConfig, run: Run, most: int, params: Any, slots: Slots, chosen: Chosen, mask_Bw: Array, steps: Any
) -> tuple[Slots, Made]:
  """`steps` more tokens in each row, `most` at most, which is t; `slots` are used up, and a mask holds for all steps.

  One program for any number of them: two might differ in how they round.
  """

  def one(t: Array, carry: tuple[Slots, Made]) -> tuple[Slots, Made]:
    slots, all_made = carry
    rows_B, live_B = jnp.arange(len(slots.token_B)), chosen.live_B
    position_B = jnp.where(live_B, slots.position_B, -1)  # what dead rows write is dropped
    logits_B1V, cache = sample.decode(cfg, params, slots.token_B[:, None], position_B, slots.cache, run=run)
    made = _draw(logits_B1V[:, 0], chosen, slots.count_B, slots, mask_Bw)
    token_B, more_B = made.token_tB, live_B.astype(jnp.int32)
    seen_BV = slots.seen_BV.at[rows_B, token_B].max(live_B)
    made_BV = slots.made_BV.at[rows_B, token_B].add(more_B)
    counts = slots.position_B + more_B, slots.count_B + more_B
    slots = _laid(Slots(cache, token_B, *counts, seen_BV, made_BV, slots.bias_BV), run)
    return slots, jax.tree.map(lambda x, y: x.at[t].set(y), all_made, made)

  rows, k = len(slots.token_B), min(TOP, cfg.vocab_size)
  token_tB, top_tBk = jnp.zeros((most, rows), jnp.int32), jnp.zeros((most, rows, k), jnp.int32)
  blank = Made(token_tB, token_tB.astype(jnp.float32), top_tBk, top_tBk.astype(jnp.float32))
  return jax.lax.fori_loop(0, steps, one, (slots, blank))


@struct.dataclass
class Scores:
  """Of C tokens of a prompt, given those before them: log-probabilities, and the likeliest tokens in their place."""

  logp_C: Array
  top_Ck: Array
  top_logp_Ck: Array


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def read(
  cfg: ModelConfig,
  run: Run,
  scored: bool,
  params: Any,
  cache: Any,
  tokens_C: Int[Array, ' C'],
  next_C: Int[Array, ' C'],
  start: Any,
  count: Any,
) -> tuple[Any, Float[Array, '1 V'], Scores | None]:
  """A cache of one row with `count` more tokens of a prompt, the first at position `start`; it is used up.

  Also the logits after the last of them, and where it is `scored` the scores of `next_C`, the tokens that follow each.
  """
  order_C = jnp.arange(len(tokens_C), dtype=jnp.int32)
  positions_1C = jnp.where(order_C < count, start + order_C, -1)[None]
  out = models.hidden(cfg, params, tokens_C[None], run=run, positions_BT=positions_1C, cache=cache)
  last_11D = jax.lax.dynamic_slice_in_dim(out.x_BTD, count - 1, 1, axis=1)
  logits_1V = models.unembed(cfg, params, last_11D)[:, 0]
  scores = None
  if scored:
    logp_CV = jax.nn.log_softmax(models.unembed(cfg, params, out.x_BTD)[0], axis=-1)
    scores = Scores(draws.pick(logp_CV, next_C), *_alternatives(logp_CV, jnp.asarray(True)))
  return _laid(out.cache, run), logits_1V, scores


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def enter(
  run: Run,
  slots: Slots,
  row: Any,
  cache_1: Any,
  logits_1V: Float[Array, '1 V'],
  chosen_1: Chosen,
  seen_V: Bool[Array, ' V'],
  bias_V: Float[Array, ' V'],
  mask_1w: Array,
  length: Any,
) -> tuple[Slots, Made]:
  """The slots with a prompt of `length` tokens that was read in place of a row, and its first token; [1, 1] of it."""
  zero_1 = jnp.zeros(1, jnp.int32)
  new = Slots(
    cache_1, zero_1, zero_1 + length, zero_1, seen_V[None], jnp.zeros_like(seen_V, jnp.int32)[None], bias_V[None]
  )
  made = _draw(logits_1V, chosen_1, zero_1, new, mask_1w)
  token_1 = made.token_tB
  new = new.replace(  # ty: ignore
    token_B=token_1,
    count_B=zero_1 + 1,
    seen_BV=new.seen_BV.at[0, token_1].set(True),
    made_BV=new.made_BV.at[0, token_1].set(1),
  )
  put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), row, axis=0)
  return _laid(jax.tree.map(put, slots, new), run), jax.tree.map(lambda x: x[None], made)
