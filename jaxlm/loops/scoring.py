"""A reward model opened, and the scores that it gives to conversations."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxlm import models, objectives
from jaxlm.config import Pretrain
from jaxlm.data import conversations, packing, turns
from jaxlm.data.conversations import Conversation
from jaxlm.data.prepared import TEMPLATE
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.loops import bases
from jaxlm.rl import prompts as asked
from jaxlm.rl import rewards

SHORTEST = 32  # tokens of a compiled row; longer ones are of twice that, and so on


class RewardModel(NamedTuple):
  """A run of `jaxlm reward`: parameters with a value head, and the template that its rows were rendered with."""

  config: Pretrain
  params: Any
  tokenizer: Tokenizer
  template: str
  step: int


def open_model(run: Any) -> RewardModel:
  """A reward model's newest weights, on one device. Raises InputError for a run of another stage."""
  found = bases.newest(run)
  if found.config.preference.stage != 'reward':
    raise InputError(f'{run}: is no reward model: train one with `jaxlm reward`')
  config, params = bases.read(found)
  return RewardModel(config, params, found.tokenizer, (epath.Path(run) / TEMPLATE).read_text(), found.step)


def score(model: RewardModel, talks: Sequence[Conversation], *, batch: int = 16) -> np.ndarray:
  """float32 [conversations]: the score of each one's last turn, which is the assistant's.

  Raises InputError for a conversation that ends otherwise, or that is longer than the model's learned positions.
  """
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
    tokens = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
    scores[some] = np.asarray(_scores(model.config.model, model.params, tokens))[: len(some)]
  return scores


def as_reward(run: str) -> rewards.Reward:
  """The scores of a reward model's run, to be named `run:FOLDER`."""
  model = open_model(run)
  talk = lambda row, said: Conversation([*asked.messages(row), {'role': 'assistant', 'content': said}])
  return lambda prompts, said, rows: score(model, list(map(talk, rows, said))).tolist()


@partial(jax.jit, static_argnums=0)
def _scores(cfg: models.ModelConfig, params: Any, batch: Any) -> jax.Array:
  """One segment a row."""
  return objectives.answers(cfg, models.Run(), scored=True)(params, batch).first.reshape(len(batch['tokens']), -1)[:, 0]


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
