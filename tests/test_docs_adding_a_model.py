"""docs/adding-a-model.md is run as it stands: its row opens and writes StarCoder2, and transformers agrees."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import PAGES

from jaxlm import interop, models, sample
from jaxlm.errors import InputError
from jaxlm.interop import families, gguf_config, hf_config
from jaxlm.models import presets

ROW, CHECK = re.findall(r'^```python\n(.*?)^```', PAGES['docs/adding-a-model.md'].read_text(), re.DOTALL | re.MULTILINE)
KIND = 'starcoder2'
SETTINGS = {
  'vocab_size': 131,
  'hidden_size': 42,
  'intermediate_size': 53,
  'num_hidden_layers': 3,
  'num_attention_heads': 3,
  'num_key_value_heads': 1,
  'max_position_embeddings': 97,
  'sliding_window': 7,
  'residual_dropout': 0.1,
}
TOKENS = np.random.default_rng(0).integers(3, 131, (3, 29)).astype(np.int32)


@pytest.fixture(autouse=True)
def row():
  """The page's first block in force, and taken back."""
  exec(compile(ROW, 'page', 'exec'), {})
  yield families.FAMILIES[KIND]
  del families.FAMILIES[KIND]


def test_its_check_passes():
  exec(compile(CHECK, 'page', 'exec'), {})


def test_every_leaf_of_it_has_a_name(row):
  cfg = hf_config.parse({'model_type': KIND, **SETTINGS}, 'here')
  leaves = models.init(cfg, jax.random.key(0))
  paths = {'/'.join(str(key.key) for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(leaves)}
  assert paths <= row.names.keys()
  assert row.names.keys() - paths == {'head'}  # tied


def test_what_it_does_not_know_is_refused():
  with pytest.raises(InputError, match='mlp_type='):
    hf_config.parse({'model_type': KIND, 'mlp_type': 'gated', **SETTINGS}, 'here')


def test_it_is_not_there_yet():
  """The page adds something: another family has to be found for it once this one is in the table."""
  del families.FAMILIES[KIND]
  try:
    with pytest.raises(InputError, match=f"model_type '{KIND}' is none of"):
      hf_config.parse({'model_type': KIND, **SETTINGS}, 'here')
  finally:
    exec(compile(ROW, 'page', 'exec'), {})
  assert not any(name.startswith(KIND) for name in presets.PRESETS) and KIND not in str(vars(gguf_config))


@pytest.fixture
def theirs():
  torch = pytest.importorskip('torch', reason="needs pip install -e '.[parity]'")
  transformers = pytest.importorskip('transformers', reason="needs pip install -e '.[parity]'")
  torch.manual_seed(0)
  model = transformers.Starcoder2ForCausalLM(transformers.Starcoder2Config(**SETTINGS)).eval()
  for weight in model.parameters():
    torch.nn.init.normal_(weight, std=0.3)
  return model


def logits_of(model, ids):
  import torch

  with torch.no_grad():
    return model(torch.tensor(ids, dtype=torch.long)).logits.numpy()


def test_transformers_agrees(theirs, tmp_path):
  """At every position, decoded past the window, and of what is exported."""
  theirs.save_pretrained(tmp_path / 'in')
  model, want = interop.load(str(tmp_path / 'in')), logits_of(theirs, TOKENS)
  logits, _ = models.forward(model.cfg, model.params, jnp.asarray(TOKENS))
  np.testing.assert_allclose(logits, want, atol=1e-4)
  lengths = jnp.full(3, 5, jnp.int32)
  logits, cache = sample.prefill(model.cfg, model.params, jnp.asarray(TOKENS[:, :5]), lengths, slots=32)
  for n in range(5, 20):
    np.testing.assert_allclose(logits.reshape(3, -1), want[:, n - 1], atol=1e-4)
    logits, cache = sample.decode(model.cfg, model.params, jnp.asarray(TOKENS[:, n : n + 1]), jnp.full(3, n), cache)
  assert interop.export(model, tmp_path / 'out') == KIND
  again = type(theirs).from_pretrained(tmp_path / 'out', attn_implementation='eager').eval()
  np.testing.assert_allclose(logits_of(again, TOKENS), want, atol=1e-5)


def test_the_defaults_are_those_of_transformers(theirs, row):
  config = type(theirs.config)().to_dict()
  there = config | (config.get('rope_parameters') or {})
  assert {key: there[key] for key in row.defaults} == row.defaults
