"""Folders of adapters that are not whole or not to be written: one line each, and nothing is left out silently."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxlm.errors import InputError
from jaxlm.interop import peft
from jaxlm.loops import foreign
from jaxlm.models import LowRank, ModelConfig

CFG = ModelConfig(vocab_size=256, d_model=8, n_layers=2, n_heads=2, d_ff=12)
CONFIG = {'peft_type': 'LORA', 'r': 3, 'lora_alpha': 6, 'base_model_name_or_path': 'ORG/NAME'}
Q = 'base_model.model.model.layers.0.self_attn.q_proj'


def zeros(*shape):
  return np.zeros(shape, np.float32)


def adapted(*shape):
  *stack, i, o = shape
  return LowRank(zeros(*shape), zeros(*stack, i, 2), zeros(*stack, 2, o), zeros(*stack))


def folder(tmp_path, **change):
  save_file({f'{Q}.lora_A.weight': zeros(3, 8), f'{Q}.lora_B.weight': zeros(8, 3)}, tmp_path / peft.WEIGHTS)
  (tmp_path / peft.CONFIG).write_text(json.dumps(CONFIG | change))
  return tmp_path


@pytest.mark.parametrize(
  'change, why',
  [
    ({'r': None}, 'r=None is no number of 1'),
    ({'r': 0}, 'r=0 is no number of 1'),
    ({'lora_alpha': '6'}, "lora_alpha='6' is no number"),
    ({'rank_pattern': {'(': 2}}, 'rank_pattern=.* is no table of patterns'),
    ({'alpha_pattern': [1]}, 'alpha_pattern=.* is no table of patterns'),
  ],
)
def test_scales_that_cannot_be_read(change, why, tmp_path):
  params = {'layers': {'attn': {'q': zeros(2, 8, 8)}}}
  assert isinstance(peft.load(folder(tmp_path), CFG, params)['layers']['attn']['q'], LowRank)
  with pytest.raises(InputError, match=why):
    peft.load(folder(tmp_path, **change), CFG, params)


@pytest.mark.parametrize(
  'base, why', [('/nowhere/model', 'is not here'), ('./gone.gguf', 'is not here'), ('.', 'is an adapter itself')]
)
def test_bases_that_are_not_there(base, why, tmp_path, monkeypatch):
  monkeypatch.chdir(folder(tmp_path, base_model_name_or_path=base))
  with pytest.raises(InputError, match=why):
    foreign.open_model(str(tmp_path))
  assert peft.base_of(folder(tmp_path)) == 'hf://ORG/NAME'
  assert peft.base_of(folder(tmp_path, revision='v2')) == 'hf://ORG/NAME@v2'


@pytest.mark.parametrize(
  'where, more', [('head', {'head': adapted(8, 256)}), ('layers/mlp/up', {'mlp': {'up': adapted(2, 2, 8, 12)}})]
)
def test_no_adapter_is_left_out(where, more, tmp_path):
  cfg = dataclasses.replace(CFG, n_experts=2 * ('mlp' in more))
  layers = {'attn': {'q': adapted(2, 8, 8)}}
  params = {'layers': layers | more} if 'mlp' in more else {'layers': layers} | more
  with pytest.raises(InputError, match=f'{where} has an adapter'):
    peft.export(cfg, params, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
