"""Rollouts as the data of a run: prompts answered by the policy of the moment, scored, and made ready to learn from."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxlm import episodic, hosts, interop, program, sharding
from jaxlm.config import Pretrain
from jaxlm.data import batches as data_batches
from jaxlm.data import turns
from jaxlm.errors import InputError
from jaxlm.loops import bases, scoring
from jaxlm.loops.answers import Answers, Asker, Clock, Told, answer_ends, joined, placed
from jaxlm.loops.feeds import Evaluated, Feed, Say, Writer
from jaxlm.models import kernels
from jaxlm.program import Program
from jaxlm.rl import advantages, algorithms, collapse, episodes, prompts, rewards
from jaxlm.train.metrics import read_rows

SHOWN = 4  # answers that are written down with their scores


class Rollouts(Feed):
  """Batches that depend on the state: a rollout at every multiple of `program.updates`, and its parts in between.

  All of it is a function of the seed, the cursor and the parameters at the rollout's beginning, so that a run that is
  saved there goes on bitwise. The order of prompts is that of `data.batches`.
  """

  groups, names = 1, ['']

  def __init__(self, config: Pretrain):
    """Raises InputError for rows without prompts, and sizes that do not divide."""
    self.config, rl = config, config.rl
    self.how = program.algorithm(config)
    self.updates = self.unit = program.updates(config)
    check(config)
    self.tokenizer, own = interop.vocabulary(config.init)
    _, self.template = turns.choose(config.chat.template or None, own)
    rows = prompts.rows(config.data.path, config.seed)
    self.held_out, self.rows = prompts.split(rows, rl.held_out)
    if len(self.rows) < 1:
      raise InputError(f'{config.data.path}: {len(rows)} prompts, of which rl.held_out={rl.held_out} are kept')
    self.watches = bool(self.held_out)
    self.contents = hashlib.sha256(''.join(map(prompts.digest, rows)).encode()).hexdigest()
    numbers = _Numbers(len(self.rows))
    self._orders = [data_batches.Batches(numbers, rl.prompts, config.seed + turn) for turn in range(rl.rounds)]
    mesh = lambda: sharding.make_mesh(**dataclasses.asdict(config.mesh))
    everywhere = {'run': lambda run: scoring.as_reward(run, mesh())}
    how: dict[str, Any] = {'timeout': rl.reward_timeout, 'everywhere': everywhere, 'once': hosts.from_first}
    self._reward = rewards.parse(rl.reward, **how)
    self._buffer: dict[str, np.ndarray] = {}
    self._told: Told = {}
    self._seen: list[Mapping[str, float]] = []
    self._warned: set[str] = set()

  def attach(self, built: Program, state: Any, say: Say) -> None:
    self._built, self._say = built, say
    mesh = jax.tree.leaves(built.abstract)[0].sharding.mesh
    tiled = built.run.attention in ('splash', 'cudnn')
    self._multiple = kernels.TILE if tiled else episodes.LEAST * mesh.shape['sequence']
    self._reference = None
    if program.holds_reference(self.config):
      self._reference = bases.fitted(self.config, bases.open_base(self.config.init, mesh)).params
    self.asker = Asker(self.config, self.tokenizer, self.template, self._reward)
    self.asker.attach(built.run, mesh)

  def stream(self, state: Any, steps: int, writer: Writer) -> Callable[[Any], Any]:
    path = epath.Path(self.config.run) / 'metrics.jsonl'
    looks = lambda row: row['step'] <= int(state.step) and ('train/loss' in row or 'reward/mean' in row)
    self._seen = hosts.from_first(lambda: list(filter(looks, read_rows(path))))

    def after(state: Any) -> Any:
      cursor, step = int(state.cursor), int(state.step) + 1
      part = cursor % self.updates
      if part == 0 or not self._buffer:
        hosts.mark(f'rollout before batch {cursor}', slow=True)
        answers, self._told = self._roll(state, cursor // self.updates)
        writer.row(step, self._told)
        self._seen.append(self._told)
        every = self.config.watch.sample_every
        if every and (step == 1 or step % every == 0):
          _show(answers, step, writer)
      hosts.mark(f'batch {cursor}', slow=part == 0)
      return self._part(cursor // self.updates, part)

    return after

  def told(self) -> Told:
    return self._told

  def warnings(self, step: int, row: Mapping[str, float]) -> list[str]:
    self._seen.append(row)
    enough = collapse.RECENT * (self.updates + 1)  # rows, of which one is of a rollout
    del self._seen[enough:-enough]
    found = collapse.warnings(self._seen, kl_target=self.config.rl.kl_target)
    new = [line for name, line in found.items() if name not in self._warned]
    self._warned |= found.keys()
    return new

  def _roll(self, state: Any, number: int) -> tuple[Answers, Told]:
    """Fills the buffer with answers to the prompts of a number; these, and what is told of them."""
    config, rl, how = self.config, self.config.rl, self.how
    assert how is not None
    clock = self.asker.clock = Clock()
    answers, told = self._answers(self.asker.decoding(state.params), number)
    places = {'limit': config.data.seq_len, 'multiple': self._multiple}
    batch = episodes.batch_of(answers.asked, answers.made, pad_id=self.tokenizer.pad_id, **places)
    if program.reads(config):
      with clock('perf/reading_s'):
        batch |= self._read(state.params, batch)
    # only here: whether a group's scores differ is a matter of the rewards alone, not of lengths
    scores_M = answers.scores_M + self.asker.shaped(answers.made) if how.overlong else answers.scores_M
    scores_PG = jnp.asarray(scores_M.reshape(rl.prompts, rl.samples), jnp.float32)
    mask_MT = jnp.asarray(batch['loss_mask'])
    kl_MT = jnp.asarray(batch['old_logp'] - batch['ref_logp']) if rl.kl_coef else jnp.zeros_like(mask_MT)
    values_MT = jnp.asarray(batch['values']) if how.valued else None
    weights = {'kl_coef': rl.kl_coef, 'gamma': rl.gamma, 'lam': rl.lam}
    stopped_M = jnp.asarray(answers.made.stopped_M)
    found = algorithms.estimate(how, scores_PG, mask_MT, kl_MT, values_MT, stopped_M, **weights)
    batch |= {name: np.asarray(x) for name, x in found.items()}
    if how.mixed:
      batch['loss_mask'] = batch['loss_mask'] * np.repeat(_mixed(answers, rl.samples), rl.samples)[:, None]
    self._buffer = {name: batch[name] for name in self._built.batch}
    if rl.kl_coef:
      told['policy/kl'] = float(jnp.sum(kl_MT * mask_MT) / jnp.sum(mask_MT))
    return answers, told | {'reward/std': float(scores_PG.std())} | clock.seconds

  def _answers(self, decoding: Any, number: int) -> tuple[Answers, Told]:
    """Answers to the prompts of a number, and what is told of all that were written.

    Where an algorithm learns only from groups whose scores differ, other prompts take the place of those whose answers
    are all worth the same, in up to `rl.rounds` rounds (DAPO's dynamic sampling).
    """
    rl, how = self.config.rl, self.how
    assert how is not None
    kept, told, wanted = [], [], rl.prompts
    for turn in range(rl.rounds if how.mixed else 1):
      rows = [self.rows[i] for i in self._orders[turn].row_ids(number) for _ in range(rl.samples)]
      answers = self.asker.answer(decoding, rows, jax.random.fold_in(_key(self.config.seed, number), turn))
      mixed_P = _mixed(answers, rl.samples)
      alike = {'reward/equal_groups': float(1 - mixed_P.mean())} if how.grouped else {}
      told.append(self.asker.told(answers) | alike)
      # those that differ first: what is left over in the last round fills the batch, and is masked
      order = np.argsort(~mixed_P, kind='stable')
      last = not how.mixed or turn == rl.rounds - 1
      taken = order[: min(wanted, rl.prompts if last else int(mixed_P.sum()))]
      kept.append(answers.groups(np.sort(taken), rl.samples))
      wanted -= len(taken)
      if not wanted:
        break
    means = {name: float(np.mean([one[name] for one in told])) for name in told[0]}
    return joined(kept), means | {'reward/rounds': float(len(told))}

  def _read(self, params: Any, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`episodic.read` of all rows, as many at once as a step has."""
    size, count = self.config.data.global_batch, len(batch['tokens'])
    found: dict[str, list[np.ndarray]] = {}
    assert self._built.read is not None
    for at in range(0, count, size):
      some = self._placed({name: batch[name][at : at + size] for name in episodic.READS})
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
    return placed(self._built.batch, arrays)

  def evaluate(self, params: Any, step: int, writer: Writer) -> Evaluated:
    """The mean reward of the likeliest answers to held-out prompts."""
    answers = self.asker.answer(self.asker.decoding(params), self.held_out)
    _show(answers, step, writer)
    told = self.asker.told(answers)
    said = f'held-out reward {told["reward/mean"]:.3f}, {told["answers/length"]:.0f} tokens an answer'
    return {f'eval/{name}': value for name, value in told.items()}, -told['reward/mean'], said

  def size(self, cursor: int) -> int:
    return self.config.data.global_batch

  def tokens(self, cursor: int) -> int:
    return self.size(cursor) * self._buffer['tokens'].shape[1]

  def epochs(self, cursor: int) -> list[float]:
    return self._orders[0].epochs(cursor // self.updates)

  def files(self, config: Pretrain) -> dict[str, str]:
    ends = answer_ends(self.template, self.tokenizer)
    return {bases.TEMPLATE: self.template, bases.GENERATION: json.dumps({'eos_token_id': ends})}

  def facts(self) -> dict[str, Any]:
    return {'prompts': len(self.rows), 'held-out prompts': len(self.held_out), 'reward': self.config.rl.reward}


class _Numbers:
  """A row source of nothing but how many there are."""

  def __init__(self, count: int):
    self.count = count

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    return {'number': np.asarray(row)}


def _mixed(answers: Answers, size: int) -> np.ndarray:
  """Of groups of so many answers, those whose scores differ."""
  return np.asarray(advantages.mixed_groups(jnp.asarray(answers.scores_M.reshape(-1, size), jnp.float32))) > 0


def _show(answers: Answers, step: int, writer: Writer) -> None:
  """Writes down a few answers with their scores: the best, the worst, and some between."""
  order = np.argsort(-answers.scores_M, kind='stable')
  for i in order[np.unique(np.linspace(0, len(order) - 1, SHOWN).round().astype(int))]:
    asked = prompts.messages(answers.rows[i])[-1]['content']
    writer.sample(step, f'{asked} ', answers.texts[i], reward=float(answers.scores_M[i]))


def _key(seed: int, number: int) -> Any:
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0x2011), number)


