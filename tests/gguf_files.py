"""Small models of every family, random, and the GGUF files that llama.cpp's converter would make of them.

Files are written by the `gguf` library, under the names that its own table gives for Hugging Face's.
"""

from pathlib import Path

import gguf
import numpy as np

V, D, H, K, N, F, M, S, E, P = (
  131,
  11,
  6,
  2,
  10,
  17,
  13,
  19,
  5,
  61,
)  # as in conftest: distinct, so that swapped axes fail
LAYERS = 2


def layer_shapes(kind: str) -> dict[str, tuple[int, ...]]:
  if kind == 'gpt2':
    linear = {'attn.c_attn': (D, 3 * D), 'attn.c_proj': (D, D), 'mlp.c_fc': (D, F), 'mlp.c_proj': (F, D)}
    shapes = {f'{name}.weight': shape for name, shape in linear.items()}
    shapes |= {f'{name}.bias': shape[-1:] for name, shape in linear.items()}
    return shapes | {f'{name}.{what}': (D,) for name in ('ln_1', 'ln_2') for what in ('weight', 'bias')}
  linear = {'q_proj': (H * N, D), 'k_proj': (K * N, D), 'v_proj': (K * N, D), 'o_proj': (D, H * N)}
  shapes = {f'self_attn.{name}.weight': shape for name, shape in linear.items()}
  if kind in ('qwen2', 'qwen2moe'):
    shapes |= {f'self_attn.{name}.bias': shape[:1] for name, shape in linear.items() if name != 'o_proj'}
  if kind == 'llama-biased':
    shapes |= {f'self_attn.{name}.bias': shape[:1] for name, shape in linear.items()}
  if kind in ('qwen3', 'qwen3moe', 'gemma3'):
    shapes |= {'self_attn.q_norm.weight': (N,), 'self_attn.k_norm.weight': (N,)}
  if kind == 'olmo2':
    shapes |= {'self_attn.q_norm.weight': (H * N,), 'self_attn.k_norm.weight': (K * N,)}
  norms = ['post_attention_layernorm'] + ['input_layernorm'] * (kind != 'olmo2')
  norms += ['post_feedforward_layernorm'] * (kind in ('olmo2', 'gemma2', 'gemma3'))
  norms += ['pre_feedforward_layernorm'] * (kind in ('gemma2', 'gemma3'))
  shapes |= {f'{name}.weight': (D,) for name in norms}
  mlp = {'gate_proj': (F, D), 'up_proj': (F, D), 'down_proj': (D, F)}
  if kind == 'mixtral':
    names = {'w1': (F, D), 'w3': (F, D), 'w2': (D, F)}
    shapes |= {f'block_sparse_moe.experts.{e}.{w}.weight': s for e in range(E) for w, s in names.items()}
    return shapes | {'block_sparse_moe.gate.weight': (E, D)}
  if kind in ('qwen2moe', 'qwen3moe'):
    shared = {f'mlp.shared_expert.{w}.weight': tuple(S if n == F else n for n in s) for w, s in mlp.items()}
    shapes |= shared | {'mlp.shared_expert_gate.weight': (1, D)} if kind == 'qwen2moe' else {}
    mlp = {name: tuple(M if n == F else n for n in shape) for name, shape in mlp.items()}
    shapes |= {f'mlp.experts.{e}.{w}.weight': s for e in range(E) for w, s in mlp.items()}
    return shapes | {'mlp.gate.weight': (E, D)}
  return shapes | {f'mlp.{name}.weight': shape for name, shape in mlp.items()}


