"""One short function a stage: apply the model, take a loss, name the metrics. Nothing here closes over an array."""

import math
from typing import Any

import jax.numpy as jnp

from jaxlm import masked, models
from jaxlm.losses import lm
from jaxlm.masked import Sum
from jaxlm.models import ModelConfig, Run
from jaxlm.train.step import LossFn


def next_token(cfg: ModelConfig, run: Run, *, z_loss: float = 0.0, chunks: int = 1) -> LossFn:
  """Pre-training and evaluation: next-token cross entropy over the batch that `data.packing` makes.

  Metrics: `nll` (nats a token, without the z term) and `bits_per_byte` of the text that the targets stand for.
  """

  def loss_fn(params: Any, batch: Any, key: Any) -> tuple[Sum, dict[str, Any]]:
    out = models.hidden(
      cfg,
      params,
      batch['tokens'],
      run=run,
      positions_BT=batch['positions'],
      segment_ids_BT=batch['segment_ids'],
      key=key if run.dropout else None,
    )
    targets_BT, mask_BT = batch['targets'], batch['loss_mask']
    if chunks == 1:
      logp_BT, lse_BT = lm.from_logits(models.unembed(cfg, params, out.x_BTD), targets_BT)
    else:
      head_DV = models.head(cfg, params)
      how = {'temperature': cfg.logits_scaling, 'chunks': chunks, 'vocab': cfg.vocab_size}
      logp_BT, lse_BT, _ = lm.logprobs(out.x_BTD, head_DV, targets_BT, **how)
    nats = masked.total(-logp_BT, mask_BT)
    bytes_ = jnp.sum(batch['target_bytes'], dtype=jnp.float32)
    metrics = {'nll': nats, 'bits_per_byte': Sum(nats.total / math.log(2), bytes_)}
    return masked.total(z_loss * lse_BT**2 - logp_BT, mask_BT), metrics

  return loss_fn
