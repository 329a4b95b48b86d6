"""Answers of the model of the moment to rows with prompts: written by an engine, read as text, scored."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlm import hosts, lora
from jaxlm.config import Pretrain, Rl
from jaxlm.data import chat, turns
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.models import Run
from jaxlm.rl import advantages, prompts, rewards, rollout, vllm
from jaxlm.rl.rollout import Completions
from jaxlm.sample import Sampling

OVERLONG = 0.25  # of the tokens an answer may have, the last ones cost score

Told = dict[str, float]


class Clock:
  """Seconds spent on things by name."""

  def __init__(self) -> None:
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def __call__(self, name: str) -> Generator[None]:
    began = time.perf_counter()
    yield
    self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


class Answers(NamedTuple):
  """M answers: the rows that were asked, their prompts as tokens, what was written, as text, and its scores."""

  rows: list[Mapping[str, Any]]
  asked: list[list[int]]
  made: Completions
  texts: list[str]
  scores_M: np.ndarray

  def groups(self, which: np.ndarray, size: int) -> 'Answers':
    """Those of some groups of so many answers each."""
    at = (which[:, None] * size + np.arange(size)).reshape(-1)
    few = lambda values: [values[i] for i in at]
    made = Completions(*(x[at] for x in self.made))
    return Answers(few(self.rows), few(self.asked), made, few(self.texts), self.scores_M[at])


def joined(parts: Sequence[Answers]) -> Answers:
  """All answers of some, one after the other."""
  rows, asked, made, texts, scores = zip(*parts, strict=True)
  whole = Completions(*map(np.concatenate, zip(*made, strict=True)))
  flat = itertools.chain.from_iterable
  return Answers(list(flat(rows)), list(flat(asked)), whole, list(flat(texts)), np.concatenate(scores))


def answer_ends(template: str, tokenizer: Tokenizer) -> list[int]:
  """The ids that end an answer."""
  return sorted({*turns.end_ids(template, tokenizer), tokenizer.eos_id})


def drawing(rl: Rl) -> Sampling:
  """How answers are drawn that are learnt from."""
  return Sampling(rl.temperature, rl.top_k, rl.top_p, rl.min_p)


def engine(config: Pretrain, run: Run, mesh: Mesh, ends: Sequence[int], sampling: Sampling) -> rollout.Engine:
  """What writes answers as `config.rl` says, up to one of `ends`, on the devices that train."""
  how: dict[str, Any] = {'run': run, 'mesh': mesh if mesh.size > 1 else None}
  return rollout.engine(config.model, sampling=sampling, **how, **_limits(config.rl, ends))


def _served(server: vllm.Server, rl: Rl, ends: Sequence[int], sampling: Sampling) -> rollout.Engine:
  return server.engine(sampling=sampling, **_limits(rl, ends))


def _limits(rl: Rl, ends: Sequence[int]) -> dict[str, Any]:
  return {'max_new_tokens': rl.max_new_tokens, 'stop_ids': ends, 'rows': rl.decode_rows}


def readied(config: Pretrain, run: Run, mesh: Mesh) -> Callable[[Any], Any]:
  """`fn(params)`: what the engine of a run reads, made once for a whole phase."""
  if not config.rl.engine:
    return rollout.readied(config.model, run, mesh)
  return jax.jit(lambda params: lora.merge({name: x for name, x in params.items() if name != 'value'}))


def seeds(key: Any, count: int) -> np.ndarray:
  """int32 [count]: those of answers drawn with a key."""
  return np.asarray(jax.random.bits(key, (count,), jnp.uint32) >> 1).astype(np.int32)


def placed(specs: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
  """Rows on the devices, laid out as a program's batch, of whatever width they are."""
  like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=specs[n].sharding) for n, x in arrays.items()}
  return hosts.place(len(next(iter(arrays.values()))), lambda rows: {n: x[rows] for n, x in arrays.items()}, like)


class Asker:
  """Asks a model, by the template and with the settings of a run."""

  def __init__(self, config: Pretrain, tokenizer: Tokenizer, template: str, reward: rewards.Reward):
    self.config, self.tokenizer, self.template, self.reward = config, tokenizer, template, reward
    self.clock = Clock()

  def attach(self, run: Run, mesh: Mesh) -> None:
    """Makes the engines, on the devices that train or those of a server."""
    rl = self.config.rl
    self._readied, ends = readied(self.config, run, mesh), answer_ends(self.template, self.tokenizer)
    make = functools.partial(engine, self.config, run, mesh, ends)
    if rl.engine:
      where = rl.engine, f'{self.config.run}/engine'
      make = functools.partial(
        _served, vllm.Server(*where, self.config.model, self.tokenizer, dtype=run.dtype), rl, ends
      )
    self._sampled, self._greedy = make(drawing(rl)), make(Sampling(temperature_B=0.0))

  def decoding(self, params: Any) -> Any:
    """What decodes: adapters folded in, laid out once for a whole phase."""
    with self.clock('perf/rollout_s'):
      return self._readied(params)

  def answer(self, decoding: Any, rows: Sequence[Mapping[str, Any]], key: Any = None) -> Answers:
    """One answer to each row, drawn with a key, or the likeliest. Raises InputError where a reward fails."""
    encode = lambda row: chat.encode(self.template, prompts.messages(row), self.tokenizer, generation=True)
    known = {at: encode(row) for at, row in {id(row): row for row in rows}.items()}  # a prompt has several answers
    asked = [known[id(row)] for row in rows]
    with self.clock('perf/rollout_s'):
      if key is None:
        made = self._greedy(decoding, asked, np.zeros(len(rows), np.int32))
      else:
        made = self._sampled(decoding, asked, seeds(key, len(rows)))
    kept = made.lengths_M - made.stopped_M
    texts = [self.tokenizer.decode(ids[:n].tolist()) for ids, n in zip(made.tokens_MN, kept, strict=True)]
    with self.clock('perf/scoring_s'):
      last = [prompts.messages(row)[-1]['content'] for row in rows]
      scores = self.reward(last, texts, rows)
    return Answers(list(rows), asked, made, texts, np.asarray(scores, np.float64))

  def told(self, answers: Answers) -> Told:
    """What is told of answers."""
    made = answers.made
    told = {'reward/mean': answers.scores_M.mean(), 'answers/length': made.lengths_M.mean()}
    told |= {'answers/truncated': 1.0 - made.stopped_M.mean()}
    return {name: float(x) for name, x in told.items()}

  def shaped(self, made: Completions) -> np.ndarray:
    """What answers near the limit lose of their scores (DAPO's soft overlong punishment)."""
    limit = self.config.rl.max_new_tokens
    lengths_M = jnp.asarray(made.lengths_M)
    return np.asarray(advantages.overlong(lengths_M, limit=limit, buffer=max(1, int(OVERLONG * limit))))
