"""Rollouts as the data of a run: prompts answered by the policy of the moment, scored, and made ready to learn from."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxlm import hosts, interop, lora, program
from jaxlm.config import Pretrain
from jaxlm.data import batches as data_batches
from jaxlm.data import chat, sources, turns
from jaxlm.errors import InputError
from jaxlm.loops import bases, scoring
from jaxlm.loops.feeds import Evaluated, Feed, Say
from jaxlm.program import Program
from jaxlm.rl import advantages, algorithms, episodes, rewards, rollout
from jaxlm.sample import Sampling

GYM, GYM_ROWS = 'gym:', 2048
OVERLONG = 0.25  # of the tokens an answer may have, the last ones cost score


class Rollouts(Feed):
  """Batches that depend on the state: a rollout at every multiple of `program.updates`, and its parts in between.

  All of it is a function of the seed, the cursor and the parameters at the rollout's beginning, so that a run that is
  saved there goes on bitwise. The order of prompts is that of `data.batches`.
  """

  groups, names = 1, ['']

  def __init__(self, config: Pretrain):
    """Raises InputError for rows without prompts, and sizes that do not divide."""
    self.config, rl = config, config.rl
    self.how, self.updates = program.algorithm(config), program.updates(config)
    _check(config, self.updates)
    self.tokenizer, own = interop.vocabulary(config.init)
    _, self.template = turns.choose(config.chat.template or None, own)
    rows = _rows(config)
    self.held_out, self.rows = _split(rows, rl.held_out)
    if len(self.rows) < 1:
      raise InputError(f'{config.data.path}: {len(rows)} prompts, of which rl.held_out={rl.held_out} are kept')
    self.watches = bool(self.held_out)
    self.contents = hashlib.sha256(''.join(map(_digest, rows)).encode()).hexdigest()
    self.prompts = data_batches.Batches(_Numbers(len(self.rows)), rl.prompts, config.seed)
    makers = dict(rewards.MAKERS) | {'run': by_model}
    self.reward = rewards.parse(rl.reward, makers, timeout=rl.reward_timeout)
    self._buffer: dict[str, np.ndarray] = {}

  def attach(self, built: Program, state: Any, say: Say) -> None:
    rl = self.config.rl
    self._built, self._say = built, say
    self._mesh = jax.tree.leaves(built.abstract)[0].sharding.mesh
    self._reference = None
    if rl.kl_coef and not self.config.lora.rank:
      self._reference = bases.fitted(self.config, bases.open_base(self.config.init, self._mesh)).params
    ends = sorted({*turns.end_ids(self.template, self.tokenizer), self.tokenizer.eos_id})
    how: dict[str, Any] = {'max_new_tokens': rl.max_new_tokens, 'stop_ids': ends, 'rows': rl.decode_rows}
    how |= {'run': built.run, 'mesh': self._mesh if self._mesh.size > 1 else None}
    sampling = Sampling(rl.temperature, rl.top_k, rl.top_p, rl.min_p)
    self._engine = rollout.engine(self.config.model, sampling=sampling, **how)
    self._greedy = rollout.engine(self.config.model, sampling=Sampling(temperature_B=0.0), **how)

  def stream(self, state: Any, steps: int, note: Callable[[int, dict[str, float]], None]) -> Callable[[Any], Any]:
    def after(state: Any) -> Any:
      cursor = int(state.cursor)
      part = cursor % self.updates
      if part == 0 or not self._buffer:
        hosts.mark(f'rollout before batch {cursor}', slow=True)
        note(int(state.step) + 1, self._roll(state, cursor // self.updates))
      hosts.mark(f'batch {cursor}', slow=part == 0)
      return self._part(cursor // self.updates, part)

    return after

  def _roll(self, state: Any, number: int) -> dict[str, float]:
    """Fills the buffer with answers to the prompts of a number; what is told of them."""
    config, rl, how = self.config, self.config.rl, self.how
    assert how is not None
    rows = [self.rows[i] for i in self.prompts.row_ids(number) for _ in range(rl.samples)]
    prompts = [self._encode(row) for row in rows]
    seeds = np.asarray(jax.random.bits(_key(config.seed, number), (len(rows),), jnp.uint32) >> 1).astype(np.int32)
    made = self._engine(self._decoding(state.params), prompts, seeds)
    scores, told = self._scored(rows, made)
    if how.overlong:
      buffer = max(1, int(OVERLONG * rl.max_new_tokens))
      scores = scores + np.asarray(
        advantages.overlong(jnp.asarray(made.lengths_M), limit=rl.max_new_tokens, buffer=buffer)
      )
    batch = episodes.batch_of(prompts, made, limit=config.data.seq_len, pad_id=self.tokenizer.pad_id)
    if how.valued or rl.kl_coef or self.updates > 1:
      batch |= self._read(state.params, batch)
    scores_PG = jnp.asarray(scores.reshape(rl.prompts, rl.samples), jnp.float32)
    mask_MT = jnp.asarray(batch['loss_mask'])
    kl_MT = jnp.asarray(batch['old_logp'] - batch['ref_logp']) if rl.kl_coef else jnp.zeros_like(mask_MT)
    values_MT = jnp.asarray(batch['values']) if how.valued else None
    weights = {'kl_coef': rl.kl_coef, 'gamma': rl.gamma, 'lam': rl.lam}
    found = algorithms.estimate(how, scores_PG, mask_MT, kl_MT, values_MT, jnp.asarray(made.stopped_M), **weights)
    batch |= {name: np.asarray(x) for name, x in found.items()}
    mixed_P = np.asarray(advantages.mixed_groups(scores_PG))
    if how.mixed:
      batch['loss_mask'] = batch['loss_mask'] * np.repeat(mixed_P, rl.samples)[:, None]
    self._buffer = {name: batch[name] for name in self._built.batch}
    if rl.kl_coef:
      told['policy/kl'] = float(jnp.sum(kl_MT * mask_MT) / jnp.sum(mask_MT))
    return told | {'reward/std': float(scores_PG.std()), 'reward/equal_groups': float(1 - mixed_P.mean())}

  def _scored(
    self, rows: Sequence[Mapping[str, Any]], made: rollout.Completions
  ) -> tuple[np.ndarray, dict[str, float]]:
    """The scores of answers, the same for all processes, and what is told of both."""
    texts = self._texts(made)
    scores = np.asarray(hosts.from_first(lambda: list(self.reward([_asked(row) for row in rows], texts, rows))))
    told = {'reward/mean': scores.mean(), 'answers/length': made.lengths_M.mean()}
    told |= {'answers/truncated': 1.0 - made.stopped_M.mean()}
    return scores, {name: float(x) for name, x in told.items()}

  def _texts(self, made: rollout.Completions) -> list[str]:
    kept = made.lengths_M - made.stopped_M
    return [self.tokenizer.decode(ids[:n].tolist()) for ids, n in zip(made.tokens_MN, kept, strict=True)]

  def _read(self, params: Any, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`episodic.read` of all rows, as many at once as a step has."""
    size, count = self.config.data.global_batch, len(batch['tokens'])
    names = ('tokens', 'targets', 'loss_mask', 'segment_ids', 'positions')
    found: dict[str, list[np.ndarray]] = {}
    assert self._built.read is not None
    for at in range(0, count, size):
      some = self._placed({name: batch[name][at : at + size] for name in names})
      for name, x in self._built.read(params, some, self._reference).items():
        found.setdefault(name, []).append(hosts.read(x))
    return {name: np.concatenate(parts) for name, parts in found.items()}

  def _part(self, number: int, part: int) -> Any:
    """A batch of the rollout at hand: another order of its answers each time it is learnt from."""
    size, count = self.config.data.global_batch, len(self._buffer['tokens'])
    epoch, place = divmod(part, count // size)
    order = np.random.default_rng([self.config.seed % 2**32, number, epoch]).permutation(count)
    rows = order[place * size : (place + 1) * size]
    return self._placed({name: x[rows] for name, x in self._buffer.items()})

  def _placed(self, arrays: Mapping[str, np.ndarray]) -> Any:
    specs = self._built.batch
    like = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=specs[n].sharding) for n, x in arrays.items()}
    return hosts.place(len(next(iter(arrays.values()))), lambda rows: {n: x[rows] for n, x in arrays.items()}, like)

  def _decoding(self, params: Any) -> Any:
    """What decodes: adapters folded in, laid out once for the whole phase."""
    merged = jax.jit(lora.merge)({name: x for name, x in params.items() if name != 'value'})
    return rollout.resharded(self.config.model, merged, self._mesh) if self._mesh.size > 1 else merged

  def evaluate(self, params: Any) -> Evaluated:
    """The mean reward of the likeliest answers to held-out prompts."""
    rows = self.held_out
    made = self._greedy(self._decoding(params), [self._encode(row) for row in rows], np.zeros(len(rows), np.int32))
    _, told = self._scored(rows, made)
    row = {f'eval/{name}': value for name, value in told.items()}
    said = f'held-out reward {told["reward/mean"]:.3f}, {told["answers/length"]:.0f} tokens an answer'
    return row, -told['reward/mean'], said

  def size(self, cursor: int) -> int:
    return self.config.data.global_batch

  def tokens(self, cursor: int) -> int:
    return self.size(cursor) * self._buffer['tokens'].shape[1]

  def epochs(self, cursor: int) -> list[float]:
    return self.prompts.epochs(cursor // self.updates)

  def files(self, config: Pretrain) -> dict[str, str]:
    ends = sorted({*turns.end_ids(self.template, self.tokenizer), self.tokenizer.eos_id})
    return {bases.TEMPLATE: self.template, bases.GENERATION: json.dumps({'eos_token_id': ends})}

  def facts(self) -> dict[str, Any]:
    return {'prompts': len(self.rows), 'held-out prompts': len(self.held_out), 'reward': self.config.rl.reward}

  def _encode(self, row: Mapping[str, Any]) -> list[int]:
    return chat.encode(self.template, messages(row), self.tokenizer, generation=True)


def by_model(run: str) -> rewards.Reward:
  """The scores of a reward model's run, to be named `run:FOLDER`."""
  model = scoring.open_model(run)
  answered = lambda row, said: scoring.conversations.Conversation(
    [*messages(row), {'role': 'assistant', 'content': said}]
  )
  return lambda prompts, said, rows: scoring.score(model, list(map(answered, rows, said))).tolist()


def held_out(config: Pretrain) -> list[dict[str, Any]]:
  """The rows of prompts that a run does not learn from."""
  return _split(_rows(config), config.rl.held_out)[0]


def _split(rows: list[dict[str, Any]], kept: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """So many rows that are held out, and the others, by the digest of their prompts."""
  rows = sorted(rows, key=_digest)
  return rows[:kept], rows[kept:]


class _Numbers:
  """A row source of nothing but how many there are."""

  def __init__(self, count: int):
    self.count = count

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    return {'number': np.asarray(row)}


def _rows(config: Pretrain) -> list[dict[str, Any]]:
  path = config.data.path
  if path.startswith(GYM):
    return [dict(row) for row in rewards.gym_rows(path.removeprefix(GYM), GYM_ROWS, config.seed)]
  found = []
  for line_number, line in enumerate(epath.Path(path).read_text().splitlines(), 1):
    row = sources.row_of(line, f'{path}:{line_number}') if hasattr(sources, 'row_of') else json.loads(line)
    if 'prompt' not in row:
      raise InputError(f'{path}:{line_number}: no column "prompt"; the columns are {", ".join(row)}')
    found.append(row)
  return found


def messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
  """The prompt of a row, a text or messages, as messages."""
  prompt = row['prompt']
  return [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else list(prompt)


def _asked(row: Mapping[str, Any]) -> str:
  return messages(row)[-1]['content']


def _digest(row: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(row['prompt'], ensure_ascii=False).encode()).hexdigest()


def _key(seed: int, number: int) -> Any:
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0x2011), number)


def _check(config: Pretrain, updates: int) -> None:
  rl, rows = config.rl, config.rl.prompts * config.rl.samples
  if not config.init:
    raise InputError('rl: begins with a model: set --init to a run, a Hugging Face folder or a .gguf file')
  if rows % config.data.global_batch:
    raise InputError(f'rl.prompts x rl.samples = {rows} do not divide by data.global_batch={config.data.global_batch}')
  how = program.algorithm(config)
  if how and how.grouped and rl.samples < 2:
    raise InputError(f'rl.samples={rl.samples}: {rl.algo} compares answers to one prompt: 2 or more')
  if config.watch.save_every % updates:
    raise InputError(
      f'watch.save_every={config.watch.save_every}: a rollout is learnt from in {updates} steps: a multiple of that'
    )
