"""The step's program does not grow with depth: traced, lowered and compiled once for all layers."""

import time

import jax
import pytest

from jaxlm import program, sharding
from jaxlm.config import Compute, Data, Pretrain
from jaxlm.models import ModelConfig

KINDS = {'plain': {}, 'alternating': {'pattern': ('local', 'global'), 'window': 8}, 'experts': {'n_experts': 4}}


def seconds(kind, layers):
  """(lowering, compiling) in seconds of this process's CPU, which neighbours do not lengthen; the program's lines."""
  model = ModelConfig(vocab_size=128, d_model=32, n_layers=layers, n_heads=4, n_kv_heads=2, d_ff=48, **KINDS[kind])
  run = Pretrain(model=model, data=Data(seq_len=16, global_batch=8), compute=Compute(remat='full'))
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  with jax.set_mesh(mesh):
    built = program.build(run, mesh)
    began = time.process_time()
    lowered = built.step.lower(built.abstract, built.batch)
    between = time.process_time()
    lines = len(lowered.compile().as_text().splitlines())
  return between - began, time.process_time() - between, lines


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_eight_layers_and_eighty(kind):
  seconds(kind, 8)  # what is loaded and traced once
  rounds = [(seconds(kind, 8), seconds(kind, 80)) for _ in range(2)]
  for name, i, limit in (('lowering', 0, 1.5), ('compiling', 1, 1.5), ('lines', 2, 1.05)):
    few, many = (min(one[which][i] for one in rounds) for which in (0, 1))
    print(f'{kind}: {name} {few:.2f}, {many:.2f}: {many / few:.2f} x')
    assert many < limit * few, (name, few, many)
