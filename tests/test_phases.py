"""Plans of stages of preference and reward, on eight CPU devices: their programs, and what lies beside each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LLAMA

from jaxlm import config as configs
from jaxlm import cost, hlo, phases, plan, program, sample, sharding, topology
from jaxlm.errors import InputError
from jaxlm.loops import rollouts, scoring
from jaxlm.rl import rollout
from jaxlm.sample import Sampling

MODEL = dataclasses.replace(LLAMA, vocab_size=256, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=24)
RL = configs.Pretrain(
  init='runs/none',  # a plan needs no weights
  model=MODEL,
  data=configs.Data(seq_len=128, global_batch=8),
  watch=configs.Watch(save_every=2),
  rl=configs.Rl(algo='ppo', prompts=4, samples=4, kl_coef=0.1, decode_rows=8, max_new_tokens=64),
)
DPO = dataclasses.replace(RL, rl=configs.Rl(), preference=configs.Preference('preference'))
ADAPTED = {'lora': configs.Lora(rank=2)}
EVERY = ['learn', 'reshard', 'prefill', 'join', 'decode', 'read']


def rl(config=RL, **changes):
  return dataclasses.replace(config, rl=dataclasses.replace(config.rl, **changes))


def visited(config, compile_=lambda part: None, tensor=2, **kwargs):
  """(the parts of a run, what it holds, its program), on a mesh of eight."""
  mesh = sharding.make_mesh(tensor=tensor)
  with jax.set_mesh(mesh):
    built, parts = program.build(config, mesh), []
    held = phases.visit(config, built, mesh, lambda part: (parts.append(part), compile_(part))[1], **kwargs)
  return {part.name: part for part in parts}, held, built


def planned(monkeypatch, config, **kwargs):
  """A plan with the CPU's devices in the place of those of eight chips."""
  monkeypatch.setattr(topology, 'devices', lambda on: jax.devices()[:8])
  return plan.plan(config, topology.parse('v5e-8'), **kwargs)


@pytest.mark.parametrize(
  'config, names',
  [
    (dataclasses.replace(RL, rl=configs.Rl()), []),
    (DPO, ['reference']),
    (dataclasses.replace(DPO, **ADAPTED), []),
    (dataclasses.replace(DPO, preference=configs.Preference('preference', loss='orpo')), []),
    (dataclasses.replace(DPO, preference=configs.Preference('reward')), []),
    (RL, ['reshard', 'prefill', 'read']),
    (rl(algo='grpo', kl_coef=0.0), ['reshard', 'prefill', 'read']),
    (rl(algo='grpo', kl_coef=0.0, prompts=2), ['reshard', 'prefill']),  # one update: ratio 1, nothing is to be read
    (dataclasses.replace(RL, **ADAPTED), ['reshard', 'prefill', 'read']),
    (rl(engine='http://host:1'), ['read']),  # a server writes
  ],
)
def test_which_programs_a_stage_has(config, names):
  """What prefill lays out is what decodes: without a compiler there is neither that nor a row that joins."""
  assert list(visited(config)[0]) == ['learn', *names]


def test_what_lies_beside_each_program():
  parts, held, built = visited(RL)
  size, state = program.local_bytes, built.abstract
  value = MODEL.d_model * 4
  assert 'value' in state.params and 'value' not in held.reference
  assert size(held.reference) == size(state.params) - value
  assert size(state.opt_state) >= 2 * (size(held.reference) + value)
  assert parts['learn'].beside == size(held.reference)
  assert parts['reshard'].beside == size(held.reference) + size(state) - size(state.params)
  assert parts['prefill'].beside == size(held.reference) + size(state)
  assert parts['read'].beside == size(state) - size(state.params)
  for config in (dataclasses.replace(RL, **ADAPTED), rl(kl_coef=0.0)):
    parts, held, built = visited(config)
    assert held.reference == {} and parts['learn'].beside == 0 and parts['prefill'].beside == size(built.abstract)
  assert 'value' not in visited(rl(algo='grpo'))[2].abstract.params


def test_a_reward_model_stays_and_has_a_program():
  mesh, size = sharding.make_mesh(tensor=2), program.local_bytes
  config = dataclasses.replace(DPO, preference=configs.Preference('reward'))
  judge = scoring.judge(config, mesh, RL.data.seq_len)
  parts, held, built = visited(RL, judges=[judge])
  without = visited(RL)[0]
  assert held.judges == (judge.params,) and 0 < size(judge.params) <= size(built.abstract.params)
  for name in ('learn', 'prefill', 'read'):
    assert parts[name].beside == without[name].beside + size(judge.params)
  assert parts['score'].beside == size(built.abstract) + size(held.reference)
  assert parts['score'].times == 1 / program.updates(RL) and 'score' not in without


def test_a_reward_model_that_is_not_trained_yet_is_told(tmp_path):
  told, mesh = [], sharding.make_mesh(tensor=2)
  assert rollouts.judges(rl(reward=f'exact:answer*0.5 + run:{tmp_path}/none*0.5'), mesh, told.append) == []
  assert told == [f'not counted: the reward model {tmp_path}/none, which is not there']
  with pytest.raises(InputError, match='holds no finished checkpoint'):
    rollouts.judges(rl(reward=f'run:{tmp_path}'), mesh, told.append)


def test_a_reference_that_reads_once_is_in_the_batch():
  parts, _, built = visited(dataclasses.replace(DPO, epochs=2.0))
  assert 'ref_logps' in built.batch and parts['reference'].times == 0.5
  assert parts['reference'].beside > 2 * program.local_bytes(built.abstract.params)  # the moments
  batch = jax.tree.leaves(parts['reference'].traced.args_info[0][1])
  assert len(batch) == len(built.batch) - 1


