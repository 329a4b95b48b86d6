"""The plan: names of topologies, what a program's text says, FLOPs from shapes, small steps compiled for chips."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXPERTS, LLAMA, MIXED

from jaxlm import config as configs
from jaxlm import cost, hlo, models, plan, topology
from jaxlm.errors import InputError
from jaxlm.models import Run
from jaxlm.train import metrics

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason="needs the TPU compiler: pip install -e '.[tpu]'"
)


@pytest.mark.parametrize(
  'name, shape, wrap',
  [
    ('v5e-256', (16, 16), (True, True, False)),
    ('v5e-8', (2, 4), (False, False, False)),
    ('v6e-128', (8, 16), (False, True, False)),
    ('v5p-8', (2, 2, 1), (False, False, False)),
    ('v5p-64', (2, 4, 4), (False, False, False)),
    ('v5p-512', (4, 8, 8), (True, True, True)),
    ('v5p:4x4x8', (4, 4, 8), (True, True, True)),
    ('v4-16', (2, 2, 2), (False, False, False)),
    ('v5e:1x1', (1, 1), (False, False, False)),
  ],
)
def test_topologies_by_name(name, shape, wrap):
  found = topology.parse(name)
  assert (found.shape, found.wrap) == (shape, wrap)


@pytest.mark.parametrize(
  'name', ['v5e', 'v9-8', 'v5e-24', 'v5e:4x4x4', 'v5p:4x4', 'v5p-1', 'h100', '', 'v5e:0x4', 'V5E 256']
)
def test_topologies_that_are_none(name):
  with pytest.raises(InputError, match='topology'):
    topology.parse(name)


TEXT = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%async_collective_fusion.1 (p: f32[4]) -> f32[4] {
  %all-reduce.2 = bf16[8,128]{1,0} all-reduce(%p), channel_id=2, to_apply=%add
}

%async_collective_fusion.2 (p: f32[4]) -> f32[4] {
  %all-reduce.3 = bf16[8,128]{1,0} all-reduce(%p), channel_id=2, to_apply=%add
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %two = s32[]{:T(128)} constant(2)
  %count = s32[]{:T(128)} get-tuple-element(%s), index=0
  %next = s32[]{:T(128)} add(%count, %two)
  %all-gather.4 = (bf16[2,128]{1,0}, bf16[16,128]{1,0}) all-gather-start(%x), channel_id=4
  %f1 = f32[4]{0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %f2 = f32[4]{0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  ROOT %t = (s32[], f32[4]) tuple(%next, /*index=1*/%f1)
}

%cond (s: (s32[], f32[4])) -> pred[] {
  %n = s32[]{:T(128)} constant(10)
  %count.2 = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %less = pred[]{:T(512)} compare(%count.2, %n), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %all-to-all.5 = f32[3,5]{1,0} all-to-all(%x), channel_id=5
  %w = (s32[], f32[4]) while(%init), condition=%cond, body=%body
  %send.6 = (f32[7]{0}, u32[], token[]) send(%x, %token), channel_id=6
}
"""


def test_collectives_of_a_text():
  """A loop by twos to ten runs five times; a fusion in two steps is one; a start's output is its larger half."""
  found = {(c.kind, c.overlapped, c.dcn, c.times, c.bytes) for c in hlo.collectives(TEXT)}
  assert found == {
    ('all-reduce', True, False, 5, 8 * 128 * 2),
    ('all-gather', True, False, 5, 16 * 128 * 2),
    ('all-to-all', False, False, 1, 60),
    ('send', False, True, 1, 7 * 4 + 4),  # with nothing between it and its end
  }


@pytest.mark.parametrize('remat, times', [('none', 3), ('full', 4)])
@pytest.mark.parametrize('cfg', [LLAMA, MIXED, EXPERTS], ids=['llama', 'mixed', 'experts'])
def test_flops_from_shapes(cfg, remat, times):
  """Forward, twice that backward, and with full remat the layers' forward once more, but for what nobody asks again."""
  B, T = 2, 13
  tokens = jnp.zeros((B, T), jnp.int32)
  params = jax.eval_shape(lambda: models.init(cfg, jax.random.key(0)))

  def loss(params):
    return jnp.sum(models.forward(cfg, params, tokens, run=Run(remat=remat))[0])

  forward = cost.matmul_flops(jax.make_jaxpr(lambda p: models.forward(cfg, p, tokens)[0])(params).jaxpr)
  got = cost.matmul_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
  head = 2.0 * B * T * cfg.d_model * cfg.padded_vocab
  last = 2.0 * B * T * cfg.d_model * cfg.d_ff * cfg.n_layers if cfg is LLAMA and remat == 'full' else 0.0
  assert got == pytest.approx(times * (forward - head) + 3 * head - last, rel=1e-6 if cfg is not EXPERTS else 0.2)
  if cfg is LLAMA:
    exact = metrics.flops_per_token(cfg, T) * B * T / 3 + 2.0 * B * T * cfg.d_model * (
      cfg.padded_vocab - cfg.vocab_size
    )
    assert forward == pytest.approx(exact, rel=1e-6)


