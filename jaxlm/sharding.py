"""From names to shardings: a mesh, one table of rules, and the shardings of a whole train state derived from it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.core import FrozenDict
from flax.linen import LogicallyPartitioned
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm import tree
from jaxlm.errors import InputError

Names = tuple[str | None, ...]
Rules = Mapping[str, str | tuple[str, ...] | None]

MESH_AXES = ('data', 'fsdp', 'expert', 'sequence', 'tensor')

# Logical axis -> mesh axes. A strategy is a change of this table; a name without an entry is replicated.
RULES: Rules = FrozenDict(
  {  # hashable: it may be part of a static argument
    # activations
    'batch': ('data', 'fsdp', 'expert'),
    'seq': 'sequence',
    'stream': ('sequence', 'tensor'),  # the sequence between layers, where no device needs all of it
    'act_heads': 'tensor',
    'act_kv_heads': 'tensor',
    'act_mlp': 'tensor',
    # parameters
    'embed': ('fsdp', 'expert'),
    'experts': 'expert',
    'expert_embed': 'fsdp',  # of the experts' own matrices
    'heads': 'tensor',
    'kv_heads': 'tensor',
    'mlp': 'tensor',
    'vocab': 'tensor',
  }
)


def make_mesh(
  *,
  data: int = 1,
  fsdp: int = -1,
  tensor: int = 1,
  sequence: int = 1,
  expert: int = 1,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """A device mesh with axes `data, fsdp, expert, sequence, tensor`; one size may be -1 and takes what is left.

  Several slices are joined by `data`. Raises InputError when the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = {'data': data, 'fsdp': fsdp, 'expert': expert, 'sequence': sequence, 'tensor': tensor}
  free = [name for name, n in sizes.items() if n == -1]
  fixed = math.prod(n for n in sizes.values() if n != -1)
  shown = ', '.join(f'{k}={v}' for k, v in sizes.items())
  if len(free) > 1 or any(n < 1 and n != -1 for n in sizes.values()):
    raise InputError(f'mesh {shown}: sizes are positive, and at most one is -1 (the rest)')
  if len(devices) % fixed or (not free and fixed != len(devices)):
    raise InputError(f'mesh {shown}: does not divide {len(devices)} devices; change one size or set it to -1')
  if free:
    sizes[free[0]] = len(devices) // fixed
  shape = tuple(sizes[name] for name in MESH_AXES)
  types = (AxisType.Auto,) * len(shape)
  slices = _slices(devices)
  if sizes['data'] % len(slices):
    raise InputError(f'mesh {shown}: {len(slices)} slices are joined by the data axis: make it a multiple of them')
  own = (sizes['data'] // len(slices), *shape[1:])
  grids = [mesh_utils.create_device_mesh(own, some, allow_split_physical_axes=True) for some in slices]
  return Mesh(np.concatenate(grids), MESH_AXES, axis_types=types)


def _slices(devices: Sequence[Any]) -> list[list[Any]]:
  """The devices of each slice: what is between slices is slow, and `data` alone is laid across them."""
  found: dict[int, list[Any]] = {}
  for device in devices:
    found.setdefault(getattr(device, 'slice_index', None) or 0, []).append(device)
  return [found[index] for index in sorted(found)]


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """A rule's mesh axes as a tuple."""
  return (entry,) if isinstance(entry, str) else entry or ()


def cut_over(name: str, rules: Rules) -> tuple[str, ...]:
  """The axes of the mesh in use that an axis of this name is cut over: those with several devices."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(a for a in axes_of(rules.get(name)) if mesh.shape[a] > 1)


def rows_divide(shape: Sequence[int], rules: Rules) -> bool:
  """Whether an array [B, T, ...] of this shape divides over the mesh in use as batch and sequence are laid on it."""
  mesh = jax.sharding.get_abstract_mesh()
  ways = (math.prod(mesh.shape[a] for a in cut_over(name, rules)) for name in ('batch', 'seq'))
  return all(size % n == 0 for size, n in zip(shape, ways, strict=False))


def spec(names: Sequence[str | None], rules: Rules) -> PartitionSpec:
  """The PartitionSpec of an array whose axes carry these logical names."""
  return PartitionSpec(*(rules.get(name) if name else None for name in names))


def constrain(x: jax.Array, names: Sequence[str | None], rules: Rules | None) -> jax.Array:
  """Pins an activation's axes that divide to the mesh in use; without rules or mesh it is the identity."""
  if rules is None or jax.sharding.get_abstract_mesh().empty:
    return x
  shape = jax.sharding.get_abstract_mesh().shape
  divides = lambda n, axes: n % math.prod(shape[a] for a in axes_of(axes)) == 0
  laid = (axes if divides(n, axes) else None for n, axes in zip(x.shape, spec(names, rules), strict=True))
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*laid))


