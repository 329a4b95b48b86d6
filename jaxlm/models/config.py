"""What a model is (ModelConfig: architecture and nothing else) and how it is computed (Run)."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from jaxlm.errors import InputError, at_least, within
from jaxlm.sharding import Rules

VOCAB_MULTIPLE = 128  # the vocabulary in memory: whole tiles for the matmul unit, and divisible by any mesh axis


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture of a decoder-only transformer. The defaults are Llama's kind."""

  vocab_size: int = 0
  d_model: int = 256
  n_layers: int = 4
  n_heads: int = 4
  n_kv_heads: int | None = None  # None: as many as n_heads
  head_dim: int | None = None  # None: d_model / n_heads
  d_ff: int = 704
  max_seq_len: int = 2048
  norm: Literal['rmsnorm', 'layernorm'] = 'rmsnorm'
  norm_eps: float = 1e-5
  activation: Literal['silu', 'gelu_tanh', 'gelu'] = 'silu'
  gated_mlp: bool = True
  positions: Literal['rope', 'learned'] = 'rope'
  rope_theta: float = 10000.0
  bias: bool = False
  tie_embeddings: bool = True
  embedding_multiplier: float = 1.0  # times what enters the first layer
  residual_multiplier: float = 1.0  # times what each sub-layer adds
  attention_multiplier: float | None = None  # times q k^T; None: 1 / sqrt(head_dim)
  logits_scaling: float = 1.0  # logits are divided by it

  def __post_init__(self):
    sizes = ('d_model', 'n_layers', 'n_heads', 'n_kv_heads', 'head_dim', 'd_ff', 'max_seq_len')
    at_least(1, 'model', **{name: getattr(self, name) for name in sizes})
    if self.head_dim is None and self.d_model % self.n_heads:
      raise InputError(f'model: d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; set head_dim')
    if self.n_heads % self.kv_heads:
      raise InputError(f'model: n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}')
    if self.positions == 'rope' and self.head_size % 2:
      raise InputError(f'model: RoPE turns pairs, so head_dim={self.head_size} must be even')
    scales = ('embedding_multiplier', 'residual_multiplier', 'attention_multiplier', 'logits_scaling')
    above_zero = (*scales, 'norm_eps', 'rope_theta')
    within('(0, inf)', 'model', **{name: getattr(self, name) for name in above_zero})

  @property
  def kv_heads(self) -> int:
    """Number of key and value heads."""
    return self.n_kv_heads or self.n_heads

  @property
  def head_size(self) -> int:
    """Width of one head."""
    return self.head_dim or self.d_model // self.n_heads

  @property
  def padded_vocab(self) -> int:
    """Rows of the embedding in memory; those past vocab_size are never predicted and are cut on export."""
    return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclasses.dataclass(frozen=True)
class Run:
  """How a model is computed; none of it changes what is computed, but for `dtype` (rounding) and `dropout`."""

  dtype: Any = jnp.float32  # of activations and matmuls; parameters, norms, softmax, logits and losses stay float32
  remat: str = 'none'  # 'none', 'full', 'dots', or comma-separated names of what to keep ('attn_out,mlp_out', ...)
  unroll: int = 1  # layers per iteration of the scan; n_layers unrolls all
  dropout: float = 0.0  # on what each sub-layer adds to the residual stream, where a key is given
  rules: Rules | None = None  # logical axis -> mesh axes; None leaves every layout to the compiler
