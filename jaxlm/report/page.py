"""A run as one self-contained HTML page, the same look for every stage. No script, no network."""

import math
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from etils import epath

from jaxlm.files import read_json
from jaxlm.report import curves, lineage, markup, runs
from jaxlm.report.runs import Rows, Run, series
from jaxlm.rl import collapse
from jaxlm.train.metrics import COMPOSITION

FILE = 'report.html'
SHOWN = 6  # samples of a prompt, and prompts
SCORED = 20  # samples with rewards
FEW = 8  # settings that are not folded away

# (what it is called, its metric): the first of each that are there
FIGURES = (
  ('held-out bits per byte', 'eval/bits_per_byte'),
  ('held-out loss', 'eval/loss'),
  ('held-out pairs told right', 'eval/rewards/accuracies'),
  ('held-out margin', 'eval/rewards/margins'),
  ('held-out reward', 'eval/reward/mean'),
  ('reward of answers', 'reward/mean'),
  ('KL from the reference', 'policy/kl'),
  ('divergence from the teacher', 'eval/distill/divergence'),
  ('skipped steps', 'train/skipped'),
  ('GiB of a device', 'perf/device_gib'),
  ('GiB of the host', 'perf/host_gib'),
)


def write(path: Any, out: Any = None) -> epath.Path:
  """Writes the page of what a run wrote into its folder, as its `report.html` or as `out`, and returns its path.

  Raises InputError if the folder holds no metrics.
  """
  run = runs.read(path)
  out = run.path / FILE if out is None else epath.Path(out)
  events = runs.events(run)
  pictures = lambda kinds: ''.join(curves.draw(one, events) for one in curves.of_run(kinds, run))
  learning, machine = (f'<div class="curves">{pictures(k)}</div>' for k in (curves.LEARNING, curves.MACHINE))
  parts = [
    _title(run),
    _figures(run),
    _warned(run),
    markup.section('Lineage', _lineage(run, out)),
    markup.section('Curves', curves.events_key(events), learning),
    markup.section('Throughput, time, memory', _spent(run), machine),
    markup.section('Gained and forgotten', _gained(run.rows)),
    _chapter(run.path / 'chapter.json'),
    markup.section('Samples through training', _samples(run.samples)),
    markup.section('Data', _composition(run)),
    markup.section('Facts', _facts(run.facts)),
    _config(run.path / 'config.json'),
  ]
  out.write_text(markup.document(run.name, parts))
  return out


def _title(run: Run) -> str:
  steps, planned = run.rows[-1]['step'], run.config.get('steps')
  of = f'{steps:,} steps' if steps == planned or not planned else f'{steps:,} of {planned:,} steps'
  ended = time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(run.rows[-1].get('time', 0)))
  said = f'{of}, last written {ended}' if run.rows[-1].get('time') else of
  tag = f' <span class="tag">{markup.escape(run.stage)}</span>' if run.stage else ''
  return f'<h1>{markup.escape(run.name)}</h1><p class="faint">{said}{tag}</p>'


def _figures(run: Run) -> str:
  """The handful of numbers a reader looks for first."""
  parameters = run.facts.get('model', {}).get('parameters')
  speeds = sorted(series(run.rows, 'perf/tokens_per_s')[1])
  shown = {
    'parameters': f'{parameters / 1e6:.2f} M' if parameters else '',
    **{label: markup.number(run.last(name)) for label, name in FIGURES},
    'tokens a second (median)': f'{speeds[len(speeds) // 2]:,.0f}' if speeds else '',
    'time at work' if run.happened else 'from the first row to the last': markup.duration(runs.clock(run))
    if runs.clock(run)
    else '',
  }
  boxes = (f'<div>{markup.escape(k)}<b>{v}</b></div>' for k, v in shown.items() if v)
  return f'<div class="figures">{"".join(boxes)}</div>'


def _lineage(run: Run, page: epath.Path) -> str:
  """The tree of its runs, and what is set otherwise than in the run that it began with."""
  nodes = lineage.family([run.path], descendants=True)
  drawn = lineage.tree(nodes, page, {next(iter(nodes)): ''}) if len(nodes) > 1 else ''
  from_ = lineage.parent(run.path, run.config)
  if from_ is None:
    return drawn
  told = lambda value: '' if value is None else str(value)
  changed = [(n, told(was), told(now)) for n, was, now in runs.differences(runs.config(from_), dict(run.config))]
  names = runs.called([from_, run.path])
  said = f'{len(changed)} settings are not those of its parent, {names[0]}'
  opened = ' open' if len(changed) <= FEW else ''
  table = markup.grid(('', *names), changed)
  return f'{drawn}<details{opened}><summary>{markup.escape(said)}</summary>{table}</details>'


def _spent(run: Run) -> str:
  """What the time went into."""
  found = runs.spent(run)
  return markup.shares(found, {name: markup.duration(seconds) for name, seconds in found.items()})


def gained(rows: Rows) -> list[tuple[str, float, float, float]]:
  """(kind, perplexity before, after, the share that it changed by) of a run that began with a model; else []."""
  found = []
  there = list(dict.fromkeys(name for row in rows for name in row))
  patterns = ('eval/nll',) if any(name.startswith('eval/rewards/') for name in there) else ('eval/*loss',)
  for name in (name for name in there if any(fnmatchcase(name, pattern) for pattern in patterns)):
    steps, values = series(rows, name)
    if len(steps) > 1 and steps[0] == 0:
      before, after = math.exp(values[0]), math.exp(values[-1])
      kind = name.removeprefix('eval/').removesuffix('loss').rstrip('/') or 'all'
      found.append(('chosen answers' if kind == 'nll' else kind, before, after, after / before - 1))
  return found