def own_tokens(
  fn: Callable[[Any, Any], Any], tokens: Any, weights: Any, rules: Rules | None, kept: Sequence[str | None] = ()
) -> Any:
  """`fn(tokens, weights)` with each device at its own part of `tokens`, and of what is returned, all [B, T, ...].

  For what the compiler would do on every device for all tokens. `weights` are whole on each, but for the leading axes
  named in `kept`, which stay laid out. Without rules or mesh, or where B and T do not divide, it is `fn` itself; mesh
  axes that neither batch nor sequence is laid on are left to the compiler.
  """
  if rules is None or jax.sharding.get_abstract_mesh().empty:
    return fn(tokens, weights)
  if not all(rows_divide(x.shape, rules) for x in jax.tree.leaves(tokens)):
    return fn(tokens, weights)
  partition = spec(('batch', 'seq'), rules)
  names = {a for one in partition for a in axes_of(one)}
  specs = (partition, spec(kept, rules))
  return jax.shard_map(fn, in_specs=specs, out_specs=partition, axis_names=names)(tokens, weights)


def batch_shardings(batch: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
  """Shardings for a batch: the first axis of every array is `batch`, the second (if any) `seq`."""
  names = ('batch', 'seq')
  return jax.tree.map(lambda x: NamedSharding(mesh, spec(names[: len(x.shape)], rules)), batch)


def laid(shapes: Any, shardings: Any) -> Any:
  """A tree of arrays, or of their shapes, as ShapeDtypeStructs with these shardings."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def is_named(x: Any) -> bool:
  """Whether this is a leaf boxed with its logical axis names."""
  return isinstance(x, LogicallyPartitioned)


def with_names(abstract: Any, named_params: Any) -> Any:
  """Gives every leaf of an abstract state that belongs to a parameter the axis names of that parameter.

  A leaf belongs to the parameter whose path is contained in its own: `opt_state/0/mu/layers/attn/q` to `layers/attn/q`,
  and so does an adapter's `layers/attn/q/a`. An axis whose size is not the parameter's (a rank) has no name.
  """
  table = sorted(tree.items(named_params, is_leaf=is_named), key=lambda item: -len(item[0]))

  def one(path: str, leaf: Any) -> Any:
    for param_path, box in table:
      if f'/{param_path}/' in f'/{path}/' and len(leaf.shape) == len(box.names):
        sizes = zip(box.names, leaf.shape, box.value.shape, strict=True)
        return LogicallyPartitioned(leaf, tuple(name if a == b else None for name, a, b in sizes))
    return leaf

  return tree.path_map(one, abstract)


def state_shardings(abstract_state: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
  """A tree of NamedSharding for a state of abstract leaves, some boxed with their axis names (see `with_names`).

  Leaves without names are replicated. Raises InputError when an axis does not divide by the mesh axes it is laid on.
  """

  def one(path: str, leaf: Any) -> NamedSharding:
    if not is_named(leaf):
      return NamedSharding(mesh, PartitionSpec())
    partition = spec(leaf.names, rules)
    for name, size, axes in zip(leaf.names, leaf.value.shape, partition, strict=True):
      laid = {a: mesh.shape[a] for a in axes_of(axes) if mesh.shape[a] > 1}
      if size % math.prod(laid.values()):
        on = ' x '.join(f'{a} {n}' for a, n in laid.items())
        raise InputError(f'{path}: axis {name!r} of size {size} does not divide by {on}')
    return NamedSharding(mesh, partition)

  return tree.path_map(one, abstract_state, is_leaf=is_named)


def check_replicated(abstract_state: Any, shardings: Any, mesh: Mesh, *, limit_bytes: int = 8 * 2**20) -> None:
  """Raises InputError if parameters are to be sharded and a leaf over `limit_bytes` is whole on every device."""
  if mesh.shape['fsdp'] * mesh.shape['tensor'] == 1:
    return
  unboxed = jax.tree.map(lambda x: x.value if is_named(x) else x, abstract_state, is_leaf=is_named)
  for (path, leaf), sharding in zip(tree.items(unboxed), jax.tree.leaves(shardings), strict=True):
    bytes_ = leaf.size * leaf.dtype.itemsize
    if bytes_ > limit_bytes and sharding.is_fully_replicated:
      raise InputError(
        f'{path} ({bytes_ / 2**20:.0f} MiB) would be replicated on every device of {dict(mesh.shape)}; '
        'name its axes, or give a name it has a rule'
      )
