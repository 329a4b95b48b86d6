"""Models in and out without transformers: what is written comes back bitwise, and what is not understood is refused."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

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


@pytest.mark.parametrize('block', [300, 1 << 20])  # many blocks of a tensor, the last one overlapping; one
@pytest.mark.parametrize('kind', NAMED)
def test_what_is_written_comes_back_bitwise(kind, block, tmp_path, monkeypatch):
  cfg = NAMED[kind]
  monkeypatch.setattr(hf, 'SHARD_BYTES', 20_000)
  monkeypatch.setattr(hf, 'BLOCK_BYTES', block)
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


@pytest.mark.slow(but='llama-float32')
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('kind', ['llama', 'gpt2', 'mixtral'])
def test_blocks_that_lie_across_devices(kind, dtype, tmp_path, monkeypatch):
  monkeypatch.setattr(hf, 'BLOCK_BYTES', 500)
  cfg = dataclasses.replace(NAMED[kind], d_model=16, d_ff=32, n_heads=4)
  cfg = cfg if kind == 'gpt2' else dataclasses.replace(cfg, n_kv_heads=4, head_dim=8)
  exported(cfg, tmp_path / 'out')
  plain = interop.load(str(tmp_path / 'out'), dtype=dtype)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  laid = interop.load(str(tmp_path / 'out'), mesh=mesh, dtype=dtype)
  want = dict(tree.items(sharding.state_shardings(models.abstract(plain.cfg), mesh)))
  for (path, x), (_, y) in zip(tree.items(plain.params), tree.items(laid.params), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=path)
    assert y.sharding == want[path] and x.dtype == y.dtype == dtype, path
  assert not laid.params['embed'].is_fully_replicated


@pytest.mark.slow(but='float16')
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_short_floats_go_in_and_out_without_a_change(dtype, tmp_path):
  """Gemma's norms are a tensor and one: added and taken away in float32, whatever they and the leaves are stored as."""
  exported(NAMED['gemma3_text'], tmp_path / 'out', dtype=dtype)
  want = load_file(tmp_path / 'out' / 'model.safetensors')
  for asked in (jnp.float32, dtype):
    model = interop.load(str(tmp_path / 'out'), dtype=asked)
    norm = model.params['final_norm']['scale']
    assert norm.dtype == jnp.float32 and model.params['embed'].dtype == asked
    np.testing.assert_array_equal(norm, want['model.norm.weight'].astype(np.float32) + np.float32(1))
    interop.export(model, tmp_path / jnp.dtype(asked).name, dtype=dtype)
    got = load_file(tmp_path / jnp.dtype(asked).name / 'model.safetensors')
    assert got.keys() == want.keys()
    for name in want:
      assert got[name].dtype == dtype and got[name].tobytes() == want[name].tobytes(), name
    logits = models.forward(model.cfg, model.params, jnp.ones((1, 5), jnp.int32))[0]
    assert np.isfinite(logits.astype(jnp.float32)).all()


def peak_of_import(source, dtype: str) -> float:
  """The most memory that a process ever had over the bytes of the parameters, beyond what it and JAX had before."""
  code = """
import jax, re, sys
from jaxlm import interop, tree
jax.block_until_ready(jax.numpy.zeros(3))
peak = lambda: 1024 * int(re.search('VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
before = peak()
params = jax.block_until_ready(interop.load(sys.argv[1], dtype=jax.numpy.dtype(sys.argv[2])).params)
print((peak() - before) / tree.nbytes(params))
"""
  command = [sys.executable, '-c', code, str(source), dtype]
  env = os.environ | {'XLA_FLAGS': '', 'JAX_ENABLE_COMPILATION_CACHE': 'false'}  # writing programs down takes memory
  done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
  return float(done.stdout)


@pytest.fixture(scope='module')
def top_heavy(tmp_path_factory):
  """A folder in bfloat16 whose embeddings are nine tenths of it: a file of zeros that takes no room on the disk."""
  folder = tmp_path_factory.mktemp('top_heavy')
  cfg = dataclasses.replace(
    LLAMA, vocab_size=200_003, d_model=1024, d_ff=1024, n_heads=8, head_dim=64, tie_embeddings=True
  )
  exported(dataclasses.replace(cfg, vocab_size=8), folder / 'small', dtype=jnp.bfloat16)
  shapes = {name: x.shape for name, x in load_file(folder / 'small' / 'model.safetensors').items()}
  shapes['model.embed_tokens.weight'] = (cfg.vocab_size, cfg.d_model)
  header, end = {}, 0
  for name, shape in shapes.items():
    header[name] = {'dtype': 'BF16', 'shape': shape, 'data_offsets': [end, end := end + 2 * int(np.prod(shape))]}
  text = json.dumps(header).encode()
  (folder / 'model.safetensors').write_bytes(len(text).to_bytes(8, 'little') + text)
  os.truncate(folder / 'model.safetensors', 8 + len(text) + end)
  (folder / 'config.json').write_text(json.dumps(hf_config.write(cfg, 'llama')))
  return folder


