"""One short function a stage: apply the model, take a loss, name the metrics. Nothing here closes over an array."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlm import lora, masked, models
from jaxlm.losses import lm, sharded
from jaxlm.losses import preference as losses
from jaxlm.masked import Sum
from jaxlm.models import ModelConfig, Run
from jaxlm.train.step import LossFn


def next_token(
  cfg: ModelConfig, run: Run, *, z_loss: float = 0.0, chunks: int = 1, balance: float = 0.0, router_z: float = 0.0
) -> LossFn:
  """Pre-training: next-token cross entropy over the batch that `data.packing` makes.

  `balance` and `router_z` weigh what keeps the routers of experts balanced (see `models.moe.route`), a micro-batch at a
  time. Metrics: `nll` (nats a token, without the other terms), `bits_per_byte` of the text that the targets stand for,
  and with experts `balance` and `router_z`.
  """

  def loss_fn(params: Any, batch: Any, key: Any) -> tuple[Sum, dict[str, Any]]:
    logp_BT, lse_BT, aux = _of_targets(cfg, run, params, batch, chunks, key)
    nats = masked.total(-logp_BT, batch['loss_mask'])
    bytes_ = jnp.sum(batch['target_bytes'], dtype=jnp.float32)
    metrics = {'nll': nats, 'bits_per_byte': Sum(nats.total / math.log(2), bytes_)}
    loss = masked.total(z_loss * lse_BT**2 - logp_BT, batch['loss_mask'])
    if aux:
      loss = Sum(loss.total + loss.weight * (balance * aux['balance'] + router_z * aux['router_z']), loss.weight)
      metrics |= {name: Sum(value * loss.weight, loss.weight) for name, value in aux.items()}
    return loss, metrics

  return loss_fn


def by_group(cfg: ModelConfig, run: Run, *, groups: int, chunks: int = 1) -> Callable[[Any, Any], dict[str, Sum]]:
  """Evaluation: `fn(params, batch)` with the metrics of `next_token`, each a Sum of arrays [groups].

  `batch['group']` says which of them a target counts for. No dropout.
  """
  still = quiet(run)

  def fn(params: Any, batch: Any) -> dict[str, Sum]:
    logp_BT, _, _ = _of_targets(cfg, still, params, batch, chunks, None)
    return grouped(logp_BT, batch, groups)

  return fn


def grouped(logp_BT: Array, batch: Any, groups: int) -> dict[str, Sum]:
  """Nats and bits of the targets as sums [groups]."""
  mask_BT = batch['loss_mask']
  add = lambda x_BT: jax.ops.segment_sum(x_BT.reshape(-1), batch['group'].reshape(-1), groups)
  nats_G = add(jnp.where(mask_BT > 0, -logp_BT * mask_BT, 0.0))
  bytes_G = add(batch['target_bytes'].astype(jnp.float32))
  return {'nll': Sum(nats_G, add(mask_BT)), 'bits_per_byte': Sum(nats_G / math.log(2), bytes_G)}


class Answers(NamedTuple):
  """Two sums for each unit of a batch (see `data.pairs`), [B * units a row]: of its first and of its second segment."""

  first: Array
  second: Array


def of_answers(x_BT: Array, batch: Any) -> Answers:
  """What of `x_BT` is under the loss mask, summed in float32 by segment; units that are not there have 0."""
  x_BT = masked.kept(x_BT, batch['loss_mask']) * batch['loss_mask']
  slots_S = jnp.arange(1, x_BT.shape[1] // 2 * 2 + 1, dtype=jnp.int32)
  inside_BST = batch['segment_ids'][:, None] == slots_S[:, None]  # never made: the sum is fused with it
  sums_BS = jnp.sum(jnp.where(inside_BST, x_BT[:, None], 0.0), axis=-1)
  return _in_two(sums_BS)


def _in_two(x_BS: Array) -> Answers:
  """The same of what is said of segments: those of odd and of even numbers."""
  even = x_BS.shape[1] // 2 * 2
  return Answers(x_BS[:, 0:even:2].reshape(-1), x_BS[:, 1:even:2].reshape(-1))


def answers(cfg: ModelConfig, run: Run, *, scored: bool, chunks: int = 1) -> Callable[[Any, Any], Answers]:
  """`fn(params, batch)`: each answer's log-probability, or with `scored` its score by the value head. No dropout."""
  still = quiet(run)
  return lambda params, batch: _answers(cfg, still, params, batch, None, scored, chunks)


def _answers(cfg: ModelConfig, run: Run, params: Any, batch: Any, key: Any, scored: bool, chunks: int) -> Answers:
  if scored and 'features' in batch:
    scores_BS, T = models.value(params, batch['features']), batch['loss_mask'].shape[1]
    return _in_two(jnp.pad(scores_BS, ((0, 0), (0, T - scores_BS.shape[1]))))
  if scored:
    params, out = hidden(cfg, run, params, batch, key)
    return of_answers(models.value(params, out.x_BTD), batch)
  return of_answers(_of_targets(cfg, run, params, batch, chunks, key)[0], batch)


