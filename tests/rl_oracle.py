"""Reinforcement learning from the papers in plain NumPy and float64: scores, advantages, losses with their gradients.

B answers, T sequence, V vocabulary.
"""

import jax.numpy as jnp
import numpy as np

from jaxlm import models

PER = dict.fromkeys(('grpo', 'gspo', 'rloo'), 'sequence') | {'dr_grpo': 'longest'}
CLIPS = {'dapo': (0.2, 0.28), 'gspo': (3e-4, 4e-4), 'cispo': (1.0, 4.0)}


def read(cfg, params, tokens, temperature):
  """(x_BTD, log of all chances [B, T, V], values [B, T] or None) of rows that are padded on the right."""
  out = models.hidden(cfg, params, jnp.asarray(tokens))
  z = np.asarray(models.unembed(cfg, params, out.x_BTD), np.float64)[..., : cfg.vocab_size] / temperature
  z -= z.max(-1, keepdims=True)
  x = np.asarray(out.x_BTD, np.float64)
  values = x @ np.asarray(params['value'], np.float64) if 'value' in params else None
  return x, z - np.log(np.exp(z).sum(-1, keepdims=True)), values


def overlong(length, limit, buffer):
  """DAPO (arXiv:2503.14476), equation 13."""
  if length <= limit - buffer:
    return 0.0
  return -1.0 if length > limit else (limit - buffer - length) / buffer


def gae(rewards, values, end, gamma, lam):
  """Schulman et al. 2015, equation 16: the sum of (gamma lam)^l d_t+l, for one answer; (advantages, returns)."""
  n, after = len(rewards), [*values[1:], end]
  d = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
  adv = np.array([sum((gamma * lam) ** (k - t) * d[k] for k in range(t, n)) for t in range(n)])
  return adv, adv + np.asarray(values)


def advantages(algo, scores, kls, values, stopped, groups, *, kl_coef, gamma, lam):
  """A list of arrays, one a token of each answer, and of PPO the returns. `kls`: log(pi / ref) of each token."""
  sizes = [len(kl) for kl in kls]
  rewards = [-kl_coef * np.asarray(kl) for kl in kls]
  for m, score in enumerate(scores):
    rewards[m][-1] += score
  whole = lambda parts: (np.concatenate(parts) - np.concatenate(parts).mean()) / np.concatenate(parts).std()
  cut = lambda flat: np.split(flat, np.cumsum(sizes)[:-1])
  if algo == 'ppo':
    found = [gae(r, v, 0.0 if over else v[-1], gamma, lam) for r, v, over in zip(rewards, values, stopped, strict=True)]
    return cut(whole([adv for adv, _ in found])), [returns for _, returns in found]
  if algo == 'reinforce_pp':
    return cut(whole([gae(r, 0 * r, 0.0, gamma, 1.0)[0] for r in rewards])), None
  worth = np.array([r.sum() for r in rewards]) if algo == 'rloo' else np.asarray(scores, np.float64)
  one = []
  for group in worth.reshape(-1, groups):
    if algo == 'rloo':
      one += [r - np.delete(group, g).mean() for g, r in enumerate(group)]
    else:
      one += list((group - group.mean()) / (1.0 if algo == 'dr_grpo' else group.std(ddof=1) + 1e-4))
  return [np.full(n, adv) for n, adv in zip(sizes, one, strict=True)], None


def loss(algo, log_all, values, batch, *, longest, kl_coef, entropy_coef, value_coef, value_clip):
  """(loss, its gradient by the logits over the temperature [B, T, V], and by the values [B, T])."""
  on = np.asarray(batch['loss_mask'], np.float64)
  adv, old = (np.where(on > 0, batch[name], 0.0).astype(np.float64) for name in ('advantages', 'old_logp'))
  lengths = on.sum(-1, keepdims=True)
  per = PER.get(algo, 'token')
  weight = {'token': on / on.sum(), 'longest': on / (longest * len(on)), 'sequence': on / lengths / len(on)}[per]
  hit = np.asarray(batch['targets'])[..., None] == np.arange(log_all.shape[-1])
  logp, chance = log_all[hit].reshape(on.shape), np.exp(log_all)
  entropy = -(chance * log_all).sum(-1)
  log_ratio = (logp - old) * on
  whole = {'gspo': log_ratio.sum(-1, keepdims=True) / lengths, 'rloo': log_ratio.sum(-1, keepdims=True)}
  r = np.exp(whole.get(algo, log_ratio)) * np.ones_like(on)
  low, high = CLIPS.get(algo, (0.2, 0.2))
  clipped = np.clip(r, 1 - low, 1 + high)
  if algo == 'cispo':
    total, by_logp = -(weight * clipped * adv * logp).sum(), -weight * clipped * adv
  else:
    total = -(weight * np.minimum(r * adv, clipped * adv)).sum()
    by_logp = -weight * adv * r * (r * adv <= clipped * adv)
    if algo == 'rloo':  # one action: every token moves the ratio of all
      by_logp = by_logp.sum(-1, keepdims=True) * on
  if kl_coef and algo not in ('ppo', 'rloo', 'reinforce_pp'):
    d = np.where(on > 0, batch['ref_logp'] - logp, 0.0)
    total += kl_coef * (weight * (np.exp(d) - d - 1)).sum()
    by_logp = by_logp + kl_coef * weight * (1 - np.exp(d))
  total -= entropy_coef * (weight * entropy).sum()
  by_z = by_logp[..., None] * (hit - chance)
  by_z += entropy_coef * weight[..., None] * chance * (log_all + entropy[..., None])
  if algo != 'ppo':
    return total, by_z, None
  before, returns = (np.where(on > 0, batch[name], 0.0).astype(np.float64) for name in ('values', 'returns'))
  near = np.clip(values, before - value_clip, before + value_clip)
  far = (values - returns) ** 2 >= (near - returns) ** 2
  total += value_coef * (weight * np.maximum((values - returns) ** 2, (near - returns) ** 2) / 2).sum()
  free = far | (near == values)
  return total, by_z, value_coef * weight * (values - returns) * free
