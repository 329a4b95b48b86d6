"""Losses over sampled answers and their advantages, and what is read off the ratio of two policies.

`logp_BT` is the policy's log-probability of each sampled token in nats, `old_logp_BT` that of the policy which the
update began from, `ref_logp_BT` a reference's; the mask is on at sampled tokens. Everything is float32 inside. A masked
position may hold NaN or inf: neither value nor gradient sees it. Values (total / weight) and gradients are unchanged by
padding on either side, by rows without a token, and by repeating every row (each copy then has its share of the
gradient). Gradients go into `logp_BT` and `values_BT` alone. Log-ratios are held within 20, so that no token overflows.

| algorithm | `ratio` | `per` | else |
|---|---|---|---|
| PPO (arXiv:1707.06347) | token | token | `value_clip`, `rl.advantages.gae` |
| GRPO (arXiv:2402.03300) | token | sequence | `kl` of kind k3 in the loss |
| Dr. GRPO (arXiv:2503.20783) | token | a constant, the longest answer's | advantages not normalised |
| DAPO (arXiv:2503.14476) | token | token | clip_high > clip_low |
| GSPO (arXiv:2507.18071) | sequence | sequence | clips of 3e-4 and 4e-4 |
| RLOO (arXiv:2402.14740) | product | sequence | or `reinforce(per=1.0)` |

B batch, T sequence.
"""

from typing import Literal

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from jaxlm import masked
from jaxlm.masked import Max, Metric, Min, Sum

Per = Literal['token', 'sequence'] | int | float
Ratio = Literal['token', 'sequence', 'product']
LIMIT = 20.0  # of a log-ratio: e^20 times an advantage is far from float32's end


def average(x_BT: Float[Array, 'B T'], mask_BT: Float[Array, 'B T'], *, per: Per = 'token') -> Sum:
  """`x_BT` over the tokens where the mask is on, `per` 'token', 'sequence' or a constant.

  'token': sum over all tokens / their number. 'sequence': each row's mean, then the mean over rows. A constant c: sum
  over all tokens / (c * rows). Rows without a token are no rows. Terms added to a loss (entropy, KL) take its own
  `per`: the weights then agree and the totals add. Raises ValueError for another `per`.
  """
  if per == 'token':
    return masked.total(x_BT, mask_BT)
  if isinstance(per, str) and per != 'sequence':
    raise ValueError(f"per is 'token', 'sequence' or a number, not {per!r}")
  weight_BT = mask_BT.astype(jnp.float32)
  total_B = jnp.sum(jnp.where(weight_BT > 0, x_BT.astype(jnp.float32) * weight_BT, 0.0), axis=-1)
  length_B = jnp.sum(weight_BT, axis=-1)
  rows = jnp.sum(length_B > 0, dtype=jnp.float32)
  if per == 'sequence':
    return Sum(jnp.sum(total_B / jnp.where(length_B > 0, length_B, 1.0)), rows)
  return Sum(jnp.sum(total_B), per * rows)


def ppo(
  logp_BT: Float[Array, 'B T'],
  old_logp_BT: Float[Array, 'B T'],
  adv_BT: Float[Array, 'B #T'],
  mask_BT: Float[Array, 'B T'],
  *,
  clip_low: float,
  clip_high: float,
  ratio: Ratio = 'token',
  per: Per = 'token',
) -> Sum:
  """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = pi / pi_old, averaged `per` (see `average`).

  `ratio` says of what: 'token' of each token. 'sequence' the geometric mean of a row's, s = exp(mean log r), in GSPO's
  token form sg(s) pi / sg(pi): a token's gradient is s A_t where s is not clipped. 'product' of the whole answer,
  exp(sum log r), one action as in RLOO. `adv_BT` may be [B, 1]; it may be multiplied by `importance_weights`, which
  scales the loss of each token, for they are never negative. Raises ValueError for another `ratio` or `per`.
  """
  r_BT = _ratio(_log_ratio(logp_BT, old_logp_BT, mask_BT), mask_BT, ratio)
  adv_BT = stop_gradient(masked.kept(adv_BT, mask_BT))
  clipped_BT = jnp.clip(r_BT, 1.0 - clip_low, 1.0 + clip_high)
  return average(-jnp.minimum(r_BT * adv_BT, clipped_BT * adv_BT), mask_BT, per=per)


