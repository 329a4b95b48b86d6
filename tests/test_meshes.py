"""Loss and gradients on one device against eight under every strategy: float32, packed rows, remat on and off."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import LLAMA, MIXED, randomized

from jaxlm import models, objectives, sharding
from jaxlm.models import Run

SIZES = {'d_model': 16, 'n_heads': 8, 'n_kv_heads': 4, 'head_dim': 6, 'd_ff': 24}
MODELS = {
  'llama': dataclasses.replace(LLAMA, **SIZES),
  'mixed': dataclasses.replace(MIXED, **SIZES),
  'experts': dataclasses.replace(LLAMA, **SIZES, n_experts=8, experts_per_token=3),
}
MESHES = {
  'data': {'data': 8, 'fsdp': 1},
  'fsdp': {'fsdp': 8},
  'tensor': {'tensor': 4, 'fsdp': 2},
  'sequence': {'sequence': 8, 'fsdp': 1},
  'data, fsdp, tensor': {'data': 2, 'fsdp': 2, 'tensor': 2},
  'fsdp, sequence, tensor': {'fsdp': 2, 'sequence': 2, 'tensor': 2},
  'expert': {'expert': 8, 'fsdp': 1},
  'fsdp, expert, tensor': {'fsdp': 2, 'expert': 2, 'tensor': 2},
  'expert, sequence': {'expert': 4, 'sequence': 2, 'fsdp': 1},
  'data, sequence': {'data': 4, 'sequence': 2, 'fsdp': 1},
}
B, T = 8, 16


def batch():
  rng = np.random.default_rng(0)
  cuts = rng.integers(3, T - 3, (B, 1))
  order = np.arange(T)[None]
  second = order >= cuts
  segments = 1 + second - (order >= cuts + 2 * (T - cuts) // 3) * (1 + second) * (np.arange(B)[:, None] % 2)
  tokens = rng.integers(0, 131, (2, B, T))
  found = {
    'tokens': tokens[0],
    'targets': tokens[1],
    'positions': np.where(second, order - cuts, order),
    'segment_ids': segments,
    'target_bytes': np.ones((B, T)),
  }
  found = {name: jnp.asarray(x, jnp.int32) for name, x in found.items()}
  return found | {'loss_mask': jnp.asarray((segments > 0) & (rng.random((B, T)) < 0.8), jnp.float32)}


def loss_and_gradients(cfg, sizes, remat, chunks):
  devices = jax.devices()[: 1 if sizes is None else 8]
  mesh = sharding.make_mesh(**(sizes or {'fsdp': 1}), devices=devices)
  attention = 'ring' if 'sequence' in (sizes or {}) else 'xla'
  run = Run(attention=attention, remat=remat, rules=None if sizes is None else sharding.RULES)
  loss_fn = objectives.next_token(cfg, run, chunks=chunks, balance=0.01, router_z=0.001)

  def total(params, batch):
    loss, _ = loss_fn(params, batch, jax.random.key(0))
    return loss.total / loss.weight

  shardings = sharding.state_shardings(models.abstract(cfg), mesh)
  layout = shardings, sharding.batch_shardings(batch(), mesh)
  step = jax.jit(jax.value_and_grad(total), in_shardings=layout, out_shardings=(None, shardings))
  with jax.set_mesh(mesh):
    return jax.tree.map(np.asarray, step(*jax.device_put((randomized(cfg), batch()), layout)))


ALONE = {}


def alone(model):
  if model not in ALONE:
    ALONE[model] = loss_and_gradients(MODELS[model], None, 'none', 1)
  return ALONE[model]


CASES = [(model, mesh, 'none', 1) for model in MODELS for mesh in MESHES]
CASES += [
  ('llama', mesh, remat, chunks) for mesh in ('fsdp, sequence, tensor',) for remat, chunks in (('full', 2), ('dots', 1))
]


@pytest.mark.slow
@pytest.mark.parametrize('model, mesh, remat, chunks', CASES)
def test_every_strategy_gives_the_same(model, mesh, remat, chunks):
  loss, gradients = loss_and_gradients(MODELS[model], MESHES[mesh], remat, chunks)
  want, expected = alone(model)
  assert loss == pytest.approx(want, rel=1e-5)
  norm = float(optax.tree.norm(expected))
  away = float(optax.tree.norm(jax.tree.map(np.subtract, gradients, expected)))
  assert norm > 0.1 and away < 1e-5 * norm, away / norm
