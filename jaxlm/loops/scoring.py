"""A reward model opened, and the scores that it gives to conversations."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from jaxlm import hosts, models, objectives, sharding
from jaxlm.config import Pretrain
from jaxlm.data import conversations, packing, turns
from jaxlm.data.conversations import Conversation
from jaxlm.data.prepared import TEMPLATE
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.loops import bases
from jaxlm.rl import prompts as asked
from jaxlm.rl import rewards

BATCH = 16  # conversations that are read at once
SHORTEST = 32  # tokens of a compiled row; longer ones are of twice that, and so on


class RewardModel(NamedTuple):
  """A run of `jaxlm reward`: parameters with a value head, and the template that its rows were rendered with."""

  config: Pretrain
  params: Any
  tokenizer: Tokenizer
  template: str
  step: int
  mesh: Mesh | None = None


def open_model(run: Any, mesh: Mesh | None = None) -> RewardModel:
  """A reward model's newest weights, laid out on a mesh or on one device. Raises InputError for another stage's run."""
  found = _newest(run)
  config, params = bases.read(found, mesh)
  return RewardModel(config, params, found.tokenizer, (epath.Path(run) / TEMPLATE).read_text(), found.step, mesh)


def _newest(run: Any) -> bases.Newest:
  found = bases.newest(run)
  if found.config.preference.stage != 'reward':
    raise InputError(f'{run}: is no reward model: train one with `jaxlm reward`')
  return found


class Judge(NamedTuple):
  """A reward model as shapes: the program that scores so many rows, traced, and the parameters that it holds."""

  traced: Any
  params: Any
  rows: int


def config_of(run: Any) -> Pretrain:
  """Raises InputError as `open_model`."""
  return _newest(run).config


def judge(config: Pretrain, mesh: Mesh, length: int) -> Judge:
  """A run of this config, for rows of so many tokens, on a mesh whose devices may not be there."""
  params = bases.shapes(config, mesh)
  shape, rows = jax.ShapeDtypeStruct, _together(mesh, BATCH)
  batch = {name: shape((rows, length), jnp.int32) for name in ('tokens', 'segment_ids', 'positions')}
  batch['loss_mask'] = shape((rows, length), jnp.float32)
  batch = sharding.laid(batch, sharding.batch_shardings(batch, mesh))
  with jax.set_mesh(mesh):
    return Judge(_scores.trace(config.model, _rules(mesh), params, batch), params, rows)


def _rules(mesh: Mesh | None) -> sharding.Rules | None:
  return sharding.RULES if mesh is not None and mesh.size > 1 else None


def _together(mesh: Mesh | None, batch: int) -> int:
  """So many rows at once, or as many more as the devices divide."""
  ways = 1 if mesh is None else math.prod(mesh.shape[name] for name in sharding.axes_of(sharding.RULES['batch']))
  return -(-batch // ways) * ways


def score(model: RewardModel, talks: Sequence[Conversation], *, batch: int = BATCH) -> np.ndarray:
  """float32 [conversations]: the score of each one's last turn, which is the assistant's.

  Of a model on the devices of several processes all call it, with the same conversations. Raises InputError for a
  conversation that ends otherwise, or that is longer than the model's learned positions.
  """
  batch = _together(model.mesh, batch)
  encoded = [_encode(model, talk, number) for number, talk in enumerate(talks)]
  scores = np.zeros(len(encoded), np.float32)
  by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
  for at in range(0, len(by_length), batch):
    some = by_length[at : at + batch]
    longest = len(encoded[some[-1]].ids)
    length = SHORTEST
    while length < longest:
      length *= 2
    rows = [_row(encoded[i], length, model.tokenizer.pad_id) for i in some + some[-1:] * (batch - len(some))]
    tokens = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    scores[some] = _scored(model, tokens)[: len(some)]
  return scores


def _scored(model: RewardModel, tokens: dict[str, np.ndarray]) -> np.ndarray:
  if model.mesh is None:
    return np.asarray(_scores(model.config.model, None, model.params, tokens))
  like, count = sharding.laid(tokens, sharding.batch_shardings(tokens, model.mesh)), len(tokens['tokens'])
  with jax.set_mesh(model.mesh):
    placed = hosts.place(count, lambda rows: {name: x[rows] for name, x in tokens.items()}, like)
    return hosts.read(_scores(model.config.model, _rules(model.mesh), model.params, placed))


def as_reward(run: str, mesh: Mesh | None = None) -> rewards.Reward:
  """The scores of a reward model's run, to be named `run:FOLDER`."""
  model = open_model(run, mesh)
  talk = lambda row, said: Conversation([*asked.messages(row), {'role': 'assistant', 'content': said}])
  return lambda prompts, said, rows: score(model, list(map(talk, rows, said))).tolist()


@partial(jax.jit, static_argnums=(0, 1))
def _scores(cfg: models.ModelConfig, rules: sharding.Rules | None, params: Any, batch: Any) -> jax.Array:
  """One segment a row."""
  scores = objectives.answers(cfg, models.Run(rules=rules), scored=True)(params, batch).first
  return scores.reshape(len(batch['tokens']), -1)[:, 0]


def _encode(model: RewardModel, talk: Conversation, number: int) -> turns.Encoded:
  talk = conversations.checked(talk, empty=True)  # an answer may be empty, and is then worth little, not an error
  if talk.messages[-1]['role'] != 'assistant':
    raise InputError(f'conversation {number}: ends with a turn of the {talk.messages[-1]["role"]}')
  found = turns.encode(model.template, talk, model.tokenizer, 'last')
  cfg = model.config.model
  if found is None or (cfg.positions == 'learned' and len(found.ids) > cfg.max_seq_len):
    raise InputError(f'conversation {number}: has more tokens than the {cfg.max_seq_len} positions of the model')
  return found


def _row(found: turns.Encoded, length: int, pad_id: int) -> dict[str, np.ndarray]:
  n = len(found.ids)
  last = np.arange(length) == np.flatnonzero(found.learned)[-1]
  return {
    'tokens': packing.padded(found.ids, length, np.int32, pad_id),
    'segment_ids': packing.padded(np.ones(n), length, np.int32),
    'positions': packing.padded(np.arange(n), length, np.int32),
    'loss_mask': last.astype(np.float32),
  }
