"""Models in and out without transformers: what is written comes back bitwise, and what is not understood is refused."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXPERTS, GPT2, LLAMA, MIXED, randomized
from safetensors.numpy import load_file, save_file

from jaxlm import cli, interop, models, sharding, tree
from jaxlm.data import tokenizer as tok
from jaxlm.errors import InputError
from jaxlm.interop import hf, hf_config
from jaxlm.loops import writing

NAMED = {
  'llama': dataclasses.replace(LLAMA, d_model=12),
  'mistral': LLAMA,  # six heads do not divide a width of 11, which Llama's config class wants
  'gpt2': GPT2,
  'gemma3_text': dataclasses.replace(
    MIXED,
    d_model=12,
    activation='gelu_tanh',
    attention_softcap=None,
    attention_multiplier=11**-0.5,
    embedding_multiplier=12**0.5,
    rope_scaling='llama3',
  ),
  'mixtral': dataclasses.replace(EXPERTS, norm_at='pre', qk_norm='none', qkv_bias=False, shared_d_ff=0),
  'qwen2_moe': dataclasses.replace(EXPERTS, norm_at='pre', qk_norm='none', pattern=('global',)),
}


def exported(cfg, folder, **kwargs):
  return interop.export(interop.Model(cfg, randomized(cfg), None, None, {}), folder, **kwargs)


@pytest.mark.parametrize('kind', NAMED)
def test_what_is_written_comes_back_bitwise(kind, tmp_path, monkeypatch):
  cfg = NAMED[kind]
  monkeypatch.setattr(hf, 'SHARD_BYTES', 20_000)
  assert exported(cfg, tmp_path / 'out') == kind
  assert len(list((tmp_path / 'out').glob('*.safetensors'))) > 1
  again = interop.load(str(tmp_path / 'out'))
  assert hf_config.plain(again.cfg) == hf_config.plain(cfg)
  cut = lambda path, x: x[: cfg.vocab_size] if path == 'embed' else x[:, : cfg.vocab_size] if path == 'head' else x
  exact = lambda path: kind != 'gemma3_text' or not path.endswith('scale')  # one is taken from norms, and added again
  for (path, want), (_, got) in zip(tree.items(randomized(cfg)), tree.items(again.params), strict=True):
    np.testing.assert_allclose(cut(path, got), cut(path, want), atol=0 if exact(path) else 1e-6, err_msg=path)
    assert not np.asarray(got[cfg.vocab_size :] if path == 'embed' else 0).any()


def test_in_bfloat16_and_onto_a_mesh(tmp_path):
  cfg = dataclasses.replace(LLAMA, d_model=16, d_ff=32, n_heads=4, n_kv_heads=4, head_dim=8)
  exported(cfg, tmp_path / 'out', dtype=jnp.bfloat16)
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
  model = interop.load(str(tmp_path / 'out'), mesh=mesh)
  q = model.params['layers']['attn']['q']
  assert q.dtype == jnp.float32 and len(q.sharding.device_set) == 8 and not q.sharding.is_fully_replicated
  np.testing.assert_array_equal(q, randomized(cfg)['layers']['attn']['q'].astype(jnp.bfloat16).astype(jnp.float32))


def test_every_scaling_of_positions_survives_its_config():
  for scaling in ('linear', 'llama3', 'yarn'):
    cfg = dataclasses.replace(LLAMA, rope_scaling=scaling, rope_factor=4.0, rope_original_len=16, rope_high=32.0)
    if scaling == 'linear':
      cfg = dataclasses.replace(cfg, rope_original_len=8192, rope_high=4.0)
    config = hf_config.write(cfg, 'llama')
    assert hf_config.plain(hf_config.parse(config, 'x')) == hf_config.plain(cfg)
    del config['rope_parameters']  # the form before transformers 5
    assert hf_config.plain(hf_config.parse(config, 'x')) == hf_config.plain(cfg)


@pytest.mark.parametrize(
  'change, why',
  [
    ({'model_type': 'mamba'}, "model_type 'mamba' is none of llama, mistral"),
    ({'hidden_act': 'relu'}, "the activation 'relu' is none of"),
    ({'new_trick': 3}, 'new_trick=3 is not known to leave the numbers of llama as they are'),
    ({'quantization_config': {'bits': 4}}, 'quantization_config='),
    ({'rope_parameters': {'rope_type': 'longrope', 'factor': 2.0}}, "rope_type 'longrope' is none of"),
    ({'rope_parameters': {'rope_type': 'yarn', 'factor': 2.0, 'mscale': 1.0}}, 'mscale of the rope parameters'),
    ({'num_hidden_layers': 4}, 'model.layers.3.* is missing'),
    ({'num_hidden_layers': 2}, 'tensors that this architecture does not have: model.layers.2'),
    ({'intermediate_size': 19}, 'has the shape .*, the config makes it'),
    ({'vocab_size': None}, 'vocab_size'),
  ],
)
def test_what_is_not_understood_is_refused_by_name(change, why, tmp_path):
  exported(NAMED['llama'], tmp_path / 'out')
  path = tmp_path / 'out' / 'config.json'
  path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | change).items() if v is not None}))
  with pytest.raises(InputError, match=why) as info:
    interop.load(str(tmp_path / 'out'))
  assert str(info.value).startswith(str(tmp_path / 'out')) and '\n' not in str(info.value)


LLAMA3_ROPE = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 4.0, 'high_freq_factor': 1.0}
YARN_ROPE = {'rope_type': 'yarn', 'factor': 8.0}


@pytest.mark.parametrize(
  'kind, change, why',
  [
    ('gemma3_text', {'attn_logit_softcapping': 2.0}, 'attn_logit_softcapping=2.0 is not supported'),
    ('gpt2', {'hidden_act': 'silu'}, "hidden_act='silu' is not activation_function="),
    ('llama', {'hidden_activation': 'gelu'}, "hidden_activation='gelu' is not hidden_act="),
    ('gemma3_text', {'layer_types': None, '_sliding_window_pattern': 2}, '_sliding_window_pattern differs'),
    ('gemma2', {'layer_types': None, '_sliding_window_pattern': 3}, '_sliding_window_pattern differs'),
    ('llama', {'rope_parameters': LLAMA3_ROPE}, 'rope_low=4.0 must be below rope_high=1.0'),
    ('llama', {'rope_parameters': YARN_ROPE | {'beta_fast': 0.5}}, 'rope_low=1.0 must be below rope_high=0.5'),
    ('llama', {'rope_parameters': YARN_ROPE | {'rope_theta': 1.0}}, 'rope_theta=1.0 must be above 1'),
    ('qwen2', {'use_sliding_window': True, 'sliding_window': 5, 'max_window_layers': None, 'layer_types': None},
     'max_window_layers=None'),
    ('gemma2', {'query_pre_attn_scalar': None}, 'query_pre_attn_scalar=None'),
  ],
)  # fmt: skip
def test_what_transformers_reads_otherwise_is_refused(kind, change, why):
  config = hf_config.write(GPT2 if kind == 'gpt2' else NAMED['llama'], kind)
  if kind.startswith('gemma'):
    config |= {'sliding_window': 7}
  hf_config.parse(config, 'x')
  changed = {**config, **{k: v for k, v in change.items() if k != 'rope_parameters'}}
  if 'rope_parameters' in change:
    changed |= {'rope_parameters': {'rope_theta': 500.0} | change['rope_parameters'], 'rope_scaling': None}
  with pytest.raises(InputError, match=why):
    hf_config.parse(changed, 'x')


def test_rope_defaults_are_those_of_transformers():
  config = hf_config.write(NAMED['llama'], 'llama') | {'max_position_embeddings': 977, 'rope_scaling': None}
  cfg = hf_config.parse(config | {'rope_parameters': {'rope_type': 'yarn', 'factor': 4.0, 'rope_theta': 500.0}}, 'x')
  assert (cfg.rope_original_len, cfg.rope_low, cfg.rope_high) == (977, 1.0, 32.0)
  assert cfg.rope_amplitude == pytest.approx(0.1 * math.log(4) + 1)


def test_gemma_2_may_have_no_soft_caps():
  config = hf_config.write(NAMED['llama'], 'gemma2')
  caps = {'attn_logit_softcapping': None, 'final_logit_softcapping': None}
  cfg = hf_config.parse(config | caps, 'x')
  assert cfg.attention_softcap is None and cfg.logits_softcap is None


@pytest.mark.parametrize(
  'change',
  [
    {'mlp_only_layers': [1]},
    {'decoder_sparse_step': 2},
    {'use_sliding_window': True, 'sliding_window': 7},
    {'shared_expert_intermediate_size': 0},
    {'attention_bias': True},
  ],
)
def test_experts_of_other_kinds_are_refused_by_name(change):
  config = hf_config.write(NAMED['qwen2_moe'], 'qwen2_moe')
  name, value = next(iter(change.items()))
  with pytest.raises(InputError, match=re.escape(f'x: {name}={value}')):
    hf_config.parse(config | change, 'x')


def test_the_number_of_experts_has_two_names():
  """What is written is the name that every version of transformers reads: others would be left at their default."""
  for kind, name, other in (
    ('mixtral', 'num_local_experts', 'num_experts'),
    ('qwen2_moe', 'num_experts', 'num_local_experts'),
    ('qwen3_moe', 'num_experts', 'num_local_experts'),
  ):
    cfg = NAMED['qwen2_moe' if kind == 'qwen2_moe' else 'mixtral']
    cfg = dataclasses.replace(cfg, qk_norm='head') if kind == 'qwen3_moe' else cfg
    config = hf_config.write(dataclasses.replace(cfg, pattern=('global',)), kind)
    assert config[name] == 5 and other not in config
    assert hf_config.parse(config, 'x').n_experts == 5
    config[other] = config.pop(name)
    assert hf_config.parse(config, 'x').n_experts == 5
  config = hf_config.write(NAMED['qwen2_moe'], 'qwen2_moe')
  del config['norm_topk_prob'], config['qkv_bias']
  assert not hf_config.parse(config, 'x').normalize_experts and hf_config.parse(config, 'x').qkv_bias


def test_tied_embeddings_with_a_head_of_their_own(tmp_path):
  cfg = dataclasses.replace(LLAMA, tie_embeddings=True)
  exported(cfg, tmp_path / 'out')
  file = tmp_path / 'out' / 'model.safetensors'
  tensors = load_file(file)
  save_file(tensors | {'lm_head.weight': tensors['model.embed_tokens.weight']}, file)
  interop.load(str(tmp_path / 'out'))  # a copy changes nothing
  save_file(tensors | {'lm_head.weight': tensors['model.embed_tokens.weight'] + 1}, file)
  with pytest.raises(InputError, match='embeddings are tied and lm_head.weight is another matrix'):
    interop.load(str(tmp_path / 'out'))


def damaged(raw: bytes) -> dict[str, bytes]:
  size = int.from_bytes(raw[:8], 'little')
  header = json.loads(raw[8 : 8 + size])
  first, second = sorted(name for name in header if name != '__metadata__')[:2]
  packed = lambda h: len(text := json.dumps(h).encode()).to_bytes(8, 'little') + text + raw[8 + size :]
  overlap = {**header, second: header[first]}
  return {
    'cut': raw[:-5],
    'cut in its header': raw[:30],
    'empty': b'',
    'header of 2^63': (1 << 63).to_bytes(8, 'little') + raw[8:],
    'overlapping': packed(overlap),
    'beyond': packed({**header, first: {**header[first], 'data_offsets': [0, 1 << 40]}}),
    'text': b'not safetensors at all',
  }


@pytest.mark.parametrize(
  'way', ['cut', 'cut in its header', 'empty', 'header of 2^63', 'overlapping', 'beyond', 'text']
)
def test_hostile_safetensors_are_refused(way, tmp_path):
  exported(LLAMA, tmp_path / 'out')
  file = tmp_path / 'out' / 'model.safetensors'
  file.write_bytes(damaged(file.read_bytes())[way])
  with pytest.raises(InputError, match='model.safetensors: not a whole safetensors file'):
    interop.load(str(tmp_path / 'out'))


def test_names_that_leave_the_folder_are_refused(tmp_path):
  exported(LLAMA, tmp_path / 'out')
  index = {'weight_map': {'model.norm.weight': '../out/model.safetensors'}}
  (tmp_path / 'out' / 'model.safetensors.index.json').write_text(json.dumps(index))
  with pytest.raises(InputError, match='is no file beside it'):
    interop.load(str(tmp_path / 'out'))


def test_pickled_weights_are_not_read(tmp_path):
  exported(LLAMA, tmp_path / 'out')
  (tmp_path / 'out' / 'model.safetensors').rename(tmp_path / 'out' / 'pytorch_model.bin')
  with pytest.raises(InputError, match='pickled weights are not read'):
    interop.load(str(tmp_path / 'out'))


def test_a_source_becomes_a_run_and_a_folder_again(tmp_path, capsys):
  vocabulary = tok.train(['call me Ishmael ' * 9], 280)
  cfg = dataclasses.replace(LLAMA, vocab_size=vocabulary.vocab_size)
  model = interop.Model(cfg, randomized(cfg), vocabulary, '{{ messages }}', {'temperature': 0.5})
  interop.export(model, tmp_path / 'hf')
  run = str(tmp_path / 'run')
  assert cli.main(['import', str(tmp_path / 'hf'), '--run', run]) == 0
  config, params, tokenizer, step = writing.load(run)
  assert (hf_config.plain(config.model), step) == (hf_config.plain(cfg), 0)
  assert tokenizer.digest == vocabulary.digest
  assert cli.main(['export', run, str(tmp_path / 'again')]) == 0
  for name in ('config.json', 'model.safetensors', 'tokenizer.json', 'chat_template.jinja'):
    assert (tmp_path / 'hf' / name).read_bytes() == (tmp_path / 'again' / name).read_bytes(), name
  assert json.loads((tmp_path / 'again' / 'generation_config.json').read_text()) == {
    'temperature': 0.5,
    'bos_token_id': 0,
    'eos_token_id': 1,
    'pad_token_id': 2,
  }
  assert cli.main(['import', str(tmp_path / 'hf'), '--run', run]) == 1
  assert 'holds a run already' in capsys.readouterr().err
  assert cli.main(['export', run, str(tmp_path / 'again')]) == 1
  assert 'holds a model already' in capsys.readouterr().err
  assert cli.main(['import', 'nowhere', '--run', str(tmp_path / 'other')]) == 1
  assert 'nowhere: no folder with config.json' in capsys.readouterr().err


def test_the_dial_s_multipliers_are_exported_as_granite(tmp_path):
  cfg = dataclasses.replace(LLAMA, residual_multiplier=0.5, logits_scaling=2.0)
  assert exported(cfg, tmp_path / 'out') == 'granite'
  with pytest.raises(InputError, match='no family of transformers has all of this architecture'):
    hf_config.family_of(MIXED)


def test_logits_survive(tmp_path):
  cfg = NAMED['gemma3_text']
  exported(cfg, tmp_path / 'out')
  ids = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 13)))
  forward = jax.jit(lambda c, p: models.forward(c, p, ids)[0], static_argnums=0)
  again = interop.load(str(tmp_path / 'out'))
  np.testing.assert_allclose(forward(again.cfg, again.params), forward(cfg, randomized(cfg)), atol=1e-5)
