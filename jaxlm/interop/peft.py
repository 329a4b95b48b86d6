"""Adapters as peft has them: a folder with adapter_config.json and adapter_model.safetensors, in and out."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.files import read_json
from jaxlm.interop import hf_config
from jaxlm.interop.families import FAMILIES, Stored
from jaxlm.lora import adapted
from jaxlm.models import LowRank, ModelConfig
from jaxlm.models.linear import is_weight, shape

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
HUB_NAME = re.compile(r'\w[\w.-]*(/\w[\w.-]*)?')
KINDS = {'lora_A.weight': 'a', 'lora_B.weight': 'b', 'lora_magnitude_vector': 'm', 'lora_magnitude_vector.weight': 'm'}
READ = {'r', 'lora_alpha', 'use_rslora', 'use_dora', 'rank_pattern', 'alpha_pattern', 'lora_dropout'}
# What a file may say beside: where it came from, how it was begun, which modules (the tensors say it).
HARMLESS = {'peft_type', 'task_type', 'base_model_name_or_path', 'revision', 'inference_mode', 'target_modules'}
HARMLESS |= {'init_lora_weights', 'auto_mapping', 'peft_version', 'fan_in_fan_out', 'exclude_modules', 'loftq_config'}
HARMLESS |= {'eva_config', 'corda_config', 'megatron_config', 'megatron_core', 'runtime_config', 'ensure_weight_tying'}
HARMLESS |= {'arrow_config', 'lora_ga_config', 'qalora_group_size'}


class _Place(NamedTuple):
  path: str
  layer: int
  stored: Stored


def is_adapter(source: epath.PathLike) -> bool:
  """Whether a source is a folder of peft's rather than a model."""
  if str(source).startswith('hf://'):
    return False
  folder = epath.Path(source).expanduser()
  return (folder / CONFIG).exists() and not (folder / 'config.json').exists()


def base_of(directory: epath.PathLike) -> str:
  """The model that an adapter says it was trained on: a folder or file that is there, else a name on the hub.

  Raises InputError if it says none, one that is neither, or an adapter.
  """
  config = read_json(epath.Path(directory).expanduser() / CONFIG)
  named = config.get('base_model_name_or_path')
  if not isinstance(named, str) or not named:
    raise InputError(f'{directory}: names no base_model_name_or_path: load the base with adapter={str(directory)!r}')
  if is_adapter(named):
    raise InputError(f'{directory}: names {named} as its base, which is an adapter itself')
  if '://' in named or epath.Path(named).expanduser().exists():
    return named
  if not HUB_NAME.fullmatch(named) or named.endswith('.gguf'):
    raise InputError(f'{directory}: names {named} as its base, which is not here: set base_model_name_or_path anew')
  return f'hf://{named}' + (f'@{config["revision"]}' if config.get('revision') else '')


def load(directory: epath.PathLike, cfg: ModelConfig, params: Any, *, family: str | None = None) -> Any:
  """`params` with the adapter of a folder on them; a rank that differs between layers is filled up with zeros.

  Raises InputError for what is not LoRA or DoRA on matrices of the layers, and for keys and tensors not understood.
  """
  folder = epath.Path(directory)
  config, tensors = read_json(folder / CONFIG), _tensors(folder / WEIGHTS)
  _check(config, folder)
  places = {module: some for module, some in _modules(cfg, family or hf_config.family_of(cfg))}
  found: dict[str, dict[int, dict[str, np.ndarray]]] = {}
  for name, array in tensors.items():
    module, kind = _parsed(name, folder)
    if module not in places:
      raise InputError(f'{folder / WEIGHTS}: {name}: this model has no such matrix in its layers')
    for place in places[module]:
      found.setdefault(place.path, {}).setdefault(place.layer, {})[kind] = _own(array, kind, place.stored)
      found[place.path][place.layer].setdefault('scale', _scale(config, module))
  return tree.path_map(
    lambda path, w: _stacked(path, w, found[path], config, folder) if path in found else w, params, is_leaf=is_weight
  )


