"""The quickstart from answers to better ones: preferences, two reward models, PPO, and who wins on held-out prompts."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxlm import lessons
from jaxlm.config import Compute, Data, Optim, Preference, Pretrain, Rl, Watch
from jaxlm.console import Training, terminable
from jaxlm.data import chat, sources, tokenizer, turns
from jaxlm.data.prepared import TEMPLATE
from jaxlm.evals import rewards, winrate
from jaxlm.files import write_whole
from jaxlm.loops import chatting, feeds, foreign, pretrain, scoring, tuning
from jaxlm.rl import prompts, rollout
from jaxlm.train.metrics import read_rows

HELD_OUT = 160  # prompts that no stage after pre-training learns from
NEW = 40  # tokens of an answer at most
KL_TARGET = 0.25  # nats a token that PPO may be away from the model that it begins with
FOLDS = 2


class Verdict(NamedTuple):
  """Held-out prompts, what each model said to them, win-rates by (model, other, judge), what the answers are like."""

  rows: list[dict[str, Any]]
  said: dict[str, list[str]]
  rates: dict[tuple[str, str, str], winrate.Rate]
  variety: dict[str, dict[str, float]]


def judging(tuned: Pretrain, *, short: bool = False) -> Pretrain:
  """Reward models on the preferences; each of the two folds is one, trained on the other's rows."""
  return Pretrain(
    run=_beside(tuned, 'reward'),
    init=tuned.run,
    data=Data(path=f'{tuned.run}/preferences.jsonl', seq_len=256, packing='best_fit', global_batch=8),
    optim=Optim(lr=5e-4, warmup_steps=0 if short else 5, weight_decay=0.0, final_ratio=0.0),
    compute=Compute(unroll=4),
    watch=Watch(log_every=1, eval_every=0, eval_batches=4, save_every=20, prompts=(), keep_last=1),
    preference=Preference(stage='reward', folds=FOLDS),
    steps=2 if short else 1,
    epochs=0.0 if short else 1.0,
  )


def reinforcing(tuned: Pretrain, *, short: bool = False) -> Pretrain:
  """PPO on the scores of the first reward model, held near to the model that it begins with."""
  held_out = 16 if short else HELD_OUT
  sizes: dict[str, Any] = {'prompts': 16, 'decode_rows': 16} if short else {'prompts': 64, 'decode_rows': 64}
  return Pretrain(
    run=_beside(tuned, 'ppo'),
    init=tuned.run,
    data=Data(path=f'{tuned.run}/prompts.jsonl', seq_len=128, global_batch=16 if short else 32),
    optim=Optim(lr=2e-4, schedule='constant', warmup_steps=0 if short else 4, weight_decay=0.0, b2=0.99),
    compute=Compute(unroll=4),
    watch=Watch(log_every=1, eval_every=30, save_every=20, prompts=(), keep_last=1),
    rl=Rl(
      algo='ppo',
      reward=f'run:{judge_runs(tuned)[0]}',
      samples=1,
      held_out=held_out,
      max_new_tokens=NEW,
      kl_coef=0.1,
      kl_target=KL_TARGET,
      value_coef=0.1,
      **sizes,
    ),
    steps=2 if short else 60,
  )


def _beside(tuned: Pretrain, name: str) -> str:
  """The folder of another stage beside that of the tuned one, the short form's beside the short one's."""
  folder, _, own = tuned.run.rpartition('/')
  return f'{folder}/{own.replace("sft", name)}'


def judge_runs(tuned: Pretrain) -> list[str]:
  """The folders of the reward models: the one that PPO learns from, and the one that it never meets."""
  return [rewards.of_fold(judging(tuned), fold).run for fold in range(FOLDS)]


def _held_out(config: Pretrain) -> list[dict[str, Any]]:
  """The rows of prompts that a run does not learn from."""
  return prompts.split(prompts.rows(config.data.path, config.seed), config.rl.held_out)[0]


def asked(tuned: Pretrain, rows: Sequence[lessons.Row], *, short: bool = False) -> set[str]:
  """Writes the prompts of PPO; returns those that are held out, from all that comes after pre-training."""
  config = reinforcing(tuned, short=short)
  lessons.write(config.data.path, lessons.prompts(rows))
  return {row['prompt'] for row in _held_out(config)}


def answers(run: str, rows: Sequence[Any], seed: int, template: str) -> list[str]:
  """What a run answers to prompts in a template, drawn at temperature 1; equal seeds draw alike."""
  model = foreign.open_model(run)
  vocabulary: Any = model.tokenizer
  params = {name: x for name, x in model.params.items() if name != 'value'}
  ends = sorted({*chatting.stop_ids(model), *turns.end_ids(template, vocabulary)})
  engine = rollout.engine(model.cfg, max_new_tokens=NEW, stop_ids=ends, rows=min(64, len(rows)))
  ids = [chat.encode(template, prompts.messages(row), vocabulary, generation=True) for row in rows]
  seeds = np.asarray(jax.random.randint(jax.random.key(seed), (len(rows),), 0, 2**31 - 1), np.int32)
  made = engine(params, ids, seeds)
  kept = made.lengths_M - made.stopped_M
  return [vocabulary.decode(one[:n].tolist()).strip() for one, n in zip(made.tokens_MN, kept, strict=True)]


