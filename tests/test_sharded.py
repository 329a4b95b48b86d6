"""The loss and the embedding on a mesh: the same numbers as on one device, and no device with the whole table."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LLAMA

from jaxlm import models, objectives, sharding
from jaxlm.losses import lm, sharded
from jaxlm.models import Run
from jaxlm.models.lookup import lookup

B, T, D, V, PADDED = 8, 6, 16, 203, 256
RNG = np.random.default_rng(5)
X, HEAD = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((B, T, D), (D, PADDED)))
TARGETS = jnp.asarray(RNG.integers(0, V, (B, T)), jnp.int32)
MESHES = {
  'fsdp': {'fsdp': 8},
  'tensor': {'tensor': 8, 'fsdp': 1},
  'fsdp, tensor': {'fsdp': 4, 'tensor': 2},
  'data, expert, sequence': {'data': 2, 'fsdp': 1, 'expert': 2, 'sequence': 2},
  'fsdp, expert, tensor': {'fsdp': 2, 'expert': 2, 'tensor': 2},
}
SETTINGS = {'plain': {}, 'cap': {'softcap': 3.0, 'temperature': 0.7}}
PROBES = [jnp.asarray(RNG.normal(size=(B, T)), jnp.float32) for _ in range(3)]


def probed(fn):
  """Every output at once, and the gradient of a sum over all of them."""

  def total(x, head):
    out = fn(x, head)
    return sum(jnp.sum(y * probe) for y, probe in zip(out, PROBES, strict=True)), out

  return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))


def on_mesh(chunks, how):
  laid = sharded.layout((B, T), sharding.RULES)
  return probed(lambda x, head: sharded.logprobs(x, head, TARGETS, laid, chunks=chunks, vocab=V, **how))(X, HEAD)


def compare(got, want):
  for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('setting', SETTINGS)
@pytest.mark.parametrize('mesh', MESHES)
def test_the_parts_that_go_round_are_the_whole(mesh, setting):
  how = SETTINGS[setting]
  want = probed(lambda x, head: lm.logprobs(x, head, TARGETS, chunks=1, vocab=V, **how))(X, HEAD)
  with jax.set_mesh(sharding.make_mesh(**MESHES[mesh])):
    for chunks in (1, 16):
      compare(on_mesh(chunks, how), want)


def test_groups_of_devices_gather_their_part(monkeypatch):
  want = probed(lambda x, head: lm.logprobs(x, head, TARGETS, chunks=1, vocab=V))(X, HEAD)
  monkeypatch.setattr(sharded, 'RING', 2)
  with jax.set_mesh(sharding.make_mesh(fsdp=8)):
    compare(on_mesh(3, {}), want)


def test_where_nothing_is_cut_or_rows_do_not_divide_there_is_no_layout():
  assert sharded.layout((B, T), sharding.RULES) is None  # no mesh
  with jax.set_mesh(sharding.make_mesh(data=8, fsdp=1)):
    assert sharded.layout((B, T), sharding.RULES) is None
  with jax.set_mesh(sharding.make_mesh(fsdp=8)):
    assert sharded.layout((B, T), None) is None
    assert sharded.layout((B - 1, T), sharding.RULES) is None


@pytest.mark.parametrize('mesh', MESHES)
def test_rows_of_a_table_that_is_cut(mesh):
  """Tokens occur many times, so that gradients add up."""
  table, tokens = jnp.asarray(RNG.normal(size=(32, D)), jnp.float32), jnp.asarray(RNG.integers(0, 9, (B, T)), jnp.int32)
  probe = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
  grad = lambda rules: jax.jit(
    jax.value_and_grad(lambda table: jnp.sum(lookup(table, tokens, jnp.float32, rules) * probe))
  )(table)
  with jax.set_mesh(sharding.make_mesh(**MESHES[mesh])):
    compare(grad(sharding.RULES), grad(None))


@pytest.mark.slow(but='fsdp-False')
@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('mesh', ['fsdp', 'fsdp, tensor'])
def test_no_device_has_the_table_the_head_or_all_logits(mesh, tied):
  """Read from the compiled gradient, of a vocabulary that no other size equals."""
  cfg = models.ModelConfig(
    vocab_size=640, d_model=48, n_layers=1, n_heads=4, n_kv_heads=2, d_ff=56, tie_embeddings=tied
  )
  mesh_ = sharding.make_mesh(**MESHES[mesh])
  loss_fn = objectives.next_token(cfg, Run(rules=sharding.RULES))
  names = ('tokens', 'targets', 'positions', 'segment_ids', 'target_bytes')
  batch = {name: jax.ShapeDtypeStruct((8, 16), jnp.int32) for name in names}
  batch['loss_mask'] = jax.ShapeDtypeStruct((8, 16), jnp.float32)
  layout = sharding.state_shardings(models.abstract(cfg), mesh_), sharding.batch_shardings(batch, mesh_)
  params = jax.eval_shape(lambda: models.init(cfg, jax.random.key(0)))
  total = lambda params, batch: loss_fn(params, batch, jax.random.key(0))[0].total
  with jax.set_mesh(mesh_):
    step = jax.jit(jax.grad(total), in_shardings=layout, out_shardings=layout[0])
    text = step.lower(params, batch).compile().as_text()
  shapes = {tuple(map(int, s.split(','))) for s in re.findall(r'\b[fb]\w*\d\[([\d,]+)\]', text)}
  whole = [s for s in shapes if 640 in s and np.prod(s) >= 640 * 48]
  assert shapes and not whole, whole


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_looked_up_all_the_same():
  params, tokens = models.init(LLAMA, jax.random.key(0)), jnp.arange(6).reshape(3, 2)
  want = models.forward(LLAMA, params, tokens)[0]
  with jax.set_mesh(sharding.make_mesh(tensor=2, fsdp=4)):
    got = jax.jit(lambda p, t: models.forward(LLAMA, p, t, run=Run(rules=sharding.RULES))[0])(params, tokens)
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
