"""lm-eval's tasks: its `LM` over a model of ours, its tables, and the difference of two models row by row."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxlm import sample
from jaxlm.data import chat
from jaxlm.errors import InputError
from jaxlm.evals import questions, subject
from jaxlm.evals.questions import Bar, Measure, Table
from jaxlm.evals.subject import Subject
from jaxlm.files import write_whole

LONGEST = (
  'max_gen_toks',
  'max_new_tokens',
  'max_tokens',
  'max_completion_tokens',
)  # names of one thing, the first wins
DRAWING = ('do_sample', 'temperature', 'top_p', 'top_k')
RESAMPLES = 1000  # for the standard errors of perplexities
NEW = 256  # tokens of an answer, where a task does not say


class Adapter:
  """What lm-eval asks of an `LM`; `lm` makes it one."""

  def __init__(self, asked: Subject, bar: Bar):
    super().__init__()
    self.asked, self.bar = asked, bar

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    pairs = [subject.pair(self.asked, *one.args) for one in requests]
    with self.bar(f'log-likelihoods, {self.asked.name}') as told:
      return [tuple(one) for one in subject.likelihoods(self.asked, pairs, told)]

  def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
    with self.bar(f'texts, {self.asked.name}') as told:
      return subject.rolling(self.asked, [one.args[0] for one in requests], told)

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    groups: dict[str, list[int]] = {}
    for i, one in enumerate(requests):
      groups.setdefault(json.dumps(one.args[1], sort_keys=True), []).append(i)
    texts = [''] * len(requests)
    for settings, some in groups.items():
      with self.bar(f'answers, {self.asked.name}') as told:
        how = _settings(json.loads(settings))
        found = subject.continued(self.asked, [requests[i].args[0] for i in some], on_progress=told, **how)
      for i, text in zip(some, found, strict=True):
        texts[i] = text
    return texts

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    template = self.asked.model.chat_template or ''
    text = chat.render(template, chat_history, self.asked.tokenizer, generation=add_generation_prompt)
    last = chat_history[-1]['content']
    return text if add_generation_prompt else text[: text.rindex(last) + len(last)]  # a message that goes on

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Raises InputError where one is wanted and there is none."""
    if chat_template and not self.asked.model.chat_template:
      raise InputError(f'{self.asked.name}: has no chat template')
    return self.asked.model.chat_template if chat_template else None

  @property
  def tokenizer_name(self) -> str:
    return self.asked.tokenizer.digest


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
  """A task's `generation_kwargs` as `subject.continued` takes them. Raises InputError for others than it knows."""
  if unknown := [name for name in given if name not in ('until', *LONGEST, *DRAWING)]:
    raise InputError(f'lm-eval: generation_kwargs {", ".join(unknown)}: here there are until, {", ".join(DRAWING)}')
  until = given.get('until') or []
  warm = float(given.get('temperature') or 0.0) if given.get('do_sample', True) else 0.0
  how = sample.Sampling(temperature_B=warm, top_k_B=given.get('top_k'), top_p_B=given.get('top_p'))
  return {
    'new': int(next((given[name] for name in LONGEST if given.get(name) is not None), NEW)),
    'until': [until] if isinstance(until, str) else until,
    'sampling': how if warm else subject.GREEDY,
  }


def lm(asked: Subject, bar: Bar) -> Any:
  """An `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=...)`. Raises InputError where lm-eval is missing."""
  try:
    from lm_eval.api.model import LM  # ty: ignore
  except ImportError as error:
    raise InputError("lm-eval is not installed: pip install -e '.[lm-eval]'") from error
  return type('Jaxlm', (Adapter, LM), {})(asked, bar)


