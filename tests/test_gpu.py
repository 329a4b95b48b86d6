"""What only a GPU can show: its attention kernel, its arithmetic beside the CPU's, a run and decoding on it.

JAX_PLATFORMS=cuda,cpu XLA_FLAGS=--xla_gpu_deterministic_ops=true pytest tests/test_gpu.py
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2, LLAMA, randomized
from test_kernels import plain

from jaxlm import models, program, sample, sharding
from jaxlm.config import Compute, Data, Optim, Pretrain
from jaxlm.errors import InputError
from jaxlm.models import ModelConfig, kernels

pytestmark = pytest.mark.skipif(jax.default_backend() != 'gpu', reason='needs a GPU: JAX_PLATFORMS=cuda,cpu')
T, H, K, N = 256, 6, 2, 64
SMALL = ModelConfig(vocab_size=131, d_model=128, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=256, max_seq_len=256)


def inputs(dtype):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=(3, T, n, N)), dtype) for n in (H, K, K))
  cuts = np.sort(rng.integers(0, T, (3, 3)), axis=1)
  return q, k, v, jnp.asarray((np.arange(T)[None, :, None] >= cuts[:, None]).sum(axis=2), jnp.int32)


def both(fn, q, k, v, segments):
  probe = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
  value = lambda q, k, v: jnp.sum(fn(q, k, v, segments).astype(jnp.float32) * probe)
  return jax.jit(jax.value_and_grad(value, (0, 1, 2)))(q, k, v)


def relative(got, want):
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize('how', [{}, {'window': 37}, {'scale': 0.2}])
@pytest.mark.parametrize('packed', [True, False])
def test_cudnn_is_attention(how, packed):
  *qkv, segments = inputs(jnp.bfloat16)
  segments = segments if packed else None
  with jax.default_matmul_precision('highest'):
    want = both(lambda *x: plain(*x, **how), *(x.astype(jnp.float32) for x in qkv), segments)
  got = both(lambda *x: kernels.cudnn(*x, **how), *qkv, segments)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert relative(a, b) < 0.02


@pytest.mark.parametrize('cfg', [LLAMA, GPT2], ids=['llama', 'gpt2'])
def test_logits_are_the_cpus(cfg):
  tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (3, 53)).astype(np.int32)
  found = []
  for platform in ('cpu', 'gpu'):
    on = jax.devices(platform)[0]
    with jax.default_matmul_precision('highest'), jax.default_device(on):
      params = jax.device_put(jax.tree.map(np.asarray, randomized(cfg)), on)
      found.append(jax.jit(lambda p, t: models.forward(cfg, p, t)[0])(params, jax.device_put(tokens, on)))
  assert relative(found[1], found[0]) < 1e-5


def built(config):
  return program.build(config, sharding.make_mesh(devices=jax.devices('gpu')[:1]))


def batch():
  ids = np.random.default_rng(0).integers(0, 131, (4, T + 1)).astype(np.int32)
  segments = np.repeat(np.arange(1, 5, dtype=np.int32), T // 4)[None].repeat(4, 0)
  positions = np.tile(np.arange(T // 4, dtype=np.int32), 4)[None].repeat(4, 0)
  ones = np.ones((4, T), np.int32)
  found = {'tokens': ids[:, :-1], 'targets': ids[:, 1:], 'segment_ids': segments, 'target_bytes': ones}
  return found | {'positions': positions, 'loss_mask': ones.astype(np.float32)}


def config(**compute):
  optim = Optim(lr=1e-3, warmup_steps=0, schedule='constant')
  return Pretrain(model=SMALL, data=Data(seq_len=T, global_batch=4), optim=optim, compute=Compute(**compute))


def losses(config, steps=5):
  made = built(config)
  state, put = made.create(), program.put(batch(), made.batch)
  told = []
  for _ in range(steps):
    state, metrics = made.step(state, put)
    told.append(float(metrics['loss']))
  return told, jax.tree.map(np.asarray, state.params)


def test_a_step_in_bfloat16_with_cudnn_follows_float32():
  auto = built(config())
  assert (auto.run.attention, auto.run.dtype) == ('cudnn', jnp.bfloat16)
  got, want = losses(config())[0], losses(config(dtype='float32', attention='xla'))[0]
  assert got[0] > got[-1] and np.allclose(got, want, rtol=5e-3)


def test_float32_takes_the_plain_arithmetic():
  assert built(config(dtype='float32')).run.attention == 'xla'
  losses(config(dtype='float32'), 1)
  with pytest.raises(InputError, match='cudnn'):
    built(config(dtype='float32', attention='cudnn'))


@pytest.mark.skipif('gpu_deterministic_ops=true' not in os.environ.get('XLA_FLAGS', ''), reason='needs the flag')
def test_steps_are_the_same_twice():
  first, second = losses(config()), losses(config())
  assert first[0] == second[0]
  jax.tree.map(np.testing.assert_array_equal, first[1], second[1])


def test_greedy_answers_alone_and_together():
  cfg = dataclasses.replace(SMALL, max_seq_len=128)
  params, prompts = randomized(cfg), [[5, 17, 3], [2], [11, 130, 7, 7, 101]]
  how = {'max_new_tokens': 29, 'sampling': sample.Sampling(0.0)}
  make = lambda some: np.asarray(sample.generate(cfg, params, some, jax.random.key(0), **how).tokens_BN)
  together = make(prompts * 3)
  assert np.isfinite(together).all()
  assert all(np.array_equal(make([p, p])[0], together[i]) for i, p in enumerate(prompts))
