"""From rewards to advantages: plain arithmetic in float32, differentiable (losses take no gradient into advantages).

A masked position may hold NaN or inf and gets 0. Padding on either side, masked columns of a group, and rows without a
token change nothing; repeating every row or group changes nothing either, repeating answers within a group does. What
is taken over a batch (`whiten`, `reinforce_plus_plus`) is to be given all of it, before it is cut into micro-batches.

B batch, T sequence, P prompts, G answers to each (a group).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm import masked

Mask = Float[Array, 'P G'] | None


def gae(
  rewards_BT: Float[Array, 'B T'],
  values_BT: Float[Array, 'B T'],
  mask_BT: Float[Array, 'B T'],
  *,
  gamma: float,
  lam: float,
  bootstrap_B: Float[Array, 'B'] | float = 0.0,
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
  """`(adv_BT, returns_BT)`: A_t = d_t + gamma lam A_t+1, d_t = r_t + gamma v_t+1 - v_t, returns A + v, 0 where masked.

  GAE (Schulman et al. 2015, arXiv:1506.02438). t + 1 is the next token that is on, so that padding and holes (what a
  tool wrote) are as if they were not there. After a row's last token the value is `bootstrap_B`: 0 for an answer that
  ended, the value of the state it was cut off in for a truncated one. Zero values and lam 1 give discounted sums of
  rewards.
  """
  r_BT, v_BT = masked.kept(rewards_BT, mask_BT), masked.kept(values_BT, mask_BT)
  on_BT = mask_BT > 0

  def back(carry: tuple[Array, Array], now: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
    next_v_B, next_adv_B = carry
    r_B, v_B, on_B = now
    adv_B = r_B + gamma * next_v_B - v_B + gamma * lam * next_adv_B
    kept = jnp.where(on_B, v_B, next_v_B), jnp.where(on_B, adv_B, next_adv_B)
    return kept, jnp.where(on_B, adv_B, 0.0)

  end_B = jnp.broadcast_to(jnp.asarray(bootstrap_B, jnp.float32), r_BT.shape[:1])
  start = end_B, jnp.zeros_like(end_B)
  adv_TB = jax.lax.scan(back, start, (r_BT.T, v_BT.T, on_BT.T), reverse=True)[1]
  return adv_TB.T, adv_TB.T + v_BT


def group_advantages(
  rewards_PG: Float[Array, 'P G'], *, normalize: bool = True, mask_PG: Mask = None
) -> Float[Array, 'P G']:
  """(r - mean) / (std + 1e-4) within each group, std with G - 1 below (GRPO, Shao et al. 2024, arXiv:2402.03300).

  `normalize=False` leaves the division out (Dr. GRPO, arXiv:2503.20783): its expected policy gradient is then (G - 1) /
  G of the exact one, the reward's own part in the mean being taken off. A group of equal rewards has exactly 0.
  """
  r_PG, on_PG, n_P1 = _group(rewards_PG, mask_PG)
  off_PG = jnp.where(on_PG, r_PG - jnp.sum(r_PG, axis=-1, keepdims=True) / jnp.maximum(n_P1, 1.0), 0.0)
  mixed_P1 = mixed_groups(rewards_PG, mask_PG=mask_PG)[:, None] > 0
  if not normalize:
    return jnp.where(mixed_P1, off_PG, 0.0)
  variance_P1 = jnp.sum(off_PG**2, axis=-1, keepdims=True) / jnp.maximum(n_P1 - 1.0, 1.0)
  std_P1 = jnp.sqrt(jnp.where(mixed_P1, variance_P1, 1.0))
  return jnp.where(mixed_P1, off_PG / (std_P1 + 1e-4), 0.0)


def mixed_groups(rewards_PG: Float[Array, 'P G'], *, mask_PG: Mask = None) -> Float[Array, 'P']:
  """1 for each group whose rewards differ and 0 where all are equal, which teaches nothing.

  DAPO's dynamic sampling (arXiv:2503.14476) draws other prompts for the latter; as a weight it leaves them out.
  """
  r_PG, on_PG, _ = _group(rewards_PG, mask_PG)
  most_P = jnp.max(jnp.where(on_PG, r_PG, -jnp.inf), axis=-1)
  return (most_P > jnp.min(jnp.where(on_PG, r_PG, jnp.inf), axis=-1)).astype(jnp.float32)


def leave_one_out(rewards_PG: Float[Array, 'P G'], *, mask_PG: Mask = None) -> Float[Array, 'P G']:
  """r minus the mean of the others of its group; 0 where there is no other (RLOO, arXiv:2402.14740).

  The baseline does not hold the answer's own reward, so that the expected policy gradient is exact.
  """
  r_PG, on_PG, n_P1 = _group(rewards_PG, mask_PG)
  others_PG = (jnp.sum(r_PG, axis=-1, keepdims=True) - r_PG) / jnp.maximum(n_P1 - 1.0, 1.0)
  return jnp.where(on_PG & (n_P1 > 1), r_PG - others_PG, 0.0)


def whiten(x_BT: Float[Array, 'B T'], mask_BT: Float[Array, 'B T'], *, shift_mean: bool = True) -> Float[Array, 'B T']:
  """(x - mean) / sqrt(var + 1e-8) over all tokens where the mask is on, var with their number below; 0 where masked.

  `shift_mean=False` adds the mean again.
  """
  x_BT, on_BT = masked.kept(x_BT, mask_BT), mask_BT > 0
  n = jnp.maximum(jnp.sum(on_BT, dtype=jnp.float32), 1.0)
  mean = jnp.sum(x_BT) / n
  off_BT = jnp.where(on_BT, x_BT - mean, 0.0)
  white_BT = off_BT * jax.lax.rsqrt(jnp.sum(off_BT**2) / n + 1e-8)
  return white_BT if shift_mean else jnp.where(on_BT, white_BT + mean, 0.0)


def kl_rewards(
  score_B: Float[Array, 'B'], kl_BT: Float[Array, 'B T'], mask_BT: Float[Array, 'B T'], *, kl_coef: float
) -> Float[Array, 'B T']:
  """-kl_coef * kl at every token, and the answer's score at its last one (Ouyang et al. 2022, arXiv:2203.02155).

  With `kl` of kind k1 the sum over an answer is the score minus kl_coef times an unbiased estimate of its KL. A row
  without a token has nowhere to keep a score.
  """
  on_BT = mask_BT > 0
  left_BT = jnp.cumsum(on_BT[:, ::-1], axis=-1, dtype=jnp.int32)[:, ::-1]
  last_BT = on_BT & (left_BT == 1)
  score_BT = jnp.where(last_BT, score_B.astype(jnp.float32)[:, None], 0.0)
  return score_BT - kl_coef * masked.kept(kl_BT, mask_BT)


def reinforce_plus_plus(
  score_B: Float[Array, 'B'],
  kl_BT: Float[Array, 'B T'],
  mask_BT: Float[Array, 'B T'],
  *,
  kl_coef: float,
  gamma: float = 1.0,
) -> Float[Array, 'B T']:
  """Rewards to come, of `kl_rewards`, whitened over the whole batch (REINFORCE++, Hu 2025, arXiv:2501.03262).

  Its variant with a baseline takes scores from which the mean of their group was taken
  (`group_advantages(normalize=False)`).
  """
  rewards_BT = kl_rewards(score_B, kl_BT, mask_BT, kl_coef=kl_coef)
  returns_BT, _ = gae(rewards_BT, jnp.zeros_like(rewards_BT), mask_BT, gamma=gamma, lam=1.0)
  return whiten(returns_BT, mask_BT)


def overlong(lengths_B: Float[Array, 'B'] | Int[Array, 'B'], *, limit: int, buffer: int) -> Float[Array, 'B']:
  """What is added to the score of a long answer: 0 up to limit - buffer tokens, falling to -1 at `limit` and beyond.

  DAPO's soft overlong punishment (arXiv:2503.14476).
  """
  return jnp.clip((limit - buffer - lengths_B.astype(jnp.float32)) / buffer, -1.0, 0.0)


def _group(rewards_PG: Array, mask_PG: Array | None) -> tuple[Array, Array, Array]:
  """(rewards with 0 where masked, where they are on, how many of each group)."""
  on_PG = jnp.ones(rewards_PG.shape, bool) if mask_PG is None else mask_PG > 0
  return masked.kept(rewards_PG, on_PG), on_PG, jnp.sum(on_PG, axis=-1, keepdims=True, dtype=jnp.float32)