def evaluate(
  asked: Subject,
  tasks: Sequence[str],
  *,
  include: str | None = None,
  shots: int | None = None,
  limit: int | None = None,
  templated: bool = False,
  bar: Bar,
) -> dict[str, Any]:
  """The results of `lm_eval.simple_evaluate`, samples included, on tasks of lm-eval's or of the folder `include`.

  Raises InputError for a task that is not there.
  """
  model = lm(asked, bar)
  from lm_eval import simple_evaluate  # ty: ignore
  from lm_eval.tasks import TaskManager  # ty: ignore

  manager = TaskManager(include_path=include, include_defaults=not include)
  if include and not set(tasks) <= set(manager.all_subtasks):  # lm-eval's own, 14,000, take a while to list
    manager = TaskManager(include_path=include)
  if missing := [name for name in tasks if not manager.match_tasks([name])]:
    raise InputError(f'lm-eval: has no task {missing[0]!r}: --include-path names a folder of your own')
  os.environ.setdefault('DISABLE_MULTIPROC', '1')  # lm-eval's bootstrap would fork, beside the threads of JAX
  how: dict[str, Any] = {'num_fewshot': shots, 'limit': limit, 'apply_chat_template': templated}
  how |= {'bootstrap_iters': RESAMPLES}
  return simple_evaluate(model=model, tasks=manager.match_tasks(list(tasks)), task_manager=manager, **how)


def shown(results: Mapping[str, Any]) -> str:
  """lm-eval's own table, Markdown."""
  from lm_eval.utils import make_table  # ty: ignore

  groups = [make_table(results, 'groups')] if results.get('groups') else []
  return '\n'.join([make_table(results), *groups]).strip()


def measures(results: Mapping[str, Any]) -> dict[str, dict[str, Measure]]:
  """Of each task its metrics row by row, those that are sums over rows: they give lm-eval's own figure."""
  found: dict[str, dict[str, Measure]] = {}
  for task, rows in results['samples'].items():
    for key, value in results['results'][task].items():
      name, _, chosen = key.partition(',')
      kept = [row[name] for row in rows if row['filter'] == chosen and name in row]
      one = _measure(name, kept) if isinstance(value, float | int) and kept else None
      if one and np.isclose(one.of(), value, rtol=1e-6):
        found.setdefault(task, {})[key.removesuffix(',none')] = one
  return found


def _measure(name: str, values: Sequence[Any]) -> Measure | None:
  """Of a metric's values, numbers or (log-probability, size)."""
  try:
    found = np.array(values, np.float64)
  except (TypeError, ValueError):
    return None
  form = 'perplexity' if 'perplexity' in name else 'bits' if name == 'bits_per_byte' else 'mean'
  sign = 1.0 if form == 'mean' else -1.0
  if found.ndim == 2 and found.shape[1] == 2 and form != 'mean':
    return Measure(sign * found[:, 0], found[:, 1], form)
  return Measure(sign * found, np.ones(len(found)), form) if found.ndim == 1 else None


def compared(found: Mapping[str, Mapping[str, Any]]) -> Table:
  """Header and rows of a table of results by model: the metrics that all have, and the first less each other."""
  of = {name: measures(results) for name, results in found.items()}
  first = next(iter(of.values()))
  in_all = {
    task: [name for name in some if all(name in one.get(task, {}) for one in of.values())]
    for task, some in first.items()
  }
  kept = {
    model: {task: {name: one[task][name] for name in names} for task, names in in_all.items()}
    for model, one in of.items()
  }
  return questions.rows(kept, next(iter(found.values()))['n-shot'])


def write(found: Mapping[str, Mapping[str, Any]], text: str, path: str) -> list[epath.Path]:
  """lm-eval's results by model as JSON at `path`, the tables (`text`) as Markdown and the rows beside it."""
  from lm_eval.utils import handle_non_serializable as plain  # ty: ignore

  to = {kind: str(epath.Path(path).with_suffix(f'.{kind}')) for kind in ('json', 'md', 'jsonl')}
  whole = {name: {key: x for key, x in one.items() if key != 'samples'} for name, one in found.items()}
  lines = [
    json.dumps({'model': name, 'task': task} | row, default=plain, ensure_ascii=False)
    for name, one in found.items()
    for task, rows in one['samples'].items()
    for row in rows
  ]
  write_whole(to['json'], json.dumps(whole, indent=1, default=plain))
  write_whole(to['md'], text + '\n')
  write_whole(to['jsonl'], ''.join(f'{line}\n' for line in lines))
  return [epath.Path(one) for one in to.values()]