def ends(cfg: ModelConfig, run: Run, *, segments: int) -> Callable[[Any, Any], Answers]:
  """`fn(params, batch)`: what the trunk makes of each answer's end, float32 [B * segments / 2, D]. No dropout.

  `segments` is even, and no row has more. The values of this are the scores of `answers`.
  """
  still = quiet(run)

  def fn(params: Any, batch: Any) -> Answers:
    _, out = hidden(cfg, still, params, batch, None)
    slots_S = jnp.arange(1, segments + 1, dtype=jnp.int32)
    ends_BST = (batch['segment_ids'][:, None] == slots_S[:, None]) & (batch['loss_mask'][:, None] > 0)
    x_BSD = jnp.take_along_axis(out.x_BTD, jnp.argmax(ends_BST, -1)[..., None], axis=1).astype(jnp.float32)
    x_BSD = masked.kept(x_BSD, jnp.any(ends_BST, -1)[..., None])
    return Answers(*(x_BSD[:, i::2].reshape(-1, cfg.d_model) for i in range(2)))

  return fn


def quiet(run: Run) -> Run:
  """Without dropout and noise."""
  return dataclasses.replace(run, dropout=0.0, embed_noise=0.0)


def reward(cfg: ModelConfig, run: Run, *, center: float = 0.0, margin: float = 1.0) -> LossFn:
  """Reward model: Bradley-Terry over the scores at the last tokens of chosen and rejected answers; weight: pairs.

  `margin` is times the margins of the batch, which come in the order of segments. Metrics: `rewards/...`.
  """

  def loss_fn(params: Any, batch: Any, key: Any) -> tuple[Sum, dict[str, Any]]:
    scores, there = _answers(cfg, run, params, batch, key, True, 1), _there(batch)
    margin_P = margin * _in_two(batch['margins']).first
    loss = losses.bradley_terry(scores.first, scores.second, margin_B=margin_P, center=center, weight_B=there)
    return loss, _rewards(scores, there)

  return loss_fn


def preference(
  cfg: ModelConfig,
  run: Run,
  *,
  loss: str = 'dpo',
  beta: float = 0.1,
  label_smoothing: float = 0.0,
  gamma: float = 0.0,
  sft: float = 1.0,
  desirable_weight: float = 1.0,
  undesirable_weight: float = 1.0,
  reference: str = 'adapters',
  chunks: int = 1,
) -> LossFn:
  """The losses of `jaxlm.losses.preference` over chosen and rejected answers, or for kto over labelled ones.

  `reference`: 'adapters' is the very tree without them, in the step; 'cached' reads `ref_logps` of the batch; 'none' is
  for losses without one. The weight is the number of pairs, or of labelled answers. Metrics: `rewards/...`, `logps/...`
  (sums over an answer), and `nll`, nats a token of the chosen (or good) answers, by which a fall of their likelihood is
  seen. What keeps the routers of experts even is not added.
  """

  def compared(params: Any, batch: Any) -> Answers:
    if reference == 'cached':
      return _in_two(batch['ref_logps'])
    if reference == 'adapters':
      return _answers(cfg, quiet(run), jax.lax.stop_gradient(lora.base(params)), batch, None, False, chunks)
    zeros_P = jnp.zeros_like(_in_two(batch['margins']).first)
    return Answers(zeros_P, zeros_P)

  def loss_fn(params: Any, batch: Any, key: Any) -> tuple[Sum, dict[str, Any]]:
    logps = _answers(cfg, run, params, batch, key, False, chunks)
    refs, lengths, there = compared(params, batch), of_answers(jnp.ones_like(batch['loss_mask']), batch), _there(batch)
    if loss == 'kto':
      good = _in_two(batch['labels']).first.astype(jnp.float32)
      weights = {'desirable_weight': desirable_weight, 'undesirable_weight': undesirable_weight}
      return _kto(logps, refs, lengths, good, there, beta=beta, **weights)
    smooth: Any = {'label_smoothing': label_smoothing}
    weighed: Any = {'beta': beta, 'weight_B': there}
    means = Answers(*(x / jnp.maximum(n, 1.0) for x, n in zip(logps, lengths, strict=True)))
    ratios = Answers(*(x - r for x, r in zip(logps, refs, strict=True)))
    found, compares = {
      'dpo': lambda: (losses.dpo(*logps, *refs, **smooth, **weighed), ratios),
      'ipo': lambda: (losses.ipo(*logps, *refs, *lengths, **weighed), ratios),
      'orpo': lambda: (losses.orpo(*logps, *lengths, sft=sft, **weighed), means),
      'simpo': lambda: (losses.simpo(*logps, *lengths, gamma=gamma, **smooth, **weighed), means),
      'cpo': lambda: (losses.cpo(*logps, lengths.first, sft=sft, **smooth, **weighed), logps),
    }[loss]()
    metrics = _rewards(Answers(beta * compares.first, beta * compares.second), there) | {
      'logps/chosen': masked.total(logps.first, there),
      'logps/rejected': masked.total(logps.second, there),
      'nll': Sum(-jnp.sum(logps.first), jnp.sum(lengths.first)),
    }
    return found, metrics

  return loss_fn


