"""Presets: their parameter counts are the published ones."""

import jax
import pytest

from jaxlm import models, tree
from jaxlm.errors import InputError
from jaxlm.interop import hf_config
from jaxlm.models import presets

COUNTS = {  # exact ones of the models as they were released
  'gpt2-124m': 124_439_808,
  'gpt2-355m': 354_823_168,
  'gpt2-774m': 774_030_080,
  'gpt2-1.5b': 1_557_611_200,
  'llama2-7b': 6_738_415_616,
  'llama2-13b': 13_015_864_320,
  'llama2-70b': 68_976_648_192,
  'llama3.1-8b': 8_030_261_248,
  'llama3.1-70b': 70_553_706_496,
  'llama3.1-405b': 405_853_388_800,
  'llama3.2-1b': 1_235_814_400,
  'llama3.2-3b': 3_212_749_824,
  'smollm2-135m': 134_515_008,
  'smollm2-360m': 361_821_120,
  'smollm2-1.7b': 1_711_376_384,
  'mistral-7b': 7_241_732_096,
  'mixtral-8x7b': 46_702_792_704,
  'qwen1.5-moe-a2.7b': 14_315_784_192,
  'qwen2.5-0.5b': 494_032_768,
  'qwen2.5-1.5b': 1_543_714_304,
  'qwen2.5-7b': 7_615_616_512,
  'qwen3-0.6b': 596_049_920,
  'qwen3-1.7b': 1_720_574_976,
  'qwen3-4b': 4_022_468_096,
  'qwen3-8b': 8_190_735_360,
  'qwen3-30b-a3b': 30_532_122_624,
  'gemma2-2b': 2_614_341_888,
  'gemma2-9b': 9_241_705_984,
  'gemma2-27b': 27_227_128_320,
  'gemma3-1b': 999_885_952,
  'olmo2-7b': 7_298_617_344,
  'olmo2-13b': 13_716_198_400,
}


@pytest.mark.parametrize('name', presets.PRESETS)
def test_counts_are_the_published_ones(name):
  cfg = presets.get(name)
  shapes = jax.eval_shape(lambda: models.init(cfg, jax.random.key(0)))
  count = tree.size(shapes) - (cfg.padded_vocab - cfg.vocab_size) * cfg.d_model * (2 - cfg.tie_embeddings)
  if name in COUNTS:
    assert count == COUNTS[name]
  else:
    letters = {'m': 1e6, 'b': 1e9}
    assert count == pytest.approx(float(name.split('-')[-1][:-1]) * letters[name[-1]], rel=0.1)
  assert hf_config.plain(hf_config.parse(hf_config.write(cfg, hf_config.family_of(cfg)), name)) == hf_config.plain(cfg)


def test_an_unknown_name_is_refused_with_the_nearest():
  with pytest.raises(InputError, match="no preset 'llama3-8'; did you mean llama3-8b"):
    presets.get('llama3-8')
