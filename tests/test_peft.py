"""Adapters against peft: equal logits and gradients for LoRA, rsLoRA and DoRA, its files read, ours opened by it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm import interop, lora, models, tree
from jaxlm.errors import InputError
from jaxlm.interop import peft as adapters
from jaxlm.losses import lm
from jaxlm.masked import value

torch = pytest.importorskip('torch', reason="needs pip install -e '.[parity]'")
transformers = pytest.importorskip('transformers', reason="needs pip install -e '.[parity]'")
peft = pytest.importorskip('peft', reason="needs pip install -e '.[parity]'")
# peft asks transformers for a name that is about to go
pytestmark = pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing:FutureWarning')

V, T = 131, 13
SIZES = {'vocab_size': V, 'hidden_size': 42, 'intermediate_size': 53, 'num_hidden_layers': 3, 'num_attention_heads': 3}
SIZES |= {
  'num_key_value_heads': 1,
  'max_position_embeddings': 97,
  'pad_token_id': 0,
  'bos_token_id': 1,
  'eos_token_id': 2,
}
LLAMA = ['q_proj', 'v_proj', 'o_proj', 'gate_proj', 'down_proj']
KINDS = {
  'lora': {'r': 5, 'lora_alpha': 7},
  'rslora': {'r': 5, 'lora_alpha': 7, 'use_rslora': True},
  'dora': {'r': 3, 'lora_alpha': 7, 'use_dora': True},
  'ranks': {'r': 5, 'lora_alpha': 7, 'rank_pattern': {'layers.1.self_attn.q_proj': 2}, 'alpha_pattern': {'o_proj': 3}},
}
IDS = np.random.default_rng(0).integers(3, V, (2, T))


def theirs(kind, folder, name='Llama', sizes=SIZES, targets=LLAMA):
  """A tiny model of transformers with an adapter of peft that is not 0, and both in files."""
  torch.manual_seed(0)
  config = getattr(transformers, f'{name}Config')(**sizes)
  base = getattr(transformers, 'GPT2LMHeadModel' if name == 'GPT2' else f'{name}ForCausalLM')(config).eval()
  base.save_pretrained(folder / 'base')
  model = peft.get_peft_model(
    base, peft.LoraConfig(task_type='CAUSAL_LM', target_modules=targets, fan_in_fan_out=name == 'GPT2', **KINDS[kind])
  )
  with torch.no_grad():
    for key, x in model.named_parameters():
      if 'lora_B' in key:
        x.normal_(0, 0.2)
      elif 'magnitude' in key:
        x.mul_(1.3)
  model.save_pretrained(folder / 'adapter')
  return model.eval()


def ours(folder):
  model = interop.load(str(folder / 'base'), adapter=folder / 'adapter')
  return model.cfg, model.params


def logits_of(cfg, params):
  return np.asarray(models.forward(cfg, params, jnp.asarray(IDS, jnp.int32))[0])


@pytest.mark.parametrize('kind', KINDS)
def test_logits_gradients_and_back(kind, tmp_path):
  model = theirs(kind, tmp_path)
  cfg, params = ours(tmp_path)
  with torch.no_grad():
    want = model(torch.tensor(IDS)).logits.numpy()
  np.testing.assert_allclose(logits_of(cfg, params), want, atol=1e-4)
  assert np.abs(logits_of(cfg, lora.base(params)) - want).max() > 0.1
  np.testing.assert_allclose(logits_of(cfg, lora.merge(params)), want, atol=1e-4)

  loss = model(torch.tensor(IDS), labels=torch.tensor(IDS)).loss
  loss.backward()
  picked, rest = lora.split(params)

  def fn(picked):
    logits = models.forward(cfg, tree.combine(picked, rest), jnp.asarray(IDS[:, :-1], jnp.int32))[0]
    return value(lm.next_token(logits, jnp.asarray(IDS[:, 1:], jnp.int32), jnp.ones((2, T - 1))))

  mine, grads = jax.jit(jax.value_and_grad(fn))(picked)
  assert float(mine) == pytest.approx(loss.item(), rel=1e-5)
  grads = lora.adapted(tree.combine(grads, rest))
  names = {'q': 'self_attn.q_proj', 'v': 'self_attn.v_proj', 'o': 'self_attn.o_proj', 'gate': 'mlp.gate_proj'}
  for path, w in grads.items():
    leaf = path.split('/')[-1]
    for i in range(cfg.n_layers):
      module = model.get_submodule(f'base_model.model.model.layers.{i}.{names.get(leaf, "mlp.down_proj")}')
      r = module.r['default']
      pairs = [(w.a[i][:, :r].T, module.lora_A['default'].weight), (w.b[i][:r].T, module.lora_B['default'].weight)]
      if kind == 'dora':
        pairs.append((w.magnitude[i], module.lora_magnitude_vector['default'].weight))
      for got, parameter in pairs:
        np.testing.assert_allclose(got, parameter.grad.numpy(), atol=2e-5 * np.abs(parameter.grad.numpy()).max() + 1e-8)

  adapters.export(cfg, params, tmp_path / 'back', base=str(tmp_path / 'base'))
  fresh = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'base').eval()
  again = peft.PeftModel.from_pretrained(fresh, tmp_path / 'back').eval()
  with torch.no_grad():
    np.testing.assert_allclose(again(torch.tensor(IDS)).logits.numpy(), want, atol=1e-4)


def test_one_adapter_of_a_fused_matrix_is_one_for_each_part(tmp_path):
  sizes = {'vocab_size': V, 'n_positions': 97, 'n_embd': 42, 'n_layer': 3, 'n_head': 3, 'n_inner': 53}
  model = theirs('lora', tmp_path, 'GPT2', sizes, ['c_attn', 'c_fc'])
  cfg, params = ours(tmp_path)
  with torch.no_grad():
    np.testing.assert_allclose(logits_of(cfg, params), model(torch.tensor(IDS)).logits.numpy(), atol=1e-4)
  with pytest.raises(InputError, match='is a part of transformer.h.0.attn.c_attn'):
    adapters.export(cfg, params, tmp_path / 'back')


@pytest.mark.parametrize(
  'change, why',
  [
    ({'peft_type': 'IA3'}, "peft_type='IA3' is not LORA"),
    ({'bias': 'all'}, "bias='all' is not understood"),
    ({'modules_to_save': ['lm_head']}, 'modules_to_save'),
    ({'layers_to_transform': [1]}, 'layers_to_transform'),
  ],
)
def test_configs_that_are_not_understood(change, why, tmp_path):
  theirs('lora', tmp_path)
  path = tmp_path / 'adapter' / 'adapter_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(InputError, match=why):
    ours(tmp_path)


def test_tensors_that_do_not_belong(tmp_path):
  theirs('lora', tmp_path)
  path = tmp_path / 'adapter' / 'adapter_model.safetensors'
  whole = load_file(path)
  name = next(name for name in whole if 'layers.1' in name and 'lora_A' in name)
  for changed, why in (
    (whole | {name.replace('layers.1', 'layers.7'): whole[name]}, 'no such matrix'),
    (whole | {name.replace('lora_A', 'lora_C'): whole[name]}, 'is no lora_A'),
    ({k: x for k, x in whole.items() if k != name}, 'of layer 1 is'),
    (whole | {name: whole[name][:, 1:].copy()}, 'of layer 1 is'),
  ):
    save_file(changed, path)
    with pytest.raises(InputError, match=why):
      ours(tmp_path)
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(InputError, match='is not whole'):
    ours(tmp_path)
