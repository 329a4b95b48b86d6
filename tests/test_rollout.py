"""Many prompts through few rows: what is made depends on prompt and seed alone, on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXPERTS, LLAMA, MIXED, randomized

from jaxlm import models, sample, sharding
from jaxlm.models import Run
from jaxlm.rl import rollout
from jaxlm.sample import Sampling

N, STOP = 11, (7, 19, 23, 40, 41)
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(50, 120, n).tolist() for n in (5, 1, 67, 3, 13, 2, 40, 5, 7, 70, 11, 3, 2, 29, 17, 6, 5)]
SEEDS = np.arange(100, 100 + len(PROMPTS))
SETTINGS = {
  'greedy': Sampling(temperature_B=0.0),
  'plain': Sampling(),
  'cold': Sampling(temperature_B=0.7),
  'cut': Sampling(1.3, 9, 0.9, 0.01, 1.2),
}


def one_by_one(cfg, sampling, prompts=PROMPTS):
  """The same by `sample.generate`, all rows at once."""
  how = {'max_new_tokens': N, 'stop_ids': STOP, 'sampling': sampling.replace(seed_B=SEEDS)}
  return jax.tree.map(np.asarray, sample.generate(cfg, randomized(cfg), prompts, jax.random.key(0), **how))


@pytest.mark.slow(but='llama-plain')
@pytest.mark.parametrize('sampling', SETTINGS)
@pytest.mark.parametrize('cfg', [LLAMA, MIXED], ids=['llama', 'mixed'])
def test_a_completion_does_not_know_its_row(cfg, sampling):
  engine = rollout.engine(cfg, max_new_tokens=N, sampling=SETTINGS[sampling], stop_ids=STOP, rows=5)
  found, want = engine(randomized(cfg), PROMPTS, SEEDS), one_by_one(cfg, SETTINGS[sampling])
  np.testing.assert_array_equal(found.tokens_MN, want.tokens_BN)
  np.testing.assert_array_equal(found.lengths_M, want.lengths_B)
  np.testing.assert_array_equal(found.stopped_M, want.stopped_B)
  np.testing.assert_allclose(found.logp_MN, want.logp_BN, atol=2e-5)
  np.testing.assert_allclose(found.sampled_logp_MN, want.sampled_logp_BN, atol=2e-5)
  assert len(set(found.lengths_M.tolist())) > 2 or sampling == 'greedy'


def test_finished_rows_make_room(monkeypatch):
  """Answers of one to six tokens: fewer passes than by batches of five, one after the other."""
  passes, advance = [], sample.advance

  def counted(*args):
    before = np.asarray(args[4].out.passes_B).copy()
    state = advance(*args)
    passes.append(int((np.asarray(state.out.passes_B) - before).max()))
    return state

  monkeypatch.setattr(sample, 'advance', counted)
  monkeypatch.setattr(sample, 'PIECE', 1)
  engine = rollout.engine(LLAMA, max_new_tokens=N, stop_ids=tuple(range(0, 131, 3)), rows=5)
  found = engine(randomized(LLAMA), PROMPTS, SEEDS)
  lengths = found.lengths_M[np.argsort([len(prompt) for prompt in PROMPTS], kind='stable')]
  assert lengths.min() >= 1 and len(lengths) == 17
  one_after_the_other = sum(int(lengths[i : i + 5].max()) - 1 for i in range(0, 17, 5))
  assert sum(passes) < 0.7 * one_after_the_other


@pytest.mark.slow
def test_equal_prompts_are_read_once(monkeypatch):
  read, prefill = [], sample.prefill

  def counted(cfg, params, prompts_BP, *args, **how):
    read.append(prompts_BP.shape[0])
    return prefill(cfg, params, prompts_BP, *args, **how)

  monkeypatch.setattr(sample, 'prefill', counted)
  prompts, params = [PROMPTS[i] for i in (0, 2, 0, 5, 5, 2, 0, 0)], randomized(LLAMA)
  engine = rollout.engine(LLAMA, max_new_tokens=13, stop_ids=STOP, rows=8)  # 13: no program of another test
  found = engine(params, prompts, SEEDS[:8])
  assert read == [4]
  for m, prompt in enumerate(prompts):
    alone = engine(params, [prompt], SEEDS[m : m + 1])
    np.testing.assert_array_equal(found.tokens_MN[m], alone.tokens_MN[0])
    np.testing.assert_allclose(found.logp_MN[m], alone.logp_MN[0], atol=2e-5)


@pytest.mark.parametrize('count', [1, 8])
def test_the_layout_is_of_what_is_readied(count):
  """A plan lays one out by the other; on one CPU matrices are turned."""
  mesh = sharding.make_mesh(fsdp=count, devices=jax.devices()[:count])
  made = jax.eval_shape(
    rollout.readied(LLAMA, Run(), mesh), jax.eval_shape(lambda: models.init(LLAMA, jax.random.key(0)))
  )
  layout = rollout.layout(LLAMA, mesh, rollout.DECODE)
  assert jax.tree.structure(made) == jax.tree.structure(layout)


@pytest.mark.slow
@pytest.mark.parametrize('cfg', [LLAMA, EXPERTS], ids=['llama', 'experts'])
def test_on_eight_devices(cfg):
  """Weights resharded once; rows are cut over the devices, and the cache with them."""
  cfg = dataclasses.replace(
    cfg, d_model=16, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=24, **({'shared_d_ff': 8} if cfg is EXPERTS else {})
  )
  params = models.init(cfg, jax.random.key(1))
  mesh = sharding.make_mesh(fsdp=4, tensor=2)
  layout = sharding.state_shardings(models.abstract(cfg), mesh)
  prompts, seeds = PROMPTS[:16], SEEDS[:16]
  want = rollout.engine(cfg, max_new_tokens=N, stop_ids=STOP, rows=8)(params, prompts, seeds)
  with jax.set_mesh(mesh):
    ready = rollout.readied(cfg, Run(), mesh)(jax.device_put(params, layout))
    q = ready['layers'][0]['attn']['q']
    assert q.sharding.shard_shape(q.shape) == (q.shape[0], q.shape[1] // 2)
    found = rollout.engine(cfg, max_new_tokens=N, stop_ids=STOP, rows=8, mesh=mesh)(ready, prompts, seeds)
    state = sample.begin(cfg, ready, prompts[:8], jax.random.key(0), max_new_tokens=N, run=Run(rules=rollout.DECODE))
    k = state.cache[0].k
    assert k.sharding.shard_shape(k.shape) == (2, 1, k.shape[2], 8)
  np.testing.assert_array_equal(found.tokens_MN, want.tokens_MN)
  np.testing.assert_allclose(found.logp_MN, want.logp_MN, atol=2e-5)


@pytest.mark.slow(but='plain')
@pytest.mark.parametrize('sampling', SETTINGS)
def test_what_the_sampler_says_is_what_training_says(sampling):
  """Trap 7: with the weights unchanged the ratio is 1, for every sampling setting."""
  how = SETTINGS[sampling]
  params = randomized(LLAMA)
  found = rollout.engine(LLAMA, max_new_tokens=N, sampling=how, stop_ids=STOP, rows=5)(params, PROMPTS, SEEDS)
  temperature = float(how.temperature_B) or 1.0
  for m, prompt in enumerate(PROMPTS):
    n = int(found.lengths_M[m])
    said = found.tokens_MN[m, :n]
    row = jnp.asarray([[*prompt, *said.tolist()]])
    logp = jax.nn.log_softmax(models.forward(LLAMA, params, row)[0][0].astype(jnp.float32) / temperature)
    got = np.asarray(logp)[np.arange(len(prompt) - 1, len(prompt) - 1 + n), said]
    np.testing.assert_allclose(np.exp(got - found.logp_MN[m, :n]), 1.0, atol=1e-5)