@pytest.mark.slow(but='bfloat16')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_one_tensor_that_is_most_of_a_model_is_never_held_twice(top_heavy, dtype):
  assert 1.0 < peak_of_import(top_heavy, dtype) < 1.3


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


def test_a_file_that_became_shorter_is_named(tmp_path):
  exported(LLAMA, tmp_path / 'out')
  opened = hf.open_directory(tmp_path / 'out')
  file = tmp_path / 'out' / 'model.safetensors'
  os.truncate(file, file.stat().st_size // 2)
  with pytest.raises(InputError, match='model.safetensors: it became shorter'):
    hf.load(opened)


def test_weights_of_integers_are_refused(tmp_path):
  exported(LLAMA, tmp_path / 'out')
  file = tmp_path / 'out' / 'model.safetensors'
  tensors = load_file(file)
  save_file(tensors | {'lm_head.weight': tensors['lm_head.weight'].astype(np.int8)}, file)
  with pytest.raises(InputError, match='lm_head.weight is stored as no float type: quantized weights are not read'):
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


def test_an_import_that_fails_leaves_no_folder(tmp_path, capsys):
  exported(LLAMA, tmp_path / 'hf')  # without a tokenizer
  for source, why in ((str(tmp_path / 'hf'), 'has no tokenizer.json'), ('nowhere', 'no folder with config.json')):
    assert cli.main(['import', source, '--run', str(tmp_path / 'run')]) == 1
    assert why in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_all_tokens_that_end_an_answer_survive(tmp_path):
  vocabulary = tok.train(['call me Ishmael ' * 9], 280)
  cfg = dataclasses.replace(LLAMA, vocab_size=vocabulary.vocab_size)
  interop.export(interop.Model(cfg, randomized(cfg), vocabulary, None, {'eos_token_id': [1, 7]}), tmp_path / 'hf')
  assert cli.main(['import', str(tmp_path / 'hf'), '--run', str(tmp_path / 'run')]) == 0
  assert cli.main(['export', str(tmp_path / 'run'), str(tmp_path / 'again')]) == 0
  assert json.loads((tmp_path / 'again' / 'generation_config.json').read_text())['eos_token_id'] == [1, 7]


def test_tokens_without_a_row_in_the_embeddings(tmp_path):
  """One that nobody puts anywhere may be there (Gemma 3 1B has one); bos, eos and pad have to have rows."""
  vocabulary = tok.train(['call me Ishmael ' * 9], 280)
  assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (0, 1, 2)
  for rows, role in ((3, ''), (2, 'pad'), (1, 'eos')):
    cfg = dataclasses.replace(LLAMA, vocab_size=rows)
    interop.export(interop.Model(cfg, randomized(cfg), vocabulary, None, {}), tmp_path / str(rows))
    if not role:
      interop.load(str(tmp_path / str(rows)))
      continue
    with pytest.raises(
      InputError, match=f'the {role} token of its tokenizer has id {rows}, its embeddings have {rows}'
    ):
      interop.load(str(tmp_path / str(rows)))


def test_the_dial_s_multipliers_are_exported_as_granite(tmp_path):
  cfg = dataclasses.replace(LLAMA, residual_multiplier=0.5, logits_scaling=2.0)
  assert exported(cfg, tmp_path / 'out') == 'granite'
  with pytest.raises(InputError, match='no family of transformers has all of this architecture'):
    hf_config.family_of(MIXED)


@pytest.mark.slow
def test_logits_survive(tmp_path):
  cfg = NAMED['gemma3_text']
  exported(cfg, tmp_path / 'out')
  ids = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 13)))
  forward = jax.jit(lambda c, p: models.forward(c, p, ids)[0], static_argnums=0)
  again = interop.load(str(tmp_path / 'out'))
  np.testing.assert_allclose(forward(again.cfg, again.params), forward(cfg, randomized(cfg)), atol=1e-5)
