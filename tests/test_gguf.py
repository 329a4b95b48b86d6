"""GGUF files: every tensor and key comes back as the model's makers had it; what cannot be translated is refused."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES
from gguf_files import FAMILY, KEYS, LAYERS, D, E, F, H, K, M, N, P, S, V, converted, random_model, small, write

from jaxlm.errors import InputError
from jaxlm.interop import gguf_config, gguf_file
from jaxlm.interop.gguf import open_file


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('kind', KEYS)
def test_every_tensor_comes_back_under_its_name(tmp_path, kind, tied):
  model, architecture = random_model(kind, tied), FAMILY.get(kind, kind)
  opened = open_file(write(tmp_path / 'a.gguf', architecture, KEYS[kind], converted(architecture, model)))
  assert opened.shapes == {name: value.shape for name, value in model.items()}
  for name, value in model.items():
    # 1 + w - 1 is w to the last bit of 1 + w
    np.testing.assert_allclose(opened.read(name), value, rtol=0, atol=5e-7 if 'gemma' in kind else 0, err_msg=name)
    tensor, whole = opened.read(name), np.asarray(opened.read(name))
    for start, stop in ((0, 1), (1, min(4, n := value.shape[tensor.axis])), (n // 2, n)):
      part = whole[start:stop] if tensor.axis == 0 else whole[:, start:stop]
      np.testing.assert_array_equal(tensor.part(start, stop), part, err_msg=name)
  assert opened.config['tie_word_embeddings'] is (tied or 'gemma' in kind)
  assert opened.tokenizer is None and opened.chat_template is None and opened.generation == {}


def test_the_gate_of_the_shared_expert_may_be_a_row_or_a_matrix(tmp_path):
  row = np.arange(D, dtype='f4')
  for i, gate in enumerate((row, row[None])):
    opened = open_file(small(tmp_path / f'{i}.gguf', 'qwen2moe', **{'blk.1.ffn_gate_inp_shexp.weight': gate}))
    np.testing.assert_array_equal(opened.read('model.layers.1.mlp.shared_expert_gate.weight'), row[None])
  with pytest.raises(InputError, match=r'ffn_gate_inp_shexp\.weight. has shape \(2, 11\), not \(11,\)'):
    open_file(small(tmp_path / 'b.gguf', 'qwen2moe', **{'blk.1.ffn_gate_inp_shexp.weight': np.zeros((2, D), 'f4')}))


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
  'qwen2moe': LIKE_LLAMA
  | {'model_type': 'qwen2_moe', 'architectures': ['Qwen2MoeForCausalLM'], 'use_sliding_window': False}
  | {'qkv_bias': True, 'num_experts': E, 'num_experts_per_tok': 2, 'moe_intermediate_size': M}
  | {'shared_expert_intermediate_size': S, 'norm_topk_prob': False, 'decoder_sparse_step': 1, 'mlp_only_layers': []},
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


def test_generation_and_template(tmp_path):
  ids = {'bos': 3, 'eos': 5, 'eot': 7, 'eom': 5, 'padding': 11}
  more = {f'tokenizer.ggml.{role}_token_id': i for role, i in ids.items()}
  more |= {'general.sampling.temp': 0.6, 'general.sampling.top_k': 20, 'general.sampling.penalty_repeat': 1.1}
  opened = open_file(small(tmp_path / 'a.gguf', more=more | {'tokenizer.chat_template': '{{ messages }}'}))
  assert opened.chat_template == '{{ messages }}' and opened.where == str(tmp_path / 'a.gguf')
  sampling = {'do_sample': True, 'temperature': 0.6, 'top_k': 20, 'repetition_penalty': 1.1}
  assert opened.generation == {'bos_token_id': 3, 'eos_token_id': [5, 7], 'pad_token_id': 11, **sampling}
  assert opened.config['eos_token_id'] == 5


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
  ('qwen2moe', {'expert_weights_norm': True}, {}, 'expert_weights_norm=True'),
  ('qwen2moe', {'expert_shared_feed_forward_length': None}, {}, 'it has no qwen2moe.expert_shared_feed_forward_length'),
  ('gemma2', {'attn_logit_softcapping': None}, {}, 'it has no gemma2.attn_logit_softcapping'),
  ('gemma3', {'rope.freq_base': None}, {}, 'it has no gemma3.rope.freq_base'),
  (
    'llama',
    {},
    {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'gpt-2', 'tokenizer.ggml.eos_token_id': 0}
    | {'tokenizer.ggml.tokens': [f'<{i}>' for i in range(V + 1)]},
    '132 tokens for an embedding of 131 rows',
  ),
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
