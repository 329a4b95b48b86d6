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
  dims: int  # of the torus; of GPUs: machines, and GPUs in one
  cores: int = 1  # that its names count for each chip
  dcn: float = 6.25e9  # bytes to other slices, of GPUs to other machines
  kind: str = 'tpu'


# Vendors' data sheets; the memory limits are those of the compiler.
CHIPS = {
  'v4': Chip(275e12, 30.75, 1228e9, 300e9, 3, 2),
  'v5e': Chip(197e12, 15.75, 819e9, 200e9, 2),
  'v5p': Chip(459e12, 95.74, 2765e9, 600e9, 3, 2),
  'v6e': Chip(918e12, 31.25, 1640e9, 448e9, 2),
  'tpu7x': Chip(1154e12, 94.75, 3690e9, 600e9, 3, 2),
  'h100': Chip(989e12, 79.1, 3352e9, 450e9, 2, dcn=50e9, kind='gpu'),
  'h200': Chip(989e12, 139.8, 4800e9, 450e9, 2, dcn=50e9, kind='gpu'),
}
NODE = 8  # GPUs in a machine, where a name does not say
# What the compiler wants to know of a GPU that it cannot ask.
GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  l2_cache_size: 52428800
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "NVIDIA {name}"
"""
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
  def size(self) -> int:
    """How many devices."""
    return math.prod(self.shape) * self.slices * (2 if self.platform == 'tpu7x' else 1)

  @property
  def limit_gib(self) -> float:
    """What a program may use of a device: on GPUs JAX takes three quarters, if its environment says no other share."""
    share = float(os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', 0.75)) if self.chip.kind == 'gpu' else 1.0
    return self.chip.memory_gib * share

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
  if chip.kind == 'gpu' and slices > 1:
    raise InputError(f'topology {name!r}: GPUs have machines, not slices: {platform}:{slices}x{NODE}, say')
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
  if chip.kind == 'gpu':
    return Topology(platform, (max(1, chips // NODE), min(chips, NODE)), slices)
  return Topology(platform, _shape(chips, chip.dims), slices)


def _shape(chips: int, dims: int) -> tuple[int, ...]:
  """The shape nearest to a cube, the longest side last (but for 2x2x1)."""
  doublings = chips.bit_length() - 1
  if dims == 3 and doublings == 2:
    return (2, 2, 1)
  sides = [doublings // dims + (i >= dims - doublings % dims) for i in range(dims)]
  return tuple(2**n for n in sides)


def devices(topology: Topology) -> list[Any]:
  """The devices of a topology, which need not be there. Raises InputError where its compiler is missing or refuses."""
  return _gpus(topology) if topology.chip.kind == 'gpu' else _tpus(topology)


def _gpus(topology: Topology) -> list[Any]:
  if importlib.util.find_spec('jax_cuda13_plugin') is None:
    raise InputError("compiling for GPUs needs JAX's CUDA plugin, on any machine: pip install -e '.[cuda]'")
  chip = topology.chip
  about = {'bandwidth': int(chip.hbm), 'memory': int(chip.memory_gib * 2**30), 'name': topology.platform.upper()}
  shape = f'1x{topology.shape[0]}x{topology.shape[1]}'
  return _described(topology, {'platform': 'cuda', 'target_config': GPU_TARGET.format(**about), 'topology': shape})


def _tpus(topology: Topology) -> list[Any]:
  os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
  if importlib.util.find_spec('libtpu') is None:
    raise InputError("compiling for TPUs needs libtpu, on any machine: pip install -e '.[tpu]'")
  how: dict[str, Any] = {'wrap': topology.wrap}
  if topology.slices > 1:
    how['num_slices'] = topology.slices
  if math.prod(topology.shape) == 1:
    how['chips_per_host_bounds'] = (1, 1, 1)
  if topology.platform == 'v4':
    how['chip_config_name'] = 'megacore'
  return _described(topology, {'platform': 'tpu'} | how)


def _described(of: Topology, how: dict[str, Any]) -> list[Any]:
  from jax.experimental import topologies

  name = f'{of.platform}:{"x".join(map(str, of.shape))}'
  try:
    return list(topologies.get_topology_desc(topology_name=name, **how).devices)
  except Exception as error:  # of the compiler
    raise InputError(f'topology {of.name}: {str(error).splitlines()[0]}') from error