def random_model(kind: str, tied: bool = False) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(3)
  if kind == 'gpt2':
    shapes = {'transformer.wte.weight': (V, D), 'transformer.wpe.weight': (P, D)}
    shapes |= {'transformer.ln_f.weight': (D,), 'transformer.ln_f.bias': (D,)}
    prefix = 'transformer.h'
  else:
    shapes, prefix = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)}, 'model.layers'
  if not tied and 'gemma' not in kind:
    shapes['lm_head.weight'] = (V, D)
  for i in range(LAYERS):
    shapes |= {f'{prefix}.{i}.{name}': shape for name, shape in layer_shapes(kind).items()}
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
  """What llama.cpp's converter does to q and k for its RoPE."""
  return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def converted(architecture: str, model: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors of a GGUF file, named by the library's own table."""
  table = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), LAYERS)
  tensors, stacks = {}, {}
  for name, value in model.items():
    if architecture == 'llama' and '.q_proj.' in name:
      value = permuted(value, H)
    if architecture == 'llama' and '.k_proj.' in name:
      value = permuted(value, K)
    if architecture in ('gemma2', 'gemma3') and name.endswith('norm.weight'):
      value = value + np.float32(1)
    if architecture == 'gpt2' and '.c_' in name and name.endswith('.weight'):
      value = value.T
    if '.experts.' in name:
      before, _, after = name.partition('.experts.')
      stacks.setdefault(f'{before}.experts.{after.partition(".")[2]}', []).append(value)
    else:  # squeezed as the converter does
      tensors[table.get_name(name, try_suffixes=('.weight', '.bias'))] = value.squeeze()
  for name, values in stacks.items():
    name = name.replace('model.', '').replace('block_sparse_moe', 'feed_forward') if 'sparse' in name else name
    tensors[table.get_name(name, try_suffixes=('.weight',))] = np.stack(values)
  assert None not in tensors
  return tensors


COMMON = {
  'block_count': LAYERS,
  'context_length': P,
  'embedding_length': D,
  'feed_forward_length': F,
  'attention.head_count': H,
  'attention.head_count_kv': K,
  'attention.key_length': N,
  'attention.value_length': N,
  'attention.layer_norm_rms_epsilon': 1e-6,
  'rope.freq_base': 5e5,
}
GEMMA2 = {'attention.sliding_window': 7, 'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0}
GPT2 = {k: v for k, v in COMMON.items() if not k.startswith(('attention', 'rope'))}
GPT2 |= {'attention.head_count': 1, 'attention.layer_norm_epsilon': 1e-5}
KEYS = {
  'llama': COMMON | {'vocab_size': V, 'rope.dimension_count': N},
  'llama-biased': COMMON,
  'mistral': COMMON | {'attention.sliding_window': 7},
  'mixtral': COMMON | {'expert_count': E, 'expert_used_count': 2},
  'qwen2': COMMON,
  'qwen3': COMMON,
  'qwen3moe': COMMON | {'expert_count': E, 'expert_used_count': 2, 'expert_feed_forward_length': M},
  'qwen2moe': COMMON
  | {'expert_count': E, 'expert_used_count': 2, 'expert_feed_forward_length': M}
  | {'expert_shared_feed_forward_length': S},
  'gemma2': COMMON | GEMMA2,
  'gemma3': COMMON | {'attention.sliding_window': 7},
  'olmo2': COMMON,
  'gpt2': GPT2,
}
FAMILY = {'llama-biased': 'llama', 'mistral': 'llama', 'mixtral': 'llama'}


def add(writer: gguf.GGUFWriter, key: str, value) -> None:
  kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
  kinds.get(type(value), writer.add_array)(key, value)


def write(path: Path, architecture: str, keys: dict, tensors: dict, more: dict | None = None) -> Path:
  """`keys` are those of the architecture, `more` any; a tensor is an array or (bytes, kind)."""
  writer = gguf.GGUFWriter(path, architecture)
  for key, value in keys.items():
    add(writer, f'{architecture}.{key}', value)
  more = dict(more or {})
  if 'general.alignment' in more:
    writer.add_custom_alignment(more.pop('general.alignment'))
  for key, value in more.items():
    add(writer, key, value)
  for name, value in tensors.items():
    if isinstance(value, tuple):
      writer.add_tensor(name, value[0], raw_dtype=value[1])
    else:
      writer.add_tensor(name, np.ascontiguousarray(value))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def small(path: Path, kind: str = 'llama', keys: dict | None = None, more: dict | None = None, **tensors) -> Path:
  """A whole small file of one family, with some keys and tensors changed (None: left out)."""
  architecture = FAMILY.get(kind, kind)
  written = converted(architecture, random_model(kind)) | {k.replace('__', '.'): v for k, v in tensors.items()}
  keys = {k: v for k, v in (KEYS[kind] | (keys or {})).items() if v is not None}
  return write(path, architecture, keys, {k: v for k, v in written.items() if v is not None}, more)
