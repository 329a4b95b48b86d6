"""The metadata of a GGUF file as Hugging Face's config.json and generation_config.json.

Every key under the architecture's name is taken by a function here; one that is left over is refused by name.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxlm.errors import InputError
from jaxlm.interop.gguf_file import GGUFFile, shown

LARGEST = 1 << 31
MAX_EXPERTS = 4096
UNCHANGED = 'convert the model with settings that are supported'
MISSING = object()
SAMPLING = {
  'temp': 'temperature',
  'top_k': 'top_k',
  'top_p': 'top_p',
  'min_p': 'min_p',
  'penalty_repeat': 'repetition_penalty',
}
Config = tuple[dict[str, Any], dict[str, int]]  # config.json, and the sizes that gguf.py's tables name by letters


class Keys:
  """The metadata, taken key by key with types and ranges checked."""

  def __init__(self, where: str, metadata: dict[str, Any]):
    self.where, self.metadata, self.taken = where, metadata, set()
    self.name = ''

  def fail(self, what: str, todo: str = UNCHANGED) -> InputError:
    return InputError(f'{self.where}: {what}; {todo}')

  def general(self) -> str:
    """The architecture. Raises InputError on one that is not supported, an adapter, or one part of several."""
    name = self.plain('general.architecture', None)
    if name not in ARCHITECTURES:
      known = ', '.join(ARCHITECTURES)
      raise self.fail(f'architecture {shown(name)} is not supported', f'supported are {known}')
    kind = self.plain('general.type', 'model')
    if kind != 'model':
      raise self.fail(f'it holds no model but {shown(kind)}', 'give the file of the model itself')
    parts = self.plain('split.count', 1)
    if parts not in (0, 1):
      raise self.fail(f'it is one of {shown(parts)} parts', 'join them with llama-gguf-split --merge')
    if self.plain('general.quantization_version', 2) != 2:
      raise self.fail('general.quantization_version is not 2', 'quantize the model again')
    self.name = str(name)
    return self.name

  def plain(self, key: str, default: Any) -> Any:
    """The value of a key as it is. Raises InputError on arrays."""
    value = self.metadata.get(key, default)
    if isinstance(value, (list, np.ndarray)):
      raise self.fail(f'{key} is {shown(value)}, not one value')
    return value

  def take(self, key: str, default: Any = MISSING) -> Any:
    """The value of `ARCHITECTURE.key`. Raises InputError if it is an array, or missing and there is no default."""
    key = f'{self.name}.{key}'
    self.taken.add(key)
    value = self.plain(key, default)
    if value is MISSING:
      raise self.fail(f'it has no {key}', 'convert the model again')
    return value

  def layers(self, key: str) -> np.ndarray | None:
    """A key that may have a value for every layer; None if it is no array."""
    value = self.metadata.get(f'{self.name}.{key}')
    self.taken.add(f'{self.name}.{key}')
    return value if isinstance(value, np.ndarray) else None

  def whole(self, key: str, default: Any = MISSING) -> Any:
    """A whole number from 1 on, or the default if there is no such key."""
    each = self.layers(key)
    if each is not None and len({*each.tolist()}) == 1:  # the same for every layer
      value = each.tolist()[0]
    elif (value := self.take(key, default)) is default:
      return default
    if type(value) is not int or not 1 <= value < LARGEST:
      raise self.fail(f'{self.name}.{key} is {shown(value)}, not a whole number from 1 on')
    return value

  def real(self, key: str, default: Any = MISSING) -> Any:
    """A finite number above 0 in the fewest digits that give the float32, or the default if there is no such key."""
    if (value := self.take(key, default)) is default:
      return default
    with np.errstate(over='ignore'):
      if type(value) not in (int, float) or not 0 < np.float32(value) < np.inf:
        raise self.fail(f'{self.name}.{key} is {shown(value)}, not a number above 0')
    return _shortest(value)

  def only(self, key: str, *allowed: Any) -> None:
    """A key of which only these values are supported; the first is what a missing one means."""
    value = self.take(key, allowed[0])
    if value not in allowed:
      raise self.fail(f'{self.name}.{key}={shown(value)} is not supported')

  def finish(self) -> None:
    """Raises InputError if a key of the architecture was not taken: it may change the numbers."""
    left = sorted(k for k in self.metadata if k.startswith(f'{self.name}.') and k not in self.taken)
    if left:
      raise self.fail(f'{shown(left[0])} is not translated, and may change the numbers')

  def token(self, role: str) -> int | None:
    value = self.metadata.get(f'tokenizer.ggml.{role}_token_id')
    return value if type(value) is int and 0 <= value < LARGEST else None

  def token_ids(self) -> dict[str, int]:
    roles = {'bos': self.token('bos'), 'eos': self.token('eos'), 'pad': self.token('padding')}
    return {f'{role}_token_id': i for role, i in roles.items() if i is not None}

  def generation(self) -> dict[str, Any]:
    """generation_config.json: ids, all that end an answer, and the sampling that its makers recommend."""
    found: dict[str, Any] = dict(self.token_ids())
    ends = list(dict.fromkeys(i for role in ('eos', 'eot', 'eom') if (i := self.token(role)) is not None))
    if len(ends) > 1:
      found['eos_token_id'] = ends
    sampling = {}
    for theirs, name in SAMPLING.items():
      value = self.metadata.get(f'general.sampling.{theirs}')
      if isinstance(value, (int, float)) and math.isfinite(value):
        sampling[name] = _shortest(value)
    return {**found, **({'do_sample': True} if sampling else {}), **sampling}


def _shortest(value: float) -> float:
  """A float32 in the fewest digits that give it: 1e-05 is stored as 9.999999747378752e-06."""
  with np.errstate(over='ignore'):
    return float(str(np.float32(value))) if isinstance(value, float) else value


def tie(file: GGUFFile) -> dict[str, bool]:
  """A file without a head uses the embedding."""
  return {'tie_word_embeddings': 'output.weight' not in file.tensors}


def _rows(file: GGUFFile, name: str) -> int:
  entry = file.tensors.get(name)
  if entry is None:
    raise InputError(f'{file.path}: tensor {shown(name)} is missing; convert the model again')
  return entry.shape[0]


def _layers(keys: Keys, file: GGUFFile) -> int:
  layers = keys.whole('block_count')
  if layers > len(file.tensors):
    raise keys.fail(f'{layers} layers, and {len(file.tensors)} tensors in all', 'convert the model again')
  return layers


def _decoder(keys: Keys, file: GGUFFile, model_type: str, architecture: str) -> Config:
  """What all but GPT-2 have: RMSNorm, RoPE, grouped queries, a gated MLP."""
  heads, width = keys.whole('attention.head_count'), keys.whole('embedding_length')
  kv_heads = keys.whole('attention.head_count_kv', None) or heads
  size = keys.whole('attention.key_length', None) or max(1, width // heads)
  keys.only('attention.value_length', size)
  keys.only('rope.dimension_count', size)
  keys.only('attention.causal', True)
  keys.take('vocab_size', None)  # the embedding has it, and may have been cut to the tokens
  keys.only('tensor_data_layout', '', 'Meta AI original pth')
  if size % 2 or heads % kv_heads:
    raise keys.fail(f'{heads} heads of {size} with {kv_heads} key heads make no attention', 'convert the model again')
  config = {
    'architectures': [architecture],
    'model_type': model_type,
    'vocab_size': _rows(file, 'token_embd.weight'),
    'hidden_size': width,
    'num_hidden_layers': _layers(keys, file),
    'num_attention_heads': heads,
    'num_key_value_heads': kv_heads,
    'head_dim': size,
    'intermediate_size': keys.whole('feed_forward_length'),
    'hidden_act': 'silu',
    'max_position_embeddings': keys.whole('context_length'),
    'rms_norm_eps': keys.real('attention.layer_norm_rms_epsilon'),
    'rope_theta': keys.real('rope.freq_base', 10000.0),
    'rope_scaling': _rope_scaling(keys),
  }
  sizes = {'V': config['vocab_size'], 'D': width, 'F': config['intermediate_size'], 'N': size}
  return config, {**sizes, 'Q': heads * size, 'K': kv_heads * size}


def _rope_scaling(keys: Keys) -> dict[str, Any] | None:
  factor = keys.real('rope.scaling.factor', None)
  kind = str(keys.take('rope.scaling.type', 'linear' if factor else 'none'))
  keys.take('rope.scaling.finetuned', None)  # a remark, nothing is computed with it
  original = keys.whole('rope.scaling.original_context_length', None)
  for key in ('attn_factor', 'yarn_ext_factor', 'yarn_attn_factor'):
    keys.only(f'rope.scaling.{key}', 1.0)
  fast, slow = keys.real('rope.scaling.yarn_beta_fast', None), keys.real('rope.scaling.yarn_beta_slow', None)
  if kind == 'none' or (kind == 'linear' and factor in (None, 1)):
    return None
  if factor is None or kind not in ('linear', 'yarn') or (kind == 'yarn' and original is None):
    raise keys.fail(f'{keys.name}.rope.scaling.type={shown(kind)} is not supported as it is described here')
  if kind == 'linear':
    return {'rope_type': 'linear', 'factor': float(factor)}
  betas = {'beta_fast': fast, 'beta_slow': slow}
  scaling = {'rope_type': 'yarn', 'factor': float(factor), 'original_max_position_embeddings': original}
  return scaling | {k: v for k, v in betas.items() if v is not None}


def llama3_factors(scaling: dict[str, Any], theta: float, size: int) -> np.ndarray:
  """What Llama 3.1's scaling divides each frequency by, as llama.cpp stores it: float64 [size / 2]."""
  wavelengths = 2 * np.pi * theta ** (np.arange(0, size, 2) / size)
  low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
  turns = scaling['original_max_position_embeddings'] / wavelengths
  smooth = np.clip((turns - low) / (high - low), 0, 1)
  return 1 / ((1 - smooth) / scaling['factor'] + smooth)


