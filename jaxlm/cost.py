"""What one compiled program costs a chip each time it runs: memory, matmuls, what is sent, and the least seconds."""

import math
import re
from typing import Any, NamedTuple

import jax

from jaxlm import fitting, hlo
from jaxlm.errors import InputError
from jaxlm.models.dispatch import WORST_CASE
from jaxlm.program import GIB
from jaxlm.topology import Chip, Topology


class Cost(NamedTuple):
  """A program on one chip, sizes in GiB; nan is what is not known of one that is too large to be made."""

  chip: Chip
  peak_gib: float
  arguments_gib: float
  outputs_gib: float
  temporaries_gib: float
  program_gib: float
  flops: float  # of matmuls, recomputation included
  sent: list[hlo.Collective]
  rounds: int = 1  # of its loop, where that has no count: the arguments are read in each

  @property
  def made(self) -> bool:
    return not math.isnan(self.arguments_gib)

  def gib(self, *, overlapped: bool) -> float:
    """What collectives send beside other work, or while it waits."""
    return self._known(sum(c.total for c in self.sent if c.overlapped == overlapped) / GIB)

  @property
  def dcn_gib(self) -> float:
    """What comes from other slices: what one sends another receives."""
    return self._known(sum(c.total for c in self.sent if c.dcn and c.kind != 'send') / GIB)

  @property
  def matmul_s(self) -> float:
    return self.flops / self.chip.flops

  @property
  def hbm_s(self) -> float:
    """For reading the arguments, writing the results, and both of what is sent."""
    kept = self.outputs_gib if self.rounds == 1 else 0.0
    sent = self.gib(overlapped=True) + self.gib(overlapped=False)
    return (self.arguments_gib * self.rounds + kept + 2 * sent) * GIB / self.chip.hbm

  def sent_s(self, *, overlapped: bool) -> float:
    some = [c for c in self.sent if c.overlapped == overlapped and c.kind != 'send']
    rate = lambda c: (self.chip.dcn if c.dcn else self.chip.ici) / (2 if c.kind == 'all-reduce' else 1)
    return self._known(sum(c.total / rate(c) for c in some))

  @property
  def seconds(self) -> float:
    """At least."""
    beside, waited = self.sent_s(overlapped=True), self.sent_s(overlapped=False)
    return max(self.matmul_s, self.hbm_s, beside) + waited if self.made else math.nan

  def _known(self, x: float) -> float:
    return x if self.made else math.nan


def of(traced: Any, on: Topology, chips: int, *, name: str = 'step', rounds: int = 1) -> tuple[Cost, Any]:
  """The cost of a traced program on `chips` of a topology, and the program itself or None where it is too large.

  A loop without a count runs `rounds` times. Raises InputError where the compiler refuses for another reason.
  """
  try:
    compiled = fitting.compiled_or_gib(traced.lower())
  except jax.errors.JaxRuntimeError as error:
    raise InputError(f'{on.name}: the compiler refuses the {name}: {str(error).splitlines()[0]}') from error
  flops = matmul_flops(traced.jaxpr.jaxpr, rounds) / chips
  if isinstance(compiled, float):
    return Cost(on.chip, compiled, *[math.nan] * 4, flops, [], rounds), None
  memory, node = compiled.memory_analysis(), on.shape[1] if on.chip.kind == 'gpu' else None
  names = ('peak_memory', 'argument_size', 'output_size', 'temp_size', 'generated_code_size')
  sizes = [getattr(memory, f'{name}_in_bytes') / GIB for name in names]
  return Cost(on.chip, *sizes, flops, hlo.collectives(compiled.as_text(), node=node, rounds=rounds), rounds), compiled


def by_kind(found: list[hlo.Collective]) -> list[dict[str, Any]]:
  """Collectives of one kind and place together, their GiB on a chip."""
  groups: dict[tuple, list[hlo.Collective]] = {}
  for one in found:
    groups.setdefault((one.kind, one.overlapped, one.dcn), []).append(one)
  return [
    {
      'kind': kind,
      'overlapped': beside,
      'dcn': dcn,
      'times': sum(c.times for c in some),
      'gib': sum(c.total for c in some) / GIB,
    }
    for (kind, beside, dcn), some in sorted(groups.items())
  ]


def matmul_flops(jaxpr: Any, rounds: int = 1) -> float:
  """FLOPs of every matmul of a traced program, on all devices together: loops as often as they run, branches the most.

  The compiler's own count sees a loop's body once. A `while`, which has no count (generation), runs `rounds` times.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    params, inner = eqn.params, lambda name, eqn=eqn: matmul_flops(_open(eqn.params[name]), rounds)
    match eqn.primitive.name:
      case 'dot_general':
        (contracted, _), _ = params['dimension_numbers']
        left = eqn.invars[0].aval.shape
        total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
      case 'ragged_dot' | 'ragged_dot_general':
        total += 2.0 * math.prod(eqn.invars[0].aval.shape) * eqn.outvars[0].aval.shape[-1]
      case 'scan':
        total += params['length'] * inner('jaxpr')
      case 'while':
        total += rounds * (inner('cond_jaxpr') + inner('body_jaxpr'))
      case 'cond':
        total += max(matmul_flops(_open(branch), rounds) for branch in params['branches'])
      case 'shard_map':
        names = params.get('newly_manual_axes', params.get('manual_axes'))  # before and since jax 0.10
        total += math.prod(params['mesh'].shape[name] for name in names) * inner('jaxpr')
      case 'jit' | 'pjit' if share := re.fullmatch(WORST_CASE.format(r'(\d+)', r'(\d+)'), params['name']):
        total += inner('jaxpr') * int(share[1]) / int(share[2])
      case 'dot_product_attention_fwd_wrapper' | 'dot_product_attention_bwd_wrapper' as name:  # cuDNN's
        (B, T, H, N), S = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape[1]
        total += 2.0 * B * T * S * H * N * (2 if 'fwd' in name else 5)
      case 'pallas_call':
        total += math.prod(params['grid_mapping'].grid) * inner('jaxpr')
      case _:
        total += sum(matmul_flops(_open(x), rounds) for x in params.values() if hasattr(_open(x), 'eqns'))
  return total


def _open(jaxpr: Any) -> Any:
  return getattr(jaxpr, 'jaxpr', jaxpr)
