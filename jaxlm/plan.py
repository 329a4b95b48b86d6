"""What a run costs on chips that are not here: its own programs, compiled for them, and read."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxlm import cost, phases, program, sharding, topology
from jaxlm.config import Mesh, Pretrain
from jaxlm.cost import Cost
from jaxlm.errors import InputError
from jaxlm.loops.scoring import Judge
from jaxlm.phases import Held, Part
from jaxlm.program import GIB
from jaxlm.topology import Topology


class Plan(NamedTuple):
  """A run on one chip, sizes in GiB; what has no other name is of its step. `fits` if the peak is within the limit."""

  topology: str
  chips: int
  mesh: dict[str, int]
  fits: bool
  limit_gib: float
  peak_gib: float  # of the largest phase
  parameters_gib: float
  optimizer_gib: float
  batch_gib: float
  arguments_gib: float
  temporaries_gib: float
  program_gib: float
  exposed_gib: float  # of collectives that are waited for
  overlapped_gib: float  # of those beside other work
  dcn_gib: float  # of both, between slices
  collectives: list[dict[str, Any]]
  tokens_per_step: int
  flops_per_chip: float  # of matmuls in a step, recomputation included
  model_flops_per_chip: float  # by convention, without it: what MFU counts
  matmul_s: float  # the least seconds of a step for its matmuls,
  hbm_s: float  # for reading and writing the state and what was gathered,
  overlapped_s: float  # for collectives beside work,
  exposed_s: float  # and for those that are waited for
  step_s_bound: float
  mfu_bound: float
  tokens_per_s_bound: float
  days: float  # of the config's steps, at the bounds of all phases
  chip_hours: float
  phases: list[dict[str, Any]]  # every program of the run, what lies on a chip beside it included; seconds each time
  reference_gib: float  # of a second tree, which stays,
  reward_models_gib: float  # and so do these
  decode_weights_gib: float  # laid out to decode, while there is a rollout
  cache_gib: float
  reshard_gib: float  # sent for them, once a rollout
  token_gib: float  # sent for a decoded token of every row,
  token_gib_training: float  # and with weights laid out as training has them


def plan(
  config: Pretrain,
  on: Topology,
  *,
  write_hlo: str | None = None,
  compare: bool = True,
  say: Callable[[str], None] = lambda line: None,
) -> Plan:
  """Compiles the programs of a run for a topology and reads them; nothing is computed and no such chip is needed.

  `write_hlo` takes the text of the step; those of other phases go beside it, with their name. `compare` says what
  decoding would send with the layout of training, which takes one program more. `say` hears of each program. A reward
  model `run:FOLDER` that is there counts with its sizes. Raises InputError for sizes that do not divide, and where the
  compiler refuses a program for another reason than memory.
  """
  if not config.model.vocab_size:
    raise InputError("plan: model.vocab_size is 0, the tokenizer's: say how many, as --model.vocab-size 32000")
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=topology.devices(on))
  judges: list[Judge] = []
  if config.rl.algo:
    from jaxlm.loops import rollouts

    rollouts.check(config)
    judges = rollouts.judges(config, mesh, say)
  built, found = program.build(config, mesh), list[tuple[Part, Cost]]()

  def compile_(part: Part) -> Any:
    one, compiled = cost.of(part.traced, on, mesh.size, name=part.name, rounds=part.rounds)
    found.append((part, one))
    say(f'{part.name}: {one.peak_gib + part.beside / GIB:.2f} GiB a chip')
    if write_hlo:
      beside = '' if part.name == 'learn' else f'.{part.name.replace(" ", "-")}'
      epath.Path(write_hlo + beside).write_text(compiled.as_text() if compiled else '')
    return compiled

  with jax.set_mesh(mesh):
    held = phases.visit(config, built, mesh, compile_, judges=judges, compare=compare)
  return _read(config, on, mesh, built, found, held)


def _read(
  config: Pretrain, on: Topology, mesh: Any, built: program.Program, found: list[tuple[Part, Cost]], held: Held
) -> Plan:
  data, local = config.data, lambda tree_: program.local_bytes(tree_) / GIB
  step, costs = found[0][1], {part.name: one for part, one in found}
  run = [(part, one) for part, one in found if part.times]
  peaks = [one.peak_gib + part.beside / GIB for part, one in run]
  tokens, step_s = data.global_batch * data.seq_len, step.seconds
  whole_s = config.steps * sum(part.times * one.seconds for part, one in run)
  model_flops = program.flops_per_token(config) * tokens / mesh.size
  sent = lambda name: sum(costs[name].gib(overlapped=x) for x in (True, False)) if name in costs else math.nan
  each = lambda name: sent(name) / costs[name].rounds if name in costs else math.nan
  return Plan(
    topology=on.name,
    chips=mesh.size,
    mesh={name: n for name, n in mesh.shape.items() if n > 1},
    fits=all(one.made for _, one in run) and max(peaks) <= on.limit_gib,
    limit_gib=on.limit_gib,
    peak_gib=max(peaks),
    parameters_gib=local(built.abstract.params),
    optimizer_gib=local(built.abstract.opt_state),
    batch_gib=local(built.batch),
    arguments_gib=step.arguments_gib,
    temporaries_gib=step.temporaries_gib,
    program_gib=step.program_gib,
    exposed_gib=step.gib(overlapped=False),
    overlapped_gib=step.gib(overlapped=True),
    dcn_gib=step.dcn_gib,
    collectives=cost.by_kind(step.sent),
    tokens_per_step=tokens,
    flops_per_chip=step.flops,
    model_flops_per_chip=model_flops,
    matmul_s=step.matmul_s,
    hbm_s=step.hbm_s,
    overlapped_s=step.sent_s(overlapped=True),
    exposed_s=step.sent_s(overlapped=False),
    step_s_bound=step_s,
    mfu_bound=model_flops / on.chip.flops / step_s,
    tokens_per_s_bound=tokens / step_s,
    days=whole_s / 86400,
    chip_hours=whole_s * mesh.size / 3600,
    phases=[_phase(part, one) for part, one in found],
    reference_gib=local(held.reference),
    reward_models_gib=local(held.judges),
    decode_weights_gib=local(held.weights),
    cache_gib=local(held.cache),
    reshard_gib=sent('reshard'),
    token_gib=each('decode'),
    token_gib_training=each(phases.COMPARED),
  )


def _phase(part: Part, one: Cost) -> dict[str, Any]:
  return {
    'name': part.name,
    'times': part.times,  # in an optimizer step
    'peak_gib': one.peak_gib + part.beside / GIB,
    'resident_gib': part.beside / GIB,  # of the peak, what is no argument
    'arguments_gib': one.arguments_gib,
    'temporaries_gib': one.temporaries_gib,
    'exposed_gib': one.gib(overlapped=False),
    'overlapped_gib': one.gib(overlapped=True),
    'seconds': one.seconds,
  }


def lines(found: Plan, table: Callable[..., str]) -> list[str]:
  """What a person reads of it."""
  held = ('reference', 'reward_models', 'decode_weights', 'cache')
  shown = ('parameters', 'optimizer', *held, 'batch', 'temporaries', 'program', 'peak')
  sizes = ((name, getattr(found, f'{name}_gib')) for name in shown)
  rows = [(name.replace('_', ' '), size) for name, size in sizes if not math.isnan(size) and (size or name not in held)]
  verdict = f'fits: {found.peak_gib:.2f} of {found.limit_gib:.2f} GiB'
  if not found.fits:
    over = found.peak_gib - found.limit_gib
    missing = f'{over:.2f} more than the {found.limit_gib:.2f} that a chip has'
    verdict = f'does not fit: {found.peak_gib:.2f} GiB, {missing}; --search finds what would'
  place = lambda c: ('DCN' if c['dcn'] else 'ICI', 'beside work' if c['overlapped'] else 'waited for')
  sent = [(c['kind'], *place(c), c['times'], c['gib']) for c in found.collectives]
  bounds = [
    ('matmuls', found.matmul_s),
    ('memory', found.hbm_s),
    ('collectives beside work', found.overlapped_s),
    ('collectives waited for', found.exposed_s),
    ('step, at best', found.step_s_bound),
  ]
  mesh = ', '.join(f'{name} {n}' for name, n in found.mesh.items()) or 'one chip'
  head = [f'{found.topology}: {found.chips} chips, {mesh}', table(('GiB a chip', ''), rows), verdict]
  if len(found.phases) > 1:
    head.append(_of_phases(found, table))
  if math.isnan(found.exposed_gib):  # the compiler made no program
    return head
  return [
    *head,
    table(('collective', 'over', '', 'times', 'GiB a chip and step'), sent) if sent else 'no collectives',
    table(('seconds, at least', ''), bounds),
    f'{found.flops_per_chip / 1e12:.1f} TFLOP a chip and step ({found.model_flops_per_chip / 1e12:.1f} without doing '
    f'any twice); at best {found.mfu_bound:.1%} MFU, {found.tokens_per_s_bound:,.0f} tokens/s, '
    f'{found.days:.1f} days and {found.chip_hours:,.0f} chip hours for the run',
  ]


def _of_phases(found: Plan, table: Callable[..., str]) -> str:
  known = lambda x: '' if math.isnan(x) else x
  rows = [
    (
      phase['name'],
      f'{phase["times"]:.3g}' if phase['times'] else 'not run',
      phase['peak_gib'],
      phase['resident_gib'],
      *(known(phase[f'{name}_gib']) for name in ('temporaries', 'exposed', 'overlapped')),
      known(1000 * phase['seconds']),
    )
    for phase in found.phases
  ]
  header = ('phase', 'times a step', 'peak GiB', 'of it resident', 'temporaries', 'waited for GiB', 'beside work', 'ms')
  shown = table(header, rows)
  if not math.isnan(found.token_gib):
    other = f', {found.token_gib_training:.3g} with the layout of training' * (not math.isnan(found.token_gib_training))
    shown += f'\n\na rollout: {found.reshard_gib:.3g} GiB sent for weights that decode; each token: '
    shown += f'{found.token_gib:.3g}{other}'
  return shown


REMATS = ('none', 'dots', 'attn_values,attn_out,mlp_out', 'full')  # from what keeps most to what keeps least


def candidates(config: Pretrain, chips: int) -> Iterator[list[Pretrain]]:
  """Lists of the same run on one mesh and with one number of micro-batches, from the lightest remat to the heaviest."""
  spread = [n for n in (1, 4, 8, 16) if config.model.n_experts and config.model.n_experts % n == 0] or [1]
  data, sequence = max(1, config.mesh.data), max(1, config.mesh.sequence)
  for accum, tensor, expert in itertools.product(
    (1, 2, 4), (1, 2, 4, 8), sorted({*spread, max(1, config.mesh.expert)})
  ):
    fixed = tensor * expert * sequence * data
    rows = chips // (tensor * sequence) * accum
    if chips % fixed or config.model.kv_heads % tensor or config.data.global_batch % rows:
      continue
    mesh = Mesh(data, chips // fixed, tensor, sequence, expert)
    computed = [dataclasses.replace(config.compute, accum=accum, remat=remat) for remat in REMATS]
    yield [dataclasses.replace(config, mesh=mesh, compute=compute) for compute in computed]


def search(
  config: Pretrain, on: Topology, *, seconds: float, say: Callable[[str], None] = lambda line: None
) -> list[tuple[Pretrain, Plan]]:
  """Plans of other remats, meshes and micro-batches, the best first, as many as there is time for (the first always).

  Of one mesh and one number of micro-batches a heavier remat is tried only where the lighter one does not fit: it would
  compute more for nothing. What does not divide or compile is told and left out.
  """
  began, found = time.monotonic(), []
  for same in candidates(config, on.size):
    for one in same:
      if found and time.monotonic() - began > seconds:
        say(f'{seconds:.0f} s are over: more may be found with more')
        return ranked(found)
      try:
        found.append((one, plan(one, on, compare=False)))
      except InputError as error:
        say(f'left out: {", ".join(map(str, row(one, None)))}: {error}')
        continue
      say(', '.join(map(str, row(*found[-1]))))
      if found[-1][1].fits:
        break
  if not found:
    raise InputError(f'{on.name}: no mesh, remat and micro-batches of this run divide and compile')
  return ranked(found)


def ranked(found: list[tuple[Pretrain, Plan]]) -> list[tuple[Pretrain, Plan]]:
  """What fits before what does not, by how soon the run could be over or by how little is missing."""
  return sorted(found, key=lambda pair: (not pair[1].fits, pair[1].days if pair[1].fits else pair[1].peak_gib))


HEADER = ('mesh', 'accum', 'remat', 'peak GiB', 'fits', 'waited for GiB', 'MFU at best', 'tokens/s at best')


def row(config: Pretrain, found: Plan | None) -> tuple[Any, ...]:
  """One line of the table of a search."""
  sizes = {name: n for name, n in dataclasses.asdict(config.mesh).items() if n != 1}
  named = ' x '.join(f'{name} {n}' for name, n in sizes.items()), config.compute.accum, config.compute.remat
  if found is None:
    return named
  bounds = (
    (found.exposed_gib, f'{found.mfu_bound:.1%}', round(found.tokens_per_s_bound)) if found.fits else ('', '', '')
  )
  return *named, found.peak_gib, 'yes' if found.fits else 'no', *bounds
