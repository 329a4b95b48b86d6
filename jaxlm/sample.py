"""Generation: prefill a ragged batch of prompts, then decode it token by token with a key/value cache.

B rows, P prompt length (padded), N new tokens, V vocabulary, J tokens that one pass reads, k = J - 1 of them drafted.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from jaxlm import draws, hosts, models, sharding, speculate
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.draws import Sampling as Sampling
from jaxlm.errors import InputError
from jaxlm.models import ModelConfig, Run
from jaxlm.speculate import Draft as Draft
from jaxlm.speculate import Lookup as Lookup

PIECE = 16  # tokens between two looks for a stop string
PROMPT_MULTIPLE = 64  # prompts are padded to a multiple of this, so that few lengths mean few compilations


@struct.dataclass
class Rollout:
  """What was generated. Entries at or past `lengths_B` are padding."""

  tokens_BN: Int[Array, 'B N']
  lengths_B: Int[Array, ' B']  # new tokens of each row, the stop id included
  logp_BN: Float[Array, 'B N']  # at the temperature, before truncation: what training compares with
  sampled_logp_BN: Float[Array, 'B N']  # after truncation: what was really drawn from
  stopped_B: Any  # whether the row ended by a stop id or string rather than for want of room
  passes_B: Any  # of the model after the prompt's: fewer than new tokens where drafts were right


def prefill(
  cfg: ModelConfig,
  params: Any,
  prompts_BP: Int[Array, 'B P'],
  lengths_B: Int[Array, ' B'],
  *,
  slots: int,
  ahead: int = 1,
  run: Run = Run(),
) -> tuple[Float[Array, 'B V'], Any]:
  """Logits after each row's last prompt token, and a cache of `slots` positions; prompts are padded on the right.

  `ahead` is the most tokens that `decode` will read at once.
  """
  laid = lambda x, *names: sharding.constrain(x, ('batch', *names), run.rules)
  prompts_BP, lengths_B = laid(prompts_BP, None), laid(lengths_B)
  cache = models.init_cache(cfg, prompts_BP.shape[0], slots, run.dtype, ahead=ahead)
  cache = jax.tree.map(lambda x_BKSN: laid(x_BKSN, 'act_kv_heads', None, None), cache)
  order_1P = jnp.arange(prompts_BP.shape[1], dtype=jnp.int32)[None]
  positions_BP = jnp.where(order_1P < lengths_B[:, None], order_1P, -1)
  out = models.hidden(cfg, params, prompts_BP, run=run, positions_BT=positions_BP, cache=cache, first=True)
  last_B1D = jnp.take_along_axis(out.x_BTD, (lengths_B - 1)[:, None, None], axis=1)
  return models.unembed(cfg, params, last_B1D)[:, 0], out.cache


def decode(
  cfg: ModelConfig,
  params: Any,
  tokens_BJ: Int[Array, 'B J'],
  position_B: Int[Array, ' B'],
  cache: Any,
  *,
  run: Run = Run(),
) -> tuple[Float[Array, 'B J V'], Any]:
  """Logits after each of J more tokens in each row, the first at its own position, and the cache with them."""
  positions_BJ = position_B[:, None] + jnp.arange(tokens_BJ.shape[1])
  out = models.hidden(cfg, params, tokens_BJ, run=run, positions_BT=positions_BJ, cache=cache)
  return models.unembed(cfg, params, out.x_BTD), out.cache


@struct.dataclass
class Decoding:
  """A batch in the middle of being continued; `advance` goes on with it."""

  token_B: Array  # the last one made: the cache does not know it yet
  cache: Any
  lengths_B: Array  # of the prompts
  keys_B: Array
  out: Rollout
  seen_BV: Any = None  # tokens of prompt and continuation, where a repetition penalty needs them
  text_BS: Any = None  # prompt and continuation, where drafts are made of them
  draft_cache: Any = None


def unstacked(cfg: ModelConfig, params: Any) -> Any:
  """The parameters with their layers as a tuple, as decoding reads them: half the time of a scanned step."""
  if isinstance(params['layers'], tuple):
    return params
  return {**params, 'layers': models.unstack(params['layers'], cfg.n_layers)}


def readied(cfg: ModelConfig, params: Any, dtype: Any = jnp.float32) -> Any:
  """`unstacked` and cast for a `Run` of that dtype in one program, for many calls to read.

  On one CPU each matrix is turned too (see `models.turned`).
  """
  if isinstance(params['layers'], tuple):
    return params
  devices = {d for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) for d in leaf.devices()}
  return _readied(cfg, Run(dtype), on_one_cpu(devices or jax.devices()[:1]), params)


def on_one_cpu(devices: Iterable[jax.Device]) -> bool:
  """Whether these are one device, and that a CPU."""
  return [d.platform for d in devices] == ['cpu']


@partial(jax.jit, static_argnums=(0, 1, 2))
def _readied(cfg: ModelConfig, run: Run, turn: bool, params: Any) -> Any:
  apart = models.cast(unstacked(cfg, params), run)
  return models.turned(cfg, apart) if turn else apart


def begin(
  cfg: ModelConfig,
  params: Any,
  prompts: Sequence[Sequence[int]],
  key: Array,
  *,
  max_new_tokens: int,
  sampling: Sampling = Sampling(),
  stop_ids: Sequence[int] = (),
  run: Run = Run(),
  draft: Lookup | Draft | None = None,
  slots: int | None = None,
) -> Decoding:
  """The prompts (non-empty token ids, of any lengths) read and one token made, with room for `max_new_tokens`.

  `slots`: positions of the cache, where it is to have more than these prompts need (see `replaced`). Raises InputError
  for an empty prompt, an id past the vocabulary, a draft model of another vocabulary, or when a model of learned
  positions would run past its last.
  """
  prompts, of_B = (prompts, None) if draft or run.rules is not None else _distinct(prompts)
  lengths = np.array([len(p) for p in prompts], np.int32)
  if not len(lengths) or not lengths.min():
    raise InputError('every prompt needs at least one token (the BOS)')
  if (most := max(map(max, prompts))) >= cfg.vocab_size:
    raise InputError(f'the prompts have the id {most}, and the model {cfg.vocab_size:,} tokens')
  readers = [cfg, draft.cfg] if isinstance(draft, Draft) else [cfg]
  if readers[-1].vocab_size != cfg.vocab_size:
    raise InputError(f'the draft model has {readers[-1].vocab_size:,} tokens, and the model {cfg.vocab_size:,}')
  ends = [c.max_seq_len for c in readers if c.positions == 'learned']
  if lengths.max() + max_new_tokens > min(ends, default=np.inf):
    raise InputError(f"{lengths.max()} + {max_new_tokens} tokens exceed the model's {min(ends)} positions")
  width = min(-(-int(lengths.max()) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE, *ends, 2**31)
  padded = np.zeros((len(prompts), width), np.int32)
  for row, prompt in zip(padded, prompts, strict=True):
    row[: len(prompt)] = prompt
  arrays = jnp.asarray(padded), jnp.asarray(lengths), jnp.asarray(list(stop_ids), jnp.int32)
  room = max_new_tokens, max(slots or 0, width + max_new_tokens)
  return begun(cfg, run, room, params, *arrays, sampling, key, draft, of_B)


def _distinct(prompts: Sequence[Sequence[int]]) -> tuple[Sequence[Sequence[int]], np.ndarray | None]:
  """The prompts that differ, and which of them each row has; None where reading them alone would not be less.

  The last is repeated up to a power of two: few counts mean few compilations.
  """
  places: dict[tuple[int, ...], int] = {}
  of_B = np.array([places.setdefault(tuple(prompt), len(places)) for prompt in prompts], np.int32)
  count = 1 << max(0, len(places) - 1).bit_length()
  if count >= len(prompts):
    return prompts, None
  found = list(places)
  return found + [found[-1]] * (count - len(found)), of_B


@partial(jax.jit, donate_argnums=0)
def replaced(state: Decoding, rows_k: Int[Array, ' k'], new: Decoding) -> Decoding:
  """The batch with the rows of another one, which has as many slots, in the places `rows_k`; `state` is used up.

  Rows whose place is no row of the batch are left out.
  """
  return jax.tree.map(lambda x, y: x.at[rows_k].set(y, mode='drop'), state, new)


def generate(
  cfg: ModelConfig,
  params: Any,
  prompts: Sequence[Sequence[int]],
  key: Array,
  *,
  max_new_tokens: int,
  sampling: Sampling = Sampling(),
  stop_ids: Sequence[int] = (),
  stop: Sequence[str] = (),
  tokenizer: Tokenizer | None = None,
  run: Run = Run(),
  draft: Lookup | Draft | None = None,
) -> Rollout:
  """Continues every prompt until a stop id, a `stop` string (which needs the tokenizer) or `max_new_tokens`.

  A row's tokens depend on its prompt, its place in the batch (or its seed) and `key`, not on the other rows' prompts.
  With a `draft` (see `jaxlm.speculate`) greedy tokens are the same, and sampled ones are distributed the same.
  Raises InputError as `begin` does.
  """
  if stop and tokenizer is None:
    raise InputError('stop strings need the tokenizer')
  control = [tokenizer.control_id(text) for text in stop] if tokenizer is not None else []
  ids = [*stop_ids, *(i for i in control if i is not None)]
  params = readied(cfg, params, run.dtype)
  how: dict[str, Any] = {'max_new_tokens': max_new_tokens, 'sampling': sampling, 'run': run, 'draft': draft}
  state = begin(cfg, params, prompts, key, stop_ids=ids, **how)
  steps, checked = PIECE if stop else max_new_tokens, 0
  while True:
    state = advance(cfg, run, steps, params, state, sampling, jnp.asarray(ids, jnp.int32), draft)
    if tokenizer is not None and stop:
      state = state.replace(out=_stopped_at(state.out, stop, tokenizer, checked))
    lengths_B = hosts.read(state.out.lengths_B)
    done_B = hosts.read(state.out.stopped_B) | (lengths_B >= max_new_tokens)
    if done_B.all():
      return state.out
    checked = int(lengths_B[~done_B].min())


def _stopped_at(out: Rollout, stop: Sequence[str], tokenizer: Tokenizer, checked: int) -> Rollout:
  """The rollout with every row ended by the token that completes a stop string; none does before `checked` tokens."""
  tokens_BN, lengths_B = hosts.read(out.tokens_BN), np.array(hosts.read(out.lengths_B))
  found_B = np.zeros(len(lengths_B), bool)
  for row, tokens_N in enumerate(tokens_BN):
    has = lambda n, tokens_N=tokens_N: any(text in tokenizer.decode(tokens_N[:n].tolist()) for text in stop)
    if has(lengths_B[row]):
      found_B[row] = True
      lengths_B[row] = next(n for n in range(min(checked, lengths_B[row]), lengths_B[row] + 1) if has(n))
  kept_BN = jnp.asarray(np.arange(tokens_BN.shape[1]) < lengths_B[:, None])
  cut = lambda x_BN: jnp.where(kept_BN, x_BN, jnp.zeros_like(x_BN))
  rows = (cut(out.tokens_BN), jnp.asarray(lengths_B), cut(out.logp_BN), cut(out.sampled_logp_BN))
  return Rollout(*rows, out.stopped_B | jnp.asarray(found_B), out.passes_B)


@partial(jax.jit, static_argnums=(0, 1, 2))
def begun(
  cfg: ModelConfig,
  run: Run,
  room: tuple[int, int],
  params: Any,
  prompts_BP: Array,
  lengths_B: Array,
  stop: Array,
  sampling: Any,
  key: Any,
  draft: Any,
  of_B: Any,
) -> Decoding:
  """`begin` for arrays: `room` is how many new tokens there may be, and the positions of the cache."""
  new, slots = room
  ahead = draft.length if draft else 0
  how = {'slots': slots, 'ahead': ahead + 1, 'run': run}
  logits_BV, cache = prefill(cfg, unstacked(cfg, params), prompts_BP, lengths_B, **how)
  if of_B is not None:  # rows of one prompt, which was read once
    prompts_BP, lengths_B, logits_BV, cache = jax.tree.map(lambda x: x[of_B], (prompts_BP, lengths_B, logits_BV, cache))
  B, P = prompts_BP.shape
  draft_cache, text_BS, seen_BV = None, None, None
  if isinstance(draft, Draft):
    _, draft_cache = prefill(draft.cfg, unstacked(draft.cfg, draft.params), prompts_BP, lengths_B, **how)
  if sampling.seed_B is None:
    keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(B))
  else:
    keys_B = jax.vmap(jax.random.key)(jnp.broadcast_to(sampling.seed_B, B))
  rows_B = jnp.arange(B)
  if sampling.repetition_B is not None:
    real_BP = jnp.arange(P)[None] < lengths_B[:, None]
    seen_BV = jnp.zeros((B, cfg.vocab_size), bool).at[rows_B[:, None], prompts_BP].max(real_BP)
  token_B, *logps = draws.draw(logits_BV, sampling, jax.vmap(partial(jax.random.fold_in, data=0))(keys_B), seen_BV)
  if seen_BV is not None:
    seen_BV = seen_BV.at[rows_B, token_B].set(True)
  if draft is not None:
    text_BS = jnp.zeros((B, slots), jnp.int32).at[:, :P].set(prompts_BP).at[rows_B, lengths_B].set(token_B)
  first = lambda x_B: jnp.zeros((B, new), x_B.dtype).at[:, 0].set(x_B)
  out = Rollout(
    first(token_B), jnp.ones(B, jnp.int32), *map(first, logps), jnp.isin(token_B, stop), jnp.zeros(B, jnp.int32)
  )
  return Decoding(token_B, cache, lengths_B, keys_B, out, seen_BV, text_BS, draft_cache)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def advance(
  cfg: ModelConfig,
  run: Run,
  steps: int,
  params: Any,
  state: Decoding,
  sampling: Sampling,
  stop: Int[Array, ' s'],
  draft: Lookup | Draft | None = None,
) -> Decoding:
  """At least `steps` more tokens in each row that has not stopped, as long as there is room; `state` is used up."""
  params = unstacked(cfg, params)
  if isinstance(draft, Draft):
    draft = draft.replace(params=unstacked(draft.cfg, draft.params))  # ty: ignore
  goal_B = jnp.minimum(state.out.lengths_B + steps, state.out.tokens_BN.shape[1])

  def goes_on(state: Decoding) -> Array:
    return jnp.any(~state.out.stopped_B & (state.out.lengths_B < goal_B))

  return jax.lax.while_loop(goes_on, partial(_pass, cfg, run, params, sampling, stop, draft), state)


def _pass(cfg: ModelConfig, run: Run, params: Any, sampling: Sampling, stop: Array, draft: Any, state: Decoding) -> Any:
  """One pass of the model: over the last token and, after it, what was drafted."""
  out, n_B, rows_B = state.out, state.out.lengths_B, jnp.arange(len(state.token_B))
  N = out.tokens_BN.shape[1]
  live_B, position_B = ~out.stopped_B & (n_B < N), state.lengths_B + n_B - 1
  keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, n_B)
  drafted_Bk, chances_BkV, draft_cache = _drafted(cfg, run, draft, sampling, position_B, keys_B, state)
  fed_BJ = jnp.concatenate([state.token_B[:, None], drafted_Bk], axis=1)
  logits_BJV, cache = decode(cfg, params, fed_BJ, position_B, state.cache, run=run)
  seen_BJV = None
  if state.seen_BV is not None:
    drafted_BkV = jax.nn.one_hot(drafted_Bk, cfg.vocab_size, dtype=bool)
    seen_BJV = jax.lax.associative_scan(
      jnp.logical_or, jnp.concatenate([state.seen_BV[:, None], drafted_BkV], axis=1), axis=1
    )
  over = partial(jax.vmap, in_axes=1, out_axes=1)
  target_BJV = over(lambda logits_BV, seen_BV: draws.log_chances(logits_BV, sampling, seen_BV))(logits_BJV, seen_BJV)
  tokens_BJ, count_B = speculate.accept(target_BJV, drafted_Bk, chances_BkV, keys_B)
  logp_BJ = draws.pick(over(lambda logits_BV: draws.log_model(logits_BV, sampling))(logits_BJV), tokens_BJ)

  order_J = jnp.arange(tokens_BJ.shape[1])
  ends_BJ = jnp.isin(tokens_BJ, stop)
  count_B = jnp.minimum(count_B, jnp.where(ends_BJ.any(axis=1), jnp.argmax(ends_BJ, axis=1) + 1, N))
  count_B = jnp.where(live_B, jnp.minimum(count_B, N - n_B), 0)
  made_BJ = order_J < count_B[:, None]

  def put(x_BS: Array, at_B: Array, x_BJ: Array) -> Array:
    slots_BJ = jnp.where(made_BJ, at_B[:, None] + order_J, x_BS.shape[1])
    return jax.vmap(lambda x_S, slots_J, x_J: x_S.at[slots_J].set(x_J, mode='drop'))(x_BS, slots_BJ, x_BJ)

  out = Rollout(
    put(out.tokens_BN, n_B, tokens_BJ),
    n_B + count_B,
    put(out.logp_BN, n_B, logp_BJ),
    put(out.sampled_logp_BN, n_B, draws.pick(target_BJV, tokens_BJ)),
    out.stopped_B | jnp.any(ends_BJ & made_BJ, axis=1),
    out.passes_B + live_B.astype(jnp.int32),
  )
  newest_B = jnp.take_along_axis(tokens_BJ, jnp.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]
  seen_BV, text_BS = state.seen_BV, state.text_BS
  if seen_BV is not None:
    seen_BV = seen_BV.at[rows_B[:, None], tokens_BJ].max(made_BJ)
  if text_BS is not None:
    text_BS = put(text_BS, state.lengths_B + n_B, tokens_BJ)
  token_B = jnp.where(live_B, newest_B, state.token_B)
  return Decoding(token_B, cache, state.lengths_B, state.keys_B, out, seen_BV, text_BS, draft_cache)


def _drafted(
  cfg: ModelConfig, run: Run, draft: Any, sampling: Sampling, position_B: Array, keys_B: Array, state: Decoding
) -> tuple[Array, Array, Any]:
  """`(tokens_Bk, log-probabilities_BkV, cache)` that a pass is to check; without a draft k is 0."""
  B, V = len(position_B), cfg.vocab_size
  if draft is None:
    return jnp.zeros((B, 0), jnp.int32), jnp.zeros((B, 0, V)), None
  if isinstance(draft, Lookup):
    tokens_Bk = speculate.look_up(state.text_BS, position_B, draft)
    return tokens_Bk, jnp.log(jax.nn.one_hot(tokens_Bk, V)), None
  pair_B2 = jnp.take_along_axis(state.text_BS, position_B[:, None] + jnp.arange(-1, 1), axis=1)
  keys_B = jax.vmap(partial(jax.random.fold_in, data=2))(keys_B)
  return speculate.draw_ahead(draft, pair_B2, position_B, state.draft_cache, sampling, keys_B, state.seen_BV, run)
