"""GGUF files: every tensor, key and id comes back as the model's makers had it, and a damaged file is refused at once.

Files are written by the `gguf` library, under the names that its own table gives for Hugging Face's.
"""

import hashlib
import os
import random
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES
from tokenizers import pre_tokenizers

from jaxlm.errors import InputError
from jaxlm.interop import gguf_config, gguf_file
from jaxlm.interop.gguf import open_file

V, D, H, K, N, F, M, E, P = 131, 11, 6, 2, 10, 17, 13, 5, 61  # as in conftest: distinct, so that swapped axes fail
LAYERS = 2

# --- models as Hugging Face has them ---


def layer_shapes(kind: str) -> dict[str, tuple[int, ...]]:
  if kind == 'gpt2':
    linear = {'attn.c_attn': (D, 3 * D), 'attn.c_proj': (D, D), 'mlp.c_fc': (D, F), 'mlp.c_proj': (F, D)}
    shapes = {f'{name}.weight': shape for name, shape in linear.items()}
    shapes |= {f'{name}.bias': shape[-1:] for name, shape in linear.items()}
    return shapes | {f'{name}.{what}': (D,) for name in ('ln_1', 'ln_2') for what in ('weight', 'bias')}
  linear = {'q_proj': (H * N, D), 'k_proj': (K * N, D), 'v_proj': (K * N, D), 'o_proj': (D, H * N)}
  shapes = {f'self_attn.{name}.weight': shape for name, shape in linear.items()}
  if kind == 'qwen2':
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
  if kind == 'qwen3moe':
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
    else:
      tensors[table.get_name(name, try_suffixes=('.weight', '.bias'))] = value
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


# --- tensors and config ---


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('kind', KEYS)
def test_every_tensor_comes_back_under_its_name(tmp_path, kind, tied):
  model, architecture = random_model(kind, tied), FAMILY.get(kind, kind)
  opened = open_file(write(tmp_path / 'a.gguf', architecture, KEYS[kind], converted(architecture, model)))
  assert opened.shapes == {name: value.shape for name, value in model.items()}
  for name, value in model.items():
    # 1 + w - 1 is w to the last bit of 1 + w
    np.testing.assert_allclose(opened.read(name), value, rtol=0, atol=5e-7 if 'gemma' in kind else 0, err_msg=name)
  assert opened.config['tie_word_embeddings'] is (tied or 'gemma' in kind)
  assert opened.tokenizer is None and opened.chat_template is None and opened.generation == {}