def preferred(tuned: Pretrain, *, short: bool = False) -> str:
  """Makes the preference rows; what they are, in words."""
  config, path = reinforcing(tuned, short=short), epath.Path(judging(tuned).data.path)
  out = {row['prompt'] for row in _held_out(config)}
  rows = map(json.loads, epath.Path(config.data.path).read_text().splitlines())
  vocabulary = tokenizer.load(f'{tuned.run}/tokenizer.json')
  pairs = lessons.preferences([row for row in rows if row['prompt'] not in out], vocabulary.encode, vocabulary.decode)
  pairs = pairs[:64] if short else pairs
  lessons.write(path, pairs)
  return (
    f'{len(pairs):,} pairs, derived by rule (no human judged them): chosen is the line that the text goes on with, '
    'rejected the same line with a fifth to a half of its tokens replaced; both have equally many'
  )


def judges(tuned: Pretrain, *, short: bool = False) -> rewards.Judged | None:
  """Trains both reward models; what each says of the rows that it has not seen, together."""
  config, _ = tuning.prepared(judging(tuned, short=short), lambda line: None)
  parts = []
  for fold in range(FOLDS):
    part = feeds.counted(rewards.of_fold(config, fold))
    trained(part)
    parts.append(rewards.judge(part.run))
  found = rewards.pooled(parts)
  if found is not None:
    for run in judge_runs(tuned):
      rewards.write(run, found, 'folds')
  return found


def trained(config: Pretrain) -> None:
  """Runs or continues a run, shown in the terminal."""
  with terminable() as stop, Training(config.steps) as shown:
    pretrain.pretrain(config, say=shown.say, on_step=shown.step, stop=stop)


def reinforced(config: Pretrain) -> dict[str, tuple[float, float]]:
  """PPO; of the held-out reward, the KL and the entropy a token what they were at first and at last."""
  trained(config)
  rows = read_rows(epath.Path(config.run) / 'metrics.jsonl')
  names = {
    'held-out reward of the likeliest answers': ('eval/reward/mean', 1),
    'reward of drawn answers': ('reward/mean', 8),
    f'KL, nats a token (target: below {KL_TARGET})': ('policy/kl', 8),
    'entropy, nats a token': ('train/policy/entropy', 8),
  }
  found = {}
  for said, (name, most) in names.items():
    values = [row[name] for row in rows if row.get(name) is not None]
    found[said] = (float(values[0]), float(np.mean(values[-most:])))
  pretrain.add_facts(
    epath.Path(config.run), {'PPO': {k: f'{a:.3f} at first, {b:.3f} at last' for k, (a, b) in found.items()}}
  )
  return found


def compared(tuned: Pretrain, ppo: Pretrain) -> Verdict:
  """Answers of three models to held-out prompts, drawn with the same seeds, before three judges."""
  rows = _held_out(ppo)
  template = (epath.Path(tuned.run) / TEMPLATE).read_text()
  runs = {'base': tuned.init, 'SFT': tuned.run, 'PPO': ppo.run}
  said = {name: answers(run, rows, 2, template) for name, run in runs.items()}
  inside, outside = judge_runs(tuned)
  known = lessons.known(document.text for document in sources.documents(lessons.TEXT))
  by = {
    'a reward model that PPO never met': scoring.as_reward(outside),
    'the reward model that PPO learnt from': scoring.as_reward(inside),
    'rule: more of the words are words of the text': lambda questions, said, rows: list(map(known, said)),
  }
  questions = [row['prompt'] for row in rows]
  rates = {}
  for name, reward in by.items():
    prefer = winrate.by_reward(reward)
    for a, b in (('PPO', 'SFT'), ('SFT', 'base')):
      rates[a, b, name] = winrate.rate(prefer(questions, said[a], said[b], rows))
  more = {name: {'words of the text': 100 * float(np.mean(list(map(known, texts))))} for name, texts in said.items()}
  variety = {name: lessons.variety(texts) | more[name] for name, texts in said.items()}
  return Verdict(rows, said, rates, variety)


def tables(found: Verdict) -> list[tuple[tuple[str, ...], list[tuple[Any, ...]]]]:
  """Headers and rows: win-rates with their 95 % intervals, and what the answers are like, in percent."""
  order = sorted(found.rates.items(), key=lambda item: item[0][0])
  wins = [(f'{a} over {b}', name, *rate[:3]) for (a, b, name), rate in order]
  names = [f'{name}, %' if name != 'words' else 'words an answer' for name in next(iter(found.variety.values()))]
  like = [(name, *map(round, of.values())) for name, of in found.variety.items()]
  return [(('', 'judge', 'wins', 'from', 'to (95 %)'), wins), (('answers of', *names), like)]


def noted(ppo: Pretrain, found: Verdict) -> None:
  """Writes every answer, and the figures for the report."""
  lines = [
    json.dumps(row | {name: texts[i] for name, texts in found.said.items()}, ensure_ascii=False)
    for i, row in enumerate(found.rows)
  ]
  write_whole(f'{ppo.run}/answers.jsonl', '\n'.join(lines) + '\n')
  wins = {f'{a} over {b}, {name}': rate.said for (a, b, name), rate in found.rates.items()}
  like = {who: ', '.join(f'{name} {x:.0f}' for name, x in of.items()) for who, of in found.variety.items()}
  pretrain.add_facts(epath.Path(ppo.run), {'win-rates': wins, 'answers, in percent': like})