def test_decoding_gathers_no_weights():
  """One flag a token, whether all rows have stopped; laid out as in training every matrix is gathered."""
  texts = {}

  def compiled(part):
    made = None if part.name in ('learn', 'reshard', 'join', 'read') else part.traced.lower().compile()
    texts[part.name] = made and made.as_text()
    return made

  parts, held, _ = visited(rl(samples=8), compiled, tensor=1, compare=True)
  assert list(parts) == [*EVERY[:-1], phases.COMPARED, 'read']
  sent = lambda name, n: sum(c.total for c in hlo.collectives(texts[name], rounds=n) if c.kind == 'all-gather')
  matrices = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held.weights) if x.ndim == 2)
  assert sent('decode', 16) == 0
  assert sent(phases.COMPARED, 16) > 0.3 * matrices
  one, two = (sum(c.total for c in hlo.collectives(texts['decode'], rounds=n)) for n in (1, 2))
  assert two == 2 * one  # nothing is outside of the loop
  assert parts['decode'].times == 4 * 64 / 16 / 4 and parts['join'].times == 12 / 4 and parts['reshard'].times == 1 / 4


def test_a_run_decodes_with_the_programs_of_its_plan(monkeypatch):
  """Programs of other shapes or layouts than the run's arguments would be refused."""
  programs, calls = {}, []

  def compiled(part):
    programs[part.name] = part.traced.lower().compile() if part.name in ('prefill', 'decode') else None
    return programs[part.name]

  built = visited(rl(decode_rows=16), compiled)[2]
  mesh = jax.tree.leaves(built.abstract)[0].sharding.mesh
  for name, part in (('begun', 'prefill'), ('advance', 'decode')):
    run = lambda *args, part=part: (calls.append(part), programs[part](*args[3:]))[1]
    monkeypatch.setattr(sample, name, run)
  with jax.set_mesh(mesh):
    weights = rollout.readied(MODEL, built.run, mesh)(built.create().params)
    how = {'max_new_tokens': 64, 'sampling': Sampling(1.0), 'stop_ids': (1, 2), 'rows': 16, 'run': built.run}
    made = rollout.engine(MODEL, mesh=mesh, **how)(weights, [[3] * 64] * 16, np.arange(16))
  assert calls == ['prefill', 'decode'] and made.lengths_M.min() > 0


@pytest.mark.slow
def test_the_largest_phase_decides(monkeypatch):
  """Rows that decode need a cache; a step of eight rows would fit."""
  small = planned(monkeypatch, RL, compare=False)
  assert [phase['name'] for phase in small.phases] == EVERY
  assert small.fits and small.peak_gib == max(phase['peak_gib'] for phase in small.phases)
  for phase in small.phases:
    assert phase['peak_gib'] >= phase['resident_gib'] + 0.9 * phase['arguments_gib'] > 0
  slots, rows = 64 + 64, 8 // 4
  assert small.cache_gib * 2**30 == 2 * MODEL.n_layers * rows * slots * 1 * 8 * 4
  assert small.days == pytest.approx(RL.steps * sum(p['times'] * p['seconds'] for p in small.phases) / 86400)
  rows, updates = 2**22, 2**19  # of eight rows each
  many = rl(prompts=rows, samples=1, decode_rows=rows)
  many = dataclasses.replace(many, steps=updates, watch=configs.Watch(save_every=updates))
  many = planned(monkeypatch, many, compare=False)
  assert not many.fits and many.peak_gib > many.limit_gib > many.phases[0]['peak_gib']


def test_bad_sizes_are_those_of_the_run(monkeypatch):
  with pytest.raises(InputError, match='do not divide by data.global_batch=8'):
    planned(monkeypatch, rl(prompts=3))
  with pytest.raises(InputError, match='begins with a model'):
    planned(monkeypatch, dataclasses.replace(RL, init=''))


def test_a_loop_without_a_count_runs_so_many_rounds():
  def fn(x):
    return jax.lax.while_loop(lambda x: jnp.any(x < 9), lambda x: x @ x, x)

  jaxpr = jax.make_jaxpr(fn)(jnp.ones((3, 3))).jaxpr
  assert [cost.matmul_flops(jaxpr, n) for n in (1, 5)] == [54, 270]


def test_model_flops_have_a_head_where_there_are_logits():
  head, whole = 6 * 16 * 256, program.flops_per_token(dataclasses.replace(RL, rl=configs.Rl()))
  assert program.flops_per_token(RL) == pytest.approx(whole - head / 2)  # answers have 64 of 128 places
  assert program.flops_per_token(rl(max_new_tokens=128)) == pytest.approx(whole)
  assert program.flops_per_token(dataclasses.replace(RL, mesh=configs.Mesh(sequence=2))) == pytest.approx(whole)


@pytest.mark.slow
def test_logits_of_answers_alone_send_less_and_gather_no_more(monkeypatch):
  def sent():
    mesh = sharding.make_mesh(tensor=2)
    with jax.set_mesh(mesh):
      built = program.build(rl(max_new_tokens=32), mesh)
      text = built.step.trace(built.abstract, built.batch).lower().compile().as_text()
    kinds = {}
    for one in hlo.collectives(text):
      kinds[one.kind] = kinds.get(one.kind, 0) + one.total
    return kinds

  some = sent()
  monkeypatch.setattr(program, '_places', lambda config, mesh: None)
  whole = sent()
  assert some['all-gather'] <= whole['all-gather'] and sum(some.values()) < sum(whole.values())
