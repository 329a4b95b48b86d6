"""What a run left in its folder, read once: rows, samples, facts, configuration, and what happened when."""

import bisect
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from jaxlm.config import Pretrain, from_json, to_json
from jaxlm.errors import InputError
from jaxlm.files import children, read_json, remote
from jaxlm.train.metrics import read_rows

Rows = Sequence[Mapping[str, Any]]

EVENTS = ('save', 'evaluation', 'skipped step', 'rewind', 'start')


class Run(NamedTuple):
  """The folder of a run, as read."""

  path: epath.Path
  rows: Rows
  samples: Rows
  facts: Mapping[str, Any]
  config: Mapping[str, Any]  # as JSON has it, with today's defaults for fields of which it does not know; or {}
  happened: Rows  # step, time, what, seconds: see `jaxlm.train.metrics.Writer.happened`

  @property
  def name(self) -> str:
    return called([self.path])[0]

  @property
  def stage(self) -> str:
    return stage(self.config)

  @property
  def names(self) -> list[str]:
    """Of all metrics."""
    return list(dict.fromkeys(name for row in self.rows for name in row))

  def last(self, name: str) -> float | None:
    """The newest value of a metric."""
    return next((row[name] for row in reversed(self.rows) if row.get(name) is not None), None)


def read(path: Any) -> Run:
  """Raises InputError if the folder holds no metrics."""
  path = epath.Path(path)
  rows = read_rows(path / 'metrics.jsonl')
  if not rows:
    raise InputError(f'{path}: no metrics.jsonl with a row in it: not the folder of a run, or one that has not begun')
  facts = read_json(path / 'facts.json') if (path / 'facts.json').exists() else {}
  return Run(path, rows, read_rows(path / 'samples.jsonl'), facts, config(path), read_rows(path / 'timeline.jsonl'))


def config(path: epath.Path) -> dict[str, Any]:
  """A run's configuration, with the defaults of fields that are younger than it; {} where there is none."""
  if not (path / 'config.json').exists():
    return {}
  found = read_json(path / 'config.json')
  try:
    return json.loads(to_json(from_json(Pretrain, json.dumps(found))))
  except (InputError, TypeError):  # of another version, or a foreign model's
    return found


def called(paths: Sequence[Any]) -> list[str]:
  """Short names of folders: as many of the last parts as tell them apart, and more than a bare number."""
  parts = [(str(path) if remote(path) else os.fspath(Path(path).absolute())).strip('/').split('/') for path in paths]
  names = []
  for one in parts:
    least = next((n for n in range(1, len(one)) if not one[-n].isdecimal() and one[-n] != 'folds'), len(one))
    others = [other for other in parts if other != one]
    clear = (n for n in range(least, len(one)) if all(other[-n:] != one[-n:] for other in others))
    names.append('/'.join(one[-next(clear, len(one)) :]))
  return names


def stage(config: Mapping[str, Any]) -> str:
  """What a run is called by its configuration."""
  part = lambda name: config.get(name) or {}
  if part('rl').get('algo'):
    return str(part('rl')['algo']).rpartition(':')[2].replace('_', ' ').upper()
  if part('preference').get('stage') == 'reward':
    return 'reward model'
  if part('preference').get('stage') == 'preference':
    return part('preference')['loss'].upper()
  if part('distill').get('teacher'):
    return 'distillation'
  adapters = ' (LoRA)' if part('lora').get('rank') else ''
  if config.get('init'):
    return 'fine-tuning' + adapters
  return 'pre-training' if config else ''


def series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
  """The steps and values of one metric, rows without it left out."""
  points = [(row['step'], row[name]) for row in rows if row.get(name) is not None]
  return [p[0] for p in points], [p[1] for p in points]