@pytest.mark.slow(but='16-2')
@pytest.mark.parametrize('experts, k', [(8, 4), (16, 2)])
def test_flops_of_experts_on_several_devices(experts, k):
  """The rows that are there, wherever the experts are: fewer of a device than a token uses, too."""
  from jaxlm import program, sharding

  sizes = {'vocab_size': 128, 'd_model': 16, 'n_layers': 2, 'n_heads': 2, 'd_ff': 24}
  model = models.ModelConfig(**sizes, n_experts=experts, experts_per_token=k)
  run = configs.Pretrain(model=model, data=configs.Data(seq_len=16, global_batch=8))

  def flops(expert):
    mesh = sharding.make_mesh(expert=expert, fsdp=8 // expert)
    with jax.set_mesh(mesh):
      built = program.build(run, mesh)
      return cost.matmul_flops(built.step.trace(built.abstract, built.batch).jaxpr.jaxpr)

  want = flops(1)
  for expert in (2, 8):
    assert flops(expert) == pytest.approx(want, rel=1e-3)


def test_flops_in_a_map_over_devices_are_those_of_all():
  from jax.sharding import PartitionSpec

  mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  spec = PartitionSpec('a')
  own = jax.shard_map(lambda x: x @ jnp.ones((5, 7)), in_specs=spec, out_specs=spec, axis_names={'a'})
  with jax.set_mesh(mesh):
    assert cost.matmul_flops(jax.make_jaxpr(jax.jit(own))(jnp.ones((12, 5))).jaxpr) == 2 * 12 * 5 * 7


CONFIG = """
from jaxlm.config import Compute, Data, Pretrain
from jaxlm.models.config import ModelConfig

config = Pretrain(
  model=ModelConfig(vocab_size=1024, d_model=256, n_layers={layers}, n_heads=2, n_kv_heads=1, d_ff=512),
  data=Data(seq_len={length}, global_batch=8),
  compute=Compute(remat='full', loss_chunks=2),
  steps=1000,
)
"""


def planned(tmp_path, *args, layers=3, length=256):
  (tmp_path / 'config.py').write_text(CONFIG.format(layers=layers, length=length))
  command = [sys.executable, '-m', 'jaxlm', 'plan', str(tmp_path / 'config.py'), *args]
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return subprocess.run(command, capture_output=True, text=True, env=environment)


@needs_libtpu
def test_a_small_step_on_four_chips(tmp_path):
  done = planned(tmp_path, '--topology', 'v5e:2x2', '--json', '--hlo', str(tmp_path / 'text'))
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  keys = 'fits peak_gib limit_gib arguments_gib temporaries_gib exposed_gib overlapped_gib flops_per_chip mfu_bound'
  assert {*keys.split(), 'tokens_per_s_bound'} <= found.keys()
  assert found['fits'] and found['limit_gib'] == 15.75 and 0 < found['mfu_bound'] < 1
  assert found['optimizer_gib'] == pytest.approx(2 * found['parameters_gib'], rel=1e-3)
  assert found['arguments_gib'] == pytest.approx(
    found['parameters_gib'] + found['optimizer_gib'] + found['batch_gib'], rel=0.05
  )
  read = hlo.collectives((tmp_path / 'text').read_text())
  assert sum(c.total for c in read) / 2**30 == pytest.approx(found['exposed_gib'] + found['overlapped_gib'])
  assert 'splash' in (tmp_path / 'text').read_text()  # the kernel of the platform


@needs_libtpu
def test_adapters_have_moments_alone(tmp_path):
  """8 + 8 adapters of rank 4 on q and v of three layers, float32, two moments each."""
  args = ('--topology', 'v5e:1x1', '--lora.rank', '4', '--lora.where', 'layers/attn/q,layers/attn/v', '--json')
  done = planned(tmp_path, *args)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  learnt = 3 * 4 * ((256 + 256) + (256 + 128))
  assert found['optimizer_gib'] * 2**30 == pytest.approx(2 * 4 * learnt, abs=64)
  assert found['parameters_gib'] * 2**30 > 4 * 1024 * 256


@needs_libtpu
def test_a_plan_of_ppo_has_every_phase(tmp_path):
  """With the layout of training every weight is gathered for every token; the value head and the reference count."""
  args = ('--rl.algo', 'ppo', '--rl.prompts', '16', '--rl.samples', '1', '--rl.decode-rows', '16')
  args += ('--rl.max-new-tokens', '64', '--rl.kl-coef', '0.1', '--init', 'none', '--watch.save-every', '100')
  done = planned(tmp_path, '--topology', 'v5e:2x2', '--json', *args)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  phases = {phase['name']: phase for phase in found['phases']}
  assert list(phases) == ['learn', 'reshard', 'prefill', 'decode', 'decode as in training', 'read']
  run = [phase for phase in found['phases'] if phase['times']]
  assert len(run) == 5 and found['fits'] and found['peak_gib'] == max(phase['peak_gib'] for phase in run)
  assert (found['parameters_gib'] - found['reference_gib']) * 2**30 == pytest.approx(4 * 256, abs=1)  # the value head
  weights = 2 * (1024 * 256 + 3 * (256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512))  # bytes in bfloat16
  assert found['decode_weights_gib'] * 2**30 == pytest.approx(weights, rel=0.01)
  assert found['cache_gib'] * 2**30 == 2 * 3 * 4 * (192 + 64) * 128 * 2  # 4 rows a chip
  assert found['reshard_gib'] * 2**30 == pytest.approx(weights, rel=0.01)
  assert found['token_gib'] * 2**30 < 100 and found['token_gib_training'] * 2**30 > 0.8 * weights
  read = phases['read']
  assert read['resident_gib'] >= found['optimizer_gib'] and read['arguments_gib'] > 2 * found['reference_gib']
  assert read['peak_gib'] > read['resident_gib'] + read['arguments_gib'] + 0.5 * read['temporaries_gib']


@needs_libtpu
def test_what_does_not_fit_is_said_with_how_much(tmp_path):
  done = planned(
    tmp_path, '--topology', 'v5e:1x1', '--data.global-batch', '4096', '--compute.remat', 'none', length=4096
  )
  assert done.returncode == 3, done.stderr
  assert 'does not fit' in done.stdout and 'more than the 15.75 that a chip has' in done.stdout


@needs_libtpu
@pytest.mark.parametrize(
  'args, why',
  [
    (('--topology', 'v5e-24'), 'no power of two of chips'),
    (('--topology', 'v5e-4', '--data.global-batch', '6'), 'does not divide'),
    (('--topology', 'v5e-4', '--model.vocab-size', '0'), 'vocab_size is 0'),
    (('--topology', 'v5e-4', '--data.seq-len', '200'), 'multiple of 128'),
    (('--topology', 'v5e-4', '--mesh.tensor', '3'), 'does not divide 4 devices'),
    (('--topology', 'v5e-4', '--mesh.tensor', '4'), 'n_kv_heads=1 does not divide by mesh.tensor=4'),
    (('--topology', 'v5e-4', '--slices', '2'), '2 slices are joined by the data axis'),
  ],
)
def test_bad_input_is_one_line(tmp_path, args, why):
  done = planned(tmp_path, *args)
  assert done.returncode == 1 and why in done.stderr.splitlines()[-1], done.stderr
  assert 'Traceback' not in done.stderr


@needs_libtpu
def test_what_is_not_known_is_not_told(tmp_path):
  """Of a step that does not compile there is no program: neither what it sends nor a bound."""
  args = ('--topology', 'v5e:1x1', '--data.global-batch', '4096', '--compute.remat', 'none', '--json')
  done = planned(tmp_path, *args, length=4096)
  found = json.loads(done.stdout.splitlines()[-1])
  assert done.returncode == 3 and not found['fits'] and found['peak_gib'] > 15.75 and found['flops_per_chip'] > 0
  for name in ('exposed_gib', 'overlapped_gib', 'mfu_bound', 'tokens_per_s_bound', 'days'):
    assert found[name] is None
  assert 'collectives' not in planned(tmp_path, *args[:-1], length=4096).stdout


def test_a_plan_is_of_the_model_that_a_run_begins_with(tmp_path):
  from jaxlm.loops import bases

  base = configs.Pretrain(model=dataclasses.replace(LLAMA, d_model=44))
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'config.json').write_text(configs.to_json(base))
  assert bases.with_model(configs.Pretrain(init=str(tmp_path))).model == base.model
  named = configs.Pretrain(init=str(tmp_path), model=LLAMA)
  assert bases.with_model(named) == named