LIKE_LLAMA = {
  'vocab_size': V,
  'hidden_size': D,
  'num_hidden_layers': LAYERS,
  'num_attention_heads': H,
  'num_key_value_heads': K,
  'head_dim': N,
  'intermediate_size': F,
  'hidden_act': 'silu',
  'max_position_embeddings': P,
  'rms_norm_eps': 1e-6,
  'rope_theta': 5e5,
  'rope_scaling': None,
  'tie_word_embeddings': False,
}
LIKE_GEMMA = {k: v for k, v in LIKE_LLAMA.items() if k != 'hidden_act'} | {
  'tie_word_embeddings': True,
  'attention_bias': False,
  'hidden_activation': 'gelu_pytorch_tanh',
  'query_pre_attn_scalar': N,
  'sliding_window': 7,
}
CONFIGS = {
  'llama': LIKE_LLAMA
  | {'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'mlp_bias': False},
  'llama-biased': LIKE_LLAMA
  | {'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'attention_bias': True, 'mlp_bias': False},
  'mistral': LIKE_LLAMA | {'model_type': 'mistral', 'architectures': ['MistralForCausalLM'], 'sliding_window': 7},
  'mixtral': LIKE_LLAMA
  | {'model_type': 'mixtral', 'architectures': ['MixtralForCausalLM'], 'sliding_window': None}
  | {'num_local_experts': E, 'num_experts_per_tok': 2},
  'qwen2': LIKE_LLAMA | {'model_type': 'qwen2', 'architectures': ['Qwen2ForCausalLM'], 'use_sliding_window': False},
  'qwen3': LIKE_LLAMA
  | {'model_type': 'qwen3', 'architectures': ['Qwen3ForCausalLM'], 'use_sliding_window': False}
  | {'attention_bias': False},
  'qwen3moe': LIKE_LLAMA
  | {'model_type': 'qwen3_moe', 'architectures': ['Qwen3MoeForCausalLM'], 'use_sliding_window': False}
  | {'attention_bias': False, 'num_experts': E, 'num_experts_per_tok': 2, 'moe_intermediate_size': M}
  | {'norm_topk_prob': True, 'decoder_sparse_step': 1, 'mlp_only_layers': []},
  'gemma2': LIKE_GEMMA
  | {'model_type': 'gemma2', 'architectures': ['Gemma2ForCausalLM'], 'attn_logit_softcapping': 50.0}
  | {'final_logit_softcapping': 30.0, 'layer_types': ['sliding_attention', 'full_attention']},
  'gemma3': LIKE_GEMMA
  | {'model_type': 'gemma3_text', 'architectures': ['Gemma3ForCausalLM'], 'attn_logit_softcapping': None}
  | {'final_logit_softcapping': None, 'layer_types': ['sliding_attention'] * 2, 'rope_local_base_freq': 10000.0},
  'olmo2': LIKE_LLAMA | {'model_type': 'olmo2', 'architectures': ['Olmo2ForCausalLM'], 'attention_bias': False},
  'gpt2': {
    'model_type': 'gpt2',
    'architectures': ['GPT2LMHeadModel'],
    'vocab_size': V,
    'n_embd': D,
    'n_layer': LAYERS,
    'n_head': 1,
    'n_inner': F,
    'n_positions': P,
    'activation_function': 'gelu_new',
    'layer_norm_epsilon': 1e-5,
    'tie_word_embeddings': False,
  },
}


@pytest.mark.parametrize('kind', KEYS)
def test_config_is_hugging_faces(tmp_path, kind):
  assert open_file(small(tmp_path / 'a.gguf', kind)).config == CONFIGS[kind]


@pytest.mark.parametrize('kind', gguf_file.KINDS)
def test_every_kind_of_number_is_dequantized_as_the_library_does(tmp_path, kind, monkeypatch):
  monkeypatch.setattr(gguf_file, 'CHUNK', 1000)  # several chunks, none of them whole
  block, size = GGML_QUANT_SIZES[Kind[kind]]
  width = 256 * 3
  raw = np.random.default_rng(5).integers(0, 256, (H * N, width // block * size), np.uint8)
  if kind in ('F32', 'F16', 'BF16'):  # other bytes than quantized ones may be anything, NaN too; these are read as sent
    raw[:] = raw & 0x3F
  keys = {'embedding_length': width}
  model = random_model('llama')
  wide = {name: np.zeros([width if n == D else n for n in value.shape], np.float32) for name, value in model.items()}
  tensors = converted('llama', wide) | {'blk.1.attn_q.weight': (raw, Kind[kind])}
  opened = open_file(write(tmp_path / 'a.gguf', 'llama', KEYS['llama'] | keys, tensors))
  got = opened.read('model.layers.1.self_attn.q_proj.weight')
  with np.errstate(all='ignore'):
    want = gguf.dequantize(raw, Kind[kind])
  want = want.reshape(H, N // 2, 2, width).swapaxes(1, 2).reshape(H * N, width)
  assert got.dtype == gguf_file.STORED.get(kind, np.float32) and got.shape == want.shape
  np.testing.assert_array_equal(got.astype(np.float32), want)


def test_the_header_is_read_as_the_library_reads_it(tmp_path):
  more = {'general.alignment': 64, 'a.list': [1, 2], 'a.bool': True, 'a.text': 'नमस्ते', 'a.texts': ['a', ''], 'a.f': 0.1}
  path = small(tmp_path / 'a.gguf', more=more)
  theirs, ours = gguf.GGUFReader(path), gguf_file.open_container(path)
  fields = {k: v.contents() for k, v in theirs.fields.items() if not k.startswith('GGUF.')}
  assert {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in ours.metadata.items()} == fields
  for tensor in theirs.tensors:
    entry = ours.tensors[tensor.name]
    assert (entry.shape, entry.offset) == (tuple(tensor.shape[::-1].tolist()), tensor.data_offset)


def llama3(theta: float, size: int, factor: float) -> np.ndarray:
  """RoPE's divisors, frequency by frequency in float32, after the description in the Llama 3.1 release."""
  out = []
  for i in range(0, size, 2):
    wavelength = np.float32(2 * np.pi) * np.float32(theta) ** (np.float32(i) / np.float32(size))
    if wavelength < 8192 / 4:
      out.append(1.0)
    elif wavelength > 8192:
      out.append(factor)
    else:
      smooth = (8192 / wavelength - 1) / 3
      out.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(out, np.float32)


@pytest.mark.parametrize('size, factor', [(64, 32.0), (128, 8.0)])
def test_llama3_scaling_is_found_from_its_factors(tmp_path, size, factor):
  keys = {'attention.key_length': size, 'attention.value_length': size, 'rope.dimension_count': size}
  model = random_model('llama')
  wide = {n: np.zeros([{H * N: H * size, K * N: K * size}.get(d, d) for d in v.shape], 'f4') for n, v in model.items()}
  tensors = converted('llama', wide)
  factors = llama3(5e5, size, factor)
  path = write(tmp_path / 'a.gguf', 'llama', KEYS['llama'] | keys, tensors | {'rope_freqs.weight': factors})
  assert open_file(path).config['rope_scaling'] == {
    'rope_type': 'llama3',
    'factor': factor,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  }
  path = write(tmp_path / 'b.gguf', 'llama', KEYS['llama'] | keys, tensors | {'rope_freqs.weight': factors[::-1]})
  with pytest.raises(InputError, match=r'b\.gguf: tensor .rope_freqs\.weight. is not Llama 3\.1'):
    open_file(path)
  path = write(tmp_path / 'c.gguf', 'llama', KEYS['llama'] | keys, tensors | {'rope_freqs.weight': factors * 0 + 1})
  assert open_file(path).config['rope_scaling'] is None


@pytest.mark.parametrize(
  'keys, want',
  [
    ({'type': 'none'}, None),
    ({'type': 'linear', 'factor': 8.0}, {'rope_type': 'linear', 'factor': 8.0}),
    ({'factor': 2.0}, {'rope_type': 'linear', 'factor': 2.0}),
    (
      {'type': 'yarn', 'factor': 4.0, 'original_context_length': 32, 'finetuned': True, 'yarn_beta_fast': 31.0},
      {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32, 'beta_fast': 31.0},
    ),
  ],
)
def test_rope_scaling(tmp_path, keys, want):
  path = small(tmp_path / 'a.gguf', 'qwen2', {f'rope.scaling.{k}': v for k, v in keys.items()})
  assert open_file(path).config['rope_scaling'] == want


def test_gemmas_layers_and_scales(tmp_path):
  def config(kind, **keys):
    return open_file(small(tmp_path / 'a.gguf', kind, {k.replace('__', '.'): v for k, v in keys.items()})).config

  one = config('gemma3', attention__sliding_window_pattern=[False, True])
  assert one['layer_types'] == ['full_attention', 'sliding_attention']
  assert config('gemma3', attention__sliding_window_pattern=2)['layer_types'] == ['sliding_attention', 'full_attention']
  assert config('gemma3', attention__sliding_window=None)['layer_types'] == ['full_attention'] * 2
  assert config('gemma3', rope__freq_base_swa=7.0)['rope_local_base_freq'] == 7.0
  # the published sizes: layers, width, heads, head size -> what q k^T is scaled by
  sizes = {'gemma2': [(46, 4608, 32, 128, 144), (42, 3584, 16, 256, 256)], 'gemma3': [(62, 5376, 32, 128, 168)]}
  for kind, rows in sizes.items():
    for layers, width, heads, size, scalar in rows:
      values = KEYS[kind] | {'block_count': layers, 'embedding_length': width, 'attention.head_count': heads}
      values |= {'attention.key_length': size, 'attention.value_length': size}
      keys = gguf_config.Keys('x', {f'{kind}.{k}': v for k, v in values.items()} | {'general.architecture': kind})
      entries = {str(i): gguf_file.Entry((2, 2), 'F32', 0) for i in range(layers)}
      entries['token_embd.weight'] = entries['0']
      made, _ = gguf_config.ARCHITECTURES[keys.general()](keys, gguf_file.GGUFFile(None, {}, entries))
      assert made['query_pre_attn_scalar'] == scalar


# --- what is refused by name ---

REFUSED = [
  ('llama', {'attention.scale': 0.5}, {}, r"'llama\.attention\.scale' is not translated"),
  ('llama', {'logit_scale': 0.5}, {}, r"'llama\.logit_scale' is not translated"),
  ('llama', {'rope.scaling.type': 'longrope'}, {}, 'rope.scaling.type'),
  ('llama', {'rope.scaling.type': 'yarn', 'rope.scaling.factor': 2.0}, {}, 'rope.scaling.type'),
  ('llama', {'rope.scaling.attn_factor': 1.5}, {}, 'attn_factor=1.5'),
  ('llama', {'rope.dimension_count': 4}, {}, 'rope.dimension_count=4'),
  ('llama', {'attention.head_count_kv': [2, 1]}, {}, 'attention.head_count_kv'),
  ('llama', {'attention.value_length': 8}, {}, 'attention.value_length=8'),
  ('llama', {'attention.causal': False}, {}, 'attention.causal=False'),
  ('llama', {'block_count': 1 << 30}, {}, '1073741824 layers'),
  ('llama', {'block_count': 3}, {}, r"tensor 'blk\.2\.attn_norm\.weight' is missing"),
  ('llama', {'block_count': 1}, {}, r"'blk\.1\.attn_k\.weight' and 8 more is none of llama"),
  ('llama', {'attention.head_count': 0}, {}, 'head_count is 0'),
  ('llama', {'attention.head_count': 4}, {}, 'shape'),
  ('llama', {'rope.freq_base': float('nan')}, {}, 'freq_base is nan'),
  ('llama', {'rope.freq_base': None, 'embedding_length': None}, {}, 'it has no llama.embedding_length'),
  ('llama', {}, {'general.architecture': 'mamba'}, "architecture 'mamba' is not supported; supported are llama"),
  ('llama', {}, {'general.type': 'adapter'}, "no model but 'adapter'"),
  ('llama', {}, {'split.count': 3}, 'one of 3 parts'),
  ('llama', {}, {'general.quantization_version': 1}, 'quantization_version'),
  ('qwen3', {'attention.sliding_window': 5}, {}, r"'qwen3\.attention\.sliding_window' is not translated"),
  ('olmo2', {'attention.sliding_window': 5}, {}, r"'olmo2\.attention\.sliding_window' is not translated"),
  ('qwen3moe', {'expert_gating_func': 2}, {}, 'expert_gating_func=2'),
  ('qwen3moe', {'expert_used_count': 6}, {}, '6 of 5 experts'),
  ('qwen3moe', {'expert_shared_count': 1}, {}, 'expert_shared_count'),
  ('gemma2', {'attn_logit_softcapping': None}, {}, 'it has no gemma2.attn_logit_softcapping'),
  ('gemma3', {'rope.freq_base': None}, {}, 'it has no gemma3.rope.freq_base'),
  ('gpt2', {'context_length': 60}, {}, 'context_length=60'),
]


@pytest.mark.parametrize('kind, keys, more, message', REFUSED)
def test_what_changes_the_numbers_is_refused_by_name(tmp_path, kind, keys, more, message):
  path = small(tmp_path / 'a.gguf', kind, keys)
  if more:
    name = more.pop('general.architecture', None)
    path = small(tmp_path / 'a.gguf', kind, keys, more)
    if name:
      path = write(tmp_path / 'a.gguf', name, {}, {'token_embd.weight': np.zeros((2, 2), 'f4')})
  with pytest.raises(InputError, match=message) as caught:
    open_file(path)
  assert str(caught.value).startswith(f'{path}: ') and '; ' in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['blk.0.attn_rot_embd.weight', '../../etc/passwd', 'a\nb', 'x' * 200])
def test_unknown_tensors_are_refused_by_name(tmp_path, name):
  with pytest.raises(InputError, match='is none of llama') as caught:
    open_file(small(tmp_path / 'a.gguf', **{name: np.zeros(3, 'f4')}))
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 300 + len(str(tmp_path))


def test_a_kind_that_is_not_read_is_named(tmp_path):
  raw = np.zeros((V, 66), np.uint8)
  with pytest.raises(InputError, match=r"'output\.weight' is stored as IQ2_XXS, which is not read; take one of F32"):
    open_file(small(tmp_path / 'a.gguf', output__weight=(raw, Kind.IQ2_XXS)))


# --- damaged and hostile files ---


def string(text: bytes) -> bytes:
  return struct.pack('<Q', len(text)) + text


def tensor(name: bytes = b't', dims: tuple[int, ...] = (2, 2), kind: int = 0, offset: int = 0) -> bytes:
  return string(name) + struct.pack(f'<I{len(dims)}QIQ', len(dims), *dims, kind, offset)


def container(keys: list[bytes] = (), tensors: list[bytes] = (), data: int = 64, version=3, counts=None) -> bytes:
  n_tensors, n_keys = counts or (len(tensors), len(keys))
  header = struct.pack('<4sIQQ', b'GGUF', version, n_tensors, n_keys) + b''.join(keys) + b''.join(tensors)
  return header + bytes(-len(header) % 32) + bytes(data)


HUGE = 1 << 63
A_KEY = string(b'a') + struct.pack('<IB', 0, 1)
HOSTILE = {
  'empty': (b'', 'does not begin with GGUF'),
  'wrong magic': (b'GGML' + container()[4:], 'does not begin with GGUF'),
  'version 1': (container(version=1), 'version 1 is not read'),
  'version 4': (container(version=4), 'version 4 is not read'),
  'big-endian': (container(version=3 << 24), 'big-endian'),
  'tensor count of 2^63': (container(counts=(HUGE, 0)), f'{HUGE} tensors do not fit'),
  'key count of 2^63': (container(counts=(0, HUGE)), f'{HUGE} keys do not fit'),
  'key count of 1000': (container(counts=(0, 1000)), '1000 keys do not fit'),
  'a key of 2^63 bytes': (container([struct.pack('<Q', HUGE)]), f'{HUGE} bytes of a string do not fit'),
  'a long key': (container([string(b'x' * 5000) + b'\0' * 5]), 'a name of 5000 bytes'),
  'a text of 2^40 bytes': (container([string(b'a') + struct.pack('<IQ', 8, 1 << 40)]), 'do not fit'),
  'an array of 2^63': (container([string(b'a') + struct.pack('<IIQ', 9, 5, HUGE)]), f'{HUGE} values of .a. do not fit'),
  'strings of 2^61': (container([string(b'a') + struct.pack('<IIQ', 9, 8, 1 << 61)]), 'strings of .a. do not fit'),
  'nested arrays': (container([string(b'a') + struct.pack('<IIQ', 9, 9, 1)]), 'array of the unknown type 9'),
  'unknown type': (container([string(b'a') + struct.pack('<IQ', 77, 1)]), 'unknown type 77'),
  'neither true nor false': (container([string(b'a') + struct.pack('<IB', 7, 2)]), 'neither true nor false'),
  'no UTF-8': (container([string(b'\xff\xfe') + struct.pack('<IB', 0, 1)]), 'no UTF-8'),
  'a key twice': (container([A_KEY, A_KEY]), 'two keys are called .a.'),
  'a tensor twice': (container(tensors=[tensor(), tensor(offset=32)]), 'two tensors are called .t.'),
  'overlapping': (container(tensors=[tensor(dims=(4, 4)), tensor(b'u', offset=32)]), 'overlap'),
  'the same place': (container(tensors=[tensor(), tensor(b'u')]), 'overlap'),
  'beyond the end': (container(tensors=[tensor(dims=(17,))]), 'not a whole GGUF file: tensor .t. ends'),
  'offset beyond': (container(tensors=[tensor(offset=1 << 40)]), 'not a whole GGUF file: tensor .t. ends'),
  'offset of 2^64 - 32': (container(tensors=[tensor(offset=(1 << 64) - 32)]), 'not a whole GGUF file'),
  'unaligned': (container(tensors=[tensor(offset=4)]), 'multiple of 32'),
  'a product of 2^64': (container(tensors=[tensor(dims=(1 << 32, 1 << 32))]), 'not a whole GGUF file'),
  'a product of 2^248': (container(tensors=[tensor(dims=(1 << 62,) * 4)]), 'not a whole GGUF file'),
  'a dimension of 0': (container(tensors=[tensor(dims=(0, 3))]), 'has shape'),
  'no dimension': (container(tensors=[tensor(dims=())]), 'has 0 dimensions'),
  '2^31 dimensions': (container(tensors=[string(b't') + struct.pack('<IQQ', 1 << 31, 1, 1)]), 'dimensions'),
  'half a block': (container(tensors=[tensor(dims=(33, 2), kind=8)]), 'blocks of 32'),
  'kind 99': (container(tensors=[tensor(kind=99)]), 'stored as type 99'),
  'alignment 0': (
    container([string(b'general.alignment') + struct.pack('<II', 4, 0)]),
    'general.alignment is 0, not a power of two',
  ),
  'alignment as text': (
    container([string(b'general.alignment') + struct.pack('<I', 8) + string(b'32')]),
    'general.alignment is',
  ),
  'no keys at all': (container(), 'architecture None is not supported'),
  'architecture of numbers': (
    container([string(b'general.architecture') + struct.pack('<IIQII', 9, 4, 2, 1, 1)]),
    'general.architecture is',
  ),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_files_are_refused_quickly_within_bounded_memory(tmp_path, name):
  data, message = HOSTILE[name]
  path = tmp_path / 'a.gguf'
  path.write_bytes(data)
  tracemalloc.start()
  began = time.perf_counter()
  try:
    with pytest.raises(InputError, match=message) as caught:
      open_file(path)
    took, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert took < 1 and peak < 1 << 20
  assert str(caught.value).startswith(f'{path}: ') and '\n' not in str(caught.value)


def test_a_huge_sparse_file_costs_no_more(tmp_path):
  """The counts fit into a file of 1 TB: what is read before it is refused is bounded all the same."""
  path = tmp_path / 'a.gguf'
  path.write_bytes(container([string(b'a') + struct.pack('<IIQ', 9, 5, 1 << 36)]))
  os.truncate(path, 1 << 40)
  tracemalloc.start()
  try:
    with pytest.raises(InputError, match='its header is longer than'):
      open_file(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
  finally:
    tracemalloc.stop()


def test_what_is_no_file_is_named(tmp_path):
  for path in (tmp_path / 'none.gguf', tmp_path):
    with pytest.raises(InputError, match='cannot be read'):
      open_file(path)


def test_a_file_that_became_shorter_is_named(tmp_path):
  path = small(tmp_path / 'a.gguf')
  opened = open_file(path)
  os.truncate(path, path.stat().st_size // 2)
  with pytest.raises(InputError, match='became shorter'):
    for name in opened.shapes:
      opened.read(name)


def with_tokenizer(path: Path) -> tuple[Path, int]:
  """A small whole file with a tokenizer, and the size of its header."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: V - 2]
  tokens = ['<s>', '</s>', *letters]
  more = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'gpt-2',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': [3, 3] + [1] * (len(tokens) - 2),
    'tokenizer.ggml.merges': [],
    'tokenizer.ggml.bos_token_id': 0,
    'tokenizer.ggml.eos_token_id': 1,
    'tokenizer.chat_template': '{{ messages }}',
  }
  more = {k: v for k, v in more.items() if v != []}
  small(path, more=more)
  return path, min(entry.offset for entry in gguf_file.open_container(path).tensors.values())


def contents(path: Path):
  """All that a file gives; a tensor's bytes stand for it."""
  opened = open_file(path)
  tensors = {}
  for name, shape in opened.shapes.items():
    value = opened.read(name)
    assert value.shape == shape and value.dtype in (np.float32, *gguf_file.STORED.values())
    tensors[name] = hashlib.sha256(value.tobytes()).digest()
  digest = opened.tokenizer and opened.tokenizer.digest
  return opened.config, tensors, digest, opened.chat_template, opened.generation


def test_a_file_cut_anywhere_is_refused(tmp_path):
  path, header = with_tokenizer(tmp_path / 'a.gguf')
  whole, size = path.read_bytes(), path.stat().st_size
  end = max(e.offset + e.rows * e.row_bytes for e in gguf_file.open_container(path).tensors.values())
  cut = tmp_path / 'cut.gguf'
  cut.write_bytes(whole)
  for length in [*range(size - 1, end - 9, -1), *range(end - 9, header, -997), *range(header, -1, -1)]:
    os.truncate(cut, length)
    began = time.perf_counter()
    if length >= end:  # what fills up the last tensor's alignment holds nothing
      assert contents(cut) == contents(path)
    else:
      with pytest.raises(InputError) as caught:
        open_file(cut)
      assert str(caught.value).startswith(f'{cut}: ') and '\n' not in str(caught.value)
    assert time.perf_counter() - began < 1


def test_flipped_bytes_of_the_header_raise_nothing_else(tmp_path):
  """A header has no checksum, so another number may be a sound file: then all of it must be there to read."""
  path, header = with_tokenizer(tmp_path / 'a.gguf')
  whole, rng, flipped = path.read_bytes(), random.Random(11), tmp_path / 'flipped.gguf'
  flipped.write_bytes(whole)
  refused = 0
  for _ in range(1500):
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8))):
      data[rng.randrange(header)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    with flipped.open('r+b') as file:  # in place: much faster than a new file
      file.write(data[:header])
    began = time.perf_counter()
    try:
      contents(flipped)
    except InputError as error:
      refused += 1
      assert str(error).startswith(f'{flipped}: ') and '\n' not in str(error)
    assert time.perf_counter() - began < 1
  assert refused > 500
