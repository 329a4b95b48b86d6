"""Configs: every file under configs/ loads, and a config survives its JSON."""

import dataclasses
from pathlib import Path

import jax
import pytest

from jaxlm import config as configs
from jaxlm import models, program, sharding
from jaxlm.config import Pretrain
from jaxlm.errors import InputError

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / 'configs').rglob('*.py'))


def test_there_are_configs():
  assert FILES


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_loads_and_builds(path):
  config = configs.load(str(path))
  assert isinstance(config, Pretrain)
  text = 'sft' if path.parent.name == 'tasks' else 'pretrain'
  text = 'distill' if config.distill.teacher else text
  text = 'rl' if config.rl.algo else text
  verb = text if config.preference.stage == 'none' else config.preference.stage
  assert f'jaxlm {verb} {path.relative_to(ROOT)}' in path.read_text()[:1200]
  config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=50257))
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=jax.devices()[:8])
  with jax.set_mesh(mesh):
    built = program.build(config, mesh)
    assert built.abstract.params['embed'].shape == (50304, config.model.d_model)
    assert jax.eval_shape(built.step, built.abstract, built.batch)[1].keys() >= {'loss', 'grad_norm'}


def test_json_round_trip():
  for path in FILES:
    config = configs.load(str(path))
    assert configs.from_json(Pretrain, configs.to_json(config)) == config


def test_json_with_an_unknown_field():
  with pytest.raises(InputError, match="Pretrain.optim: no field 'lrr'; did you mean 'lr'"):
    configs.from_json(Pretrain, '{"optim": {"lrr": 1}}')


def test_the_gpt2_config_is_gpt2_small():
  config = configs.load(str(ROOT / 'configs' / 'gpt2' / '124m.py')).model
  config = dataclasses.replace(config, vocab_size=50257)
  shapes = jax.eval_shape(lambda: models.init(config, jax.random.key(0)))
  size = sum(x.size for x in jax.tree.leaves(shapes)) - (50304 - 50257) * 768
  assert size == 124_439_808  # the published count of GPT-2 small
