"""The algorithms of `jaxlm rl` as data: how scores become advantages, and how a loss weighs the tokens.

M answers, M = P * G for P prompts with G answers each, T sequence.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlm.errors import InputError
from jaxlm.losses import policy
from jaxlm.masked import Sum
from jaxlm.rl import advantages, own


class Algorithm(NamedTuple):
  """One of them; `ALGORITHMS` has those that are known by name.

  An advantage of one's own is a function from scores [P, G] to [P, G]; a loss of one's own takes what `policy.ppo`
  does and gives a Sum (docs/new-algorithm.md).
  """

  advantage: Literal['gae', 'group', 'centered', 'leave_one_out', 'whitened'] | Callable[[Any], Any]
  loss: Literal['ppo', 'cispo'] | Callable[..., Sum] = 'ppo'
  ratio: policy.Ratio = 'token'
  per: Literal['token', 'sequence', 'longest'] = 'token'  # longest: a constant, the tokens that an answer may have
  clip_low: float = 0.2
  clip_high: float = 0.2
  kl: Literal['reward', 'loss'] = 'loss'  # where kl_coef has its place
  mixed: bool = False  # groups whose answers all have one score are left out of the mean
  overlong: bool = False  # answers near the limit lose score, and truncated ones the most

  @property
  def grouped(self) -> bool:
    """Whether an answer is compared with others to the same prompt."""
    return callable(self.advantage) or self.advantage in ('group', 'centered', 'leave_one_out')

  @property
  def valued(self) -> bool:
    """Whether it learns a value function."""
    return self.advantage == 'gae'


ALGORITHMS = {
  'ppo': Algorithm('gae', kl='reward'),
  'grpo': Algorithm('group', per='sequence'),
  'dr_grpo': Algorithm('centered', per='longest'),
  'dapo': Algorithm('group', clip_high=0.28, mixed=True, overlong=True),
  'gspo': Algorithm('group', ratio='sequence', per='sequence', clip_low=3e-4, clip_high=4e-4),
  'cispo': Algorithm('group', loss='cispo', clip_low=1.0, clip_high=4.0),
  'rloo': Algorithm('leave_one_out', ratio='product', per='sequence', kl='reward'),
  'reinforce_pp': Algorithm('whitened', kl='reward'),
}


def by_name(name: str) -> Algorithm:
  """One of `ALGORITHMS`, or `FILE.py:NAME`, one of a user's own. Raises InputError for what is neither."""
  if name in ALGORITHMS:
    return ALGORITHMS[name]
  if '.py:' not in name:
    raise InputError(f'rl.algo={name}: there are {", ".join(ALGORITHMS)}, and FILE.py:NAME')
  found = own.named(name, f'rl.algo={name}')
  if not isinstance(found, Algorithm):
    raise InputError(f'rl.algo={name}: is a {type(found).__name__}, and no jaxlm.rl.algorithms.Algorithm')
  return found


def estimate(
  how: Algorithm,
  scores_PG: Float[Array, 'P G'],
  mask_MT: Float[Array, 'M T'],
  kl_MT: Float[Array, 'M T'],
  values_MT: Float[Array, 'M T'] | None,
  stopped_M: Bool[Array, 'M'],
  *,
  kl_coef: float,
  gamma: float,
  lam: float,
) -> dict[str, Any]:
  """`advantages` [M, T] of answers, and of algorithms with a value function `returns` [M, T].

  `kl_MT` (k1: log-ratios to the reference) is taken off the scores where the algorithm has it in the reward. Of a
  truncated answer the value after its last token is that of the token itself.
  """
  if how.kl == 'loss':
    kl_coef = 0.0
  scores_M = scores_PG.reshape(-1)
  if how.advantage == 'whitened':
    return {'advantages': advantages.reinforce_plus_plus(scores_M, kl_MT, mask_MT, kl_coef=kl_coef, gamma=gamma)}
  if how.advantage == 'gae':
    assert values_MT is not None
    rewards_MT = advantages.kl_rewards(scores_M, kl_MT, mask_MT, kl_coef=kl_coef)
    end_M = jnp.where(stopped_M, 0.0, _last(values_MT, mask_MT))
    found, returns = advantages.gae(rewards_MT, values_MT, mask_MT, gamma=gamma, lam=lam, bootstrap_B=end_M)
    return {'advantages': advantages.whiten(found, mask_MT), 'returns': returns}
  less_M = scores_M - kl_coef * jnp.sum(jnp.where(mask_MT > 0, kl_MT, 0.0), axis=-1)
  less_PG = less_M.reshape(scores_PG.shape)
  if callable(how.advantage):
    adv_PG = how.advantage(less_PG)
  elif how.advantage == 'leave_one_out':
    adv_PG = advantages.leave_one_out(less_PG)
  else:
    adv_PG = advantages.group_advantages(less_PG, normalize=how.advantage == 'group')
  return {'advantages': jnp.broadcast_to(adv_PG.reshape(-1, 1), mask_MT.shape)}


def _last(x_MT: Array, mask_MT: Array) -> Array:
  """Of each row the entry where the mask is on last."""
  last_M = jnp.argmax(jnp.where(mask_MT > 0, jnp.arange(mask_MT.shape[1]), -1), axis=-1)
  return jnp.take_along_axis(x_MT, last_M[:, None], axis=-1)[:, 0]
