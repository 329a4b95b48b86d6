"""Files as their makers published them: config.json of the hub against the presets, GPT-2's names, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import GPT2, LLAMA, randomized
from safetensors.numpy import load_file, save_file

from jaxlm import interop, tree
from jaxlm.errors import InputError
from jaxlm.interop import hf_config, published
from jaxlm.interop.foreign import Foreign
from jaxlm.models import presets

DTYPE = {'torch_dtype': 'bfloat16', 'initializer_range': 0.02, 'use_cache': True}
LLAMAS = DTYPE | {'hidden_act': 'silu', 'num_key_value_heads': 8, 'rms_norm_eps': 1e-05, 'tie_word_embeddings': False}
VISION = {
  'hidden_size': 1152,
  'image_size': 896,
  'intermediate_size': 4304,
  'model_type': 'siglip_vision_model',
  'num_attention_heads': 16,
  'num_hidden_layers': 27,
  'patch_size': 14,
  'vision_use_head': False,
}
LINEAR = {'factor': 8.0, 'rope_type': 'linear'}


def gemma3(**text):
  """What the makers wrote of Gemma 3 from 4B on: few keys, the others at the defaults of transformers."""
  indices = {
    'boi_token_index': 255999,
    'eoi_token_index': 256000,
    'eos_token_id': [1, 106],
    'image_token_index': 262144,
  }
  return {
    'architectures': ['Gemma3ForConditionalGeneration'],
    **indices,
    'initializer_range': 0.02,
    'mm_tokens_per_image': 256,
    'model_type': 'gemma3',
    'text_config': {'model_type': 'gemma3_text', 'rope_scaling': LINEAR, 'sliding_window': 1024, **text},
    'torch_dtype': 'bfloat16',
    'transformers_version': '4.50.0.dev0',
    'vision_config': VISION,
  }


def qwen(kind, **more):
  architecture = {'qwen2': 'Qwen2ForCausalLM', 'qwen3': 'Qwen3ForCausalLM', 'qwen3_moe': 'Qwen3MoeForCausalLM'}[kind]
  fixed = {'architectures': [architecture], 'attention_dropout': 0.0, 'bos_token_id': 151643, 'hidden_act': 'silu'}
  fixed |= {'model_type': kind, 'rms_norm_eps': 1e-06, 'rope_theta': 1000000.0, 'use_sliding_window': False}
  return DTYPE | fixed | {'vocab_size': 151936, **more}


# Written from what stands on the hub under these names, keys left out as they are there; the names are our presets'.
HUB = {
  'gpt2-124m': {
    'activation_function': 'gelu_new',
    'architectures': ['GPT2LMHeadModel'],
    'attn_pdrop': 0.1,
    'bos_token_id': 50256,
    'embd_pdrop': 0.1,
    'eos_token_id': 50256,
    'initializer_range': 0.02,
    'layer_norm_epsilon': 1e-05,
    'model_type': 'gpt2',
    'n_ctx': 1024,
    'n_embd': 768,
    'n_head': 12,
    'n_layer': 12,
    'n_positions': 1024,
    'resid_pdrop': 0.1,
    'summary_activation': None,
    'summary_first_dropout': 0.1,
    'summary_proj_to_labels': True,
    'summary_type': 'cls_index',
    'summary_use_proj': True,
    'task_specific_params': {'text-generation': {'do_sample': True, 'max_length': 50}},
    'vocab_size': 50257,
  },
  'llama3.1-8b': LLAMAS
  | {
    'architectures': ['LlamaForCausalLM'],
    'attention_bias': False,
    'attention_dropout': 0.0,
    'bos_token_id': 128000,
    'eos_token_id': [128001, 128008, 128009],
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'max_position_embeddings': 131072,
    'mlp_bias': False,
    'model_type': 'llama',
    'num_attention_heads': 32,
    'num_hidden_layers': 32,
    'pretraining_tp': 1,
    'rope_scaling': {
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 8192,
      'rope_type': 'llama3',
    },
    'rope_theta': 500000.0,
    'transformers_version': '4.42.3',
    'vocab_size': 128256,
  },
  'smollm2-135m': LLAMAS
  | {
    'architectures': ['LlamaForCausalLM'],
    'attention_bias': False,
    'attention_dropout': 0.0,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'hidden_size': 576,
    'initializer_range': 0.041666666666666664,
    'intermediate_size': 1536,
    'is_llama_config': True,
    'max_position_embeddings': 8192,
    'mlp_bias': False,
    'model_type': 'llama',
    'num_attention_heads': 9,
    'num_hidden_layers': 30,
    'num_key_value_heads': 3,
    'pad_token_id': 2,
    'pretraining_tp': 1,
    'rope_interleaved': False,
    'rope_scaling': None,
    'rope_theta': 100000,
    'tie_word_embeddings': True,
    'transformers.js_config': {'kv_cache_dtype': {'q4f16': 'float16', 'fp16': 'float16'}},
    'transformers_version': '4.42.3',
    'vocab_size': 49152,
  },
  'mistral-7b': LLAMAS
  | {
    'architectures': ['MistralForCausalLM'],
    'bos_token_id': 1,
    'eos_token_id': 2,
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'max_position_embeddings': 32768,
    'model_type': 'mistral',
    'num_attention_heads': 32,
    'num_hidden_layers': 32,
    'rope_theta': 10000.0,
    'sliding_window': 4096,
    'transformers_version': '4.34.0.dev0',
    'vocab_size': 32000,
  },
  'mixtral-8x7b': LLAMAS
  | {
    'architectures': ['MixtralForCausalLM'],
    'attention_dropout': 0.0,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'hidden_size': 4096,
    'intermediate_size': 14336,
    'max_position_embeddings': 32768,
    'model_type': 'mixtral',
    'num_attention_heads': 32,
    'num_experts_per_tok': 2,
    'num_hidden_layers': 32,
    'num_local_experts': 8,
    'output_router_logits': False,
    'rope_theta': 1000000.0,
    'router_aux_loss_coef': 0.02,
    'sliding_window': None,
    'transformers_version': '4.36.0.dev0',
    'vocab_size': 32000,
  },
  'qwen2.5-0.5b': qwen(
    'qwen2',
    eos_token_id=151643,
    hidden_size=896,
    intermediate_size=4864,
    max_position_embeddings=32768,
    max_window_layers=24,
    num_attention_heads=14,
    num_hidden_layers=24,
    num_key_value_heads=2,
    sliding_window=32768,
    tie_word_embeddings=True,
    transformers_version='4.40.1',
    use_mrope=False,
  ),
  'qwen3-1.7b': qwen(
    'qwen3',
    attention_bias=False,
    eos_token_id=151645,
    head_dim=128,
    hidden_size=2048,
    intermediate_size=6144,
    max_position_embeddings=40960,
    max_window_layers=28,
    num_attention_heads=16,
    num_hidden_layers=28,
    num_key_value_heads=8,
    rope_scaling=None,
    sliding_window=None,
    tie_word_embeddings=True,
    transformers_version='4.51.0',
  ),
  'qwen3-30b-a3b': qwen(
    'qwen3_moe',
    attention_bias=False,
    decoder_sparse_step=1,
    eos_token_id=151645,
    head_dim=128,
    hidden_size=2048,
    intermediate_size=6144,
    max_position_embeddings=40960,
    max_window_layers=48,
    mlp_only_layers=[],
    moe_intermediate_size=768,
    norm_topk_prob=True,
    num_attention_heads=32,
    num_experts=128,
    num_experts_per_tok=8,
    num_hidden_layers=48,
    num_key_value_heads=4,
    output_router_logits=False,
    rope_scaling=None,
    router_aux_loss_coef=0.001,
    sliding_window=None,
    tie_word_embeddings=False,
    transformers_version='4.51.0',
  ),
  'gemma2-2b': DTYPE
  | {
    'architectures': ['Gemma2ForCausalLM'],
    'attention_bias': False,
    'attention_dropout': 0.0,
    'attn_logit_softcapping': 50.0,
    'bos_token_id': 2,
    'cache_implementation': 'hybrid',
    'eos_token_id': [1, 107],
    'final_logit_softcapping': 30.0,
    'head_dim': 256,
    'hidden_act': 'gelu_pytorch_tanh',
    'hidden_activation': 'gelu_pytorch_tanh',
    'hidden_size': 2304,
    'intermediate_size': 9216,
    'max_position_embeddings': 8192,
    'model_type': 'gemma2',
    'num_attention_heads': 8,
    'num_hidden_layers': 26,
    'num_key_value_heads': 4,
    'pad_token_id': 0,
    'query_pre_attn_scalar': 256,
    'rms_norm_eps': 1e-06,
    'rope_theta': 10000.0,
    'sliding_window': 4096,
    'transformers_version': '4.42.4',
    'vocab_size': 256000,
  },
  'gemma3-4b': gemma3(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
  'gemma3-12b': gemma3(
    hidden_size=3840, intermediate_size=15360, num_attention_heads=16, num_hidden_layers=48, num_key_value_heads=8
  ),
  'gemma3-27b': gemma3(
    head_dim=128,
    hidden_size=5376,
    intermediate_size=21504,
    num_attention_heads=32,
    num_hidden_layers=62,
    num_key_value_heads=16,
    query_pre_attn_scalar=168,
  ),
  'olmo2-7b': DTYPE
  | {
    'architectures': ['Olmo2ForCausalLM'],
    'attention_bias': False,
    'attention_dropout': 0.0,
    'eos_token_id': 100257,
    'hidden_act': 'silu',
    'hidden_size': 4096,
    'intermediate_size': 11008,
    'max_position_embeddings': 4096,
    'model_type': 'olmo2',
    'num_attention_heads': 32,
    'num_hidden_layers': 32,
    'num_key_value_heads': 32,
    'pad_token_id': 100277,
    'rms_norm_eps': 1e-06,
    'rope_scaling': None,
    'rope_theta': 500000,
    'tie_word_embeddings': False,
    'transformers_version': '4.47.0.dev0',
    'vocab_size': 100352,
  },
}


def text_config(config, *names):
  """The config that is parsed, as a folder with these tensors would have it."""
  foreign = Foreign('x', config, dict.fromkeys(names, (1,)), lambda name: np.zeros(1), None, None, {})
  return published.text_model(foreign)


@pytest.mark.parametrize('name', HUB)
def test_a_published_config_is_its_preset(name):
  config = json.loads(json.dumps(HUB[name]))
  parsed = hf_config.parse(text_config(config).config, name)
  assert hf_config.plain(parsed) == hf_config.plain(presets.get(name))


def wrapped(**changes):
  return text_config(HUB['gemma3-4b'] | changes, 'language_model.model.norm.weight', 'vision_tower.a')


@pytest.mark.parametrize(
  'changes, why',
  [
    ({'quantization_config': {'bits': 4}}, 'quantization_config=.* is not known to leave the numbers of gemma3_text'),
    ({'text_config': None}, 'its text_config is none of a gemma3_text'),
    ({'text_config': {'model_type': 'gemma4_text'}}, 'its text_config is none of a gemma3_text'),
    ({'text_config': {'tie_word_embeddings': False}, 'tie_word_embeddings': True}, 'tie_word_embeddings of the whole'),
    ({'text_config': {'final_logit_softcapping': 30.0}}, 'final_logit_softcapping is not supported for gemma3'),
  ],
)
def test_a_whole_that_is_not_understood_is_refused(changes, why):
  with pytest.raises(InputError, match=f'^x: {why}'):
    wrapped(**changes)


def test_what_is_left_out_is_said():
  found = wrapped()
  assert found.left_out == 'the text model alone: 1 tensors of its vision tower and projector are left out'
  assert list(found.shapes) == ['model.norm.weight']


@pytest.mark.parametrize('cfg', [GPT2, dataclasses.replace(LLAMA, tie_embeddings=False)], ids=['gpt2', 'llama'])
def test_names_without_their_model_s_prefix(cfg, tmp_path):
  """GPT-2 is published so, with its masks; so is what transformers saves of a model without its head's class."""
  interop.export(interop.Model(cfg, randomized(cfg), None, None, {}), tmp_path)
  file = tmp_path / 'model.safetensors'
  bare = {name.partition('.')[2] if not name.startswith('lm_head') else name: x for name, x in load_file(file).items()}
  save_file(bare | {'h.0.attn.bias': np.ones((1, 1, 5, 5), np.float32)}, file)
  again = interop.load(str(tmp_path))
  for (path, want), (_, got) in zip(tree.items(randomized(cfg)), tree.items(again.params), strict=True):
    want = want[: cfg.vocab_size] if path == 'embed' else want[:, : cfg.vocab_size] if path == 'head' else want
    got = got[: cfg.vocab_size] if path == 'embed' else got[:, : cfg.vocab_size] if path == 'head' else got
    np.testing.assert_array_equal(got, want, err_msg=path)


