"""Published architectures by name: `presets.get('llama3.1-8b')` is a ModelConfig, as `jaxlm import` would make it."""

import difflib
from typing import Any

from jaxlm.errors import InputError
from jaxlm.models.config import ModelConfig


def _gpt2(layers: int, width: int, heads: int, length: int = 1024) -> ModelConfig:
  return ModelConfig(
    vocab_size=50257,
    d_model=width,
    n_layers=layers,
    n_heads=heads,
    d_ff=4 * width,
    max_seq_len=length,
    norm='layernorm',
    activation='gelu_tanh',
    gated_mlp=False,
    positions='learned',
    bias=True,
  )


def _llama(layers: int, width: int, heads: int, kv: int, ffn: int, **more: Any) -> ModelConfig:
  fields: dict[str, Any] = {'d_model': width, 'n_layers': layers, 'n_heads': heads, 'n_kv_heads': kv, 'd_ff': ffn}
  fields |= {'vocab_size': 32000, 'max_seq_len': 4096, 'tie_embeddings': False} | more
  return ModelConfig(**fields)


def _llama3(*sizes: int, factor: float = 8.0, **more: Any) -> ModelConfig:
  scaling: dict[str, Any] = {} if factor == 1 else {'rope_scaling': 'llama3', 'rope_factor': factor}
  length = 8192 if factor == 1 else 131072
  return _llama(*sizes, **{'vocab_size': 128256, 'max_seq_len': length, 'rope_theta': 500000.0} | scaling | more)


def _qwen2(*sizes: int, **more: Any) -> ModelConfig:
  fixed = {'vocab_size': 151936, 'max_seq_len': 32768, 'rope_theta': 1e6, 'norm_eps': 1e-6, 'qkv_bias': True}
  return _llama(*sizes, **fixed | more)


def _qwen3(*sizes: int, **more: Any) -> ModelConfig:
  fixed = {'vocab_size': 151936, 'max_seq_len': 40960, 'rope_theta': 1e6, 'norm_eps': 1e-6, 'qk_norm': 'head'}
  return _llama(*sizes, **fixed | {'head_dim': 128} | more)


def _gemma(*sizes: int, scalar: int, **more: Any) -> ModelConfig:
  fixed = {
    'vocab_size': 256000,
    'max_seq_len': 8192,
    'head_dim': 256,
    'norm_eps': 1e-6,
    'activation': 'gelu_tanh',
    'norm_at': 'both',
    'tie_embeddings': True,
    'embedding_multiplier': sizes[1] ** 0.5,
    'attention_multiplier': scalar**-0.5,
  }
  return _llama(*sizes, **fixed | more)


def _gemma2(*sizes: int, scalar: int = 256, **more: Any) -> ModelConfig:
  alternating = {'pattern': ('local', 'global'), 'window': 4096, 'attention_softcap': 50.0, 'logits_softcap': 30.0}
  return _gemma(*sizes, scalar=scalar, **alternating | more)


def _gemma3(*sizes: int, scalar: int = 256, factor: float = 8.0, **more: Any) -> ModelConfig:
  fixed: dict[str, Any] = {
    'vocab_size': 262208,
    'max_seq_len': 131072,
    'pattern': ('local',) * 5 + ('global',),
    'window': 1024,
    'qk_norm': 'head',
    'rope_theta': 1e6,
    'rope_theta_local': 1e4,
  }
  scaling: dict[str, Any] = {} if factor == 1 else {'rope_scaling': 'linear', 'rope_factor': factor}
  return _gemma(*sizes, scalar=scalar, **fixed | scaling | more)


def _olmo2(*sizes: int) -> ModelConfig:
  fixed: dict[str, Any] = {'vocab_size': 100352, 'rope_theta': 500000.0, 'norm_eps': 1e-6}
  return _llama(*sizes, **fixed, norm_at='post', qk_norm='whole')


