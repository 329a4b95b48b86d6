"""A tiny model that learns from rewards on one device, step by step, without a process or a run's folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from conftest import LLAMA, randomized

from jaxlm import interop, program, sharding
from jaxlm.config import Chat, Data, Mesh, Optim, Pretrain, Rl, Watch
from jaxlm.data import tokenizer
from jaxlm.loops import feeds, rollouts
from jaxlm.rl.rollout import Completions

CFG = dataclasses.replace(LLAMA, vocab_size=263, n_layers=1)
REFERENCE = randomized(CFG, 1)
LETTERS, ALIKE, N = 'abcdefg', 'Z', 13
OWN = """
def score(prompts, texts, rows):
  worth = lambda text: (7 * text.count('a') + 3 * text.count('b')) % 11 / 7
  return [0.4 if row['alike'] else worth(text) for text, row in zip(texts, rows)]


def letters(prompts, texts, rows):
  return [sum(letter.islower() for letter in text) for text in texts]
"""


def furnish(home: Path) -> Path:
  """A base model, prompts of which some have answers that are all worth the same, and rewards."""
  words = tokenizer.train(['no pair twice'], CFG.vocab_size - 1)
  interop.export(interop.Model(CFG, REFERENCE, words, None, {}), home / 'base')
  rows = [
    {'prompt': letter * n, 'alike': letter == ALIKE} for letter, most in ((ALIKE, 7), ('Q', 8)) for n in range(1, most)
  ]
  (home / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (home / 'own.py').write_text(OWN)
  return home


class Tiny(NamedTuple):
  """A run's data, its program, and its state."""

  feed: rollouts.Rollouts
  built: program.Program
  state: Any


def opened(
  home: Path,
  algo: str,
  reward: str = 'score',
  *,
  steps: int = 6,
  lr: float = 0.0,
  batch: int = 5,
  head_scale: float = 1.0,
  **rl: Any,
) -> Tiny:
  """Three prompts with five answers each, learnt from in three steps, from weights that are not the reference's."""
  given: dict[str, Any] = {'prompts': 3, 'samples': 5, 'held_out': 0, 'max_new_tokens': N, 'decode_rows': 7} | rl
  config = Pretrain(
    init=str(home / 'base'),
    data=Data(path=str(home / 'rows.jsonl'), seq_len=59, global_batch=batch),
    chat=Chat(template='plain'),
    optim=Optim(lr=lr, schedule='constant', warmup_steps=0, weight_decay=0.0),
    mesh=Mesh(fsdp=1),
    watch=Watch(save_every=steps),
    steps=steps,
    rl=Rl(algo=algo, reward=f'python:{home / "own.py"}:{reward}', **given),
  )
  config, feed = feeds.open_feed(config)
  assert isinstance(feed, rollouts.Rollouts)
  mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])
  built = program.build(config, mesh)
  value = {'value': jnp.asarray(head_scale * np.random.default_rng(3).normal(size=CFG.d_model), jnp.float32)}
  state = built.around(jax.tree.map(jnp.copy, {**randomized(CFG, 5), **(value if program.valued(config) else {})}))
  feed.attach(built, state, lambda line: None)
  return Tiny(feed, built, state)


class Known:
  """An engine that writes random letters, so long and stopped so that all cases are there, and keeps what it wrote."""

  def __init__(self, feed: rollouts.Rollouts):
    words = feed.tokenizer
    self.ids = np.array([words.encode(letter)[-1] for letter in LETTERS], np.int32)
    self.words, self.end, self.calls = words, words.eos_id, []

  def __call__(self, decoding: Any, asked: Any, seeds: np.ndarray) -> Completions:
    rng, count = np.random.default_rng(seeds), len(asked)
    lengths = rng.choice([1, 2, 5, 11, 12, 13, 13], count).astype(np.int32)
    stopped = (lengths < N) | (rng.random(count) < 0.3)
    tokens = np.where(np.arange(N) < lengths[:, None], rng.choice(self.ids, (count, N)), 0)
    tokens[np.arange(count)[stopped], lengths[stopped] - 1] = self.end
    logp = rng.normal(-2.0, 0.3, (count, N)).astype(np.float32)
    made = Completions(tokens.astype(np.int32), lengths, logp, logp, stopped)
    self.calls.append((asked, made))
    return made