def _llama3_scaling(keys: Keys, file: GGUFFile, theta: float, size: int) -> dict[str, Any] | None:
  """The scaling whose factors the file holds: they are the outcome, its settings are found from them."""
  entry = file.tensors['rope_freqs.weight']
  if entry.shape != (size // 2,) or entry.kind != 'F32':
    raise keys.fail(f"tensor 'rope_freqs.weight' is {entry.kind} of shape {entry.shape}, not F32 of ({size // 2},)")
  factors = file.read_rows(entry, 0, 1)[0].astype(np.float64)
  if (factors == 1).all():
    return None
  scaling = {'rope_type': 'llama3', 'factor': float(factors.max())}
  scaling |= {'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}
  sound = np.isfinite(factors).all() and factors.min() >= 1
  if not sound or not np.allclose(llama3_factors(scaling, theta, size), factors, rtol=1e-4, atol=0):
    raise keys.fail("tensor 'rope_freqs.weight' is not Llama 3.1's scaling of 8192 positions by (1, 4)")
  return scaling


def _llama(keys: Keys, file: GGUFFile) -> Config:
  experts, window = keys.take('expert_count', 0), keys.take('attention.sliding_window', 0)
  kind = 'mixtral' if experts else 'mistral' if window else 'llama'
  config, sizes = _decoder(keys, file, kind, f'{kind.capitalize()}ForCausalLM')
  if 'rope_freqs.weight' in file.tensors:
    if config['rope_scaling']:
      raise keys.fail(f"both {keys.name}.rope.scaling.type and tensor 'rope_freqs.weight' scale RoPE")
    config['rope_scaling'] = _llama3_scaling(keys, file, config['rope_theta'], config['head_dim'])
  if kind == 'llama':
    config['attention_bias'] = 'blk.0.attn_q.bias' in file.tensors
    config['mlp_bias'] = 'blk.0.ffn_up.bias' in file.tensors
    keys.only('expert_used_count', 0)
    return config, sizes
  config['sliding_window'] = keys.whole('attention.sliding_window') if window else None
  if kind == 'mixtral':
    sizes |= _experts(keys, config, 'num_local_experts', config['intermediate_size'])
    config['intermediate_size'] = sizes['M']
  return config, sizes


def _experts(keys: Keys, config: dict[str, Any], name: str, default: Any, normalized: bool = True) -> dict[str, int]:
  """Sizes of the experts; whether the weights of those chosen are normalized is the architecture's, not the file's."""
  count, used = keys.whole('expert_count'), keys.whole('expert_used_count')
  if used > count or count > MAX_EXPERTS:
    raise keys.fail(f'{used} of {count} experts make no layer', 'convert the model again')
  keys.only('expert_gating_func', 1)  # softmax
  keys.only('expert_weights_norm', normalized)
  keys.only('expert_weights_scale', 1.0, 0.0)  # 0: not scaled
  config |= {name: count, 'num_experts_per_tok': used}
  return {'E': count, 'M': keys.whole('expert_feed_forward_length', default)}


def _qwen(keys: Keys, file: GGUFFile) -> Config:
  config, sizes = _decoder(keys, file, keys.name, f'{keys.name.capitalize()}ForCausalLM')
  config |= (
    {'use_sliding_window': False} if keys.name == 'qwen2' else {'use_sliding_window': False, 'attention_bias': False}
  )
  return config, sizes


def _qwen3moe(keys: Keys, file: GGUFFile) -> Config:
  config, sizes = _decoder(keys, file, 'qwen3_moe', 'Qwen3MoeForCausalLM')
  sizes |= _experts(keys, config, 'num_experts', MISSING)
  every = {'moe_intermediate_size': sizes['M'], 'norm_topk_prob': True, 'decoder_sparse_step': 1, 'mlp_only_layers': []}
  return config | every | {'use_sliding_window': False, 'attention_bias': False}, sizes


def _qwen2moe(keys: Keys, file: GGUFFile) -> Config:
  config, sizes = _decoder(keys, file, 'qwen2_moe', 'Qwen2MoeForCausalLM')
  sizes |= _experts(keys, config, 'num_experts', MISSING, normalized=False)
  sizes['S'] = keys.whole('expert_shared_feed_forward_length')
  every = {'moe_intermediate_size': sizes['M'], 'shared_expert_intermediate_size': sizes['S'], 'qkv_bias': True}
  every |= {'norm_topk_prob': False, 'decoder_sparse_step': 1, 'mlp_only_layers': []}
  return config | every | {'use_sliding_window': False}, sizes


def _gemma(keys: Keys, file: GGUFFile, kind: str, architecture: str, sizes_27b: int) -> Config:
  config, sizes = _decoder(keys, file, kind, architecture)
  del config['hidden_act']
  # not in the file: llama.cpp too knows the 27 B models, scaled by the width of a head, by their number of layers
  of_width = config['num_hidden_layers'] == sizes_27b
  scalar = config['hidden_size'] // config['num_attention_heads'] if of_width else config['head_dim']
  gemma = {'hidden_activation': 'gelu_pytorch_tanh', 'query_pre_attn_scalar': scalar, 'attention_bias': False}
  return config | gemma, sizes


def _gemma2(keys: Keys, file: GGUFFile) -> Config:
  config, sizes = _gemma(keys, file, 'gemma2', 'Gemma2ForCausalLM', 46)
  keys.only('attention.sliding_window_pattern', 2)
  return config | {
    'sliding_window': keys.whole('attention.sliding_window'),
    'layer_types': _layer_types(2, config['num_hidden_layers']),
    'attn_logit_softcapping': keys.real('attn_logit_softcapping'),
    'final_logit_softcapping': keys.real('final_logit_softcapping'),
  }, sizes


def _gemma3(keys: Keys, file: GGUFFile) -> Config:
  keys.real('rope.freq_base')  # llama.cpp has no default of Gemma's for it
  config, sizes = _gemma(keys, file, 'gemma3_text', 'Gemma3ForCausalLM', 62)
  window, layers = keys.whole('attention.sliding_window', None), config['num_hidden_layers']
  pattern = keys.layers('attention.sliding_window_pattern')
  if pattern is not None and pattern.dtype == bool and len(pattern) == layers:
    types = ['sliding_attention' if local else 'full_attention' for local in pattern.tolist()]
  else:
    types = _layer_types(keys.whole('attention.sliding_window_pattern', 6), layers)
  return config | {
    'sliding_window': window,
    'layer_types': types if window else ['full_attention'] * layers,
    'rope_local_base_freq': keys.real('rope.freq_base_swa', 10000.0),
    'attn_logit_softcapping': None,
    'final_logit_softcapping': keys.real('final_logit_softcapping', None),
  }, sizes


def _layer_types(every: int, layers: int) -> list[str]:
  """The last of every so many layers sees all, the others a window."""
  return ['sliding_attention' if (i + 1) % every else 'full_attention' for i in range(layers)]


def _olmo2(keys: Keys, file: GGUFFile) -> Config:
  config, sizes = _decoder(keys, file, 'olmo2', 'Olmo2ForCausalLM')
  return config | {'attention_bias': False}, sizes


def _gpt2(keys: Keys, file: GGUFFile) -> Config:
  heads, width = keys.whole('attention.head_count'), keys.whole('embedding_length')
  keys.only('attention.head_count_kv', heads)
  keys.take('vocab_size', None)
  if width % heads:
    raise keys.fail(f'a width of {width} is not a multiple of {heads} heads', 'convert the model again')
  config = {
    'architectures': ['GPT2LMHeadModel'],
    'model_type': 'gpt2',
    'vocab_size': _rows(file, 'token_embd.weight'),
    'n_embd': width,
    'n_layer': _layers(keys, file),
    'n_head': heads,
    'n_inner': keys.whole('feed_forward_length'),
    'n_positions': _rows(file, 'position_embd.weight'),
    'activation_function': 'gelu_new',
    'layer_norm_epsilon': keys.real('attention.layer_norm_epsilon'),
  }
  keys.only('context_length', config['n_positions'])
  sizes = {'V': config['vocab_size'], 'D': width, 'T': 3 * width, 'F': config['n_inner']}
  return config, {**sizes, 'P': config['n_positions']}


ARCHITECTURES: dict[str, Callable[[Keys, GGUFFile], Config]] = {
  'llama': _llama,
  'qwen2': _qwen,
  'qwen3': _qwen,
  'qwen2moe': _qwen2moe,
  'qwen3moe': _qwen3moe,
  'gemma2': _gemma2,
  'gemma3': _gemma3,
  'olmo2': _olmo2,
  'gpt2': _gpt2,
}