def _gained(rows: Rows) -> str:
  said = lambda change: f'{change:+.1%}, {"gained" if change < 0 else "forgotten"}'
  lines = [(kind, f'{before:.2f}', f'{after:.2f}', said(change)) for kind, before, after, change in gained(rows)]
  return markup.grid(('held-out text', 'perplexity before', 'after', ''), lines)


def _warned(run: Run) -> str:
  """What the last steps of reinforcement learning warn of, and where training went back."""
  target = (run.config.get('rl') or {}).get('kl_target', 0.0)
  lines = list(collapse.warnings(run.rows, kl_target=target).values())
  path = run.path / 'rewinds.json'
  for one in read_json(path, list) if path.exists() else []:
    lines.append(f'loss spike at step {one["spike"]}: back to step {one["step"]}, on with batch {one["cursor"]}')
  if failed := run.last('train/failed_saves'):
    lines.append(f'{failed:.0f} saves failed')
  shown = ''.join(f'<li>{markup.escape(line)}</li>' for line in lines)
  return markup.section('Warnings', f'<ul>{shown}</ul>') if lines else ''


def _samples(rows: Rows) -> str:
  """Those that have rewards; then prompts with what was written to each as training went on, ones met once last."""
  by_prompt: dict[str, list[Mapping[str, Any]]] = {}
  for row in (row for row in rows if 'reward' not in row):
    by_prompt.setdefault(row['prompt'], []).append(row)
  again = [_prompt(prompt, found) for prompt, found in by_prompt.items() if len(found) > 1]
  once = [_prompt(prompt, found) for prompt, found in reversed(by_prompt.items()) if len(found) == 1]
  return _scored([row for row in rows if 'reward' in row]) + _folded(again, 'prompts') + _folded(once, 'earlier ones')


def _scored(rows: Rows) -> str:
  """A table of samples and their rewards: the newest step's first, and of a step the best."""
  ranked = sorted(rows, key=lambda row: (-row['step'], -row['reward']))
  lines = [(row['step'], row['prompt'], row['text'], row['reward']) for row in ranked]
  table = lambda some: markup.grid(('step', 'prompt', 'answer', 'reward'), some, 'ruled answers')
  older = table(lines[SCORED:])
  rest = f'<details><summary>{len(lines) - SCORED} earlier ones</summary>{older}</details>' if older else ''
  return table(lines[:SCORED]) + rest


def _folded(boxes: Sequence[str], what: str) -> str:
  older = ''.join(boxes[SHOWN:])
  rest = f'<details><summary>{len(boxes) - SHOWN} more {what}</summary>{older}</details>' if older else ''
  return ''.join(boxes[:SHOWN]) + rest


def _prompt(prompt: str, rows: Rows) -> str:
  """One prompt's texts, oldest first: some evenly, the rest folded away."""
  lines = [f'<div><small>step {row["step"]}</small>{markup.escape(row["text"])}</div>' for row in rows]
  picked = sorted({round(i * (len(lines) - 1) / (SHOWN - 1)) for i in range(SHOWN)})
  rest = [line for i, line in enumerate(lines) if i not in picked]
  more = f'<details><summary>{len(rest)} between</summary>{"".join(rest)}</details>' if rest else ''
  return f'<div class="sample"><b>{markup.escape(prompt)}</b>{"".join(lines[i] for i in picked)}{more}</div>'


def _composition(run: Run) -> str:
  """What the training text is made of, and how often each part was read."""
  kinds, data = run.facts.get(COMPOSITION, {}), run.config.get('data') or {}
  read = {
    name.removeprefix('data/').removesuffix('/epochs'): run.last(name) for name in run.names if name[-7:] == '/epochs'
  }
  said = [f'from {markup.escape(data["path"])}'] if data.get('path') else []
  said += [f'mixed {markup.escape(data["mix"])}'] if data.get('mix') else []
  said += [f'then {markup.escape(one)}' for one in data.get('phases') or ()]
  total = next((value for name, value in read.items() if name in ('', 'data')), run.last('data/epochs'))
  said += [f'read {total:.2f} times'] if total else []
  mixed = {name: value for name, value in read.items() if name in kinds or '/' in name}
  times = {name: f', read {mixed[name]:.2f} times' if mixed.get(name) is not None else '' for name in kinds}
  bar = markup.shares(kinds, {name: f'{count:,} tokens{times[name]}' for name, count in kinds.items()})
  return f'<p class="faint">{"; ".join(said)}</p>{bar}' if said or bar else ''


def _facts(facts: Mapping[str, Any]) -> str:
  tables = [markup.table(name, values) for name, values in facts.items() if name != COMPOSITION]
  return f'<div class="tables">{"".join(tables)}</div>' if tables else ''


def _chapter(path: epath.Path) -> str:
  """A table with a header, from JSON that a run holds."""
  if not path.exists():
    return ''
  found = read_json(path)
  return markup.section('Pre-trained against fine-tuned', markup.grid(found['header'], found['rows'], 'chapter'))


def _config(path: epath.Path) -> str:
  if not path.exists():
    return ''
  text = markup.escape(path.read_text())
  return markup.section('Configuration', f'<details><summary>config.json</summary><pre>{text}</pre></details>')
