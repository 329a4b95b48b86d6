"""Tasks that are files of rows: multiple choice, continuations, texts, answers, with examples before the question."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxlm.data import chat, sources
from jaxlm.errors import InputError
from jaxlm.evals import scores, subject
from jaxlm.evals.rewards import RESAMPLES, Z, wilson
from jaxlm.evals.subject import Subject
from jaxlm.files import write_whole
from jaxlm.loops import bases, pretrain

Table = tuple[tuple[str, ...], list[tuple[Any, ...]]]
Bar = Callable[[str], Any]  # of what is done: a context with `update(done, total)`, or None

BETWEEN = '\n\n'  # examples, and what ends an answer
PROMPT = ('prompt', 'question', 'query', 'ctx', 'context')
CHOICES, GOLD = ('choices', 'endings', 'options'), ('answer', 'label', 'gold', 'answerKey', 'target')
FORMS: dict[str, Callable[[Any], Any]] = {'mean': lambda x: x, 'perplexity': np.exp, 'bits': lambda x: x / math.log(2)}


class Question(NamedTuple):
  """A row: what stands before, what may follow, and the places of what is right among it; a text has no prompt."""

  prompt: str
  options: list[str]
  gold: list[int]


class Task(NamedTuple):
  """Rows of one kind: 'choices', 'continuation', 'text' or 'answer'."""

  name: str
  kind: str
  rows: list[Question]


class Measure(NamedTuple):
  """A metric of N rows: form(sum of values / sum of weights), form being one of FORMS."""

  values: np.ndarray
  weights: np.ndarray
  form: str = 'mean'

  def of(self, places: Any = slice(None)) -> Any:
    """The metric over some rows, or over each of several draws of rows [draws, rows]."""
    return FORMS[self.form](self.values[places].sum(-1) / self.weights[places].sum(-1))

  @property
  def share(self) -> bool:
    """Whether it counts the rows that are right."""
    return self.form == 'mean' and bool(np.isin(self.values, (0.0, 1.0)).all())


class Found(NamedTuple):
  """What a model makes of a task: its metrics by name, and of every row what it said, as JSON has it."""

  measures: dict[str, Measure]
  said: list[dict[str, Any]]


def load(specs: Sequence[str]) -> list[Task]:
  """One task of each `[NAME=]FILE` of JSONL or Parquet (see the README for its columns).

  Raises InputError for a row that is none of the kinds, and for a file of several kinds.
  """
  found: dict[str, list[tuple[str, Question]]] = {}

  def make(row: Mapping[str, Any], file: sources.File, number: int) -> sources.Document:
    where = f'{file.path}:{number}'
    found.setdefault(file.kind, []).append(_question(row, where))
    return sources.Document('', file.kind, where, file.kind)

  for file in sources.files(specs, None):
    for _ in sources.read(file, make=make):
      pass
  if mixed := [name for name, rows in found.items() if len({kind for kind, _ in rows}) > 1]:
    raise InputError(f'{mixed[0]}: rows of several kinds, {sorted({kind for kind, _ in found[mixed[0]]})}')
  if not found:
    raise InputError(f'{", ".join(specs)}: no rows in there')
  return [Task(name, rows[0][0], [row for _, row in rows]) for name, rows in found.items()]


def _question(row: Mapping[str, Any], where: str) -> tuple[str, Question]:
  there = lambda names: next((row[name] for name in names if row.get(name) is not None), None)
  prompt, choices, gold = there(PROMPT), there(CHOICES), there(GOLD)
  if choices is not None and isinstance(prompt, str):
    labels = choices.get('label', []) if isinstance(choices, dict) else []
    options = choices.get('text') if isinstance(choices, dict) else choices
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(x, str) and x for x in options):
      raise InputError(f'{where}: its choices are no list of two or more texts')
    return 'choices', Question(prompt, options, [_place(gold, options, labels, where)])
  if isinstance(row.get('continuation'), str) and row['continuation']:
    return 'continuation', Question(prompt or '', [row['continuation']], [0])
  answers = [str(x) for x in (gold if isinstance(gold, list) else [gold]) if x is not None]
  if isinstance(prompt, str) and answers:
    return 'answer', Question(prompt, answers, list(range(len(answers))))
  if isinstance(row.get('text'), str) and row['text'] and prompt is None:
    return 'text', Question('', [row['text']], [0])
  raise InputError(
    f'{where}: has {", ".join(row) or "nothing"}: give prompt and choices and answer, prompt and continuation, '
    'prompt and answer, or text'
  )


def _place(gold: Any, options: list[str], labels: list[str], where: str) -> int:
  """Which choice is right: said by its label, its text, its letter, or its place from 0."""
  for among in (labels, options):
    if gold in among:
      return among.index(gold)
  text = str(gold).strip()
  place = int(text) if text.isdecimal() else ord(text.upper()) - ord('A') if len(text) == 1 else -1
  if not 0 <= place < len(options):
    raise InputError(f'{where}: its answer {gold!r} is none of its {len(options)} choices')
  return place


def joined(prompt: str, option: str) -> str:
  """What follows the prompt: with a space before it, unless there is white space or nothing to part it from."""
  return option if not prompt or prompt[-1].isspace() or option[:1].isspace() else f' {option}'


def drawn(task: Task, pool: Sequence[Question], shots: int, seed: int) -> list[list[Question]]:
  """For each row `shots` others of the pool, drawn by the seed, none of them with the prompt of the row itself."""
  if task.kind == 'text' and shots:
    raise InputError(f'{task.name}: whole texts have no examples before them: leave --shots out')
  same, found = Counter(row.prompt for row in pool), []
  for i, row in enumerate(task.rows if shots else ()):
    most = min(len(pool), shots + same[row.prompt])
    some = np.random.default_rng((seed, i)).choice(len(pool), most, replace=False)
    others = [pool[j] for j in some if pool[j].prompt != row.prompt][:shots]
    if len(others) < shots:
      raise InputError(f'{task.name}: {len(others)} other rows, too few for {shots} examples')
    found.append(others)
  return found or [[] for _ in task.rows]


def contexts(asked: Subject, task: Task, examples: Sequence[Sequence[Question]], templated: bool) -> list[str]:
  """What the model reads of each row before what follows: its examples and its prompt, as text or as turns."""
  if not templated or task.kind == 'text':
    shown = lambda one: one.prompt + joined(one.prompt, one.options[one.gold[0]])
    return [BETWEEN.join([*map(shown, some), row.prompt]) for some, row in zip(examples, task.rows, strict=True)]
  template = asked.model.chat_template
  if not template:
    raise InputError(f'{asked.name}: has no chat template')
  turn = lambda role, text: {'role': role, 'content': text}
  turns = lambda one: [turn('user', one.prompt), turn('assistant', one.options[one.gold[0]])]
  return [
    chat.render(template, [t for one in [*some, row] for t in turns(one)][:-1], asked.tokenizer, generation=True)
    for some, row in zip(examples, task.rows, strict=True)
  ]


def ask(asked: Subject, task: Task, before: Sequence[str], *, new: int, templated: bool, bar: Bar) -> Found:
  """What the model makes of the rows, `before` being their contexts; an answer has `new` tokens at most."""
  with bar(f'{task.name}, {asked.name}') as told:
    if task.kind == 'text':
      return _texts([row.options[0] for row in task.rows], asked, told)
    if task.kind == 'answer':
      return _answers(task, before, asked, new, () if templated else (BETWEEN,), told)
    return _followed(task, before, asked, templated, told)


def _followed(task: Task, before: Sequence[str], asked: Subject, templated: bool, told: Any) -> Found:
  """Log-likelihoods of what may follow: the likeliest choice, whole (acc) or by the byte (acc_norm)."""
  follows = lambda context, option: option if templated else joined(context, option)
  pairs = [
    subject.pair(asked, context, follows(context, option))
    for context, row in zip(before, task.rows, strict=True)
    for option in row.options
  ]
  scored, ones = iter(subject.likelihoods(asked, pairs, told)), np.ones(len(task.rows))
  found = [[next(scored) for _ in row.options] for row in task.rows]
  said: list[dict[str, Any]] = [{'logp': [one.logp for one in some]} for some in found]
  if task.kind == 'continuation':
    right = np.array([some[0].greedy for some in found], np.float64)
    surprise = np.array([-some[0].logp for some in found])
    return Found({'acc': Measure(right, ones), 'perplexity': Measure(surprise, ones, 'perplexity')}, said)
  per_byte = lambda one, row: [x / len(o.encode()) for x, o in zip(one['logp'], row.options, strict=True)]
  best = {
    'acc': [int(np.argmax(one['logp'])) for one in said],
    'acc_norm': [int(np.argmax(per_byte(one, row))) for one, row in zip(said, task.rows, strict=True)],
  }
  right = lambda places: np.array([p in row.gold for p, row in zip(places, task.rows, strict=True)], np.float64)
  said = [one | {'acc': a, 'acc_norm': b} for one, a, b in zip(said, *best.values(), strict=True)]
  return Found({name: Measure(right(places), ones) for name, places in best.items()}, said)


def _texts(texts: list[str], asked: Subject, told: Any) -> Found:
  surprise = -np.array(subject.rolling(asked, texts, told))
  size = lambda of: np.array([of(text) for text in texts], np.float64)
  words, bytes_N = size(lambda text: max(1, len(text.split()))), size(lambda text: len(text.encode()))
  measures = {
    'word_perplexity': Measure(surprise, words, 'perplexity'),
    'byte_perplexity': Measure(surprise, bytes_N, 'perplexity'),
    'bits_per_byte': Measure(surprise, bytes_N, 'bits'),
  }
  return Found(measures, [{'logp': -x} for x in surprise.tolist()])


def _answers(task: Task, before: Sequence[str], asked: Subject, new: int, until: Sequence[str], told: Any) -> Found:
  said = [text.strip() for text in subject.continued(asked, before, new=new, until=until, on_progress=told)]
  best = lambda score: np.array(
    [max(float(score(text, wanted)) for wanted in row.options) for text, row in zip(said, task.rows, strict=True)]
  )
  ones, exact = np.ones(len(said)), lambda text, wanted: text == wanted.strip()
  measures = {'exact_match': Measure(best(exact), ones), 'f1': Measure(best(scores.f1), ones)}
  return Found(measures, [{'answer': text} for text in said])


def interval(one: Measure, seed: int = 0) -> tuple[float, float]:
  """95 %: Wilson's of a share, else a bootstrap over rows (percentiles)."""
  if one.share:
    return wilson(float(one.of()), len(one.values))
  return _percentiles(lambda places: one.of(places), len(one.values), seed)


