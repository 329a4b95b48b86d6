"""The objectives of reinforcement learning: what sampled answers and their advantages teach."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm import lora, masked, models, objectives
from jaxlm.losses import policy
from jaxlm.masked import Metric, Sum
from jaxlm.models import ModelConfig, Run
from jaxlm.rl.algorithms import Algorithm
from jaxlm.train.step import LossFn

READS = ('tokens', 'targets', 'loss_mask', 'segment_ids', 'positions')  # what `read` takes of a batch


def read(
  cfg: ModelConfig,
  run: Run,
  *,
  temperature: float,
  chunks: int = 1,
  valued: bool = False,
  compared: bool = False,
  places: int | None = None,
) -> Callable[..., dict[str, Any]]:
  """`fn(params, batch, reference=None)`: `old_logp` [B, T] at the temperature, `values` if there is a head for them.

  With `compared` also `ref_logp`, of the `reference` parameters or, without these, of the tree without its adapters.
  With `places` logits are made for so many places of a row alone, from the first that learns; elsewhere all is 0.
  """
  quiet = objectives.quiet(run)

  def fn(params: Any, batch: Any, reference: Any = None) -> dict[str, Any]:
    logp_BT, _, x_BTD, params = _of(cfg, quiet, params, batch, None, chunks, temperature, places)
    found = {'old_logp': logp_BT} | ({'values': models.value(params, x_BTD)} if valued else {})
    if compared:
      other = lora.base(params) if reference is None else reference
      found['ref_logp'] = _of(cfg, quiet, other, batch, None, chunks, temperature, places)[0]
    return found

  return fn


def learn(
  cfg: ModelConfig,
  run: Run,
  how: Algorithm,
  *,
  temperature: float,
  longest: int,
  kl_coef: float = 0.0,
  value_coef: float = 0.1,
  value_clip: float = 0.2,
  entropy_coef: float = 0.0,
  importance: Literal['', 'token', 'sequence'] = '',
  importance_cap: float = 2.0,
  chunks: int = 1,
  places: int | None = None,
) -> LossFn:
  """The loss of an algorithm over a batch of `rl.episodes` with `advantages`.

  The batch also holds `old_logp` (without it the policy itself is the old one: a first step, of ratio 1), `ref_logp`
  where kl_coef is in the loss, and `values` and `returns` where there is a value function. With `importance` the
  loss of each token is weighed by how likely it, or its answer, was to the old policy against to the sampler
  (`policy.importance_weights`). `places` as in `read`. Metrics: `policy/...`.
  """
  per: Any = longest if how.per == 'longest' else how.per
  made = how.loss if callable(how.loss) else getattr(policy, how.loss)
  clips: dict[str, Any] = {'clip_low': how.clip_low, 'clip_high': how.clip_high, 'ratio': how.ratio}

  def loss_fn(params: Any, batch: Any, key: Any) -> tuple[Sum, dict[str, Metric]]:
    logp_BT, entropy_BT, x_BTD, params = _of(cfg, run, params, batch, key, chunks, temperature, places)
    mask_BT = batch['loss_mask']
    old_BT, adv_BT = batch.get('old_logp', jax.lax.stop_gradient(logp_BT)), batch['advantages']
    stats = policy.ratio_stats(logp_BT, old_BT, adv_BT, mask_BT, **clips)
    metrics = {f'policy/{name}': one for name, one in stats.items()}
    if importance:
      asked: dict[str, Any] = {'level': importance, 'cap': importance_cap}
      weight_BT = policy.importance_weights(old_BT, batch['sampled_logp'], mask_BT, **asked)
      metrics |= {'policy/importance_mean': masked.total(weight_BT, mask_BT)}
      metrics |= {'policy/importance_max': masked.Max(weight_BT.max())}
      adv_BT *= weight_BT
    loss = made(logp_BT, old_BT, adv_BT, mask_BT, per=per, **clips)
    metrics['policy/entropy'] = masked.total(entropy_BT, mask_BT)
    # how far the sampler is from this program, with weights that are the same in a first step: near 0, or a bug
    gap_BT = jnp.abs(masked.kept(old_BT - batch['sampled_logp'], mask_BT))
    metrics |= {'policy/sampler_gap': masked.total(gap_BT, mask_BT), 'policy/sampler_gap_max': masked.Max(gap_BT.max())}
    total = loss.total
    if kl_coef and how.kl == 'loss':
      kl_BT = policy.kl(logp_BT, batch['ref_logp'], mask_BT, kind='k3')
      total += kl_coef * policy.average(kl_BT, mask_BT, per=per).total
      metrics['policy/kl'] = masked.total(jax.lax.stop_gradient(kl_BT), mask_BT)
    if entropy_coef:
      total -= entropy_coef * policy.average(entropy_BT, mask_BT, per=per).total
    if how.valued:
      values_BT = models.value(params, x_BTD)
      value = policy.value_clip(values_BT, batch['values'], batch['returns'], mask_BT, clip=value_clip, per=per)
      total += value_coef * value.total
      metrics['value/loss'] = value
      metrics['value/explained_variance'] = policy.explained_variance(values_BT, batch['returns'], mask_BT)
    return Sum(total, loss.weight), metrics

  return loss_fn


def _of(
  cfg: ModelConfig, run: Run, params: Any, batch: Any, key: Any, chunks: int, temperature: float, places: int | None
) -> tuple:
  """(logp_BT, entropy_BT, x_BTD, parameters with their keys)."""
  params, out = objectives.hidden(cfg, run, params, batch, key)
  of = lambda x_BND, targets_BN: objectives.logprobs(cfg, run, params, x_BND, targets_BN, chunks, temperature)[::2]
  targets_BT = batch['targets']
  length = targets_BT.shape[1]
  if places is None or places >= length:
    return *of(out.x_BTD, targets_BT), out.x_BTD, params
  first_B = jnp.minimum(jnp.argmax(batch['loss_mask'] > 0, axis=1), length - places)
  part = jax.vmap(lambda x, first: jax.lax.dynamic_slice_in_dim(x, first, places))
  whole = jax.vmap(lambda x, first: jax.lax.dynamic_update_slice_in_dim(jnp.zeros(length, x.dtype), x, first, 0))
  logp_BT, entropy_BT = (whole(x, first_B) for x in of(part(out.x_BTD, first_B), part(targets_BT, first_B)))
  return logp_BT, entropy_BT, out.x_BTD, params