def events(run: Run) -> dict[str, list[int]]:
  """The steps of each of EVENTS, as far as the folder tells."""
  told = lambda what: sorted({row['step'] for row in run.happened if row.get('what') == what})
  steps, skipped = series(run.rows, 'train/skipped')
  grown = [step for step, was, now in zip(steps, [0.0, *skipped], skipped, strict=False) if now > was]
  rewinds = read_json(run.path / 'rewinds.json', list) if (run.path / 'rewinds.json').exists() else []
  kept = [int(p.name) for p in children(run.path / 'checkpoints') if p.name.isdecimal()]
  last = run.rows[-1]['step']
  back = {one['step'] for one in rewinds}
  return {
    'save': told('save') or sorted(step for step in kept if step <= last),
    'evaluation': sorted({row['step'] for row in run.rows if any(name.startswith('eval/') for name in row)}),
    'skipped step': grown,
    'rewind': sorted(one['spike'] for one in rewinds),
    'start': [step for step in told('start') if step and step not in back],
  }


def spent(run: Run) -> dict[str, float]:
  """Seconds by what they went into, {} where rows say no times; what is left of the clock's comes last.

  Runs that wrote no timeline do not tell what evaluations, samples and saves took.
  """
  timed = [row for row in run.rows if row.get('perf/step_s') is not None]
  if not timed:
    return {}
  total = lambda name: sum(row.get(name) or 0.0 for row in run.rows)
  begins = [0, *(row['step'] for row in timed)]
  steps = [max(1, row['step'] - begin) * row['perf/step_s'] for begin, row in zip(begins, timed, strict=False)]
  waits = sum(s * (row.get('perf/data_wait') or 0.0) for s, row in zip(steps, timed, strict=True))
  parts = {
    'writing answers': total('perf/rollout_s'),
    'scoring them': total('perf/scoring_s'),
    'reading them': total('perf/reading_s'),
  }
  answers = sum(parts.values())
  found = {'steps': sum(steps) - waits, **parts, 'waiting for data': max(0.0, waits - answers)}
  for what, name in (('evaluation', 'evaluations'), ('samples', 'samples'), ('save', 'saves')):
    found[name] = sum(row.get('seconds') or 0.0 for row in run.happened if row.get('what') == what)
  found['start and else' if run.happened else 'else, saves and evaluations among it'] = max(
    0.0, clock(run) - sum(found.values())
  )
  return {name: seconds for name, seconds in found.items() if seconds > 0}


def clock(run: Run) -> float:
  """Seconds that the run was at work, from each start to the last that was written before the next."""
  times = sorted(row['time'] for row in (*run.rows, *run.happened) if row.get('time'))
  starts = sorted(row['time'] for row in run.happened if row.get('what') == 'start' and row.get('time'))
  if not times:
    return 0.0
  if not starts:
    return times[-1] - times[0] + (run.rows[0].get('perf/step_s') or 0.0)
  if times[0] < starts[0]:  # of a run that began before there was a timeline
    starts.insert(0, times[0])
  ends = [times[max(0, bisect.bisect_left(times, after) - 1)] for after in starts[1:]] + [times[-1]]
  return sum(max(0.0, end - start) for start, end in zip(starts, ends, strict=True))


def differences(old: Any, new: Any, prefix: str = '') -> list[tuple[str, Any, Any]]:
  """(dotted name, old value, new value) where two configurations differ; the folders' own names left out."""
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return [] if old == new else [(prefix, old, new)]
  names = [name for name in dict.fromkeys((*old, *new)) if prefix or name not in ('run', 'init')]
  dotted = lambda name: f'{prefix}.{name}' if prefix else name
  return list(itertools.chain(*(differences(old.get(n), new.get(n), dotted(n)) for n in names)))


def reward_models(config: Mapping[str, Any]) -> list[str]:
  """The runs that a reward names: 'run:A*0.8 + run:B' names two."""
  parts = re.split(r'\s\+\s', (config.get('rl') or {}).get('reward') or '')
  return [re.sub(r'\*-?[\d.]+$', '', part.strip()).removeprefix('run:') for part in parts if 'run:' in part[:4]]
