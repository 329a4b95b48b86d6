"""The families of models as tables: which config keys of Hugging Face's set which field, and where each leaf is stored.

A family is data. Reading a config refuses, by name, every key that it neither uses nor knows to change no number.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

DIVIDING = ('llama', 'gemma2', 'gemma3_text')  # transformers wants their heads to divide the width, head_dim or not
EXPERTS = ('num_experts', 'num_local_experts')  # two names of one key
ACTIVATIONS = {'silu': 'silu', 'gelu': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh'}
KINDS = {'full_attention': 'global', 'sliding_attention': 'local'}
# Of tokens, of training alone (dropout, initialisation, router losses), of how things are computed, of bookkeeping.
HARMLESS = frozenset(
  (
    *('architectures', 'auto_map', 'model_type', 'dtype', 'torch_dtype', 'transformers_version', '_name_or_path'),
    *('bos_token_id', 'eos_token_id', 'pad_token_id', 'unk_token_id', 'initializer_range', 'attention_dropout'),
    *('attn_pdrop', 'embd_pdrop', 'resid_pdrop', 'hidden_dropout', 'output_router_logits', 'router_aux_loss_coef'),
    *('router_jitter_noise', 'pretraining_tp', 'summary_type', 'summary_use_proj', 'summary_activation'),
    *('summary_proj_to_labels', 'summary_first_dropout', 'task_specific_params', 'gradient_checkpointing'),
    *('cache_implementation', 'max_window_layers', '_sliding_window_pattern', 'sliding_window_pattern', 'use_cache'),
    *('n_ctx', 'output_past', 'reorder_and_upcast_attn', '_attn_implementation', 'is_llama_config'),
    *('transformers.js_config', 'unsloth_fixed', 'unsloth_version', 'output_hidden_states', 'output_attentions'),
    *('return_dict', 'chunk_size_feed_forward', 'is_encoder_decoder', 'id2label', 'label2id', 'problem_type'),
    *('_num_labels', 'n_special', 'predict_special_tokens'),
  )
)


class Stored(NamedTuple):
  """Where the array of a leaf lies, or of one layer (`{i}` in the name) or one expert (`{e}`) of it."""

  name: str
  transposed: bool = False
  part: tuple[int, int] = (0, 1)  # the first of so many equal blocks of columns
  plus: float = 0.0  # the leaf is the tensor plus that


class Family(NamedTuple):
  """One architecture of Hugging Face's transformers."""

  architecture: str
  keys: Mapping[str, str]  # config key -> field, taken as it is
  defaults: Mapping[str, Any]  # what transformers takes for a key that is not there
  fixed: Mapping[str, Any]  # fields that the family always has
  only: Mapping[str, Any]  # keys that may be there with this value and no other
  names: Mapping[str, Stored]


def linear(name: str) -> Stored:
  """A torch.nn.Linear's weight: its rows are outputs."""
  return Stored(f'{name}.weight', transposed=True)


