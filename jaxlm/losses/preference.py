"""Losses over answers that were preferred to others, from the log-probabilities of whole answers.

A log-probability is summed over the answer's tokens (`summed`), in nats; a length counts them. Everything is float32
inside. The weight of a Sum is that of its rows. Rows of weight 0 may hold NaN or inf: neither value nor gradient sees
them. Values (total / weight) and gradients are unchanged by padding on either side, by rows of weight 0, and by
repeating every row (each copy then has its share of the gradient). No gradient goes into a reference, margin or
baseline.

B rows or pairs, T sequence.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm import masked
from jaxlm.masked import Sum


def summed(logp_BT: Float[Array, 'B T'], mask_BT: Float[Array, 'B T']) -> tuple[Float[Array, 'B'], Float[Array, 'B']]:
  """`(logp_B, length_B)`: log-probabilities summed over the tokens of each answer (mask on), and their number."""
  on_BT = (mask_BT > 0).astype(jnp.float32)
  return jnp.sum(masked.kept(logp_BT, mask_BT), axis=-1), jnp.sum(on_BT, axis=-1)


def bradley_terry(
  chosen_B: Float[Array, 'B'],
  rejected_B: Float[Array, 'B'],
  *,
  margin_B: Float[Array, 'B'] | float = 0.0,
  center: float = 0.0,
  weight_B: Float[Array, 'B'] | float = 1.0,
) -> Sum:
  """Reward model: -log sigmoid(r_c - r_r - margin) + center * (r_c + r_r)^2, from the rewards of both answers.

  The margin is how much better the chosen answer was said to be (Llama 2, arXiv:2307.09288); `center` holds rewards
  near zero, which the first term leaves free (Eisenstein et al. 2023, arXiv:2312.09244).
  """
  chosen_B, rejected_B, margin_B = (masked.kept(x, weight_B) for x in (chosen_B, rejected_B, margin_B))
  ranked_B = jax.nn.log_sigmoid(chosen_B - rejected_B - jax.lax.stop_gradient(margin_B))
  return masked.total(center * (chosen_B + rejected_B) ** 2 - ranked_B, weight_B)


def dpo(
  chosen_B: Float[Array, 'B'],
  rejected_B: Float[Array, 'B'],
  ref_chosen_B: Float[Array, 'B'] | float,
  ref_rejected_B: Float[Array, 'B'] | float,
  *,
  beta: float,
  label_smoothing: float = 0.0,
  weight_B: Float[Array, 'B'] | float = 1.0,
) -> Sum:
  """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), h = log(pi_c / ref_c) - log(pi_r / ref_r).

  DPO (Rafailov et al. 2023, arXiv:2305.18290); e = label_smoothing > 0 is its conservative form, labels being flipped
  with chance e (Mitchell 2023). References of 0.0 make it reference-free.
  """
  c_B, r_B = _ratio(chosen_B, ref_chosen_B, weight_B), _ratio(rejected_B, ref_rejected_B, weight_B)
  return _logistic(beta * (c_B - r_B), label_smoothing, weight_B)


def ipo(
  chosen_B: Float[Array, 'B'],
  rejected_B: Float[Array, 'B'],
  ref_chosen_B: Float[Array, 'B'] | float,
  ref_rejected_B: Float[Array, 'B'] | float,
  chosen_length_B: Float[Array, 'B'] | float,
  rejected_length_B: Float[Array, 'B'] | float,
  *,
  beta: float,
  weight_B: Float[Array, 'B'] | float = 1.0,
) -> Sum:
  """(h - 1 / (2 beta))^2, h = log(pi_c / ref_c) / length_c - log(pi_r / ref_r) / length_r; beta is the paper's tau.

  IPO (Azar et al. 2023, arXiv:2310.12036), a token's mean in place of an answer's sum, as its authors did and TRL does;
  lengths of 1.0 give the formula as printed.
  """
  c_B, r_B = _ratio(chosen_B, ref_chosen_B, weight_B), _ratio(rejected_B, ref_rejected_B, weight_B)
  h_B = _mean(c_B, chosen_length_B, weight_B) - _mean(r_B, rejected_length_B, weight_B)
  return masked.total((h_B - 1.0 / (2.0 * beta)) ** 2, weight_B)


def kto(
  logp_B: Float[Array, 'B'],
  ref_logp_B: Float[Array, 'B'] | float,
  desirable_B: Float[Array, 'B'],
  kl: Float[Array, ''] | float,
  *,
  beta: float,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
  weight_B: Float[Array, 'B'] | float = 1.0,
) -> Sum:
  """w (1 - sigmoid(s beta (log(pi / ref) - kl))), s = 1 and w = desirable_weight for the desirable (1), else s = -1.

  KTO (Ethayarajh et al. 2024, arXiv:2402.01306), of single answers. `kl` is what `kto_baseline` says, at least 0.
  """
  kl = jax.lax.stop_gradient(jnp.maximum(jnp.asarray(kl, jnp.float32), 0.0))
  desirable_B = masked.kept(desirable_B, weight_B)
  sign_B = jnp.where(desirable_B > 0, 1.0, -1.0)
  each_B = jnp.where(desirable_B > 0, desirable_weight, undesirable_weight)
  losses_B = jax.nn.sigmoid(-sign_B * beta * (_ratio(logp_B, ref_logp_B, weight_B) - kl))
  return masked.total(each_B * losses_B, weight_B)


def kto_baseline(
  logp_B: Float[Array, 'B'], ref_logp_B: Float[Array, 'B'] | float, *, weight_B: Float[Array, 'B'] | float = 1.0
) -> Float[Array, '']:
  """KTO's estimate of KL(pi | ref), at least 0: the mean log-ratio of answers given to other rows' prompts.

  A mean of the rows at hand: it is taken for each micro-batch and not linear in the batch. 0 where all weights are 0.
  """
  mean = masked.total(_ratio(logp_B, ref_logp_B, weight_B), weight_B)
  return jnp.maximum(mean.total / jnp.where(mean.weight > 0, mean.weight, 1.0), 0.0)


def orpo(
  chosen_B: Float[Array, 'B'],
  rejected_B: Float[Array, 'B'],
  chosen_length_B: Float[Array, 'B'] | float,
  rejected_length_B: Float[Array, 'B'] | float,
  *,
  beta: float,
  sft: float = 1.0,
  weight_B: Float[Array, 'B'] | float = 1.0,
) -> Sum:
  """-sft l_c - beta log sigmoid(log odds(l_c) - log odds(l_r)), l a token's mean log-probability, odds p / (1 - p).

  ORPO (Hong et al. 2024, arXiv:2403.07691; beta is its lambda), which needs no reference. The first term is each
  answer's own mean (TRL takes the mean over all tokens of a batch, the prompt's too); `sft=0.0` leaves it out. Means
  are held below -1e-6, where the odds are finite.
  """
  c_B, r_B = _mean(chosen_B, chosen_length_B, weight_B), _mean(rejected_B, rejected_length_B, weight_B)
  ranked_B = jax.nn.log_sigmoid(_log_odds(c_B) - _log_odds(r_B))
  return masked.total(-sft * c_B - beta * ranked_B, weight_B)


def simpo(
  chosen_B: Float[Array, 'B'],
  rejected_B: Float[Array, 'B'],
  chosen_length_B: Float[Array, 'B'] | float,
  rejected_length_B: Float[Array, 'B'] | float,
  *,
  beta: float,
  gamma: float,
  label_smoothing: float = 0.0,
  weight_B: Float[Array, 'B'] | float = 1.0,
) -> Sum:
  """-log sigmoid(beta (l_c - l_r) - gamma), l the mean log-probability of a token, gamma the margin in units of reward.

  SimPO (Meng et al. 2024, arXiv:2405.14734), which needs no reference; smoothed as `dpo` is.
  """
  c_B, r_B = _mean(chosen_B, chosen_length_B, weight_B), _mean(rejected_B, rejected_length_B, weight_B)
  return _logistic(beta * (c_B - r_B) - gamma, label_smoothing, weight_B)


def cpo(
  chosen_B: Float[Array, 'B'],
  rejected_B: Float[Array, 'B'],
  chosen_length_B: Float[Array, 'B'] | float,
  *,
  beta: float,
  sft: float = 1.0,
  label_smoothing: float = 0.0,
  weight_B: Float[Array, 'B'] | float = 1.0,
) -> Sum:
  """-log sigmoid(beta (log pi_c - log pi_r)) - sft log pi_c / length_c, smoothed as `dpo` is.

  CPO (Xu et al. 2024, arXiv:2401.08417), which needs no reference. The second term is a token's mean, as in its
  authors' code; a length of 1.0 gives the formula as printed.
  """
  chosen_B, rejected_B = masked.kept(chosen_B, weight_B), masked.kept(rejected_B, weight_B)
  ranked = _logistic(beta * (chosen_B - rejected_B), label_smoothing, weight_B)
  return Sum(
    ranked.total - sft * masked.total(_mean(chosen_B, chosen_length_B, weight_B), weight_B).total, ranked.weight
  )


def pair_metrics(
  chosen_B: Float[Array, 'B'], rejected_B: Float[Array, 'B'], *, weight_B: Float[Array, 'B'] | float = 1.0
) -> dict[str, Sum]:
  """`chosen`, `rejected`, their `margin` and `accuracy` (a tie is half right) of two rewards, each a Sum over pairs.

  The reward is a reward model's, beta log(pi / ref) for DPO, or what the loss compares. No gradient.
  """
  chosen_B, rejected_B = (jax.lax.stop_gradient(masked.kept(x, weight_B)) for x in (chosen_B, rejected_B))
  right_B = 0.5 * (1.0 + jnp.sign(chosen_B - rejected_B))
  found = {'chosen': chosen_B, 'rejected': rejected_B, 'margin': chosen_B - rejected_B, 'accuracy': right_B}
  return {name: masked.total(x_B, weight_B) for name, x_B in found.items()}


def _ratio(logp_B: Array, ref_B: Array | float, weight_B: Array | float) -> Array:
  """log(pi / ref), 0 in rows of no weight."""
  return masked.kept(logp_B, weight_B) - jax.lax.stop_gradient(masked.kept(ref_B, weight_B))


def _mean(logp_B: Array, length_B: Array | float, weight_B: Array | float) -> Array:
  """Of a token; an answer without any has 0, and so have rows of no weight."""
  length_B = jax.lax.stop_gradient(jnp.asarray(length_B, jnp.float32))
  return masked.kept(logp_B, weight_B) / jnp.maximum(length_B, 1.0)


def _log_odds(logp_B: Array) -> Array:
  logp_B = jnp.minimum(logp_B, -1e-6)
  return logp_B - jnp.log(-jnp.expm1(logp_B))


def _logistic(logits_B: Array, smoothing: float, weight_B: Array | float) -> Sum:
  right_B, wrong_B = jax.nn.log_sigmoid(logits_B), jax.nn.log_sigmoid(-logits_B)
  return masked.total(-(1.0 - smoothing) * right_B - smoothing * wrong_B, weight_B)