def _there(batch: Any) -> Array:
  """float32, one a unit: 1 where both of its answers are in the batch."""
  lengths = of_answers(jnp.ones_like(batch['loss_mask']), batch)
  return ((lengths.first > 0) & (lengths.second > 0)).astype(jnp.float32)


def _rewards(rewards: Answers, there: Array) -> dict[str, Any]:
  names = {'margin': 'margins', 'accuracy': 'accuracies'}
  found = losses.pair_metrics(rewards.first, rewards.second, weight_B=there)
  return {f'rewards/{names.get(name, name)}': one for name, one in found.items()}


def _kto(
  logps: Answers, refs: Answers, lengths: Answers, good: Array, there: Array, *, beta: float, **weights: float
) -> tuple[Sum, dict[str, Any]]:
  """KTO over first segments; second ones, prompts with other rows' answers, say what the baseline is.

  Accuracy: how often a good answer's reward is above the baseline, and another's below.
  """
  kl = losses.kto_baseline(jax.lax.stop_gradient(logps.second), refs.second, weight_B=there)
  loss = losses.kto(logps.first, refs.first, good, kl, beta=beta, weight_B=there, **weights)
  reward = jax.lax.stop_gradient(beta * (logps.first - refs.first))
  right = 0.5 * (1.0 + jnp.sign(reward - beta * kl) * jnp.sign(good - 0.5))
  chosen, rejected = there * good, there * (1.0 - good)
  return loss, {
    'rewards/chosen': masked.total(reward, chosen),
    'rewards/rejected': masked.total(reward, rejected),
    'rewards/accuracies': masked.total(right, there),
    'logps/chosen': masked.total(logps.first, chosen),
    'logps/rejected': masked.total(logps.first, rejected),
    'nll': Sum(-masked.total(logps.first, chosen).total, masked.total(lengths.first, chosen).total),
    'kl': masked.total(jnp.full_like(there, kl), there),
  }


def whole(loss_fn: LossFn) -> Callable[[Any, Any], dict[str, Any]]:
  """Evaluation by a stage's own loss: `fn(params, batch)` gives it as `loss` beside its metrics."""

  def fn(params: Any, batch: Any) -> dict[str, Any]:
    loss, metrics = loss_fn(params, batch, None)  # ty: ignore
    return metrics | {'loss': loss}

  return fn


def hidden(cfg: ModelConfig, run: Run, params: Any, batch: Any, key: Any) -> tuple[Any, models.Hidden]:
  """The parameters, whose adapters drop inputs if there is a key, and what the trunk makes of the batch."""
  params = params if key is None else lora.with_keys(params, key)
  segments = {'positions_BT': batch['positions'], 'segment_ids_BT': batch['segment_ids']}
  noisy = key if run.dropout or run.embed_noise else None
  return params, models.hidden(cfg, params, batch['tokens'], run=run, key=noisy, **segments)


def _of_targets(cfg: ModelConfig, run: Run, params: Any, batch: Any, chunks: int, key: Any) -> tuple[Array, Array, Any]:
  """(logp_BT, lse_BT) of the batch's targets, and what the layers add to the loss.

  A batch with `places` [B, K] (see `data.pairs`) has logits there alone, and 0 elsewhere.
  """
  params, out = hidden(cfg, run, params, batch, key)
  x_BTD, targets_BT = out.x_BTD, batch['targets']
  T = targets_BT.shape[1]
  if 'places' in batch:
    at = jax.vmap(lambda x, places: jnp.take(x, places, axis=0, mode='clip'))
    x_BTD, targets_BT = (at(x, batch['places']) for x in (x_BTD, targets_BT))
  if chunks == 1 and sharded.layout((len(targets_BT), targets_BT.shape[1]), run.rules) is None:
    logp_BT, lse_BT = lm.from_logits(models.unembed(cfg, params, x_BTD), targets_BT)
  else:
    logp_BT, lse_BT, _ = logprobs(cfg, run, params, x_BTD, targets_BT, chunks)
  if 'places' in batch:
    spread = jax.vmap(lambda x, places: jnp.zeros(T, x.dtype).at[places].set(x, mode='drop'))
    logp_BT, lse_BT = (spread(x, batch['places']) for x in (logp_BT, lse_BT))
  return logp_BT, lse_BT, out.aux


def logprobs(
  cfg: ModelConfig, run: Run, params: Any, x_BTD: Array, targets_BT: Array, chunks: int, temperature: float = 1.0
) -> tuple[Array, Array, Array]:
  """(logp_BT, lse_BT, entropy_BT), see `lm.logprobs`, of the logits over the temperature."""
  B, T = targets_BT.shape
  laid = sharded.layout((B, T), run.rules)
  scale, cap = cfg.logits_scaling, cfg.logits_softcap
  how: dict[str, Any] = {'softcap': None if cap is None else cap * scale, 'vocab': cfg.vocab_size}
  fn = lm.logprobs if laid is None else partial(sharded.logprobs, laid=laid)
  return fn(x_BTD, models.head(cfg, params), targets_BT, chunks=chunks, temperature=scale * temperature, **how)