def cispo(
  logp_BT: Float[Array, 'B T'],
  old_logp_BT: Float[Array, 'B T'],
  adv_BT: Float[Array, 'B #T'],
  mask_BT: Float[Array, 'B T'],
  *,
  clip_high: float,
  clip_low: float = 1.0,
  ratio: Ratio = 'token',
  per: Per = 'token',
) -> Sum:
  """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi: weights are clipped and no token loses its gradient.

  CISPO (MiniMax-M1, arXiv:2506.13585); `clip_low=1.0` is no lower bound, as there. TRL's epsilon_high is 1 + clip_high.
  """
  r_BT = stop_gradient(_ratio(_log_ratio(logp_BT, old_logp_BT, mask_BT), mask_BT, ratio))
  weight_BT = jnp.clip(r_BT, 1.0 - clip_low, 1.0 + clip_high)
  adv_BT = stop_gradient(masked.kept(adv_BT, mask_BT))
  return average(-weight_BT * adv_BT * masked.kept(logp_BT, mask_BT), mask_BT, per=per)


def reinforce(
  logp_BT: Float[Array, 'B T'], adv_BT: Float[Array, 'B #T'], mask_BT: Float[Array, 'B T'], *, per: Per = 'token'
) -> Sum:
  """-A log pi: at `per=1.0` its gradient's mean over the policy's own answers is that of minus the expected reward.

  REINFORCE (Williams 1992), with RLOO's advantages (arXiv:2402.14740) or REINFORCE++'s (arXiv:2501.03262). Any constant
  `per` keeps its direction; 'sequence' weighs the tokens of short answers more.
  """
  adv_BT = stop_gradient(masked.kept(adv_BT, mask_BT))
  return average(-adv_BT * masked.kept(logp_BT, mask_BT), mask_BT, per=per)


def value_clip(
  values_BT: Float[Array, 'B T'],
  old_values_BT: Float[Array, 'B T'],
  returns_BT: Float[Array, 'B T'],
  mask_BT: Float[Array, 'B T'],
  *,
  clip: float,
  per: Per = 'token',
) -> Sum:
  """max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) / 2, averaged `per`; a clip of inf is the plain square.

  The value loss of PPO's implementations (Engstrom et al. 2020, arXiv:2005.12729).
  """
  v_BT, old_BT, target_BT = (masked.kept(x, mask_BT) for x in (values_BT, old_values_BT, returns_BT))
  old_BT, target_BT = stop_gradient(old_BT), stop_gradient(target_BT)
  clipped_BT = jnp.clip(v_BT, old_BT - clip, old_BT + clip)
  return average(0.5 * jnp.maximum((v_BT - target_BT) ** 2, (clipped_BT - target_BT) ** 2), mask_BT, per=per)


def kl(
  logp_BT: Float[Array, 'B T'],
  ref_logp_BT: Float[Array, 'B T'],
  mask_BT: Float[Array, 'B T'] | None = None,
  *,
  kind: Literal['k1', 'k2', 'k3'] = 'k3',
) -> Float[Array, 'B T']:
  """Estimates of KL(pi | ref) from the policy's own tokens, with d = log pi - log ref (Schulman 2020).

  | kind | is | its mean | the mean of its gradient (at each position, its prefix given) |
  |---|---|---|---|
  | k1 | d | the KL | 0: it belongs into the reward, not into the loss |
  | k2 | d^2 / 2 | about the KL where it is small | of KL(pi | ref) |
  | k3 | exp(-d) - 1 + d | the KL, and never negative | of KL(ref | pi) |

  (Tang and Munos 2025, arXiv:2506.09477.) Where a mask is given the result is 0 at masked positions. Raises ValueError
  for another kind.
  """
  d_BT = _log_ratio(logp_BT, ref_logp_BT, jnp.ones_like(logp_BT) if mask_BT is None else mask_BT)
  if kind == 'k1':
    return d_BT
  if kind == 'k2':
    return 0.5 * d_BT**2
  if kind == 'k3':
    return jnp.expm1(-d_BT) + d_BT
  raise ValueError(f'kind is k1, k2 or k3, not {kind!r}')