def judges(config: Pretrain, mesh: Any, say: Say) -> list[scoring.Judge]:
  """The reward models of a run, as shapes; of one that was not trained yet it is said that it is missing."""
  runs = [argument for name, argument, _ in rewards.terms(config.rl.reward) if name == 'run']
  there = [run for run in runs if epath.Path(run).exists()]
  for run in runs:
    if run not in there:
      say(f'not counted: the reward model {run}, which is not there')
  return [scoring.judge(scoring.config_of(run), mesh, config.data.seq_len) for run in there]


def check(config: Pretrain) -> None:
  """Raises InputError for a run without a model to begin with, and for sizes that do not divide."""
  rl, rows, updates = config.rl, config.rl.prompts * config.rl.samples, program.updates(config)
  if not config.init:
    raise InputError('rl: begins with a model: set --init to a run, a Hugging Face folder or a .gguf file')
  if rows % config.data.global_batch:
    raise InputError(f'rl.prompts x rl.samples = {rows} do not divide by data.global_batch={config.data.global_batch}')
  how = program.algorithm(config)
  if how and how.grouped and rl.samples < 2:
    raise InputError(f'rl.samples={rl.samples}: {rl.algo} compares answers to one prompt: 2 or more')
  for name, value in (('watch.save_every', config.watch.save_every), ('steps', config.steps)):
    if value % updates:
      raise InputError(f'{name}={value}: a rollout is learnt from in {updates} steps: a multiple of that')
