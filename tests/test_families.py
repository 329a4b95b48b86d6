"""Every family against transformers: tiny random models in, equal logits, a training step, and out again."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm import interop, models, objectives, sample, train
from jaxlm.errors import InputError
from jaxlm.interop import families, hf_config
from jaxlm.models import Run

torch = pytest.importorskip('torch', reason="needs pip install -e '.[parity]'")
transformers = pytest.importorskip('transformers', reason="needs pip install -e '.[parity]'")

V, T, WINDOW = 131, 29, 7
BASE = {
  'vocab_size': V,
  'hidden_size': 42,
  'intermediate_size': 53,
  'num_hidden_layers': 3,
  'num_attention_heads': 3,
  'num_key_value_heads': 1,
  'max_position_embeddings': 97,
  'pad_token_id': 0,
  'bos_token_id': 1,
  'eos_token_id': 2,
}
WIDE = BASE | {'hidden_size': 44, 'head_dim': 18}  # heads that do not divide the width
LLAMA3 = {'rope_type': 'llama3', 'rope_theta': 500.0, 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
YARN = {'rope_type': 'yarn', 'rope_theta': 500.0, 'factor': 4.0, 'original_max_position_embeddings': 16}
VISION = {'hidden_size': 16, 'intermediate_size': 20, 'num_hidden_layers': 1, 'num_attention_heads': 2}
VISION |= {'image_size': 28, 'patch_size': 14, 'vision_use_head': False}
GEMMA3 = BASE | {'num_hidden_layers': 7, 'head_dim': 18, 'sliding_window': WINDOW, 'query_pre_attn_scalar': 11}
EXPERTS = {'num_experts_per_tok': 2, 'num_local_experts': 5}
FAMILIES = {
  'llama2': ('Llama', BASE),
  'llama3': ('Llama', BASE | {'rope_parameters': LLAMA3 | {'original_max_position_embeddings': 16}}),
  'llama-biases': ('Llama', BASE | {'attention_bias': True, 'mlp_bias': True}),
  'smollm2': ('Llama', BASE | {'tie_word_embeddings': True}),
  'yarn': ('Llama', BASE | {'rope_parameters': YARN}),
  'linear': ('Llama', BASE | {'rope_parameters': {'rope_type': 'linear', 'rope_theta': 500.0, 'factor': 4.0}}),
  'yarn, its defaults': (
    'Qwen3',
    WIDE
    | {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 500.0, 'factor': 4.0}, 'max_position_embeddings': 13},
  ),
  'yarn in a window': ('Mistral', WIDE | {'sliding_window': WINDOW, 'rope_parameters': YARN | {'beta_fast': 9.0}}),
  'yarn that shortens': ('Llama', BASE | {'rope_parameters': YARN | {'factor': 0.5}}),
  'mistral': ('Mistral', WIDE | {'sliding_window': WINDOW}),
  'granite': ('Granite', BASE | {'residual_multiplier': 0.3, 'embedding_multiplier': 7.0, 'logits_scaling': 3.0}),
  'qwen2': ('Qwen2', BASE),
  'qwen2-local': ('Qwen2', BASE | {'use_sliding_window': True, 'sliding_window': WINDOW, 'max_window_layers': 1}),
  'qwen3': ('Qwen3', WIDE),
  'olmo2': ('Olmo2', BASE),
  'gemma2': ('Gemma2', BASE | {'head_dim': 18, 'sliding_window': WINDOW, 'query_pre_attn_scalar': 11}),
  'gemma3': ('Gemma3Text', GEMMA3),
  'gemma3-yarn': (
    'Gemma3Text',
    GEMMA3
    | {'rope_parameters': {'full_attention': YARN, 'sliding_attention': {'rope_type': 'default', 'rope_theta': 90.0}}},
  ),
  'gemma3-multimodal': ('Gemma3', {'text_config': GEMMA3, 'vision_config': VISION, 'mm_tokens_per_image': 4}),
  'gpt2': ('GPT2', {'vocab_size': V, 'n_positions': 97, 'n_embd': 42, 'n_layer': 3, 'n_head': 3, 'n_inner': 53}),
  'mixtral': ('Mixtral', WIDE | EXPERTS),
  'qwen2-moe': (
    'Qwen2Moe',
    BASE
    | {'num_experts': 5, 'num_experts_per_tok': 2, 'moe_intermediate_size': 23}
    | {'shared_expert_intermediate_size': 37},
  ),
  'qwen3-moe': ('Qwen3Moe', WIDE | EXPERTS | {'moe_intermediate_size': 23, 'norm_topk_prob': True}),
}
HEADS = {
  'GPT2': 'GPT2LMHeadModel',
  'Gemma3Text': 'Gemma3ForCausalLM',
  'Gemma3': 'Gemma3ForConditionalGeneration',
}
HOW = {'attn_implementation': 'eager', 'experts_implementation': 'eager'}


def tokens(rows=3, length=T, seed=0):
  return np.random.default_rng(seed).integers(3, V, (rows, length)).astype(np.int32)


@pytest.fixture(scope='module', params=FAMILIES)
def family(request, tmp_path_factory):
  """(the folder that transformers saved, its model, ours)."""
  folder = tmp_path_factory.mktemp(request.param) / 'hf'
  saved(request.param, folder)
  return folder, reopened(folder), interop.load(str(folder))


def saved(family, folder, dtype=torch.float32):
  name, settings = FAMILIES[family]
  torch.manual_seed(0)
  config = getattr(transformers, f'{name}Config')(**settings)
  model = getattr(transformers, HEADS.get(name, f'{name}ForCausalLM'))(config).eval()
  for weight in model.parameters():
    torch.nn.init.normal_(weight, std=0.3)
  model.to(dtype).save_pretrained(folder)


def reopened(folder, **kwargs):
  model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **HOW, **kwargs)
  assert not found['missing_keys'] and not found['unexpected_keys'] and not found['mismatched_keys']
  return model.eval()


def theirs(model, ids, **kwargs):
  with torch.no_grad():
    return model(torch.tensor(ids, dtype=torch.long), **kwargs).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def ours(cfg, params, ids, positions=None, segments=None):
  return models.forward(cfg, params, ids, positions_BT=positions, segment_ids_BT=segments)[0]


def test_logits_are_equal_at_every_position(family):
  _, reference, model = family
  np.testing.assert_allclose(ours(model.cfg, model.params, tokens()), theirs(reference, tokens()), atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['llama2', 'gemma2', 'gemma3'])
def test_folders_in_short_floats_are_computed_in_float32(name, dtype, tmp_path):
  saved(name, tmp_path, dtype)
  reference, model = reopened(tmp_path, dtype=torch.float32), interop.load(str(tmp_path))
  np.testing.assert_allclose(ours(model.cfg, model.params, tokens()), theirs(reference, tokens()), atol=1e-4)


def test_packed_rows_are_as_if_alone(family):
  _, reference, model = family
  first, second = tokens(1, 11, 1), tokens(1, 18, 2)
  row = np.concatenate([first, second], axis=1)
  positions = np.concatenate([np.arange(11), np.arange(18)])[None].astype(np.int32)
  segments = np.repeat([[1, 2]], [11, 18], axis=1).astype(np.int32)
  got = ours(model.cfg, model.params, row, positions, segments)
  want = np.concatenate([theirs(reference, first), theirs(reference, second)], axis=1)
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_decoding_is_the_full_pass_beyond_the_window_and_with_padding(family):
  """Ragged prompts, padded on the right with junk; then tokens one at a time, against transformers row by row."""
  _, reference, model = family
  ids, lengths = tokens(3, 19), np.array([5, 11, 13], np.int32)
  logits, cache = sample.prefill(model.cfg, model.params, jnp.asarray(ids[:, :13]), jnp.asarray(lengths), slots=32)
  want = [theirs(reference, ids[row : row + 1])[0] for row in range(3)]
  decode = jax.jit(functools.partial(sample.decode, model.cfg))
  for n in range(6):
    np.testing.assert_allclose(
      logits, [row[length + n - 1] for row, length in zip(want, lengths, strict=True)], atol=1e-4
    )
    fed = np.array([row[length + n] for row, length in zip(ids, lengths, strict=True)])
    logits, cache = decode(model.params, jnp.asarray(fed)[:, None], jnp.asarray(lengths + n), cache)
    logits = logits[:, 0]


def test_padding_on_the_left_changes_nothing(family):
  """Positions below 0 are dropped by the cache and seen by nobody, then and while decoding."""
  _, reference, model = family
  ids, prompt = tokens(2, 19), 13
  padded = np.concatenate([np.full((2, 4), 7, np.int32), ids[:, :prompt]], axis=1)
  padded[1] = np.roll(padded[1], -4)  # the second row is padded on the right
  positions = np.stack([np.arange(-4, prompt), np.where(np.arange(prompt + 4) < prompt, np.arange(prompt + 4), -1)])
  out = models.hidden(
    model.cfg,
    model.params,
    jnp.asarray(padded),
    positions_BT=jnp.asarray(positions.astype(np.int32)),
    cache=models.init_cache(model.cfg, 2, 32),
    first=True,
  )
  logits, want = models.unembed(model.cfg, model.params, out.x_BTD), theirs(reference, ids)
  np.testing.assert_allclose(logits[0, 4:], want[0, :prompt], atol=1e-4)
  np.testing.assert_allclose(logits[1, :prompt], want[1, :prompt], atol=1e-4)
  cache, decode = out.cache, jax.jit(functools.partial(sample.decode, model.cfg))
  for n in range(prompt, 19):
    at = jnp.full(2, n, jnp.int32)
    logits, cache = decode(model.params, jnp.asarray(ids[:, n : n + 1]), at, cache)
    np.testing.assert_allclose(logits[:, 0], want[:, n], atol=1e-4)


def test_a_step_later_it_is_exported_and_transformers_agrees(family, tmp_path):
  folder, _, model = family
  batch = {'tokens': tokens(3, 12), 'targets': tokens(3, 12, 5), 'loss_mask': np.ones((3, 12), np.float32)}
  batch |= {
    'positions': np.broadcast_to(np.arange(12, dtype=np.int32), (3, 12)),
    'segment_ids': np.ones((3, 12), np.int32),
  }
  batch['target_bytes'] = np.ones((3, 12), np.int32)
  optimizer = optax.sgd(0.05)
  step = jax.jit(
    train.make_train_step(objectives.next_token(model.cfg, Run(), balance=0.01, router_z=0.001), optimizer)
  )
  state, metrics = step(train.create_state(model.params, optimizer, jax.random.key(0)), batch)
  assert np.isfinite(float(metrics['loss']))
  kind = interop.export(model._replace(params=state.params), tmp_path / 'out')
  again = reopened(tmp_path / 'out')
  assert type(again).__name__ == type(reopened(folder)).__name__.replace('ConditionalGeneration', 'CausalLM'), kind
  got = ours(model.cfg, state.params, tokens())
  np.testing.assert_allclose(got, theirs(again, tokens()), atol=1e-4)
  assert np.abs(np.asarray(got) - theirs(reopened(folder), tokens())).max() > 1e-3


def config_of(kind):
  return transformers.models.auto.configuration_auto.CONFIG_MAPPING[kind]()


@pytest.mark.parametrize('kind', families.FAMILIES)
def test_a_key_that_is_not_there_means_what_transformers_takes(kind):
  """Published files leave out keys: ours are theirs, or the key is required. 'period' is no key."""
  family, theirs = families.FAMILIES[kind], config_of(kind).to_dict()
  rope = theirs.get('rope_parameters') or {}
  theirs |= {'rope_theta': rope.get('full_attention', rope).get('rope_theta')}
  theirs |= {'rope_local_base_freq': rope.get('sliding_attention', {}).get('rope_theta')}
  alike = theirs.get('num_attention_heads'), theirs.get('num_key_value_heads')
  for key, value in family.defaults.items():
    if key == 'head_dim' and value is None:
      assert theirs.get(key) in (None, theirs['hidden_size'] // theirs['num_attention_heads'])
    elif key == 'num_key_value_heads' and value is None:  # as many as heads
      assert alike[0] == alike[1]
    elif key in ('period', 'mlp_bias', 'intermediate_size') and key not in theirs or key == 'intermediate_size':
      continue
    elif key == 'sliding_window' and 'use_sliding_window' in theirs:  # it is None where it is not used
      assert type(config_of(kind))(use_sliding_window=True).sliding_window == value
    else:
      assert theirs[key] == value, key
  for key, value in family.only.items():
    if key in theirs:
      assert theirs[key] == value, key


@pytest.mark.parametrize('kind', families.FAMILIES)
def test_a_whole_default_config_and_one_with_sizes_alone_are_read_alike(kind):
  theirs = config_of(kind)
  sizes = {key: getattr(theirs, key) for key in families.FAMILIES[kind].keys if hasattr(theirs, key)}
  required = {key: sizes[key] for key in sizes if key not in families.FAMILIES[kind].defaults}
  if kind == 'qwen3_moe':
    required['num_experts'] = theirs.num_experts
  short = hf_config.parse({'model_type': kind} | required, kind)
  assert hf_config.plain(short) == hf_config.plain(hf_config.parse(theirs.to_dict(), kind))


WINDOWED = [
  ('qwen2', {'use_sliding_window': True}),
  ('qwen3', {'use_sliding_window': True, 'max_window_layers': 3}),
  ('qwen3_moe', {'use_sliding_window': True, 'max_window_layers': 3}),  # which it does not read
  ('mistral', {}),
  ('mistral', {'sliding_window': None}),
  ('mixtral', {'sliding_window': 9}),
  ('gemma2', {'num_hidden_layers': 5}),
  ('gemma3_text', {'sliding_window_pattern': 4}),
]


@pytest.mark.parametrize('kind, settings', WINDOWED)
def test_windows_are_where_transformers_has_them(kind, settings):
  theirs = type(config_of(kind))(**settings)
  window = theirs.sliding_window
  types = getattr(theirs, 'layer_types', None) or ['sliding_attention' if window else 'full_attention'] * 99
  local = tuple('local' if kind == 'sliding_attention' else 'global' for kind in types[: theirs.num_hidden_layers])
  asked = {key: value for key, value in theirs.to_dict().items() if key not in ('layer_types', 'sliding_window')}
  ours = hf_config.parse({**asked, **settings}, kind)
  assert ours.kinds == local and (window is None or ours.window == window)
  if 'layer_types' in theirs.to_dict():
    assert hf_config.parse(theirs.to_dict() | settings, kind).kinds == local


def multimodal(folder):
  """A tiny multimodal model, saved by transformers with the few keys that its makers write."""
  torch.manual_seed(0)
  text = {'hidden_size': 48, 'intermediate_size': 53, 'num_hidden_layers': 7, 'sliding_window': WINDOW}
  text |= {'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}, 'vocab_size': V}
  parts = {'text_config': dict(text), 'vision_config': VISION, 'mm_tokens_per_image': 4}
  model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**parts)).eval()
  for weight in model.parameters():
    torch.nn.init.normal_(weight, std=0.1)
  model.save_pretrained(folder)
  config = {'model_type': 'gemma3', 'torch_dtype': 'bfloat16', 'eos_token_id': [1, 106], 'image_token_index': 100}
  parts['text_config'] = text | {'model_type': 'gemma3_text'}
  (folder / 'config.json').write_text(json.dumps(config | parts))
  return theirs(model, tokens())


def test_the_text_model_of_a_published_multimodal_folder(tmp_path):
  want = multimodal(tmp_path)
  model = interop.load(str(tmp_path))
  assert model.cfg.n_heads == 8 and model.cfg.kv_heads == 4 and model.cfg.head_size == 256
  assert model.left_out.startswith('the text model alone: ')
  np.testing.assert_allclose(ours(model.cfg, model.params, tokens()), want, atol=1e-4)
  file = tmp_path / 'model.safetensors'
  saved = load_file(file)
  hub = {name.replace('model.language_model.', 'language_model.model.', 1): x for name, x in saved.items()}
  hub = {name.removeprefix('model.'): x for name, x in hub.items()}
  late = {name.replace('language_model.model.', 'model.language_model.', 1): x for name, x in hub.items()}
  late = {name if name.startswith('model.') else f'model.{name}': x for name, x in late.items()}
  assert hub.keys() != late.keys() and saved.keys() in (hub.keys(), late.keys())
  for tensors in (hub, late):
    save_file(tensors, file)
    again = interop.load(str(tmp_path))
    np.testing.assert_array_equal(again.params['layers']['attn']['q'], model.params['layers']['attn']['q'])
  for extra in ('audio_tower.x', 'language_model.model.layers.0.extra.weight', 'model.norm.weight'):
    save_file(hub | {extra: np.ones(3, np.float32)}, file)
    with pytest.raises(InputError, match='tensors that this architecture does not have'):
      interop.load(str(tmp_path))
