"""Models as Hugging Face has them: read a tensor at a time onto their shardings, written for transformers to open."""

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxlm import models, sharding, tree
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.tokenizer import ROLES, Tokenizer
from jaxlm.errors import InputError
from jaxlm.files import read_json, read_text
from jaxlm.interop import hf_config
from jaxlm.interop.families import FAMILIES, Stored
from jaxlm.interop.foreign import Foreign, Tensor
from jaxlm.interop.published import BUFFERS, text_model
from jaxlm.models.config import ModelConfig

SHARD_BYTES = 1 << 30  # of a safetensors file
BLOCK_BYTES = 1 << 20  # of a tensor, in float32, that are in host memory at a time
FLOATS = {
  name: np.dtype(kind) for name, kind in {'F64': '<f8', 'F32': '<f4', 'F16': '<f2', 'BF16': jnp.bfloat16}.items()
}


class Model(NamedTuple):
  """A model in memory: what is asked of it is `models.forward(cfg, params, tokens)`."""

  cfg: ModelConfig
  params: Any
  tokenizer: Tokenizer | None
  chat_template: str | None
  generation: dict[str, Any]
  left_out: str = ''  # what of the source is not in it, in words


def open_directory(path: epath.PathLike) -> Foreign:
  """A folder with config.json and safetensors, in one file or several. Raises InputError for what is not whole."""
  path = epath.Path(path)
  config = _json(path / 'config.json')
  where: dict[str, epath.Path] = {}
  tensors: dict[str, Tensor] = {}
  for file in _weight_files(path):
    for name, tensor in _header(file).items():
      if name in where:
        raise InputError(f'{file}: the tensor {name} is in {where[name].name} too')
      where[name], tensors[name] = file, tensor
  there = (path / 'tokenizer.json').exists()
  extra = {name: _json(path / name) if (path / name).exists() else {} for name in ('generation_config.json', _TOKENS)}
  found = Foreign(
    str(path),
    config,
    {name: tensor.shape for name, tensor in tensors.items()},
    tensors.__getitem__,
    tokenizers.load(path / 'tokenizer.json') if there else None,
    chat_template(path),
    extra['generation_config.json'],
  )
  return text_model(found)


def load(foreign: Foreign, *, mesh: Any = None, rules: Any = sharding.RULES, dtype: Any = jnp.float32) -> Model:
  """The model with its weights on the devices, a block of one tensor in host memory at a time.

  With a mesh, laid out as training has them. Leaves that are a tensor and one more (Gemma's norms) stay float32,
  whatever `dtype` is. Raises InputError for an architecture, a field, a tensor or a shape that
  is not understood, and for tensors that nothing asks for.
  """
  cfg, names = hf_config.parse(foreign.config, foreign.where), FAMILIES[foreign.config['model_type']].names
  _check_sizes(foreign, cfg)
  _check_ids(foreign, cfg)
  abstract = models.abstract(cfg)
  layout = None if mesh is None else dict(tree.items(sharding.state_shardings(abstract, mesh, rules)))
  leaves = tree.items(jax.tree.map(lambda box: box.value, abstract, is_leaf=sharding.is_named))
  found = {path: _tensors_of(foreign, cfg, path, names[path], leaf.shape) for path, leaf in leaves}
  _check_unused(foreign, cfg, names, {tensor for tensors in found.values() for tensor in tensors.values()})

  def leaf(path: str, box: Any) -> jax.Array:
    kind = jnp.float32 if names[path].plus else dtype  # a norm's distance from one would not survive a shorter type
    whole = _Leaf(tuple(box.value.shape), kind, None if layout is None else layout[path])
    for index, tensor in found[path].items():
      _fill(whole, index, foreign.read(tensor), names[path])
    return whole.array()

  params = tree.path_map(leaf, abstract, is_leaf=sharding.is_named)
  return Model(cfg, params, foreign.tokenizer, foreign.chat_template, foreign.generation, foreign.left_out)


def export(model: Model, directory: epath.PathLike, *, dtype: Any = jnp.float32) -> str:
  """Writes the folder that transformers opens; returns the family. Raises InputError if none has this architecture."""
  kind = hf_config.family_of(model.cfg)
  folder = epath.Path(directory)
  if (folder / 'config.json').exists():
    raise InputError(f'{folder}: holds a model already: give a new folder')
  folder.mkdir(parents=True, exist_ok=True)
  config = hf_config.write(model.cfg, kind) | {'dtype': jnp.dtype(dtype).name, 'torch_dtype': jnp.dtype(dtype).name}
  generation = dict(model.generation)
  if model.tokenizer is not None:
    ids = {f'{role}_token_id': getattr(model.tokenizer, f'{role}_id') for role in ROLES}
    config, generation = config | ids, ids | generation
    model.tokenizer.save(folder / 'tokenizer.json')
  single = tree.size(model.params) * jnp.dtype(dtype).itemsize <= SHARD_BYTES
  _write_shards(folder, _tensors(model.cfg, model.params, FAMILIES[kind].names, dtype), single)
  if model.chat_template:
    (folder / 'chat_template.jinja').write_text(model.chat_template)
  if generation:
    (folder / 'generation_config.json').write_text(json.dumps(generation, indent=2))
  (folder / 'config.json').write_text(json.dumps(config, indent=2))
  return kind