def importance_weights(
  train_logp_BT: Float[Array, 'B T'],
  sampled_logp_BT: Float[Array, 'B T'],
  mask_BT: Float[Array, 'B T'],
  *,
  level: Literal['token', 'sequence'] = 'token',
  cap: float,
) -> Float[Array, 'B T']:
  """min(pi_train / pi_sampled, cap) of each token, or of the whole answer at all its tokens; 0 where masked.

  For answers of another engine, whose log-probabilities differ from those of training (Ionides 2008; Yao et al. 2025).
  Multiply the advantages by it. No gradient. Raises ValueError for another level.
  """
  if level not in ('token', 'sequence'):
    raise ValueError(f'level is token or sequence, not {level!r}')
  log_BT = _log_ratio(train_logp_BT, sampled_logp_BT, mask_BT)
  ratio_BT = _ratio(log_BT, mask_BT, 'token' if level == 'token' else 'product')
  return stop_gradient(masked.kept(jnp.minimum(ratio_BT, cap), mask_BT))


def ratio_stats(
  logp_BT: Float[Array, 'B T'],
  old_logp_BT: Float[Array, 'B T'],
  adv_BT: Float[Array, 'B #T'],
  mask_BT: Float[Array, 'B T'],
  *,
  clip_low: float,
  clip_high: float,
  ratio: Ratio = 'token',
) -> dict[str, Metric]:
  """What is watched of an update, over tokens, without gradient.

  `clip_low` and `clip_high` are the shares whose gradient the clip stopped below and above, `clip_fraction` both;
  `ratio_min` and `ratio_max`; `approx_kl` estimates KL(old | pi) by k3 (nats a token). Where nothing is on, the
  extremes are inf and -inf, which add nothing to others.
  """
  log_BT = stop_gradient(_log_ratio(logp_BT, old_logp_BT, mask_BT))
  r_BT = _ratio(log_BT, mask_BT, ratio)
  adv_BT = masked.kept(adv_BT, mask_BT)
  low_BT = ((r_BT < 1.0 - clip_low) & (adv_BT < 0)).astype(jnp.float32)
  high_BT = ((r_BT > 1.0 + clip_high) & (adv_BT > 0)).astype(jnp.float32)
  return {
    'clip_low': masked.total(low_BT, mask_BT),
    'clip_high': masked.total(high_BT, mask_BT),
    'clip_fraction': masked.total(low_BT + high_BT, mask_BT),
    'approx_kl': masked.total(jnp.expm1(log_BT) - log_BT, mask_BT),
    'ratio_min': Min(jnp.min(masked.kept(r_BT, mask_BT, jnp.inf))),
    'ratio_max': Max(jnp.max(masked.kept(r_BT, mask_BT, -jnp.inf))),
  }


def explained_variance(
  values_BT: Float[Array, 'B T'], returns_BT: Float[Array, 'B T'], mask_BT: Float[Array, 'B T']
) -> Sum:
  """1 - Var(R - v) / Var(R) over the tokens at hand, as the Sum of both variances; 1 is a perfect value function."""
  target_BT = stop_gradient(masked.kept(returns_BT, mask_BT))
  left_BT = target_BT - stop_gradient(masked.kept(values_BT, mask_BT))

  def spread(x_BT: Array) -> Array:
    mean = masked.total(x_BT, mask_BT)
    mean = mean.total / jnp.maximum(mean.weight, 1.0)
    return masked.total((x_BT - mean) ** 2, mask_BT).total

  return Sum(spread(target_BT) - spread(left_BT), spread(target_BT))


def _log_ratio(logp_BT: Array, other_BT: Array, mask_BT: Array) -> Array:
  """log(pi / other) within LIMIT, 0 where masked."""
  d_BT = masked.kept(logp_BT, mask_BT) - stop_gradient(masked.kept(other_BT, mask_BT))
  return jnp.clip(d_BT, -LIMIT, LIMIT)


def _ratio(log_BT: Array, mask_BT: Array, ratio: Ratio) -> Array:
  """The ratio of each token, or its row's at all of them; `log_BT` is 0 where masked."""
  if ratio == 'token':
    return jnp.exp(log_BT)
  total_B1 = jnp.sum(log_BT, axis=-1, keepdims=True)
  if ratio == 'product':
    return jnp.broadcast_to(jnp.exp(jnp.clip(total_B1, -LIMIT, LIMIT)), log_BT.shape)
  if ratio == 'sequence':
    length_B1 = jnp.sum(mask_BT > 0, axis=-1, keepdims=True, dtype=jnp.float32)
    mean_B1 = stop_gradient(total_B1 / jnp.maximum(length_B1, 1.0))
    return jnp.exp(mean_B1) * jnp.exp(log_BT - stop_gradient(log_BT))
  raise ValueError(f'ratio is token, sequence or product, not {ratio!r}')
