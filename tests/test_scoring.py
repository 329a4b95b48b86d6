"""Reward models on a mesh: the scores of one device, by a program that no device has all weights for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import preferred
from conftest import LLAMA, randomized

from jaxlm import config as configs
from jaxlm import program, sharding
from jaxlm.data import prepare
from jaxlm.data.conversations import Conversation
from jaxlm.loops import bases, scoring

WORDS = preferred.vocabulary()
MODEL = dataclasses.replace(
  LLAMA, vocab_size=WORDS.vocab_size, d_model=16, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=24
)
CONFIG = configs.Pretrain(model=MODEL, preference=configs.Preference('reward'))


def model(mesh=None):
  value = np.random.default_rng(3).normal(size=MODEL.d_model).astype(np.float32)
  params = {**randomized(MODEL), 'value': jnp.asarray(value)}
  if mesh is not None:
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, bases.shapes(CONFIG, mesh))
  template = prepare.chat_of('plain', None, WORDS, preference=True)[2].template
  return scoring.RewardModel(CONFIG, params, WORDS, template, 0, mesh)


def talks():
  turn = lambda role, text: {'role': role, 'content': text}
  return [Conversation([turn('user', one['prompt']), turn('assistant', one['chosen'])]) for one in preferred.rows(19)]


def test_a_mesh_scores_as_one_device():
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  found, want = scoring.score(model(mesh), talks(), batch=5), scoring.score(model(), talks(), batch=7)
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
  assert want.std() > 0.01  # there is something to tell apart


def test_no_device_holds_the_whole():
  """Parameters are cut as a policy's, and rows over the devices, 16 of them or as many more as these divide."""
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  found = scoring.judge(CONFIG, mesh, 64)
  whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(found.params))
  assert 'value' in found.params and program.local_bytes(found.params) < 0.4 * whole
  assert found.rows == 16 and scoring.judge(CONFIG, sharding.make_mesh(), 64).rows == 16
  compiled = found.traced.lower().compile()
  scores = jax.tree.leaves(compiled.output_shardings)[0]
  assert scores.shard_shape((16,)) == (4,)
