"""Foreign models as runs, and runs as foreign models: an import is a run that was saved at step 0."""

import json
from typing import Any

import jax.numpy as jnp
from etils import epath

from jaxlm import config as configs
from jaxlm import interop, lora
from jaxlm.config import Pretrain
from jaxlm.data.prepared import TEMPLATE
from jaxlm.errors import InputError
from jaxlm.files import read_json, write_whole
from jaxlm.interop import peft
from jaxlm.loops import bases, writing
from jaxlm.loops.bases import GENERATION
from jaxlm.train import lock
from jaxlm.train.checkpoint import Checkpoints


def import_run(source: str, run: Any) -> interop.Model:
  """Makes a run of a foreign model (see `interop.open_source`): others begin with it by `--init`.

  Raises InputError if the folder holds a checkpoint already, or the source has no tokenizer.
  """
  folder = epath.Path(run)
  checkpoints = Checkpoints(folder / 'checkpoints')
  _check_new(checkpoints, folder)
  model = interop.load(source)  # before anything is made: what cannot be read leaves no folder behind
  if model.tokenizer is None:
    raise InputError(f'{source}: has no tokenizer.json')
  with lock.hold(folder):
    _check_new(checkpoints, folder)
    config = Pretrain(run=str(run), init=source, model=model.cfg)
    write_whole(folder / 'config.json', configs.to_json(config))
    model.tokenizer.save(folder / 'tokenizer.json')
    if model.chat_template:
      write_whole(folder / TEMPLATE, model.chat_template)
    write_whole(folder / GENERATION, json.dumps(model.generation, indent=1))
    meta = {'config': json.loads(configs.to_json(config)), 'tokenizer': model.tokenizer.digest, 'data': ''}
    checkpoints.save(0, {'params': model.params}, meta)
    checkpoints.close()
  return model


def _check_new(checkpoints: Checkpoints, folder: epath.Path) -> None:
  if checkpoints.steps():
    raise InputError(f'{folder}: holds a run already; use another --run')


def export_run(run: Any, directory: Any, *, dtype: str = 'float32', merge: bool = False) -> str:
  """Writes a run's newest checkpoint as a folder that others open; returns what it is.

  That is what transformers opens, or, of a run with adapters that are not to be folded in, what peft does.
  """
  model = as_model(run)
  if 'value' in model.params:
    if bases.newest(run).config.preference.stage == 'reward':
      raise InputError(f'{run}: is a reward model, which has a head of its own: it stays a run')
    model = model._replace(params={name: x for name, x in model.params.items() if name != 'value'})  # of PPO
  if lora.adapted(model.params) and not merge:
    config = bases.newest(run).config
    if config.lora.also:
      raise InputError(f'{run}: {config.lora.also} learned too (lora.also), which peft would lack: add --merge')
    found = published_base(config.init)
    base, revision = found or (config.init, None)
    peft.export(model.cfg, model.params, directory, base=base, revision=revision)
    return f'a LoRA adapter of peft, float32, on {base}{"" if found else _first(base)}'
  model = model._replace(params=lora.merge(model.params))
  return f'{interop.export(model, directory, dtype=jnp.dtype(dtype))}, {dtype}'


def published_base(source: str) -> tuple[str, str | None] | None:
  """(name, revision) by which peft opens a base of adapters: a folder, or a name on the hub; None where there is none.

  A run that is an import, its weights as they came, is what it came from, if that is no folder that went away.
  """
  if source.startswith(interop.HUB):
    name, _, revision = source.removeprefix(interop.HUB).removeprefix('models/').partition('@')
    return name, revision or None
  if not source or not epath.Path(source).expanduser().is_dir():
    return None
  if not bases.is_run(source):
    return source, None
  found = bases.newest(source)
  return None if found.step or found.meta['data'] else published_base(found.config.init)


def _first(base: str) -> str:
  """What has to be done before peft opens a run or a GGUF file, in words."""
  run, imported = ('RUN', f'`jaxlm import {base} --run RUN` and ') if base.endswith('.gguf') else (base, '')
  return f': peft needs it as a folder, by {imported}`jaxlm export {run} DIR` first, DIR as base_model_name_or_path'


def open_model(source: str) -> interop.Model:
  """A run's newest weights, a foreign model, or an adapter of peft's on the base that it names, a model of either kind.

  Raises InputError if it is none of these, or has no tokenizer.
  """
  folder = epath.Path(source)
  if peft.is_adapter(source):
    model = open_model(peft.base_of(source))
    return model._replace(params=peft.load(folder, model.cfg, lora.merge(model.params)))
  if str(source).startswith(interop.HUB):
    return _with_tokenizer(interop.load(source), source)
  if folder.is_dir() and not (folder / 'checkpoints').exists() and not (folder / 'config.json').exists():
    raise InputError(f'{source}: no finished checkpoint of a run, and no config.json of a Hugging Face model')
  model = as_model(source) if (folder / 'checkpoints').exists() else interop.load(source)
  return _with_tokenizer(model, source)


def _with_tokenizer(model: interop.Model, source: str) -> interop.Model:
  if model.tokenizer is None:
    raise InputError(f'{source}: has no tokenizer')
  return model


def as_model(run: Any) -> interop.Model:
  """A run's newest weights with its tokenizer, and the template and the generation config that it came with, if any."""
  folder = epath.Path(run)
  config, params, tokenizer, _ = writing.load(folder)
  template, generation = folder / TEMPLATE, folder / GENERATION
  return interop.Model(
    config.model,
    params,
    tokenizer,
    template.read_text() if template.exists() else None,
    read_json(generation) if generation.exists() else {},
  )
