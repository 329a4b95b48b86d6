"""A model for more tokens than it was trained with."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.models.config import ModelConfig


def grow(cfg: ModelConfig, params: Any, vocab_size: int) -> tuple[ModelConfig, Any]:
  """`(cfg, params)` for `vocab_size` tokens: new ones begin as the mean of the old ones, in embedding and head.

  Then they are as likely as the others are on average (Hewitt 2021, "Initializing new word embeddings"). Raises
  ValueError for fewer tokens than there are.
  """
  if vocab_size < cfg.vocab_size:
    raise ValueError(f'a vocabulary of {cfg.vocab_size} tokens does not shrink to {vocab_size}')
  new = dataclasses.replace(cfg, vocab_size=vocab_size)

  def grown(table_VD: jax.Array) -> jax.Array:
    mean_D = jnp.mean(table_VD[: cfg.vocab_size], axis=0)
    table_VD = jnp.pad(table_VD, ((0, new.padded_vocab - len(table_VD)), (0, 0)))
    rows_V1 = jnp.arange(len(table_VD))[:, None]
    return jnp.where((rows_V1 >= cfg.vocab_size) & (rows_V1 < vocab_size), mean_D, table_VD)

  params = {**params, 'embed': grown(params['embed'])}
  return new, params if cfg.tie_embeddings else {**params, 'head': grown(params['head'].T).T}
