"""What a step costs on chips that are not here: the run's own program, compiled for them, and read."""

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxlm import hlo, program, sharding, topology
from jaxlm.config import Mesh, Pretrain
from jaxlm.errors import InputError
from jaxlm.models.dispatch import WORST_CASE
from jaxlm.program import GIB
from jaxlm.topology import Topology


class Plan(NamedTuple):
  """A step on one chip, sizes in GiB. `fits` if the peak is within the limit."""

  topology: str
  chips: int
  mesh: dict[str, int]
  fits: bool
  limit_gib: float
  peak_gib: float
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
  days: float  # of the config's steps, at the bound
  chip_hours: float


def plan(config: Pretrain, on: Topology, *, write_hlo: str | None = None) -> Plan:
  """Compiles the step of a run for a topology and reads it; nothing is computed and no such chip is needed.

  Raises InputError for sizes that do not divide, and where the compiler refuses the program for another reason than
  memory.
  """
  if not config.model.vocab_size:
    raise InputError("plan: model.vocab_size is 0, the tokenizer's: say how many, as --model.vocab-size 32000")
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=topology.devices(on))
  built = program.build(config, mesh)
  with jax.set_mesh(mesh):
    traced = built.step.trace(built.abstract, built.batch)  # ty: ignore
    flops = matmul_flops(traced.jaxpr.jaxpr) / mesh.size
    compiled = _compiled(traced.lower(), on)
  text = '' if isinstance(compiled, float) else compiled.as_text()
  if write_hlo:
    epath.Path(write_hlo).write_text(text)
  node = on.shape[1] if on.chip.kind == 'gpu' else None
  return _read(config, on, mesh, built, compiled, flops, hlo.collectives(text, node=node) if text else [])


def _compiled(lowered: Any, on: Topology) -> Any:
  try:
    return program.compiled_or_gib(lowered)
  except jax.errors.JaxRuntimeError as error:
    raise InputError(f'{on.name}: the compiler refuses the step: {str(error).splitlines()[0]}') from error


def _read(
  config: Pretrain, on: Topology, mesh: Any, built: program.Program, compiled: Any, flops: float, found: list[Any]
) -> Plan:
  chip, data = on.chip, config.data
  memory = None if isinstance(compiled, float) else compiled.memory_analysis()
  size = lambda name: getattr(memory, f'{name}_in_bytes') / GIB if memory else math.nan
  peak = size('peak_memory') if memory else compiled
  known = 1.0 if memory else math.nan  # without a program nothing is known of what it sends
  exposed = known * sum(c.total for c in found if not c.overlapped)
  overlapped = known * sum(c.total for c in found if c.overlapped)
  dcn = known * sum(c.total for c in found if c.dcn and c.kind != 'send')  # what one sends another receives
  tokens = data.global_batch * data.seq_len
  model_flops = program.flops_per_token(config) * tokens / mesh.size
  seconds = lambda some: (
    known
    * sum(
      c.total * (2 if c.kind == 'all-reduce' else 1) / (chip.dcn if c.dcn else chip.ici)
      for c in some
      if c.kind != 'send'
    )
  )
  beside, waited = seconds(c for c in found if c.overlapped), seconds(c for c in found if not c.overlapped)
  moved = size('argument_size') + size('output_size') + 2 * (exposed + overlapped) / GIB
  step_s = known * (max(flops / chip.flops, moved * GIB / chip.hbm, beside) + waited)
  return Plan(
    topology=on.name,
    chips=mesh.size,
    mesh={name: n for name, n in mesh.shape.items() if n > 1},
    fits=bool(memory) and peak <= on.limit_gib,
    limit_gib=on.limit_gib,
    peak_gib=peak,
    parameters_gib=program.local_bytes(built.abstract.params) / GIB,
    optimizer_gib=program.local_bytes(built.abstract.opt_state) / GIB,
    batch_gib=program.local_bytes(built.batch) / GIB,
    arguments_gib=size('argument_size'),
    temporaries_gib=size('temp_size'),
    program_gib=size('generated_code_size'),
    exposed_gib=exposed / GIB,
    overlapped_gib=overlapped / GIB,
    dcn_gib=dcn / GIB,
    collectives=_by_kind(found),
    tokens_per_step=tokens,
    flops_per_chip=flops,
    model_flops_per_chip=model_flops,
    matmul_s=flops / chip.flops,
    hbm_s=moved * GIB / chip.hbm,
    overlapped_s=beside,
    exposed_s=waited,
    step_s_bound=step_s,
    mfu_bound=model_flops / chip.flops / step_s,
    tokens_per_s_bound=tokens / step_s,
    days=config.steps * step_s / 86400,
    chip_hours=config.steps * step_s * mesh.size / 3600,
  )


def lines(found: Plan, table: Callable[..., str]) -> list[str]:
  """What a person reads of it."""
  shown = ('parameters', 'optimizer', 'batch', 'temporaries', 'program', 'peak')
  sizes = ((name, getattr(found, f'{name}_gib')) for name in shown)
  rows = [(name, size) for name, size in sizes if not math.isnan(size)]
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
        found.append((one, plan(one, on)))
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
  """What fits before what does not, by the bound on tokens a second or by how little is missing."""
  return sorted(
    found, key=lambda pair: (not pair[1].fits, -pair[1].tokens_per_s_bound if pair[1].fits else pair[1].peak_gib)
  )


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
