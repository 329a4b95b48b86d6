"""Folders and templates made to hurt: each is refused in one line, soon, and without much memory."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import GPT2, LLAMA, randomized
from safetensors.numpy import load_file, save_file

from jaxlm import interop
from jaxlm.data import template
from jaxlm.data import tokenizer as tok
from jaxlm.errors import InputError
from jaxlm.interop import hf_config

WRONG = [0, -1, 10**9, 10**18, 10**40, 1.5, float('nan'), float('inf'), 'x', [], [1], {}, {'a': 1}, '\n\x1b[2J']
KEYS = ['vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'head_dim']
KEYS += ['intermediate_size', 'rms_norm_eps', 'tie_word_embeddings', 'hidden_act', 'attention_bias', 'layer_types']
KEYS += ['rope_theta', 'rope_scaling', 'rope_parameters', 'model_type', 'sliding_window', 'max_position_embeddings']
KEYS += ['strange\n\x1b[2Jkey']
FINE = {'max_position_embeddings': (10**9,), 'rms_norm_eps': (10**9, 10**18, 1.5), 'rope_theta': (10**9, 10**18, 1.5)}
FINE |= {'rope_scaling': ({},), 'rope_parameters': ({},)}


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
  vocabulary = tok.train(['call me Ishmael ' * 9], 280)
  cfg = dataclasses.replace(LLAMA, d_model=12, vocab_size=vocabulary.vocab_size)
  folder = tmp_path_factory.mktemp('sound') / 'model'
  interop.export(interop.Model(cfg, randomized(cfg), vocabulary, '{{ messages }}', {}), folder)
  return folder


@pytest.fixture
def folder(sound, tmp_path):
  return shutil.copytree(sound, tmp_path / 'model')


def refused(folder):
  with pytest.raises(InputError) as caught:
    interop.load(str(folder))
  assert str(caught.value).startswith(str(folder)) and str(caught.value).isprintable() and len(str(caught.value)) < 1001


@pytest.mark.parametrize('key', KEYS)
def test_values_that_no_model_has(sound, folder, key):
  config = json.loads((sound / 'config.json').read_text())
  for value in WRONG:
    if any(type(value) is type(fine) and value == fine for fine in FINE.get(key, ())):
      continue
    changed = {k: v for k, v in config.items() if not (key == 'rope_scaling' and k == 'rope_parameters')}
    (folder / 'config.json').write_text(json.dumps(changed | {key: value}))
    refused(folder)


@pytest.mark.parametrize('kind', ['llama', 'gemma3_text', 'mixtral', 'gpt2'])
def test_a_size_that_is_null_or_missing(kind):
  config = hf_config.write({'gpt2': GPT2}.get(kind, LLAMA), kind)
  config |= {'num_local_experts': 5, 'num_experts_per_tok': 2} if kind == 'mixtral' else {}
  hf_config.parse(config, 'x')
  for key in ('vocab_size', 'hidden_size', 'num_hidden_layers', 'n_embd', 'n_layer'):
    if key in config:
      with pytest.raises(InputError, match=key):
        hf_config.parse(config | {key: None}, 'x')


@pytest.mark.parametrize('value', WRONG[2:])
@pytest.mark.parametrize(
  'key', ['factor', 'low_freq_factor', 'rope_type', 'full_attention', 'original_max_position_embeddings']
)
def test_rope_parameters_that_no_model_has(key, value):
  scaling = {'rope_type': 'llama3', 'factor': 2.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, key: value}
  config = hf_config.write(LLAMA, 'llama') | {'rope_parameters': scaling, 'rope_scaling': None}
  try:
    hf_config.parse(config, 'x')
  except InputError as error:
    assert str(error).isprintable()
  else:
    assert isinstance(value, (int, float)) and 0 < value < 1e30


def index(found):
  return lambda folder: (folder / 'model.safetensors.index.json').write_text(json.dumps(found))


def tensors(change):
  return lambda folder: save_file(change(load_file(folder / 'model.safetensors')), folder / 'model.safetensors')


def header(**changes):
  def write(folder):
    raw = (folder / 'model.safetensors').read_bytes()
    size = int.from_bytes(raw[:8], 'little')
    found = json.loads(raw[8 : 8 + size])
    found['model.norm.weight'] |= changes
    text = json.dumps(found).encode()
    (folder / 'model.safetensors').write_bytes(len(text).to_bytes(8, 'little') + text + raw[8 + size :])

  return write


def special(name, make):
  def change(folder):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)

  return change


def sized(size, data=b''):
  return lambda path: (path.write_bytes(data), os.truncate(path, size))


def tokenizer(**changes):
  def change(folder):
    path = folder / 'tokenizer.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return change


def names(**changes):
  return lambda folder: (folder / 'tokenizer_config.json').write_text(json.dumps(changes))


JSON = (
  'config.json',
  'generation_config.json',
  'tokenizer_config.json',
  'tokenizer.json',
  'model.safetensors.index.json',
)
HOSTILE = {
  **{f'{name} is a pipe': special(name, os.mkfifo) for name in (*JSON, 'model.safetensors', 'chat_template.jinja')},
  **{
    f'{name} is endless': special(name, lambda path: path.symlink_to('/dev/zero'))
    for name in (*JSON, 'model.safetensors')
  },
  **{f'{name} of 1 GB': special(name, sized(1 << 30)) for name in (*JSON, 'model.safetensors', 'chat_template.jinja')},
  **{f'{name} is a folder': special(name, lambda path: path.mkdir()) for name in JSON},
  **{f'{name} is deep': special(name, lambda path: path.write_bytes(b'[' * 300_000)) for name in JSON},
  **{f'{name} is no text': special(name, lambda path: path.write_bytes(b'\xff\xfe\0')) for name in JSON},
  'a digit too many': special('config.json', lambda path: path.write_text('{"vocab_size": ' + '1' * 100_000 + '}')),
  'a template of no text': special('chat_template.jinja', lambda path: path.write_bytes(b'\xff\xfe')),
  'an index of a list': index({'weight_map': ['model.safetensors']}),
  'an index of nothing': index({}),
  'an index up and out': index({'weight_map': {'a': '../../etc/passwd'}}),
  'an absolute index': index({'weight_map': {'a': '/etc/passwd'}}),
  'an index of numbers': index({'weight_map': {'a': 1, 'b': 'x'}}),
  'an index to the folder above': index({'weight_map': {'a': '..'}}),
  'an index to nothing': index({'weight_map': {'a': ''}}),
  'an index with a zero byte': index({'weight_map': {'a': 'a\0b'}}),
  'an index of a long name': index({'weight_map': {'a': 'a' * 5000}}),
  'a link to another file': special('model.safetensors', lambda path: path.symlink_to('/etc/passwd')),
  'a tensor up and out': tensors(lambda found: found | {'../../x': np.ones(3, np.float32)}),
  'a tensor that moves the cursor': tensors(lambda found: found | {'a\n\x1b[2J': np.ones(3, np.float32)}),
  'a tensor of a long name': tensors(lambda found: found | {'a' * 10**6: np.ones(3, np.float32)}),
  'whole numbers': tensors(lambda found: {name: x.astype(np.int8) for name, x in found.items()}),
  'an empty tensor of 2^62': header(shape=[1 << 62, 0], data_offsets=[0, 0]),
  'a product of 2^96': header(shape=[1 << 32, 1 << 32, 1 << 32]),
  'sides of 1': header(shape=[1] * 200 + [11]),
  'another type': header(dtype='F8_E4M3'),
  'the vocabulary of another': tensors(lambda found: {n: x[:-1] if 'embed' in n else x for n, x in found.items()}),
  'a name of a number': names(eos_token=5),
  'a template of a number': lambda folder: ((folder / 'chat_template.jinja').unlink(), names(chat_template=5)(folder)),
  'a tokenizer of another kind': tokenizer(model={'type': 'X'}),
  'a tokenizer of an endless vocabulary': tokenizer(model={'type': 'BPE', 'vocab': {'<|eos|>': 1 << 31}, 'merges': []}),
  'a broken pattern': tokenizer(pre_tokenizer={'type': 'Split', 'pattern': {'Regex': '(((('}, 'behavior': 'Isolated'}),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_folders_are_refused_soon(folder, name):
  HOSTILE[name](folder)
  began = time.monotonic()
  refused(folder)
  assert time.monotonic() - began < 5


BOUNDED = ('config.json of 1 GB', 'tokenizer.json of 1 GB', 'config.json is endless', 'model.safetensors of 1 GB')
COUNTS = {'num_hidden_layers': 10**9, 'head_dim': 10**9, 'intermediate_size': 10**9, 'vocab_size': 10**9}


def test_memory_stays_bounded(sound, tmp_path):
  """The peak of a process of its own that tries one after another, beyond what it had before."""
  folders = []
  for name in BOUNDED:
    folders.append(shutil.copytree(sound, tmp_path / name))
    HOSTILE[name](folders[-1])
  for key, value in COUNTS.items():
    folders.append(shutil.copytree(sound, tmp_path / key))
    path = folders[-1] / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
  code = f"""