@pytest.mark.parametrize(
  'kind, change, why',
  [
    ('llama', {'sliding_window': 5}, 'sliding_window=5 is not supported for llama'),
    ('llama', {'rope_local_base_freq': 5.0}, 'rope_local_base_freq=5.0 is not known'),
    ('llama', {'rope_scaling': {'rope_type': 'linear'}}, 'no factor in the rope parameters'),
    ('llama', {'rope_scaling': {'type': 'llama3', 'factor': 2.0}}, 'no low_freq_factor, high_freq_factor'),
    (
      'llama',
      {'rope_scaling': {'type': 'linear', 'factor': 2.0}, 'rope_parameters': {'rope_type': 'default'}},
      'rope_parameters and rope_scaling differ',
    ),
    ('mistral', {'rope_parameters': {'full_attention': {}}}, 'rope_parameters: this family has one of layer'),
    ('gemma3_text', {'rope_parameters': {'rope_theta': 5.0}}, 'rope_parameters: this family has one for each kind'),
    ('mistral', {'layer_types': ['full_attention'] * 3}, 'layer_types: in this family all layers are alike'),
    ('qwen2', {'layer_types': ['sliding_attention'] * 3}, 'layer_types: in this family all layers are alike'),
    ('gemma2', {'sliding_window_pattern': 3}, 'sliding_window_pattern=3 is not supported'),
  ],
)
def test_what_transformers_would_read_otherwise_is_refused(kind, change, why):
  sizes = {'vocab_size': 7, 'hidden_size': 8, 'num_hidden_layers': 3, 'num_attention_heads': 2, 'intermediate_size': 8}
  sizes |= {'num_key_value_heads': 1, 'max_position_embeddings': 9, 'model_type': kind}
  hf_config.parse(sizes, 'x')
  with pytest.raises(InputError, match=f'^x: {why}'):
    hf_config.parse(sizes | change, 'x')