def export(
  cfg: ModelConfig, params: Any, directory: epath.PathLike, *, base: str = '', revision: str | None = None
) -> None:
  """Writes the adapters of a tree as peft opens them, on a base model that is called `base`, on the hub of a revision.

  Raises InputError if the tree has none, or one on a matrix that the family stores with others (GPT-2's attention) or
  that is of experts or in no layer.
  """
  from safetensors.numpy import save

  folder, found = epath.Path(directory), adapted(params)
  if not found:
    raise InputError(f'{folder}: this model has no adapter to write')
  if (folder / CONFIG).exists():
    raise InputError(f'{folder}: holds an adapter already: give a new folder')
  modules = list(_modules(cfg, hf_config.family_of(cfg)))
  if left := sorted(found.keys() - {place.path for _, places in modules for place in places}):
    raise InputError(f'{folder}: {left[0]} has an adapter, which none of peft takes here: merge')
  tensors: dict[str, np.ndarray] = {}
  alphas: dict[str, float] = {}
  for module, places in modules:
    for place in places:
      if place.path not in found:
        continue
      if place.stored.part[1] > 1:
        raise InputError(f'{folder}: {place.path} is a part of {module}: peft has no adapter for a part')
      w, i = found[place.path], place.layer
      a, b = np.asarray(w.a[i], np.float32), np.asarray(w.b[i], np.float32)
      tensors |= {f'{PREFIX}{module}.lora_A.weight': a.T, f'{PREFIX}{module}.lora_B.weight': b.T}
      if w.magnitude is not None:
        tensors[f'{PREFIX}{module}.lora_magnitude_vector'] = np.asarray(w.magnitude[i], np.float32)
      alphas[module] = float(w.scale_L[i]) * a.shape[1]
  ranks = {
    name.removeprefix(PREFIX).removesuffix('.lora_A.weight'): len(x) for name, x in tensors.items() if 'lora_A' in name
  }
  first = next(iter(ranks))
  config = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'revision': revision,
    'r': ranks[first],
    'lora_alpha': alphas[first],
    'rank_pattern': {_exactly(m): r for m, r in ranks.items() if r != ranks[first]},
    'alpha_pattern': {_exactly(m): x for m, x in alphas.items() if x != alphas[first]},
    'target_modules': sorted({module.rpartition('.')[2] for module in ranks}),
    'use_dora': any(w.magnitude is not None for w in found.values()),
    'use_rslora': False,
    'lora_dropout': max(w.rate for w in found.values()),
    'bias': 'none',
    'inference_mode': True,
  }
  folder.mkdir(parents=True, exist_ok=True)
  (folder / WEIGHTS).write_bytes(save({name: np.ascontiguousarray(x) for name, x in tensors.items()}, {'format': 'pt'}))
  (folder / CONFIG).write_text(json.dumps(config, indent=2))


def _modules(cfg: ModelConfig, family: str) -> Iterator[tuple[str, list[_Place]]]:
  """Every matrix of a layer as the family calls it, with the leaves that lie in it."""
  by_name: dict[str, list[_Place]] = {}
  for path, stored in FAMILIES[family].names.items():
    if '{i}' not in stored.name or '{e}' in stored.name or not stored.name.endswith('.weight'):
      continue
    for i in range(cfg.n_layers):
      module = stored.name.removesuffix('.weight').format(i=i)
      by_name.setdefault(module, []).append(_Place(path, i, stored))
  yield from by_name.items()


def _exactly(module: str) -> str:
  return f'^{re.escape(module)}$'


def _tensors(path: epath.Path) -> dict[str, np.ndarray]:
  from safetensors import SafetensorError
  from safetensors.numpy import load as read

  if not path.exists():
    raise InputError(f'{path}: no such file')
  try:
    return {name: x.astype(np.float32) for name, x in read(path.read_bytes()).items()}
  except (SafetensorError, KeyError, ValueError) as error:
    raise InputError(f'{path}: is not whole: {str(error).splitlines()[0]}') from error