def test_candidates_divide():
  config = configs.Pretrain(model=dataclasses.replace(LLAMA, n_kv_heads=2), data=configs.Data(global_batch=16))
  tried = list(plan.candidates(config, 8))
  meshes = {(one.mesh.fsdp, one.mesh.tensor, one.compute.accum) for same in tried for one in same}
  assert meshes == {(8, 1, 1), (4, 2, 1), (8, 1, 2), (4, 2, 2), (4, 2, 4)}
  assert [one.compute.remat for one in tried[0]] == list(plan.REMATS)
  rest = dataclasses.replace(config, mesh=configs.Mesh(data=-1, fsdp=1))
  assert [(one.mesh.data, one.mesh.fsdp) for one in next(plan.candidates(rest, 8))][0] == (1, 8)


@needs_libtpu
def test_a_search_puts_the_best_first(tmp_path):
  done = planned(tmp_path, '--topology', 'v5e:2x2', '--search', '--minutes', '0.01')
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert 'tokens/s at best' in lines[0] and '| none' in lines[2] and 'yes' in lines[2] and 'are over' in done.stderr


@needs_libtpu
@pytest.mark.slow
def test_a_program_does_not_grow_with_depth(tmp_path):
  sizes = []
  for layers in (8, 80):
    done = planned(tmp_path, '--topology', 'v5e:2x2', '--json', '--hlo', str(tmp_path / 'text'), layers=layers)
    assert done.returncode == 0, done.stderr
    sizes.append(len((tmp_path / 'text').read_text()))
  assert np.ptp(sizes) < 0.1 * max(sizes)