import re, sys
from jaxlm import interop
from jaxlm.errors import InputError
peak = lambda: int(re.search('VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10
interop.load({str(sound)!r})
before = peak()
for folder in sys.argv[1:]:
  try:
    interop.load(folder)
  except InputError:
    continue
  raise SystemExit(folder)
print(peak() - before)
"""
  command = [sys.executable, '-c', code, *map(str, folders)]
  began = time.monotonic()
  done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {'XLA_FLAGS': ''}, timeout=60)
  assert done.returncode == 0, done.stderr[-2000:]
  assert int(done.stdout) < 100 and time.monotonic() - began < 30  # MB


@pytest.mark.parametrize(
  'hostile',
  [
    '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
    '{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f("a" * 1000) }}',
    '{{ ' + '(' * 100_000 + '1' + ')' * 100_000 + ' }}',
    '{{ 9 ** (9 ** 9) }}',
    "{{ '%2000000000d' % 1 }}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    '{{ lipsum(n=100000000) }}',
    '{{ cycler.__init__.__globals__ }}',
    '{% for i in range(10 ** 12) %}{% endfor %}',
  ],
  ids=lambda text: text[:30],
)
def test_templates_that_do_not_end_or_grow(hostile):
  render = template.Renderer(seconds=1.0, chars=100_000)
  render('x', {})
  began = time.monotonic()
  with pytest.raises(InputError, match='^chat template: ') as caught:
    render(hostile, {'messages': []})
  assert time.monotonic() - began < 10 and str(caught.value).isprintable()
  assert render('{{ x }}', {'x': 'lives'}) == 'lives'
  render.close()


def test_named_templates_and_a_processor_s(folder):
  (folder / 'chat_template.jinja').unlink()
  several = [{'name': 'tool_use', 'template': 'a'}, {'name': 'default', 'template': 'b'}]
  names(eos_token='<|eos|>', chat_template=several)(folder)
  assert interop.load(str(folder)).chat_template == 'b'
  names(eos_token='<|eos|>')(folder)
  (folder / 'chat_template.json').write_text(json.dumps({'chat_template': 'c'}))
  assert interop.load(str(folder)).chat_template == 'c'
