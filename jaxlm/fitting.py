"""Whether a step fits into a device's memory, found before anything is computed."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.errors import InputError
from jaxlm.program import GIB, Program, local_bytes


def memory_limit(mesh: Mesh) -> int | None:
  """Bytes that a program may use on a device of this process; None where that is not known, as on CPUs."""
  device = mesh.local_devices[0]
  return (device.memory_stats() or {}).get('bytes_limit')


def fitting(built: Program, limit: int | None) -> Program:
  """The program with its step compiled, for batches of the full size.

  Raises InputError, before anything is computed, if the step needs more than `limit` bytes of a device. None: it is
  not looked at.
  """
  if limit is None:
    return built
  compiled = compiled_or_gib(built.step.lower(built.abstract, built.batch))  # ty: ignore
  peak = compiled if isinstance(compiled, float) else compiled.memory_analysis().peak_memory_in_bytes / GIB
  if isinstance(compiled, float) or peak > limit / GIB:
    sizes = {'parameters': built.abstract.params, 'optimizer': built.abstract.opt_state, 'batch': built.batch}
    shown = ', '.join(f'{name} {local_bytes(part) / GIB:.2f}' for name, part in sizes.items())
    raise InputError(
      f'the step needs {peak:.2f} GiB of a device that has {limit / GIB:.2f} ({shown}, the rest temporaries): '
      'set compute.remat full, a larger compute.accum or mesh, or see what `jaxlm plan CONFIG --search` finds'
    )
  full = jax.tree.map(jnp.shape, built.batch)

  def step(state: Any, batch: Any) -> Any:
    return (compiled if jax.tree.map(jnp.shape, batch) == full else built.step)(state, batch)

  return built._replace(step=step)


def compiled_or_gib(lowered: Any) -> Any:
  """The compiled program, or the GiB that it would need where that is more than there are; other errors are raised."""
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    used = re.search(r'(?:Used |temporaries \()([\d.]+)([GM])', str(error))
    if 'RESOURCE_EXHAUSTED' not in str(error) or not used:
      raise
    return float(used[1]) / (1 if used[2] == 'G' else 1024)
