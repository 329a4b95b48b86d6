"""One short function a stage: apply the model, take a loss, name the metrics. Nothing here closes over an array."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlm import lora, masked, models
from jaxlm.losses import lm, sharded
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
  quiet = dataclasses.replace(run, dropout=0.0, embed_noise=0.0)

  def fn(params: Any, batch: Any) -> dict[str, Sum]:
    logp_BT, _, _ = _of_targets(cfg, quiet, params, batch, chunks, None)
    mask_BT = batch['loss_mask']
    add = lambda x_BT: jax.ops.segment_sum(x_BT.reshape(-1), batch['group'].reshape(-1), groups)
    nats_G = add(jnp.where(mask_BT > 0, -logp_BT * mask_BT, 0.0))
    bytes_G = add(batch['target_bytes'].astype(jnp.float32))
    return {'nll': Sum(nats_G, add(mask_BT)), 'bits_per_byte': Sum(nats_G / math.log(2), bytes_G)}

  return fn


def _of_targets(cfg: ModelConfig, run: Run, params: Any, batch: Any, chunks: int, key: Any) -> tuple[Array, Array, Any]:
  """(logp_BT, lse_BT) of the batch's targets, and what the layers add to the loss."""
  params = params if key is None else lora.with_keys(params, key)
  segments = {'positions_BT': batch['positions'], 'segment_ids_BT': batch['segment_ids']}
  out = models.hidden(
    cfg, params, batch['tokens'], run=run, key=key if run.dropout or run.embed_noise else None, **segments
  )
  laid = sharded.layout(batch['targets'].shape, run.rules)
  if chunks == 1 and laid is None:
    return *lm.from_logits(models.unembed(cfg, params, out.x_BTD), batch['targets']), out.aux
  rows = out.x_BTD, models.head(cfg, params), batch['targets']
  scale, cap = cfg.logits_scaling, cfg.logits_softcap
  how: dict[str, Any] = {'temperature': scale, 'softcap': None if cap is None else cap * scale, 'vocab': cfg.vocab_size}
  logprobs = lm.logprobs if laid is None else partial(sharded.logprobs, laid=laid)
  logp_BT, lse_BT, _ = logprobs(*rows, chunks=chunks, **how)
  return logp_BT, lse_BT, out.aux