def _check(config: Mapping[str, Any], folder: epath.Path) -> None:
  where = folder / CONFIG
  if config.get('peft_type') != 'LORA':
    raise InputError(f'{where}: peft_type={config.get("peft_type")!r} is not LORA')
  for key, table, least in (('r', 'rank_pattern', 1), ('lora_alpha', 'alpha_pattern', 0)):  # 0: a layer without one
    fits = lambda x, least=least: isinstance(x, (int, float)) and x >= least
    if not fits(config.get(key)):
      raise InputError(f'{where}: {key}={config.get(key)!r} is no number of {least} or more')
    patterns = config.get(table) or {}
    if not isinstance(patterns, dict) or not all(_is_regex(p) and fits(x) for p, x in patterns.items()):
      raise InputError(f'{where}: {table}={patterns!r} is no table of patterns with numbers of {least} or more')
  unset = (None, False, 'none', [], {}, 0)
  for key, value in config.items():
    if key not in READ | HARMLESS and value not in unset:
      raise InputError(f'{where}: {key}={value!r} is not understood here')


def _is_regex(pattern: str) -> bool:
  try:
    re.compile(pattern)
  except re.error:
    return False
  return True


def _parsed(name: str, folder: epath.Path) -> tuple[str, str]:
  kind = next((suffix for suffix in KINDS if name.endswith(f'.{suffix}')), None)
  if kind is None or not name.startswith(PREFIX):
    raise InputError(f'{folder / WEIGHTS}: {name}: is no lora_A, lora_B or lora_magnitude_vector of a matrix')
  return name.removeprefix(PREFIX).removesuffix(f'.{kind}'), KINDS[kind]


def _own(array: np.ndarray, kind: str, stored: Stored) -> np.ndarray:
  """A leaf's part of a tensor, inputs first."""
  if kind == 'a':
    return array.T
  index, parts = stored.part
  return np.split(array.T if kind == 'b' else array.reshape(-1), parts, axis=-1)[index]


def _pattern(table: Mapping[str, float], module: str, default: float) -> float:
  """A pattern means modules whose name ends with it, or matches it as a regular expression, as in peft."""
  return next((x for pattern, x in table.items() if re.match(rf'(.*\.)?({pattern})$', module)), default)


def _scale(config: Mapping[str, Any], module: str) -> Any:
  r = _pattern(config.get('rank_pattern') or {}, module, config['r'])
  alpha = _pattern(config.get('alpha_pattern') or {}, module, config['lora_alpha'])
  return np.float32(alpha / (r**0.5 if config.get('use_rslora') else r))


def _stacked(
  path: str, w: Any, layers: Mapping[int, Mapping[str, np.ndarray]], config: Mapping[str, Any], folder: epath.Path
) -> LowRank:
  if isinstance(w, LowRank):
    raise InputError(f'{path}: has an adapter already')
  L, i, o = shape(w)
  whole = {'a', 'b', 'scale'} | ({'m'} if config.get('use_dora') else set())
  rank = max(found['a'].shape[-1] if 'a' in found else 0 for found in layers.values())
  a, b, scale = np.zeros((L, i, rank), np.float32), np.zeros((L, rank, o), np.float32), np.zeros(L, np.float32)
  magnitude: Any = np.zeros((L, o), np.float32)
  for n, found in layers.items():
    r = found['a'].shape[-1] if 'a' in found else -1
    if set(found) != whole or (found['a'].shape, found['b'].shape) != ((i, r), (r, o)):
      shapes = {kind: x.shape for kind, x in found.items() if kind != 'scale'}
      raise InputError(f'{folder / WEIGHTS}: {path} of layer {n} is {i} x {o}, and here are {shapes}')
    a[n, :, :r], b[n, :r], scale[n] = found['a'], found['b'], found['scale']
    if 'm' in found:
      magnitude[n] = found['m']
  if config.get('use_dora') and len(layers) < L:
    raise InputError(f'{folder / WEIGHTS}: {path} has magnitudes in {len(layers)} of {L} layers: all of them or none')
  arrays = (jnp.asarray(x) for x in (a, b, scale))
  return LowRank(
    w, *arrays, jnp.asarray(magnitude) if config.get('use_dora') else None, rate=config.get('lora_dropout', 0.0)
  )
