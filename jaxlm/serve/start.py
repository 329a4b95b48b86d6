"""A server from what was said on the command line: models are opened, compiled, and served until it is asked to end."""

import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from jaxlm import arguments, interop, lora, sample, sharding
from jaxlm.data import turns
from jaxlm.errors import InputError
from jaxlm.interop import peft
from jaxlm.loops import chatting, foreign
from jaxlm.models import computed_in
from jaxlm.models.linear import LowRank
from jaxlm.serve import app, engine, slots
from jaxlm.serve.api import Limits, Served
from jaxlm.serve.choices import Choices
from jaxlm.serve.engine import Bank, Engine

KEY = 'JAXLM_API_KEY'
NEEDED = ('starlette', 'uvicorn')


def serve(options: arguments.Serve, say: Callable[[str], None]) -> None:
  """Blocks until SIGTERM or SIGINT. Raises InputError for what cannot be served."""
  if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    raise InputError(f"serving needs {missing[0]}: pip install -e '.[serve]'")
  key = options.api_key or os.environ.get(KEY) or None
  local = options.host in app.LOOPBACK
  if not local and key is None:
    raise InputError(f'--host {options.host} lets others in: they need a key, by --api-key or {KEY}')
  service = opened(options, key, say)
  app.run(service, options.host, options.port, say)


def opened(options: arguments.Serve, key: str | None, say: Callable[[str], None]) -> app.Service:
  """The models on the device, everything compiled. Raises InputError."""
  choices = Choices(options.choices) if options.choices else None
  model = foreign.open_model(options.model)
  if model.left_out:
    say(f'{options.model}: {model.left_out}')
  limit = model.cfg.max_seq_len if model.cfg.positions == 'learned' else options.context
  context = min(options.context, limit)
  name = options.name or PurePosixPath(options.model).name or options.model
  mesh = _mesh(options)
  base = lora.merge(model.params) if options.adapter else model.params
  base = base if mesh is None else slots.resharded(model.cfg, base, mesh)
  dtype = computed_in(options.dtype, jax.default_backend())
  trees = {name: sample.readied(model.cfg, base, dtype)}
  for one in options.adapter:
    called, _, folder = one.partition('=')
    if called in trees:
      raise InputError(f'--adapter {one}: there is a model of that name already')
    if not peft.is_adapter(folder):
      raise InputError(f'--adapter {folder}: no folder of a peft adapter')
    own = peft.load(epath.Path(folder), model.cfg, base)
    own = own if mesh is None else slots.resharded(model.cfg, own, mesh)
    trees[called] = _sharing(sample.readied(model.cfg, own, dtype), trees[name])
  banks = {}
  for called, tree in trees.items():
    how: dict[str, Any] = {'rows': options.slots, 'context': context, 'lobbies': options.prefixes}
    how |= {'mesh': mesh, 'dtype': dtype}
    banks[called] = Bank(model.cfg, tree, model.tokenizer, **how)  # ty: ignore
    banks[called].warm()
  served = {called: _served(called, model, options.template) for called in trees}
  hosts = None if key else (*app.LOOPBACK, options.host)
  times: dict[str, Any] = {
    'head_seconds': options.body_seconds,
    'body_seconds': options.body_seconds,
    'answer_seconds': options.answer_seconds,
  }
  times |= {'drain_seconds': options.drain_seconds, 'body_bytes': (1 << 18) + 64 * context}
  settings = app.Settings(key=key, hosts=hosts, choices=choices, **times)
  limits = Limits(answers=min(options.answers, options.queue), context=context, tokens=context)
  return app.Service(Engine(banks, queue=options.queue), served, limits, settings)


def _mesh(options: arguments.Serve) -> Mesh | None:
  """Over the first devices, as many as were asked for; None for one. Raises InputError where there are fewer."""
  count = options.data * options.tensor
  if count > len(jax.devices()):
    raise InputError(f'data={options.data} x tensor={options.tensor}: there are {len(jax.devices())} devices')
  how: dict[str, Any] = {'data': options.data, 'tensor': options.tensor, 'fsdp': 1}
  return sharding.make_mesh(**how, devices=jax.devices()[:count]) if count > 1 else None


def _sharing(tree: Any, base: Any) -> Any:
  """The parameters with an adapter, of which all but the adapter's own arrays are those of the base."""
  shared = lambda new, old: new.replace(w=old) if isinstance(new, LowRank) else old
  return jax.tree.map(shared, tree, base, is_leaf=lambda x: isinstance(x, LowRank))


def _served(name: str, model: interop.Model, asked: str | None) -> Served:
  tokenizer: Any = model.tokenizer
  template, ends = model.chat_template, frozenset(chatting.stop_ids(model))
  if asked:
    _, template = turns.choose(asked, model.chat_template)
    ends |= frozenset(turns.end_ids(template, tokenizer))
  usual = chatting.sampling_of(model.generation)
  defaults = engine.Settings(
    temperature=usual.temperature_B,
    top_k=usual.top_k_B or None,
    top_p=1.0 if usual.top_p_B is None else usual.top_p_B,
    min_p=usual.min_p_B or 0.0,
    repetition=usual.repetition_B or 1.0,
  )
  return Served(name, tokenizer, template, model.cfg.vocab_size, ends, defaults, int(time.time()))