_GPT3 = {'125m': (12, 768, 12), '350m': (24, 1024, 16), '760m': (24, 1536, 16), '2.7b': (32, 2560, 32)}
_SMOL: dict[str, Any] = {'vocab_size': 49152, 'max_seq_len': 8192, 'rope_theta': 1e5, 'tie_embeddings': True}
PRESETS: dict[str, ModelConfig] = {
  'gpt2-124m': _gpt2(12, 768, 12),
  'gpt2-355m': _gpt2(24, 1024, 16),
  'gpt2-774m': _gpt2(36, 1280, 20),
  'gpt2-1.5b': _gpt2(48, 1600, 25),
  **{f'gpt3-{name}': _gpt2(*sizes, length=2048) for name, sizes in _GPT3.items()},
  'gpt3-6.7b': _gpt2(32, 4096, 32, 2048),
  'gpt3-175b': _gpt2(96, 12288, 96, 2048),
  'llama2-7b': _llama(32, 4096, 32, 32, 11008),
  'llama2-13b': _llama(40, 5120, 40, 40, 13824),
  'llama2-70b': _llama(80, 8192, 64, 8, 28672),
  'llama3-8b': _llama3(32, 4096, 32, 8, 14336, factor=1.0),
  'llama3-70b': _llama3(80, 8192, 64, 8, 28672, factor=1.0),
  'llama3.1-8b': _llama3(32, 4096, 32, 8, 14336),
  'llama3.1-70b': _llama3(80, 8192, 64, 8, 28672),
  'llama3.1-405b': _llama3(126, 16384, 128, 8, 53248),
  'llama3.2-1b': _llama3(16, 2048, 32, 8, 8192, factor=32.0, head_dim=64, tie_embeddings=True),
  'llama3.2-3b': _llama3(28, 3072, 24, 8, 8192, factor=32.0, head_dim=128, tie_embeddings=True),
  'smollm2-135m': _llama(30, 576, 9, 3, 1536, **_SMOL),
  'smollm2-360m': _llama(32, 960, 15, 5, 2560, **_SMOL),
  'smollm2-1.7b': _llama(24, 2048, 32, 32, 8192, **_SMOL | {'rope_theta': 130000.0}),
  'mistral-7b': _llama(32, 4096, 32, 8, 14336, max_seq_len=32768, pattern=('local',), window=4096),
  'mixtral-8x7b': _llama(32, 4096, 32, 8, 14336, max_seq_len=32768, rope_theta=1e6, n_experts=8, experts_per_token=2),
  'qwen2.5-0.5b': _qwen2(24, 896, 14, 2, 4864, tie_embeddings=True),
  'qwen2.5-1.5b': _qwen2(28, 1536, 12, 2, 8960, max_seq_len=131072, tie_embeddings=True),
  'qwen2.5-7b': _qwen2(28, 3584, 28, 4, 18944, vocab_size=152064, max_seq_len=131072),
  'qwen1.5-moe-a2.7b': _qwen2(
    *(24, 2048, 16, 16, 1408),
    max_seq_len=8192,
    n_experts=60,
    experts_per_token=4,
    normalize_experts=False,
    shared_d_ff=5632,
  ),
  'qwen3-0.6b': _qwen3(28, 1024, 16, 8, 3072, tie_embeddings=True),
  'qwen3-1.7b': _qwen3(28, 2048, 16, 8, 6144, tie_embeddings=True),
  'qwen3-4b': _qwen3(36, 2560, 32, 8, 9728, tie_embeddings=True),
  'qwen3-8b': _qwen3(36, 4096, 32, 8, 12288),
  'qwen3-30b-a3b': _qwen3(48, 2048, 32, 4, 768, n_experts=128, experts_per_token=8),
  'gemma2-2b': _gemma2(26, 2304, 8, 4, 9216),
  'gemma2-9b': _gemma2(42, 3584, 16, 8, 14336),
  'gemma2-27b': _gemma2(46, 4608, 32, 16, 36864, scalar=144, head_dim=128),
  'gemma3-1b': _gemma3(26, 1152, 4, 1, 6912, factor=1.0, vocab_size=262144, max_seq_len=32768, window=512),
  'gemma3-4b': _gemma3(34, 2560, 8, 4, 10240),
  'gemma3-12b': _gemma3(48, 3840, 16, 8, 15360),
  'gemma3-27b': _gemma3(62, 5376, 32, 16, 21504, scalar=168, head_dim=128),
  'olmo2-7b': _olmo2(32, 4096, 32, 32, 11008),
  'olmo2-13b': _olmo2(40, 5120, 40, 40, 13824),
}


def get(name: str) -> ModelConfig:
  """The architecture of this name. Raises InputError with the nearest names if there is none."""
  if name not in PRESETS:
    near = difflib.get_close_matches(name, PRESETS, 3, 0.4)
    raise InputError(
      f'no preset {name!r}; {"did you mean " + ", ".join(near) if near else "there are " + ", ".join(PRESETS)}'
    )
  return PRESETS[name]