_TOKENS = 'tokenizer_config.json'


class _Leaf:
  """A leaf on its devices, zeros at first, that is filled block by block: each device is sent its own part alone."""

  def __init__(self, shape: tuple[int, ...], dtype: Any, place: Any):
    self.shape, self.dtype, self.place = shape, jnp.dtype(dtype), place
    whole = {None: (slice(None),) * len(shape)}
    parts = whole if place is None else place.addressable_devices_indices_map(shape)
    self.starts = {to: [part.indices(n)[0] for part, n in zip(at, shape, strict=True)] for to, at in parts.items()}
    size = shape if place is None else place.shard_shape(shape)
    # XLA's CPU would go through a whole shard of bfloat16 for every block, but not of integers
    platform = (next(iter(parts)) or jax.devices()[0]).platform
    bits = np.uint16 if self.dtype == jnp.bfloat16 and platform == 'cpu' else dtype
    self.shards = {to: jnp.zeros(size, bits, device=to) for to in parts}

  def put(self, block: np.ndarray, at: tuple[int, ...], *, transposed: bool, plus: float) -> None:
    """Writes a block at its place `at`; only its last axes are there, the others are one long."""
    lead = len(at) - block.ndim
    for to, shard in self.shards.items():
      ends = [(start, start + n) for start, n in zip(self.starts[to], shard.shape, strict=True)]
      if not all(low <= i < high for i, (low, high) in zip(at[:lead], ends[:lead], strict=True)):
        continue
      spans = [
        (max(i, low), min(i + n, high)) for i, n, (low, high) in zip(at[lead:], block.shape, ends[lead:], strict=True)
      ]
      if any(low >= high for low, high in spans):
        continue
      part = block[tuple(slice(low - i, high - i) for i, (low, high) in zip(at[lead:], spans, strict=True))]
      start = np.subtract([*at[:lead], *(low for low, _ in spans)], self.starts[to]).astype(np.int32)
      part = jax.device_put(part.T if transposed else part, to)
      with _alone(to):
        self.shards[to] = _put(shard, part, start, dtype=self.dtype, transposed=transposed, plus=plus)
    jax.block_until_ready(list(self.shards.values()))  # else blocks that wait for their turn pile up in memory

  def array(self) -> jax.Array:
    shards = []
    for to, shard in self.shards.items():
      with _alone(to):
        shards.append(_as(shard, self.dtype, to))
    return shards[0] if self.place is None else jax.make_array_from_single_device_arrays(self.shape, self.place, shards)


def _alone(device: Any) -> Any:
  """A mesh of one device: the one in use, of all, would not have what is on one."""
  return contextlib.nullcontext() if device is None else jax.set_mesh(jax.sharding.Mesh(np.array([device]), ('one',)))


@functools.partial(jax.jit, donate_argnums=0, static_argnames=('dtype', 'transposed', 'plus'))
def _put(
  shard: jax.Array, part: jax.Array, start: jax.Array, *, dtype: Any, transposed: bool, plus: float
) -> jax.Array:
  part = part.T if transposed else part
  part = (part.astype(jnp.float32) + plus if plus else part).astype(dtype)
  part = jax.lax.bitcast_convert_type(part, shard.dtype).reshape((1,) * (shard.ndim - part.ndim) + part.shape)
  return jax.lax.dynamic_update_slice(shard, part, list(start))


def _as(bits: jax.Array, dtype: Any, to: Any) -> jax.Array:
  """The same memory as another type of the same size."""
  return bits if bits.dtype == dtype else jax.device_put(np.asarray(bits).view(dtype), to)


