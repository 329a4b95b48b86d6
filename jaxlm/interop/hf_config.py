"""config.json to ModelConfig and back, by the tables of `families`; what is not understood is refused by name."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxlm.errors import InputError
from jaxlm.interop.families import ACTIVATIONS, DIVIDING, EXPERTS, FAMILIES, HARMLESS, KINDS, Family
from jaxlm.models.config import ModelConfig

ROPE_KEYS = {'rope_type', 'type', 'rope_theta', 'factor', 'original_max_position_embeddings'} | {
  'low_freq_factor', 'high_freq_factor', 'beta_slow', 'beta_fast', 'attention_factor'
}  # fmt: skip
CAPS = ('attn_logit_softcapping', 'final_logit_softcapping')  # None: no cap
MOST = {'num_hidden_layers': 4097, 'n_layer': 4097}  # a pattern is found in time that grows with their square
OTHERS = {
  **dict.fromkeys(('sliding_window', 'sliding_window_pattern', '_sliding_window_pattern', 'max_window_layers'), 'int'),
  **dict.fromkeys(('rope_theta', 'rope_local_base_freq', 'query_pre_attn_scalar'), 'float'),
  **dict.fromkeys(('attention_bias', 'mlp_bias', 'use_sliding_window'), 'bool'),
  **dict.fromkeys(('rope_scaling', 'rope_parameters'), 'dict'),
  'layer_types': 'list',
}  # what is no field by itself
ACTIVATION_KEYS = ('hidden_activation', 'hidden_act', 'activation_function')
LAYERED = {'period', 'max_window_layers'}  # a family with one of these reads `layer_types`, others ignore them


def parse(config: Mapping[str, Any], where: str) -> ModelConfig:
  """The architecture that a config.json describes.

  Raises InputError for a family that is not known, a key that is missing, and a key or value that would change the
  numbers and is not understood.
  """
  kind = str(config.get('model_type'))
  if kind not in FAMILIES:
    raise InputError(f'{where}: model_type {kind!r} is none of {", ".join(FAMILIES)}')
  family = FAMILIES[kind]
  if own := next((key for key in EXPERTS if key in family.keys), None):
    config = {own if key in EXPERTS else key: value for key, value in config.items()}
  values = {**family.defaults, **config}
  if missing := [key for key in family.keys if key not in values]:
    raise InputError(f'{where}: no {", ".join(missing)}')
  _check_values(values, family, where)
  for key, value in config.items():
    if key in family.only and value != family.only[key] and (value is not None or family.only[key]):
      raise InputError(f'{where}: {key}={value!r} is not supported for {kind}')
    if key not in {*family.keys, *family.defaults, *family.only, *HARMLESS, *_SPECIAL}:
      raise InputError(f'{where}: {key}={value!r} is not known to leave the numbers of {kind} as they are')
  fields = {field: values[key] for key, field in family.keys.items() if values[key] is not None} | dict(family.fixed)
  activation = _activation(values, family, where)
  if not isinstance(activation, str) or activation not in ACTIVATIONS:
    raise InputError(f'{where}: the activation {activation!r} is none of {", ".join(ACTIVATIONS)}')
  fields['activation'] = ACTIVATIONS[activation]
  fields.setdefault('d_ff', 4 * fields['d_model'])
  if 'attention_bias' in family.defaults:
    if values['attention_bias'] != values['mlp_bias']:
      raise InputError(f'{where}: attention_bias and mlp_bias must be alike')
    fields['bias'] = bool(values['mlp_bias'])
  if not fields.get('shared_d_ff', 1):
    raise InputError(f'{where}: shared_expert_intermediate_size=0 is not supported for {kind}')
  if 'query_pre_attn_scalar' in family.defaults:
    fields['attention_multiplier'] = values['query_pre_attn_scalar'] ** -0.5
    fields['embedding_multiplier'] = math.sqrt(fields['d_model'])
  if kind != 'gpt2':
    fields |= _rope(values, family, fields['max_seq_len'], where)
  fields |= _pattern(values, family, fields['n_layers'], where)
  try:
    return ModelConfig(**fields)
  except (InputError, TypeError) as error:
    raise InputError(f'{where}: {error}') from error


def _activation(values: Mapping[str, Any], family: Family, where: str) -> Any:
  """What the family's own key says; other families' keys change nothing there, and may not say something else."""
  own = next(key for key in ACTIVATION_KEYS if key in family.defaults)
  for key in ACTIVATION_KEYS:
    if key != own and values.get(key) is not None and ACTIVATIONS.get(values[key]) != ACTIVATIONS.get(values[own]):
      raise InputError(f'{where}: {key}={values[key]!r} is not {own}={values[own]!r}, which this family reads')
  return values[own]


def _check_values(values: Mapping[str, Any], family: Family, where: str) -> None:
  """Raises InputError for a value of another type, or beyond what any model has: before it is computed with."""
  fields = {field.name: str(field.type) for field in dataclasses.fields(ModelConfig)}
  kinds = {key: fields[field] for key, field in family.keys.items()} | OTHERS
  for key in values.keys() & kinds.keys():
    value, kind = values[key], kinds[key]
    if value is None and key == 'query_pre_attn_scalar':
      raise InputError(f'{where}: {key}=None is not supported')
    if value is None and (
      key in OTHERS or key in CAPS or family.defaults.get(key, 0) is None or key == 'num_key_value_heads'
    ):
      continue
    most = MOST.get(key, 1 << 31)
    if 'bool' in kind:
      good = isinstance(value, bool)
    elif 'int' in kind:
      good = type(value) is int and 0 <= value < most
    elif 'dict' in kind:
      good = isinstance(value, dict) and _good_rope(value)
    elif 'list' in kind:
      good = isinstance(value, list) and all(isinstance(one, str) for one in value)
    else:
      good = type(value) in (int, float) and 0 < value < 1e30
    if not good:
      raise InputError(f'{where}: {key}={value!r} is not supported: damaged?')


def _good_rope(found: Mapping[str, Any]) -> bool:
  """Whether what is known of the rope parameters has the right types; the rest is refused by name elsewhere."""
  for key, value in found.items():
    if key in KINDS:
      good = value is None or (isinstance(value, dict) and not value.keys() & KINDS.keys() and _good_rope(value))
    elif key in ('rope_type', 'type'):
      good = value is None or isinstance(value, str)
    else:
      good = key not in ROPE_KEYS or value is None or (type(value) in (int, float) and 0 < value < 1e30)
    if not good:
      return False
  return True


def write(cfg: ModelConfig, kind: str) -> dict[str, Any]:
  """The config.json of a model as one of a family. What the family cannot say is lost: see `family_of`."""
  family, cfg = FAMILIES[kind], plain(cfg)
  config: dict[str, Any] = {'architectures': [family.architecture], 'model_type': kind}
  config |= {key: getattr(cfg, field) for key, field in family.keys.items()}
  names = {ours: theirs for theirs, ours in ACTIVATIONS.items()} | {'gelu_tanh': 'gelu_pytorch_tanh'}
  key = next(name for name in ACTIVATION_KEYS if name in family.defaults)
  config[key] = 'gelu_new' if kind == 'gpt2' and cfg.activation == 'gelu_tanh' else names[cfg.activation]
  if 'query_pre_attn_scalar' in family.defaults:
    scalar = (cfg.attention_multiplier or 1.0) ** -2
    config['query_pre_attn_scalar'] = round(scalar) if math.isclose(scalar, round(scalar)) else scalar
  if 'attention_bias' in family.defaults:
    config |= {'attention_bias': cfg.bias, 'mlp_bias': cfg.bias}
  if kind != 'gpt2':
    config |= _written_rope(cfg, family)
  local = 'local' in cfg.kinds
  if 'sliding_window' in family.defaults:
    config['sliding_window'] = cfg.window if local else None
  if 'use_sliding_window' in family.defaults:
    config['use_sliding_window'] = local
  if family.defaults.keys() & LAYERED:
    back = {ours: theirs for theirs, ours in KINDS.items()}
    config['layer_types'] = [back[kind] for kind in cfg.kinds]
  return config


def family_of(cfg: ModelConfig) -> str:
  """The first family whose config says all of this architecture. Raises InputError if there is none."""
  for kind in FAMILIES:
    if kind in DIVIDING and cfg.d_model % cfg.n_heads:
      continue
    try:
      again = parse(write(cfg, kind), kind)
    except InputError:
      continue
    if plain(again) == plain(cfg):
      return kind
  raise InputError('no family of transformers has all of this architecture; its multipliers, norms or positions differ')


def plain(cfg: ModelConfig) -> ModelConfig:
  """The same architecture with everything that follows from something else written out: equal ones compute alike."""
  changes: dict[str, Any] = {'n_kv_heads': cfg.kv_heads, 'head_dim': cfg.head_size, 'pattern': _shortest(cfg.kinds)}
  changes['attention_multiplier'] = cfg.attention_multiplier or cfg.head_size**-0.5
  standard = ModelConfig()
  if 'local' not in cfg.kinds:
    changes |= {'window': standard.window, 'rope_theta_local': None}
  if cfg.rope_theta_local == cfg.rope_theta and cfg.rope_scaling == 'none':
    changes['rope_theta_local'] = None
  if cfg.positions != 'rope':
    changes |= {f.name: f.default for f in dataclasses.fields(cfg) if f.name.startswith('rope_')}
  if cfg.bias:
    changes['qkv_bias'] = False
  return dataclasses.replace(cfg, **changes)


_SPECIAL = {'hidden_act', 'hidden_activation', 'rope_theta', 'rope_scaling', 'rope_parameters', 'layer_types'}


def _first(values: Mapping[str, Any], *keys: str) -> Any:
  return next((values[key] for key in keys if values.get(key) is not None), None)


def _shortest(kinds: tuple[str, ...]) -> tuple[str, ...]:
  """The shortest pattern that repeats to these."""
  for n in range(1, len(kinds) + 1):
    if all(kind == kinds[i % n] for i, kind in enumerate(kinds)):
      return kinds[:n]
  return kinds


def _pattern(values: Mapping[str, Any], family: Family, layers: int, where: str) -> dict[str, Any]:
  window = values.get('sliding_window') if values.get('use_sliding_window', True) else None
  listed = values.get('layer_types')
  if listed is not None and (len(listed) != layers or not KINDS.keys() >= set(listed)):
    raise InputError(f'{where}: layer_types are not {layers} of {", ".join(KINDS)}')
  kinds = ('global' if window is None else 'local',) * layers
  if window is not None and listed is None and 'period' in values:
    period = _first(values, 'sliding_window_pattern', 'period')
    if not period or (values.get('_sliding_window_pattern') or period) != period:
      raise InputError(f'{where}: sliding_window_pattern={period} is not supported, or _sliding_window_pattern differs')
    kinds = tuple('local' if (i + 1) % period else 'global' for i in range(layers))
  elif window is not None and listed is None and 'max_window_layers' in family.defaults:
    if values['max_window_layers'] is None:
      raise InputError(f'{where}: max_window_layers=None is not supported')
    kinds = tuple('local' if i >= values['max_window_layers'] else 'global' for i in range(layers))
  elif listed is not None:
    asked = tuple(KINDS[kind] for kind in listed)
    if asked != kinds and (window is None or not family.defaults.keys() & LAYERED):
      raise InputError(f'{where}: layer_types: in this family all layers are alike: sliding_window={window}')
    kinds = asked
  return {'pattern': _shortest(kinds), 'window': window} if 'local' in kinds else {}


def _rope(values: Mapping[str, Any], family: Family, length: int, where: str) -> dict[str, Any]:
  """The rope fields, from `rope_parameters` (one, or one a kind of layer) or the older keys."""
  found, old = values.get('rope_parameters') or {}, values.get('rope_scaling') or {}
  by_kind = 'rope_local_base_freq' in family.defaults
  if found and by_kind != bool(found.keys() & KINDS.keys()):
    raise InputError(f'{where}: rope_parameters: this family has {"one for each kind" if by_kind else "one"} of layer')
  whole, local = (found.get('full_attention') or {}, found.get('sliding_attention') or {}) if by_kind else (found, {})
  new = {key: value for key, value in whole.items() if key != 'rope_theta'}
  if new and old and new != {key: value for key, value in old.items() if key != 'rope_theta'}:
    raise InputError(f'{where}: rope_parameters and rope_scaling differ')
  if local.get('rope_type', 'default') != 'default':
    raise InputError(f'{where}: rope_parameters of sliding_attention: {local["rope_type"]!r} is not supported')
  usual = {**family.defaults, **{key: value for key, value in values.items() if value is not None}}
  whole = {'rope_theta': usual['rope_theta'], **{key: x for key, x in (whole | old).items() if x is not None}}
  fields = {'rope_theta': float(whole['rope_theta'])}
  if by_kind:
    fields['rope_theta_local'] = float(local.get('rope_theta') or usual['rope_local_base_freq'])
  return fields | _scaling(whole, length, where)


def _scaling(found: Mapping[str, Any], length: int, where: str) -> dict[str, Any]:
  kind = found.get('rope_type') or found.get('type') or 'default'
  if unknown := found.keys() - ROPE_KEYS:
    raise InputError(f'{where}: {", ".join(sorted(unknown))} of the rope parameters is not supported')
  if kind == 'default':
    return {}
  if kind not in ('linear', 'llama3', 'yarn'):
    raise InputError(f'{where}: rope_type {kind!r} is none of default, linear, llama3, yarn')
  needed = ('factor', 'low_freq_factor', 'high_freq_factor') if kind == 'llama3' else ('factor',)
  if missing := [key for key in needed if found.get(key) is None]:
    raise InputError(f'{where}: no {", ".join(missing)} in the rope parameters')
  factor = float(found['factor'])
  fields = {'rope_scaling': kind, 'rope_factor': factor}
  if kind == 'linear':
    return fields
  fields['rope_original_len'] = found.get('original_max_position_embeddings') or length
  if kind == 'llama3':
    return fields | {'rope_low': float(found['low_freq_factor']), 'rope_high': float(found['high_freq_factor'])}
  amplitude = found.get('attention_factor')
  return fields | {
    'rope_low': float(found.get('beta_slow') or 1),
    'rope_high': float(found.get('beta_fast') or 32),
    'rope_amplitude': float(0.1 * math.log(max(factor, 1.0)) + 1 if amplitude is None else amplitude),
  }


def _written_rope(cfg: ModelConfig, family: Family) -> dict[str, Any]:
  """Both forms, that of transformers 5 and the one before it."""
  scaling: dict[str, Any] = {'rope_type': 'default'}
  if cfg.rope_scaling != 'none':
    scaling = {'rope_type': cfg.rope_scaling, 'factor': cfg.rope_factor}
    if cfg.rope_scaling != 'linear':
      scaling['original_max_position_embeddings'] = cfg.rope_original_len
    if cfg.rope_scaling == 'llama3':
      scaling |= {'low_freq_factor': cfg.rope_low, 'high_freq_factor': cfg.rope_high}
    if cfg.rope_scaling == 'yarn':
      scaling |= {'beta_slow': cfg.rope_low, 'beta_fast': cfg.rope_high, 'attention_factor': cfg.rope_amplitude}
  whole = {'rope_theta': cfg.rope_theta, **scaling}
  if cfg.rope_theta_local is None and 'rope_local_base_freq' not in family.defaults:
    old = None if cfg.rope_scaling == 'none' else scaling
    return {'rope_theta': cfg.rope_theta, 'rope_scaling': old, 'rope_parameters': whole}
  local = {'rope_theta': cfg.rope_theta_local or cfg.rope_theta, 'rope_type': 'default'}
  return {'rope_parameters': {'full_attention': whole, 'sliding_attention': local}}
