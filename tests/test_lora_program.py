"""Read from programs: a frozen matrix has no gradient, and what adapters save in work and memory on a mesh."""

import jax
import pytest

from jaxlm import cost, program, sharding
from jaxlm.config import Compute, Data, Lora, Pretrain
from jaxlm.models import ModelConfig, presets

MODEL = ModelConfig(vocab_size=640, d_model=48, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=56, tie_embeddings=False)
KERNELS = {(48, 48), (24, 48), (48, 56)}


def traced(model, devices, seq_len=24, **how):
  run = Pretrain(
    model=model, data=Data(seq_len=seq_len, global_batch=8), compute=Compute(remat='full', loss_chunks=8), **how
  )
  mesh = sharding.make_mesh(fsdp=devices, devices=jax.devices()[:devices])
  with jax.set_mesh(mesh):
    built = program.build(run, mesh)
    return built.step.trace(built.abstract, built.batch)


def products(jaxpr):
  """The shapes of all that is multiplied out, at any depth; of matrices whichever way round."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      shape = eqn.outvars[0].aval.shape
      yield tuple(sorted(shape)) if len(shape) == 2 else shape
    for value in eqn.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from products(inner)


def test_no_frozen_kernel_has_a_gradient():
  assert set(products(traced(MODEL, 1).jaxpr.jaxpr)) >= KERNELS  # without adapters they have
  assert not KERNELS & set(products(traced(MODEL, 1, lora=Lora(rank=3)).jaxpr.jaxpr))


def test_a_filter_leaves_out_the_gradient_of_the_rest():
  made = KERNELS & set(products(traced(MODEL, 1, trainable='layers/attn/*').jaxpr.jaxpr))
  assert made == {(48, 48), (24, 48)}


@pytest.mark.slow
def test_what_adapters_save_on_eight_devices():
  """SmolLM2-135M, 8 rows of 256 tokens, full remat: memory beside the arguments, and FLOPs."""
  model = presets.get('smollm2-135m')
  full, some = (traced(model, 8, 256, **how) for how in ({}, {'lora': Lora(rank=16)}))
  flops = [cost.matmul_flops(one.jaxpr.jaxpr) for one in (full, some)]
  temporary = [one.lower().compile().memory_analysis().temp_size_in_bytes for one in (full, some)]
  print(f'temporary memory {temporary[1] / temporary[0]:.3f} x, FLOPs {flops[1] / flops[0]:.3f} x')
  assert temporary[1] < 0.95 * temporary[0] and flops[1] < 0.85 * flops[0]