def difference(a: Measure, b: Measure, seed: int = 0) -> tuple[float, float, float]:
  """(a - b, from, to) of two models on the same rows, 95 %.

  Of shares by Agresti and Min 2005 (half a row is added to each of the four outcomes, so that a few rows that all agree
  are no certainty), else by a bootstrap in which both have the same rows.
  """
  apart = float(a.of() - b.of())
  if not (a.share and b.share):
    return apart, *_percentiles(lambda places: a.of(places) - b.of(places), len(a.values), seed)
  count, better, worse = len(a.values) + 2, (a.values > b.values).sum() + 0.5, (a.values < b.values).sum() + 0.5
  middle = (better - worse) / count
  spread = Z * math.sqrt(better + worse - (better - worse) ** 2 / count) / count
  return apart, float(max(-1.0, middle - spread)), float(min(1.0, middle + spread))


def _percentiles(metric: Callable[[np.ndarray], np.ndarray], count: int, seed: int) -> tuple[float, float]:
  rng, at_once = np.random.default_rng(seed), max(1, (1 << 20) // count)
  most = max(1000, min(RESAMPLES, (1 << 27) // count))  # fewer of very many rows
  with np.errstate(divide='ignore', invalid='ignore'):  # a draw of rows without weight has no value
    parts = range(0, most, at_once)
    drawn = np.concatenate([metric(rng.integers(0, count, (min(at_once, most - at), count))) for at in parts])
  drawn = drawn[np.isfinite(drawn)]
  low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (float('nan'), float('nan'))
  return float(low), float(high)


def rows(found: Mapping[str, Mapping[str, Mapping[str, Measure]]], shots: Mapping[str, int]) -> Table:
  """Header and rows of a table of `found[model][task][metric]`; of several models also the first less each other.

  `shots`: the examples before each question, by task.
  """
  first, *others = found
  lines: list[tuple[Any, ...]] = []
  for task, measures in found[first].items():
    for name, one in measures.items():
      begins = task, len(one.values), shots.get(task, 0), name
      lines += [(*begins, m, float(of[task][name].of()), *interval(of[task][name])) for m, of in found.items()]
      lines += [(*begins, f'{first} - {m}', *difference(one, found[m][task][name])) for m in others]
  return ('task', 'rows', 'shots', 'metric', 'model', 'value', 'from', 'to (95 %)'), lines


def write(table: Table, shown: str, said: Sequence[Mapping[str, Any]], path: str, run: str | None) -> list[epath.Path]:
  """The table as JSON at `path`, as Markdown (`shown`) and the rows (`said`) beside it, and in the report of `run`."""
  header, lines = (*table[0][:-1], 'to'), table[1]
  to = {kind: str(epath.Path(path).with_suffix(f'.{kind}')) for kind in ('json', 'md', 'jsonl')}
  write_whole(to['json'], json.dumps([dict(zip(header, line, strict=True)) for line in lines], indent=1))
  write_whole(to['md'], shown + '\n')
  write_whole(to['jsonl'], ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in said))
  if run is not None and bases.is_run(run):
    facts = {
      f'{task}, {name}, {model}': f'{x:.3f} ({low:.3f} to {high:.3f})'
      for task, _, _, name, model, x, low, high in lines
    }
    pretrain.add_facts(epath.Path(run), {f'scores, {lines[0][2]} shots': facts})
  return [epath.Path(one) for one in to.values()]