def _llama_names(norm: float = 0.0) -> dict[str, Stored]:
  layer = 'model.layers.{i}.'
  found = {'embed': Stored('model.embed_tokens.weight'), 'head': linear('lm_head')}
  found['final_norm/scale'] = Stored('model.norm.weight', plus=norm)
  for ours in 'qkvo':
    found[f'layers/attn/{ours}'] = linear(f'{layer}self_attn.{ours}_proj')
    found[f'layers/attn/{ours}_bias'] = Stored(f'{layer}self_attn.{ours}_proj.bias')
    found[f'layers/attn/{ours}_norm/scale'] = Stored(f'{layer}self_attn.{ours}_norm.weight', plus=norm)
  for ours in ('gate', 'up', 'down'):
    found[f'layers/mlp/{ours}'] = linear(f'{layer}mlp.{ours}_proj')
    found[f'layers/mlp/{ours}_bias'] = Stored(f'{layer}mlp.{ours}_proj.bias')
  norms = {'attn_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}
  return found | _norms(norms, norm)


def _norms(names: Mapping[str, str], plus: float = 0.0) -> dict[str, Stored]:
  return {
    f'layers/{ours}/scale': Stored(f'model.layers.{{i}}.{name}.weight', plus=plus) for ours, name in names.items()
  }


def _gemma_names() -> dict[str, Stored]:
  norms = {
    'attn_norm': 'input_layernorm',
    'attn_post_norm': 'post_attention_layernorm',
    'mlp_norm': 'pre_feedforward_layernorm',
    'mlp_post_norm': 'post_feedforward_layernorm',
  }
  return _llama_names(1.0) | _norms(norms, 1.0)


def _expert_names(block: str, gate: str, up: str, down: str) -> dict[str, Stored]:
  expert = f'model.layers.{{i}}.{block}.experts.{{e}}.'
  found = {f'layers/mlp/{ours}': linear(f'{expert}{n}') for ours, n in {'gate': gate, 'up': up, 'down': down}.items()}
  return _llama_names() | found | {'layers/mlp/router': linear(f'model.layers.{{i}}.{block}.gate')}


def _qwen_expert_names() -> dict[str, Stored]:
  names = _expert_names('mlp', 'gate_proj', 'up_proj', 'down_proj')
  shared = 'model.layers.{i}.mlp.shared_expert'
  found = {f'layers/mlp/shared/{ours}': linear(f'{shared}.{ours}_proj') for ours in ('gate', 'up', 'down')}
  return names | found | {'layers/mlp/shared_gate': linear(f'{shared}_gate')}


def _gpt2_names() -> dict[str, Stored]:
  h = 'transformer.h.{i}.'
  found = {'embed': Stored('transformer.wte.weight'), 'positions': Stored('transformer.wpe.weight')}
  found['head'] = linear('lm_head')
  for ours, theirs in {
    'final_norm': 'transformer.ln_f',
    'layers/attn_norm': f'{h}ln_1',
    'layers/mlp_norm': f'{h}ln_2',
  }.items():
    found |= {f'{ours}/scale': Stored(f'{theirs}.weight'), f'{ours}/bias': Stored(f'{theirs}.bias')}
  for ours, block, theirs in (
    ('attn/q', (0, 3), 'attn.c_attn'),
    ('attn/k', (1, 3), 'attn.c_attn'),
    ('attn/v', (2, 3), 'attn.c_attn'),
    ('attn/o', (0, 1), 'attn.c_proj'),
    ('mlp/up', (0, 1), 'mlp.c_fc'),
    ('mlp/down', (0, 1), 'mlp.c_proj'),
  ):
    found[f'layers/{ours}'] = Stored(f'{h}{theirs}.weight', part=block)
    found[f'layers/{ours}_bias'] = Stored(f'{h}{theirs}.bias', part=block)
  return found


_SIZES = {
  'vocab_size': 'vocab_size',
  'hidden_size': 'd_model',
  'num_hidden_layers': 'n_layers',
  'num_attention_heads': 'n_heads',
  'num_key_value_heads': 'n_kv_heads',
  'head_dim': 'head_dim',
  'intermediate_size': 'd_ff',
  'max_position_embeddings': 'max_seq_len',
  'rms_norm_eps': 'norm_eps',
  'tie_word_embeddings': 'tie_embeddings',
}
_MOE = {'num_local_experts': 'n_experts', 'num_experts_per_tok': 'experts_per_token'}
_QWEN_MOE = {key: field for key, field in _SIZES.items() if field != 'd_ff'} | {
  'num_experts': 'n_experts',
  'num_experts_per_tok': 'experts_per_token',
  'moe_intermediate_size': 'd_ff',
  'norm_topk_prob': 'normalize_experts',
}
_OPTIONAL = {'num_key_value_heads': None, 'head_dim': None, 'rms_norm_eps': 1e-6, 'tie_word_embeddings': False}
_PLAIN = _OPTIONAL | {'hidden_act': 'silu', 'rope_theta': 10000.0}
_QWEN = _PLAIN | {'num_key_value_heads': 32, 'use_sliding_window': False, 'sliding_window': 4096}
_GEMMA = _OPTIONAL | {
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 256,
  'rope_theta': 10000.0,
  'tie_word_embeddings': True,
  'query_pre_attn_scalar': 256,
  'sliding_window': 4096,
  'hidden_activation': 'gelu_pytorch_tanh',
}
_BIASES = {'attention_bias': False, 'mlp_bias': False}  # both or neither
_NO_BIAS = dict(_BIASES)
_NO_WINDOW = {'sliding_window': None}
_MULTIPLIERS = ('embedding_multiplier', 'residual_multiplier', 'attention_multiplier', 'logits_scaling')
_SOFTCAPS = {'attn_logit_softcapping': 'attention_softcap', 'final_logit_softcapping': 'logits_softcap'}

FAMILIES: dict[str, Family] = {
  'llama': Family(
    'LlamaForCausalLM', _SIZES, _PLAIN | _BIASES, {}, _NO_WINDOW | {'rope_interleaved': False}, _llama_names()
  ),
  'mistral': Family(
    'MistralForCausalLM', _SIZES, _PLAIN | {'num_key_value_heads': 8, 'sliding_window': 4096}, {}, {}, _llama_names()
  ),
  'granite': Family(
    'GraniteForCausalLM',
    _SIZES | {name: name for name in _MULTIPLIERS},
    _PLAIN | _BIASES | dict.fromkeys(_MULTIPLIERS, 1.0),
    {},
    _NO_WINDOW,
    _llama_names(),
  ),
  'qwen2': Family(
    'Qwen2ForCausalLM',
    _SIZES,
    _QWEN | {'max_window_layers': 28},
    {'qkv_bias': True},
    {'use_mrope': False},
    _llama_names(),
  ),
  'qwen3': Family(
    'Qwen3ForCausalLM',
    _SIZES,
    _QWEN | {'head_dim': 128, 'max_window_layers': 28},
    {'qk_norm': 'head'},
    _NO_BIAS,
    _llama_names(),
  ),
  'olmo2': Family(
    'Olmo2ForCausalLM',
    _SIZES,
    _PLAIN | {'rms_norm_eps': 1e-5},
    {'qk_norm': 'whole', 'norm_at': 'post'},
    _NO_BIAS | _NO_WINDOW,
    _llama_names()
    | _norms({'attn_post_norm': 'post_attention_layernorm', 'mlp_post_norm': 'post_feedforward_layernorm'}),
  ),
  'gemma2': Family(
    'Gemma2ForCausalLM',
    _SIZES | _SOFTCAPS,
    _GEMMA | {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0, 'period': 2},
    {'norm_at': 'both'},
    _NO_BIAS | {'use_bidirectional_attention': None, 'sliding_window_pattern': 2, 'sliding_window_size': 4096},
    _gemma_names(),
  ),
  'gemma3_text': Family(
    'Gemma3ForCausalLM',
    _SIZES | {'final_logit_softcapping': 'logits_softcap'},
    _GEMMA
    | {'final_logit_softcapping': None}
    | {'period': 6, 'rope_theta': 1e6, 'rope_local_base_freq': 1e4}
    | {'vocab_size': 262208, 'max_position_embeddings': 131072},
    {'norm_at': 'both', 'qk_norm': 'head'},
    _NO_BIAS | {'use_bidirectional_attention': False, 'attn_logit_softcapping': None},  # which it does not read
    _gemma_names(),
  ),
  'gpt2': Family(
    'GPT2LMHeadModel',
    {
      'vocab_size': 'vocab_size',
      'n_embd': 'd_model',
      'n_layer': 'n_layers',
      'n_head': 'n_heads',
      'n_inner': 'd_ff',
      'n_positions': 'max_seq_len',
      'layer_norm_epsilon': 'norm_eps',
      'tie_word_embeddings': 'tie_embeddings',
    },
    {'n_inner': None, 'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True, 'activation_function': 'gelu_new'},
    {'norm': 'layernorm', 'positions': 'learned', 'bias': True, 'gated_mlp': False},
    {'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False},
    _gpt2_names(),
  ),
  'mixtral': Family(
    'MixtralForCausalLM',
    _SIZES | _MOE,
    _PLAIN | {'num_key_value_heads': 8, 'rope_theta': 1e6, 'rms_norm_eps': 1e-5, 'sliding_window': None},
    {},
    {},
    _expert_names('block_sparse_moe', 'w1', 'w3', 'w2'),
  ),
  'qwen3_moe': Family(
    'Qwen3MoeForCausalLM',
    _QWEN_MOE,
    _QWEN | {'num_key_value_heads': 4, 'norm_topk_prob': False, 'intermediate_size': None},
    {'qk_norm': 'head'},
    _NO_BIAS | {'mlp_only_layers': [], 'decoder_sparse_step': 1},
    _qwen_expert_names(),
  ),
  'qwen2_moe': Family(
    'Qwen2MoeForCausalLM',
    _QWEN_MOE | {'shared_expert_intermediate_size': 'shared_d_ff', 'qkv_bias': 'qkv_bias'},
    _QWEN | {'num_key_value_heads': 16, 'norm_topk_prob': False, 'intermediate_size': None, 'qkv_bias': True},
    {},
    {'mlp_only_layers': [], 'decoder_sparse_step': 1, 'use_sliding_window': False},  # its window has rules of its own
    _qwen_expert_names(),
  ),
}