def _fill(leaf: _Leaf, index: tuple[int, ...], tensor: Tensor, stored: Stored) -> None:
  """Reads a tensor into its place, a block at a time."""
  number, count = stored.part
  first, size = [0] * len(tensor.shape), list(tensor.shape)
  size[-1] //= count
  first[-1] = number * size[-1]
  axis, n = tensor.axis, size[tensor.axis]
  step = max(1, min(n, BLOCK_BYTES // (4 * math.prod(tensor.shape) // tensor.shape[axis])))
  for start in range(0, n, step):
    start = min(start, n - step)  # the last block as large as all: one program for them
    block = tensor.part(first[axis] + start, first[axis] + start + step)
    if count > 1 and axis != len(size) - 1:
      block = block[..., first[-1] : first[-1] + size[-1]]
    at = tuple(start if i == axis else 0 for i in range(len(size)))
    block, at = (block.T, at[::-1]) if stored.transposed else (block, at)
    leaf.put(block, (*index, *at), transposed=stored.transposed, plus=stored.plus)


def _tensors_of(
  foreign: Foreign, cfg: ModelConfig, path: str, stored: Stored, shape: tuple[int, ...]
) -> dict[tuple[int, ...], str]:
  """The tensors of a leaf by layer and expert. Raises InputError where one is missing, or of another shape or type."""
  lead = ('{i}' in stored.name) + ('{e}' in stored.name)
  axis = {'embed': 0, 'head': 1}.get(path)
  inner = [cfg.vocab_size if i == axis else n for i, n in enumerate(shape[lead:])]
  inner = inner[::-1] if stored.transposed else inner
  want = (*inner[:-1], inner[-1] * stored.part[1])
  found: dict[tuple[int, ...], str] = {}
  for index in np.ndindex(shape[:lead]):
    name = stored.name.replace('{i}', str(index[0] if index else '')).replace('{e}', str(index[-1] if index else ''))
    if name not in foreign.shapes:
      raise InputError(f'{foreign.where}: the tensor {name} is missing')
    have = foreign.read(name)
    if have.shape != want:
      raise InputError(f'{foreign.where}: {name} has the shape {have.shape}, the config makes it {want}')
    if have.dtype is None:
      raise InputError(f'{foreign.where}: {name} is stored as no float type: quantized weights are not read')
    found[index] = name
  return found


def _check_sizes(foreign: Foreign, cfg: ModelConfig) -> None:
  """Raises InputError, before anything is made of them, for sizes that no tensor has."""
  largest = max((side for shape in foreign.shapes.values() if all(shape) for side in shape), default=0)
  sizes = {'n_layers': cfg.n_layers, 'n_experts': cfg.n_experts}
  sides = {'vocab_size': cfg.vocab_size, 'd_model': cfg.d_model, 'd_ff': cfg.d_ff}
  sides |= {'n_heads x head_dim': cfg.n_heads * cfg.head_size}
  sides |= {'max_seq_len': cfg.max_seq_len} if cfg.positions == 'learned' else {}
  for name, size in (sizes | sides).items():
    if size > (largest if name in sides else len(foreign.shapes)):
      raise InputError(f'{foreign.where}: the config says {name}={size}, more than its tensors have')


def _check_ids(foreign: Foreign, cfg: ModelConfig) -> None:
  """Raises InputError where a token that is put into a text or ends one has no row in the embeddings."""
  for role in ROLES if foreign.tokenizer else ():
    i = getattr(foreign.tokenizer, f'{role}_id')
    if i is not None and i >= cfg.vocab_size:
      raise InputError(
        f'{foreign.where}: the {role} token of its tokenizer has id {i}, its embeddings have {cfg.vocab_size} rows'
      )


def _check_unused(foreign: Foreign, cfg: ModelConfig, names: Mapping[str, Stored], used: set[str]) -> None:
  """Refuses tensors that no leaf asked for, but for buffers and a copy of tied embeddings."""
  left = [name for name in foreign.shapes if name not in used and not name.endswith(BUFFERS)]
  if cfg.tie_embeddings and names['head'].name in left:
    if not _equal(foreign.read(names['head'].name), foreign.read(names['embed'].name)):
      raise InputError(f'{foreign.where}: its embeddings are tied and {names["head"].name} is another matrix')
    left.remove(names['head'].name)
  if left:
    more = f' and {len(left) - 3} more' if len(left) > 3 else ''
    raise InputError(f'{foreign.where}: tensors that this architecture does not have: {", ".join(left[:3])}{more}')


def _equal(a: Tensor, b: Tensor) -> bool:
  if a.shape != b.shape or not a.shape or a.dtype is None:
    return False
  n = a.shape[0]
  step = max(1, BLOCK_BYTES // (4 * math.prod(a.shape[1:])))
  return all(np.array_equal(a.part(i, min(i + step, n)), b.part(i, min(i + step, n))) for i in range(0, n, step))


def _tensors(
  cfg: ModelConfig, params: Any, names: Mapping[str, Stored], dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
  """(name, array) of every tensor of the file, one after another, vocabulary and joined blocks as they are there."""
  blocks: dict[str, dict[int, np.ndarray]] = {}
  for path, leaf in tree.items(params):
    stored = names[path]
    layers = range(leaf.shape[0]) if '{i}' in stored.name else (None,)
    for i in layers:
      x = np.asarray(models.dense(leaf if i is None else jax.tree.map(lambda y, i=i: y[i], leaf)), np.float32)
      x = x[: cfg.vocab_size] if path == 'embed' else x[:, : cfg.vocab_size] if path == 'head' else x
      x = np.swapaxes(x - stored.plus, -1, -2) if stored.transposed else x - stored.plus
      name, (index, count) = stored.name.replace('{i}', str(i)), stored.part
      if '{e}' in name:
        yield from ((name.format(e=e), expert.astype(dtype)) for e, expert in enumerate(x))
        continue
      parts = blocks.setdefault(name, {}) | {index: x}
      blocks[name] = parts
      if len(parts) == count:
        yield name, np.concatenate([parts[n] for n in range(count)], axis=-1).astype(dtype)
        del blocks[name]


def _write_shards(folder: epath.Path, tensors: Iterator[tuple[str, np.ndarray]], single: bool) -> None:
  """Files of about SHARD_BYTES, and, where there are several, the index that says what is in which."""
  from safetensors.numpy import save

  index: dict[str, str] = {}
  shard: dict[str, np.ndarray] = {}
  size = whole = count = 0

  def flush() -> None:
    nonlocal size, count
    count += 1
    name = 'model.safetensors' if single else f'model-{count:05d}.safetensors'
    (folder / name).write_bytes(save(shard, metadata={'format': 'pt'}))
    index.update(dict.fromkeys(shard, name))
    shard.clear()
    size = 0

  for name, x in tensors:
    if shard and not single and size + x.nbytes > SHARD_BYTES:
      flush()
    shard[name] = np.ascontiguousarray(x)  # safetensors writes a view's buffer, not the view
    size, whole = size + x.nbytes, whole + x.nbytes
  flush()
  if not single:
    found = {'metadata': {'total_size': whole}, 'weight_map': index}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(found, indent=2))


def _weight_files(path: epath.Path) -> list[epath.Path]:
  index = path / 'model.safetensors.index.json'
  if not index.exists():
    if not Path(path / 'model.safetensors').is_file():
      raise InputError(f'{path}: no model.safetensors: pickled weights are not read; convert them with safetensors')
    return [path / 'model.safetensors']
  found = _json(index).get('weight_map')
  if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
    raise InputError(f'{index}: damaged: its weight_map is none of tensors to files')
  names = sorted(set(found.values()))
  for name in names:
    if '/' in name or '\0' in name or len(name) > 255 or not Path(path / name).is_file():
      raise InputError(f'{index}: names {name!r}, which is no file beside it')
  return [path / name for name in names]


def chat_template(path: epath.Path) -> str | None:
  """The chat template of a folder, ours or Hugging Face's, if there is one."""
  template = path / 'chat_template.jinja'
  if template.exists():
    return read_text(template, 1 << 24)
  return _template(_json(path / _TOKENS).get('chat_template') if (path / _TOKENS).exists() else None, path)


def _template(found: Any, path: epath.Path) -> str | None:
  """The chat template in tokenizer_config.json: one, or several with names, or that of a processor's own file."""
  if isinstance(found, list) and all(isinstance(one, dict) for one in found):
    found = {str(one.get('name')): one.get('template') for one in found}.get('default')
  if found is None and (path / 'chat_template.json').exists():
    found = _json(path / 'chat_template.json').get('chat_template')
  if found is not None and not isinstance(found, str):
    raise InputError(f'{path}: its chat_template is no text')
  return found


def _header(file: epath.Path) -> dict[str, Tensor]:
  """The tensors of a file, once safetensors has found its header to be sound."""
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(str(file), 'numpy') as opened:
      names = list(opened.keys())
    with Path(file).open('rb') as raw:
      size = int.from_bytes(raw.read(8), 'little')
      header = json.loads(raw.read(size))
      return {name: _stored(file, header[name], 8 + size) for name in names}
  except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
    raise InputError(f'{file}: not a whole safetensors file: {error}') from error


def _stored(file: epath.Path, entry: dict[str, Any], data: int) -> Tensor:
  """A tensor whose parts are read and not mapped: pages of a mapped file would count as memory of the process."""
  shape, dtype = tuple(entry['shape']), FLOATS.get(entry['dtype'])
  first = data + entry['data_offsets'][0]

  def part(start: int, stop: int) -> np.ndarray:
    out = np.empty((stop - start, *shape[1:]) if shape else (), dtype)
    with Path(file).open('rb', buffering=0) as raw:
      raw.seek(first + start * (out.nbytes // max(stop - start, 1)))
      left = out.reshape(-1).view(np.uint8).data
      while left and (count := raw.readinto(left)):  # Linux gives 2 GB at most
        left = left[count:]
    if left:
      raise InputError(f'{file}: it became shorter while it was read')
    return out

  return Tensor(shape, dtype, part)


def _json(path: epath.Path) -> dict[str, Any]:
  if not path.exists():
    raise InputError(f'{path}: no such file')
  return read_json(path)
