"""Two models' answers to the same prompts, which of them are preferred, and how much of that their lengths explain."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxlm import interop, lora, sample
from jaxlm.data import chat, turns
from jaxlm.errors import InputError
from jaxlm.evals import tasks, winrate
from jaxlm.files import write_whole
from jaxlm.loops import chatting, foreign, pretrain, scoring
from jaxlm.rl import prompts, rewards

Row = Mapping[str, Any]
Told = Callable[[int, int], None] | None
Table = tuple[tuple[str, ...], list[tuple[Any, ...]]]

NEAR = 0.1  # two lengths are alike where they differ by no more than this share of the longer one


class Versus(NamedTuple):
  """Prompts with both answers, and for each 1 where A's is preferred, 0 where B's is, 0.5 for a tie."""

  names: tuple[str, str]
  rows: list[Row]
  answers: tuple[list[str], list[str]]
  results: np.ndarray
  unread: int  # of the ties: where a judge named none

  @property
  def lengths(self) -> np.ndarray:
    """[2, prompts]: characters of the answers, which models with other tokens have in common."""
    return np.array([[len(text) for text in side] for side in self.answers], np.float64)


def answers(
  model: interop.Model,
  template: str,
  rows: Sequence[Row],
  *,
  temperature: float = 0.0,
  new: int = 128,
  batch: int = 16,
  on_progress: Told = None,
) -> list[str]:
  """What a model answers to prompts (see `asked.rows`), the likeliest tokens at temperature 0."""
  tokenizer: Any = model.tokenizer
  ends = sorted({*chatting.stop_ids(model), *turns.end_ids(template, tokenizer)})
  encoded = (chat.encode(template, prompts.messages(row), tokenizer, generation=True) for row in rows)
  wanted = [tasks.Example('', ids, '') for ids in encoded]
  how: dict[str, Any] = {'new': new, 'batch': batch, 'names': (), 'on_progress': on_progress}
  how |= {'sampling': sample.Sampling(temperature_B=temperature)}
  return tasks.answer(model.cfg, lora.merge(model.params), tokenizer, wanted, ends, **how).texts


def opened(sources: Sequence[str]) -> tuple[list[tuple[interop.Model, str]], list[str]]:
  """The models, each with the template that it is asked in, and in words where that is not its own.

  A model without one is asked in that of another of them, and where none has one in headings ('plain').
  """
  models = [foreign.open_model(source) for source in sources]
  others = [model.chat_template for model in models if model.chat_template]
  spare, whose = (others[0], 'that of the other') if others else (turns.choose('plain', None)[1], "'plain'")
  lines = [
    f'{source}: has no chat template: it is asked in {whose}'
    for source, model in zip(sources, models, strict=True)
    if not model.chat_template
  ]
  return [(model, model.chat_template or spare) for model in models], lines


def compare(names: Sequence[str], rows: Sequence[Row], said: Sequence[list[str]], preferred: winrate.Compare) -> Versus:
  """The answers `said` by two models, judged."""
  results = preferred([shown(row) for row in rows], said[0], said[1], rows)
  unread = np.isnan(results)
  return Versus((names[0], names[1]), list(rows), (said[0], said[1]), np.where(unread, 0.5, results), int(unread.sum()))


def shown(row: Row) -> str:
  """The prompt as a judge reads it."""
  said = prompts.messages(row)
  return said[0]['content'] if len(said) == 1 else '\n\n'.join(f'{one["role"]}: {one["content"]}' for one in said)


def by_name(what: str, *, model: str = '', key: str = '', on_progress: Told = None) -> winrate.Compare:
  """A judge at a URL that ends in /v1, or any reward of `jaxlm rl --reward`. Raises InputError for neither."""
  if what.startswith(('http://', 'https://')):
    if not model:
      raise InputError(f'judge {what}: name the model that judges with --judge-model')
    return winrate.by_judge(what, model, key=key, on_progress=on_progress)
  reward = rewards.parse(what, dict(rewards.MAKERS) | {'run': scoring.as_reward}, timeout=600.0)
  last = lambda rows: [prompts.messages(row)[-1]['content'] for row in rows]
  return winrate.by_reward(lambda shown, said, rows: reward(last(rows), said, rows))


def _alike(found: Versus) -> np.ndarray:
  longer = found.lengths.max(0)
  return np.abs(found.lengths[0] - found.lengths[1]) <= NEAR * np.maximum(longer, 1.0)


def rows_of(found: Versus) -> Table:
  """Header and rows of a table: all prompts, those of answers of like length, and each kind where there are several."""
  kinds = list(dict.fromkeys(str(row.get('kind', '')) for row in found.rows))
  of_kind = lambda kind: np.array([str(row.get('kind', '')) == kind for row in found.rows])
  parts = {'all': np.ones(len(found.rows), np.bool_), 'lengths within 10 %': _alike(found)}
  parts |= {f'- {kind}': of_kind(kind) for kind in kinds} if len(kinds) > 1 else {}
  table = []
  for name, there in parts.items():
    if there.any():
      share, low, high, *counts = winrate.rate(found.results[there])
      table.append((name, int(there.sum()), *counts, share, low, high))
  return ('prompts', 'number', 'wins', 'ties', 'losses', 'win-rate', 'from', 'to (95 %)'), table


def lines(found: Versus) -> list[str]:
  """In words: how long the answers are, and how often the longer one is preferred."""
  a, b = found.lengths
  told = [f'characters of an answer: {a.mean():.0f} of {found.names[0]}, {b.mean():.0f} of {found.names[1]}']
  decided = (found.results != 0.5) & (a != b)
  if decided.any():
    longer = ((found.results > 0.5) == (a > b))[decided]
    low, high = winrate.wilson(float(longer.mean()), len(longer))
    told.append(f'the longer answer is preferred: {longer.mean():.1%} ({low:.1%} to {high:.1%}) of {len(longer)}')
  if not _alike(found).any():
    told.append('no two answers are of like length (within 10 %)')
  if found.unread:
    told.append(f'{found.unread} prompts are ties because the judge named none of A, B and C')
  return told


def samples(found: Versus, most: int = 3) -> list[str]:
  """A few prompts with both answers, wins and losses before ties."""
  order = sorted(range(len(found.rows)), key=lambda i: found.results[i] == 0.5)
  first = [i for i in order if found.results[i] != 0][: most - 1]
  picked = (first + [i for i in order if i not in first])[:most]
  verdict = lambda x: 'a tie' if x == 0.5 else 'preferred' if x > 0.5 else 'not preferred'
  told = []
  for i in picked:
    head = f'{shown(found.rows[i])}\n'
    a, b = (f'[{name}] {side[i]}' for name, side in zip(found.names, found.answers, strict=True))
    told.append(f'{head}{a}\n{b}\n-> {verdict(found.results[i])}')
  return told


def write(found: Versus, what: str, path: str, run: str | None) -> epath.Path:
  """Every prompt as a line of JSON, the figures beside it as `.json`, and in the report of `run`; returns the path."""
  header, table = rows_of(found)
  body = [
    json.dumps({'prompt': row['prompt'], 'a': a, 'b': b, 'result': float(x)}, ensure_ascii=False)
    for row, a, b, x in zip(found.rows, *found.answers, found.results, strict=True)
  ]
  write_whole(path, '\n'.join(body) + '\n')
  figures = [dict(zip((*header[:-1], 'to'), line, strict=True)) for line in table]
  whole = {'a': found.names[0], 'b': found.names[1], 'judge': what, 'table': figures, 'said': lines(found)}
  write_whole(str(epath.Path(path).with_suffix('.json')), json.dumps(whole, indent=1, ensure_ascii=False))
  if run is not None:
    said = {line[0]: f'{line[5]:.1%} ({line[6]:.1%} to {line[7]:.1%}), {line[1]} prompts' for line in table}
    said |= {f'{i}.': line for i, line in enumerate(lines(found), 1)}
    pretrain.add_facts(epath.Path(run), {f'win-rate over {found.names[1]}, by {what}': said})
  return epath.Path(path)
