"""The objective of distillation: what a frozen teacher says of the same places is what a student learns to say.

The teacher's parameters are in the batch, as `batch['teacher']`: they are an argument of the step, the same for all
its micro-batches, and no part of the state.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlm import masked, models, objectives
from jaxlm.losses import distill, lm
from jaxlm.masked import Sum
from jaxlm.models import ModelConfig, Run
from jaxlm.train.step import LossFn

Divergence = Callable[[Array, Array, Array], Sum]  # (student_BTV, teacher_BTV, mask_BT)


def divergence(loss: str, *, beta: float = 0.5, temperature: float = 1.0) -> Divergence:
  """One of `jaxlm.losses.distill` with its settings; `beta` is that of jensen_shannon."""
  how: dict[str, Any] = {'temperature': temperature} | ({'beta': beta} if loss == 'jensen_shannon' else {})
  return lambda student_BTV, teacher_BTV, mask_BT: getattr(distill, loss)(student_BTV, teacher_BTV, mask_BT, **how)


def learn(
  cfg: ModelConfig,
  run: Run,
  teacher: ModelConfig,
  taught: Run,
  apart: Divergence,
  *,
  alpha: float = 1.0,
  chunks: int = 1,
  balance: float = 0.0,
  router_z: float = 0.0,
) -> LossFn:
  """alpha * divergence + (1 - alpha) * next-token cross entropy where the loss mask is on; weight: its targets.

  The cross entropy is of targets where `data_mask`, if the batch has it, is on: a student's own answers are none.
  `balance` and `router_z` as in `objectives.next_token`. With `chunks` the logits of both models are there for one part
  of the sequence at a time, and are made once more for the gradient. Metrics: `distill/divergence` and `distill/nll`,
  nats a token.
  """

  def loss_fn(params: Any, batch: Any, key: Any) -> tuple[Sum, dict[str, Any]]:
    found, logp_BT, aux = _both(cfg, run, teacher, taught, apart, params, batch, key, chunks)
    mask_BT = batch['loss_mask']
    named = masked.total(-logp_BT, mask_BT * batch.get('data_mask', 1.0))
    loss = Sum(alpha * found.total + (1.0 - alpha) * named.total, found.weight)
    metrics = {'distill/divergence': found, 'distill/nll': masked.total(-logp_BT, mask_BT)}
    if aux:
      loss = Sum(loss.total + loss.weight * (balance * aux['balance'] + router_z * aux['router_z']), loss.weight)
      metrics |= {name: Sum(value * loss.weight, loss.weight) for name, value in aux.items()}
    return loss, metrics

  return loss_fn


def by_group(
  cfg: ModelConfig,
  run: Run,
  teacher: ModelConfig,
  taught: Run,
  apart: Divergence,
  *,
  groups: int,
  chunks: int = 1,
) -> Callable[[Any, Any], dict[str, Sum]]:
  """Evaluation: what `objectives.by_group` gives, and `divergence` over all groups. No dropout."""
  still = objectives.quiet(run)

  def fn(params: Any, batch: Any) -> dict[str, Sum]:
    found, logp_BT, _ = _both(cfg, still, teacher, taught, apart, params, batch, None, chunks)
    return objectives.grouped(logp_BT, batch, groups) | {'divergence': found}

  return fn


def _both(
  cfg: ModelConfig,
  run: Run,
  teacher: ModelConfig,
  taught: Run,
  apart: Divergence,
  params: Any,
  batch: Any,
  key: Any,
  chunks: int,
) -> tuple[Sum, Array, Any]:
  """The divergence, the student's log-probabilities [B, T] of the targets, and what its layers add to the loss."""
  params, out = objectives.hidden(cfg, run, params, batch, key)
  frozen = jax.lax.stop_gradient(batch['teacher'])
  shown_BTD = objectives.hidden(teacher, objectives.quiet(taught), frozen, batch, None)[1].x_BTD
  vocab = min(cfg.vocab_size, teacher.vocab_size)  # one tokenizer: what is past it stands for nothing

  def part(own_BtD: Array, shown_BtD: Array, targets_Bt: Array, mask_Bt: Array) -> tuple[Sum, Array]:
    own_BtV = models.unembed(cfg, params, own_BtD)[..., :vocab]
    shown_BtV = models.unembed(teacher, frozen, shown_BtD)[..., :vocab]
    return apart(own_BtV, shown_BtV, mask_Bt), lm.from_logits(own_BtV, targets_Bt)[0]

  found, logp_BT = _in_parts(part, chunks, out.x_BTD, shown_BTD, batch['targets'], batch['loss_mask'])
  return found, logp_BT, out.aux


def _in_parts(part: Callable[..., tuple[Sum, Array]], chunks: int, *arrays: Array) -> tuple[Sum, Array]:
  """`part(*arrays)` over every chunks-th place of the sequence at a time, which lie on devices as the whole does."""
  if chunks == 1:
    return part(*arrays)
  B, T = arrays[0].shape[:2]

  def cut(x: Array) -> Array:
    x = jnp.pad(x, [(0, 0), (0, -T % chunks)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, -1, chunks, *x.shape[2:]), 2, 0)

  found, logp_CBt = jax.lax.map(jax.checkpoint(lambda some: part(*some)), tuple(map(cut, arrays)))
  return masked.reduce_stacked(found), jnp.moveaxis(logp_CBt, 0, 2).reshape(B, -1)[:, :T]
