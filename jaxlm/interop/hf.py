"""Models as Hugging Face has them: read a tensor at a time onto their shardings, written for transformers to open."""

import json
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
from jaxlm.interop.foreign import Foreign
from jaxlm.interop.published import BUFFERS, text_model
from jaxlm.models.config import ModelConfig

SHARD_BYTES = 1 << 30  # of a safetensors file


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
  shapes: dict[str, tuple[int, ...]] = {}
  for file in _weight_files(path):
    for name, shape in _header(file).items():
      if name in where:
        raise InputError(f'{file}: the tensor {name} is in {where[name].name} too')
      where[name], shapes[name] = file, shape
  there = (path / 'tokenizer.json').exists()
  extra = {name: _json(path / name) if (path / name).exists() else {} for name in ('generation_config.json', _TOKENS)}
  template = path / 'chat_template.jinja'
  found = Foreign(
    str(path),
    config,
    shapes,
    lambda name: _read(where[name], name),
    tokenizers.load(path / 'tokenizer.json') if there else None,
    read_text(template, 1 << 24) if template.exists() else _template(extra[_TOKENS].get('chat_template'), path),
    extra['generation_config.json'],
  )
  return text_model(found)


def load(foreign: Foreign, *, mesh: Any = None, rules: Any = sharding.RULES, dtype: Any = jnp.float32) -> Model:
  """The model with its weights on the devices, one tensor in host memory at a time.

  With a mesh, laid out as training has them. Raises InputError for an architecture, a field, a tensor or a shape that
  is not understood, and for tensors that nothing asks for.
  """
  cfg, names = hf_config.parse(foreign.config, foreign.where), FAMILIES[foreign.config['model_type']].names
  _check_sizes(foreign, cfg)
  abstract = models.abstract(cfg)
  layout = None if mesh is None else dict(tree.items(sharding.state_shardings(abstract, mesh, rules)))
  used: set[str] = set()

  def leaf(path: str, box: Any) -> jax.Array:
    stored, shape = names[path], tuple(box.value.shape)
    place = None if layout is None else layout[path]
    if '{i}' not in stored.name:
      return jax.device_put(_fitted(_one(foreign, stored, used), shape, path, foreign.where, cfg).astype(dtype), place)
    whole: Any = None
    for i in range(shape[0]):
      part = _one(foreign, stored._replace(name=stored.name.replace('{i}', str(i))), used)
      part = jnp.asarray(_fitted(part, shape[1:], path, foreign.where, cfg), dtype)
      whole = _put(jnp.zeros(shape, dtype, device=place) if whole is None else whole, part, i)
    return whole

  params = tree.path_map(leaf, abstract, is_leaf=sharding.is_named)
  _check_unused(foreign, cfg, names, used)
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
_put = jax.jit(lambda whole, part, i: whole.at[i].set(part), donate_argnums=0)


def _one(foreign: Foreign, stored: Stored, used: set[str]) -> np.ndarray:
  """The array that a tensor stands for."""
  if '{e}' in stored.name:
    count = next(n for n in range(1 << 16) if stored.name.format(e=n) not in foreign.shapes)
    if not count:
      raise InputError(f'{foreign.where}: the tensor {stored.name.format(e=0)} is missing')
    return np.stack([_one(foreign, stored._replace(name=stored.name.format(e=e)), used) for e in range(count)])
  if stored.name not in foreign.shapes:
    raise InputError(f'{foreign.where}: the tensor {stored.name} is missing')
  used.add(stored.name)
  x = foreign.read(stored.name)
  index, blocks = stored.part
  if blocks > 1:
    x = np.split(x, blocks, axis=-1)[index] if x.shape[-1] % blocks == 0 else x
  x = x.T if stored.transposed else x
  return x + np.asarray(stored.plus, x.dtype) if stored.plus else x


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


def _fitted(x: np.ndarray, shape: tuple[int, ...], path: str, where: str, cfg: ModelConfig) -> np.ndarray:
  """The array in the shape that the model has, its vocabulary filled up with zeros to whole tiles."""
  axis = {'embed': 0, 'head': 1}.get(path)
  stored = tuple(cfg.vocab_size if i == axis else n for i, n in enumerate(shape))
  if x.shape != stored:
    raise InputError(f'{where}: {path} has the shape {x.shape}, the config makes it {stored}')
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise InputError(f'{where}: {path} is stored as {x.dtype}: quantized weights are not read')
  return x if stored == shape else np.pad(x, [(0, n - have) for n, have in zip(shape, stored, strict=True)])


def _check_unused(foreign: Foreign, cfg: ModelConfig, names: Mapping[str, Stored], used: set[str]) -> None:
  """Refuses tensors that no leaf asked for, but for buffers and a copy of tied embeddings."""
  left = [name for name in foreign.shapes if name not in used and not name.endswith(BUFFERS)]
  if cfg.tie_embeddings and names['head'].name in left:
    same = np.array_equal(foreign.read(names['head'].name), foreign.read(names['embed'].name))
    if not same:
      raise InputError(f'{foreign.where}: its embeddings are tied and {names["head"].name} is another matrix')
    left.remove(names['head'].name)
  if left:
    more = f' and {len(left) - 3} more' if len(left) > 3 else ''
    raise InputError(f'{foreign.where}: tensors that this architecture does not have: {", ".join(left[:3])}{more}')


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


def _template(found: Any, path: epath.Path) -> str | None:
  """The chat template in tokenizer_config.json: one, or several with names, or that of a processor's own file."""
  if isinstance(found, list) and all(isinstance(one, dict) for one in found):
    found = {str(one.get('name')): one.get('template') for one in found}.get('default')
  if found is None and (path / 'chat_template.json').exists():
    found = _json(path / 'chat_template.json').get('chat_template')
  if found is not None and not isinstance(found, str):
    raise InputError(f'{path}: its chat_template is no text')
  return found


def _header(file: epath.Path) -> dict[str, tuple[int, ...]]:
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(str(file), 'numpy') as opened:
      return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
  except (SafetensorError, OSError, ValueError) as error:
    raise InputError(f'{file}: not a whole safetensors file: {error}') from error


def _read(file: epath.Path, name: str) -> np.ndarray:
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(str(file), 'flax') as opened:  # numpy has no bfloat16 of its own
      return np.asarray(opened.get_tensor(name))
  except (SafetensorError, OSError, ValueError, TypeError) as error:
    raise InputError(f'{file}: the tensor {name} cannot be read: {error}') from error


def _json(path: epath.Path) -> dict[str, Any]:
  if not path.exists():
    raise InputError(f'{path}: no such file')
  return read_json(path)
