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
  rope_theta_local: float | None = None  # of the local layers, which are then not scaled (Gemma 3); None: the same
  rope_scaling: Literal['none', 'linear', 'llama3', 'yarn'] = 'none'  # how positions past the first training are met
  rope_factor: float = 1.0  # so many times the length
  rope_original_len: int = 8192  # the length of the first training
  rope_low: float = 1.0  # llama3: turns in that length below which a frequency is divided; yarn: the same (beta_slow)
  rope_high: float = 4.0  # llama3: turns above which it stays; yarn: the same (beta_fast, 32 there)
  rope_amplitude: float = 1.0  # of the rotated queries and keys (yarn: 0.1 ln(rope_factor) + 1), where they are scaled
  bias: bool = False  # in every matmul of a layer
  qkv_bias: bool = False  # in those of queries, keys and values (Qwen 2)
  norm_at: Literal['pre', 'post', 'both'] = 'pre'  # a sub-layer's input, output (OLMo 2) or both (Gemma 2) are normed
  qk_norm: Literal['none', 'head', 'whole'] = 'none'  # queries and keys are normed a head (Qwen 3) or whole (OLMo 2)
  pattern: tuple[Literal['global', 'local'], ...] = ('global',)  # what layers attend to, repeated to the last
  window: int = 4096  # tokens that a local layer attends to, its own included
  n_experts: int = 0  # of each feed-forward layer; 0: one plain one
  experts_per_token: int = 2
  normalize_experts: bool = True  # the weights of a token's experts are made to add to 1
  shared_d_ff: int = 0  # width of one more expert, for every token; 0: there is none (Qwen 2 MoE has one)
  attention_softcap: float | None = None  # scores become cap * tanh(scores / cap) (Gemma 2)
  logits_softcap: float | None = None
  tie_embeddings: bool = True
  embedding_multiplier: float = 1.0  # times what enters the first layer
  residual_multiplier: float = 1.0  # times what each sub-layer adds
  attention_multiplier: float | None = None  # times q k^T; None: 1 / sqrt(head_dim)
  logits_scaling: float = 1.0  # logits are divided by it

  def __post_init__(self):
    sizes = ('d_model', 'n_layers', 'n_heads', 'n_kv_heads', 'head_dim', 'd_ff', 'max_seq_len', 'window')
    at_least(1, 'model', **{name: getattr(self, name) for name in sizes})
    if self.head_dim is None and self.d_model % self.n_heads:
      raise InputError(f'model: d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; set head_dim')
    if self.n_heads % self.kv_heads:
      raise InputError(f'model: n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}')
    if self.positions == 'rope' and self.head_size % 2:
      raise InputError(f'model: RoPE turns pairs, so head_dim={self.head_size} must be even')
    if self.rope_scaling in ('llama3', 'yarn') and not self.rope_low < self.rope_high:
      raise InputError(f'model: rope_low={self.rope_low} must be below rope_high={self.rope_high}')
    if self.rope_scaling == 'yarn' and self.rope_theta <= 1:
      raise InputError(f'model: rope_theta={self.rope_theta} must be above 1 for yarn')
    if self.n_experts and not 1 <= self.experts_per_token <= self.n_experts:
      raise InputError(
        f'model: experts_per_token={self.experts_per_token} must be from 1 to n_experts={self.n_experts}'
      )
    if self.n_experts and self.bias:
      raise InputError('model: experts have no biases here; set bias=False')
    at_least(0, 'model', shared_d_ff=self.shared_d_ff)
    if self.shared_d_ff and not self.n_experts:
      raise InputError(
        f'model: shared_d_ff={self.shared_d_ff} is of a model with experts; set n_experts, or leave it 0'
      )
    if not self.pattern:
      raise InputError("model.pattern needs a kind of layer, 'global' or 'local'")
    scales = ('embedding_multiplier', 'residual_multiplier', 'attention_multiplier', 'logits_scaling')
    ropes = ('rope_theta', 'rope_theta_local', 'rope_factor', 'rope_low', 'rope_high', 'rope_amplitude')
    above_zero = (*scales, *ropes, 'norm_eps', 'attention_softcap', 'logits_softcap')
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
  def kinds(self) -> tuple[str, ...]:
    """What each layer attends to: 'global' or 'local'."""
    return tuple(self.pattern[i % len(self.pattern)] for i in range(self.n_layers))

  @property
  def padded_vocab(self) -> int:
    """Rows of the embedding in memory; those past vocab_size are never predicted and are cut on export."""
    return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def computed_in(asked: str, platform: str) -> Any:
  """The dtype of activations and matmuls by its name; 'auto' is bfloat16 on accelerators and float32 on CPUs."""
  return jnp.dtype({'auto': 'float32' if platform == 'cpu' else 'bfloat16'}.get(asked, asked))


@dataclasses.dataclass(frozen=True)
class Run:
  """How a model is computed; none of it changes what is computed, but for `dtype` (rounding) and `dropout`."""

  dtype: Any = jnp.float32  # of activations and matmuls; parameters, norms, softmax, logits and losses stay float32
  # 'xla', 'splash' (TPU), 'cudnn' (GPU), 'ring' (a sequence over devices), or 'reached' (of a cache what is used)
  attention: str = 'xla'
  remat: str = 'none'  # 'none', 'full', 'dots', or comma-separated names of what to keep ('attn_out,mlp_out', ...)
  unroll: int = 1  # layers per iteration of the scan; n_layers unrolls all
  dropout: float = 0.0  # on what each sub-layer adds to the residual stream, where a key is given
  embed_noise: float = 0.0  # NEFTune's alpha: noise on what enters the first layer, where a key is given
  float8: bool = False  # the layers' matmuls in eight bits, but for experts (of training: decoding has none of it)
  ragged: bool = False  # what goes to other devices' experts is sent as it is, not padded (not on CPUs)
  rules: Rules | None = None  # logical axis -> mesh axes; None leaves every layout to the compiler
