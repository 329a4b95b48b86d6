"""Speculative decoding: several tokens are drafted cheaply, and the model checks them all in one pass. Lossless.

B rows, S positions, V vocabulary, k drafted tokens, J = k + 1 tokens that a pass reads.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from jaxlm import draws, models
from jaxlm.draws import Sampling
from jaxlm.models import ModelConfig, Run


@struct.dataclass
class Lookup:
  """Drafts what followed the newest tokens where they stood before (prompt lookup, Saxena 2023): no second model."""

  length: int = struct.field(pytree_node=False, default=6)  # tokens drafted at a time
  ngram: int = struct.field(pytree_node=False, default=3)  # the longest run of newest tokens that is looked for


@struct.dataclass
class Draft:
  """Drafts by a smaller model of the same vocabulary, under the same sampling."""

  cfg: ModelConfig = struct.field(pytree_node=False)
  params: Any
  length: int = struct.field(pytree_node=False, default=4)


def look_up(text_BS: Int[Array, 'B S'], last_B: Int[Array, ' B'], draft: Lookup) -> Int[Array, 'B k']:
  """What followed the latest of the longest earlier runs that end like `text_BS` does at `last_B`.

  Where the end is reached it goes round: a text that repeats itself is drafted to repeat itself. Where nothing is found
  it is any tokens of the text.
  """
  S = text_BS.shape[1]
  at_S, last_B1 = jnp.arange(S), last_B[:, None]
  alike_BS, run_BS = at_S < last_B1, jnp.zeros(text_BS.shape, jnp.int32)
  for back in range(draft.ngram):
    newest_B1 = jnp.take_along_axis(text_BS, jnp.maximum(last_B1 - back, 0), axis=1)
    alike_BS &= (jnp.roll(text_BS, back, axis=1) == newest_B1) & (at_S >= back)
    run_BS += alike_BS.astype(jnp.int32)
  best_B1 = jnp.argmax(run_BS * S + jnp.minimum(at_S, last_B1 - 1), axis=1)[:, None]
  ahead_Bk = jnp.arange(draft.length) % jnp.maximum(last_B1 - best_B1, 1)
  return jnp.take_along_axis(text_BS, jnp.minimum(best_B1 + 1 + ahead_Bk, S - 1), axis=1)


def draw_ahead(
  draft: Draft,
  pair_B2: Int[Array, 'B 2'],
  position_B: Int[Array, ' B'],
  cache: Any,
  sampling: Sampling,
  keys_B: Array,
  seen_BV: Any,
  run: Run,
) -> tuple[Int[Array, 'B k'], Float[Array, 'B k V'], Any]:
  """`(tokens, the log-probabilities they were drawn from, cache)` of the draft model.

  `pair_B2` are the two newest tokens, the last at `position_B`: of the first the cache may not know yet.
  """
  rows_B = jnp.arange(len(pair_B2))

  def one(carry: Any, i: Any) -> Any:
    tokens_Bt, position_Bt, cache, seen_BV = carry
    out = models.hidden(draft.cfg, draft.params, tokens_Bt, run=run, positions_BT=position_Bt, cache=cache)
    logits_BV = models.unembed(draft.cfg, draft.params, out.x_BTD[:, -1:])[:, 0]
    chances_BV = draws.log_chances(logits_BV, sampling, seen_BV)
    token_B = draws.drawn(chances_BV, jax.vmap(partial(jax.random.fold_in, data=i))(keys_B))
    seen_BV = None if seen_BV is None else seen_BV.at[rows_B, token_B].set(True)
    return (token_B[:, None], position_Bt[:, -1:] + 1, out.cache, seen_BV), (token_B, chances_BV)

  position_B2 = jnp.stack([position_B - 1, position_B], axis=1)
  carry, first = one((pair_B2, position_B2, cache, seen_BV), 0)
  carry, rest = jax.lax.scan(one, carry, jnp.arange(1, draft.length))
  token_Bk, chances_BkV = jax.tree.map(
    lambda a, b: jnp.moveaxis(jnp.concatenate([a[None], b]), 0, 1), tuple(first), tuple(rest)
  )
  return token_Bk, chances_BkV, carry[2]


def accept(
  target_BJV: Float[Array, 'B J V'],
  drafted_Bk: Int[Array, 'B k'],
  draft_BkV: Float[Array, 'B k V'],
  keys_B: Array,
) -> tuple[Int[Array, 'B J'], Int[Array, ' B']]:
  """`(tokens_BJ, count_B)`: the drafted tokens that stand, and one more; entries from `count_B` on mean nothing.

  With log-probabilities p of the model and q of the draft, a token x stands with probability min(1, p(x) / q(x)); in
  place of the first that does not, one is drawn from max(p - q, 0). The tokens are then distributed as p, whatever q is
  (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318).
  """
  k = drafted_Bk.shape[1]
  if not k:
    return draws.drawn(target_BJV[:, 0], keys_B)[:, None], jnp.ones(len(keys_B), jnp.int32)
  luck_Bk = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (k,)))(keys_B)
  p_Bk, q_Bk = (draws.pick(x_BkV, drafted_Bk) for x_BkV in (target_BJV[:, :k], draft_BkV))
  stands_Bk = jnp.log(luck_Bk) < p_Bk - q_Bk
  n_B = jnp.sum(jnp.cumprod(stands_Bk.astype(jnp.int32), axis=1), axis=1)
  at = lambda x_BJV: jnp.take_along_axis(x_BJV, n_B[:, None, None], axis=1)[:, 0]
  p_BV = at(target_BJV)
  q_BV = at(jnp.concatenate([draft_BkV, jnp.full_like(target_BJV[:, :1], -jnp.inf)], axis=1))
  rest_BV = jnp.maximum(jnp.exp(p_BV) - jnp.exp(q_BV), 0.0)
  rest_BV = jnp.where((n_B < k)[:, None] & (rest_BV.sum(axis=-1, keepdims=True) > 0), jnp.log(rest_BV), p_BV)
  more_B = draws.drawn(rest_BV, keys_B)
  tokens_BJ = jnp.concatenate([drafted_Bk, drafted_Bk[:, :1]], axis=1)
  return tokens_BJ.at[jnp.arange(len(n_B)), n_B].set(more_B), n_B + 1
