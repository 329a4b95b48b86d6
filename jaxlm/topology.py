"""Accelerators by name: what a chip can do, and the devices of a slice, of which none needs to be there."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from jaxlm.errors import InputError


class Chip(NamedTuple):
  """What one device of a platform has; rates a second."""

  flops: float  # dense bfloat16
  memory_gib: float  # that a program may use, as its compiler says
  hbm: float  # bytes
  ici: float  # bytes to all neighbours together
  dims: int  # of the torus
  cores: int = 1  # that its names count for each chip


# Vendors' data sheets; the memory limits are those of the compiler.
CHIPS = {
  'v4': Chip(275e12, 30.75, 1228e9, 300e9, 3, 2),
  'v5e': Chip(197e12, 15.75, 819e9, 200e9, 2),
  'v5p': Chip(459e12, 95.74, 2765e9, 600e9, 3, 2),
  'v6e': Chip(918e12, 31.25, 1640e9, 448e9, 2),
  'tpu7x': Chip(1154e12, 94.75, 3690e9, 600e9, 3, 2),
}
DCN = 6.25e9  # bytes a second of a chip between slices
# What libtpu asks for on a machine without a TPU.
ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5p-8',
  'TPU_LOG_DIR': 'disabled',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


class Topology(NamedTuple):
  """One or several slices of a platform."""

  platform: str
  shape: tuple[int, ...]
  slices: int

  @property
  def chip(self) -> Chip:
    return CHIPS[self.platform]

  @property
  def name(self) -> str:
    return f'{self.platform}:{"x".join(map(str, self.shape))}' + (f' x {self.slices} slices' if self.slices > 1 else '')

  @property
  def wrap(self) -> tuple[bool, bool, bool]:
    """Which dimensions close to a ring: those of whole cubes of 4x4x4, and of 16 chips where the torus is flat."""
    if self.chip.dims == 3:
      whole = all(n % 4 == 0 for n in self.shape)
      return whole, whole, whole
    return (self.shape[0] == 16, self.shape[1] == 16, False)


def parse(name: str, slices: int = 1) -> Topology:
  """`v5p-64` or `v5e-256` as clouds call it (v4, v5p and tpu7x count cores, two a chip), or `v5p:4x4x8` in chips.

  Raises InputError for what is neither.
  """
  match = re.fullmatch(r'([a-z0-9]+)([:-])([\dx]+)', name.lower())
  platform, separator, size = match.groups() if match else ('', '', '')
  if platform not in CHIPS or slices < 1:
    known = ', '.join(CHIPS)
    raise InputError(f'topology {name!r}: PLATFORM-SIZE or PLATFORM:AxB[xC] with a platform of {known}, as v5e-256')
  chip = CHIPS[platform]
  if separator == ':':
    shape = tuple(int(n) for n in size.split('x') if n)
    if len(shape) != chip.dims or min(shape) < 1:
      raise InputError(f'topology {name!r}: {platform} has {chip.dims} dimensions')
    return Topology(platform, shape, slices)
  chips = int(size) // chip.cores if size.isdigit() else 0
  if chips < 1 or chips & (chips - 1):
    raise InputError(
      f'topology {name!r}: no power of two of chips; give its shape, as {platform}:{"x".join("444"[: chip.dims])}'
    )
  return Topology(platform, _shape(chips, chip.dims), slices)


def _shape(chips: int, dims: int) -> tuple[int, ...]:
  """The shape nearest to a cube, the longest side last (but for 2x2x1)."""
  doublings = chips.bit_length() - 1
  if dims == 3 and doublings == 2:
    return (2, 2, 1)
  sides = [doublings // dims + (i >= dims - doublings % dims) for i in range(dims)]
  return tuple(2**n for n in sides)


def devices(topology: Topology) -> list[Any]:
  """The devices of a topology, which need not be there. Raises InputError where libtpu is missing or refuses it."""
  os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
  if importlib.util.find_spec('libtpu') is None:
    raise InputError("compiling for TPUs needs libtpu, on any machine: pip install 'jaxlm[tpu]'")
  from jax.experimental import topologies

  how: dict[str, Any] = {'wrap': topology.wrap}
  if topology.slices > 1:
    how['num_slices'] = topology.slices
  if math.prod(topology.shape) == 1:
    how['chips_per_host_bounds'] = (1, 1, 1)
  if topology.platform == 'v4':
    how['chip_config_name'] = 'megacore'
  name = f'{topology.platform}:{"x".join(map(str, topology.shape))}'
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **how).devices)
  except Exception as error:  # of the compiler
    raise InputError(f'topology {topology.name}: {str(error).splitlines()[0]}') from error
