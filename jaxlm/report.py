"""A run as one self-contained HTML page: what came out, curves, samples, configuration. No script, no network."""

import html
import io
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from etils import epath

from jaxlm.errors import InputError
from jaxlm.files import read_json
from jaxlm.rl import collapse
from jaxlm.train.metrics import read_rows

Rows = Sequence[Mapping[str, Any]]

# (title, y label, patterns of the metrics drawn, logarithmic y)
CURVES = (
  ('Loss', 'nats a token', ('train/loss', 'eval/loss'), False),
  ('Compression', 'bits per byte', ('train/bits_per_byte', 'eval/bits_per_byte'), False),
  ('Rewards', 'of answers', ('*/rewards/chosen', '*/rewards/rejected'), False),
  ('Margins', 'chosen - rejected', ('train/rewards/margins', 'eval/rewards/margins'), False),
  ('Told right', 'share of pairs', ('train/rewards/accuracies', 'eval/rewards/accuracies'), False),
  ('Chosen answers', 'nats a token', ('train/nll', 'eval/nll'), False),
  ('Reward', 'mean of answers', ('reward/mean', 'eval/reward/mean'), False),
  ('Distance to the reference', 'KL, nats a token', ('policy/kl', 'train/policy/kl'), False),
  ('Entropy', 'nats a token', ('train/policy/entropy',), False),
  ('New over old policy', 'ratio', ('train/policy/ratio_min', 'train/policy/ratio_max'), False),
  ('Clipped', 'share of tokens', ('train/policy/clip_*',), False),
  ('Length of answers', 'tokens', ('answers/length', 'eval/answers/length'), False),
  ('Cut answers, groups alike', 'share', ('answers/truncated', 'reward/equal_groups'), False),
  ('Value function', 'explained variance', ('train/value/explained_variance',), False),
  ('Sampler and training program', 'apart, nats a token', ('train/policy/sampler_gap*',), True),
  ('Where the time goes', 'seconds', ('perf/rollout_s', 'perf/scoring_s', 'perf/reading_s', 'perf/step_s'), False),
  ('From the teacher', 'nats a token', ('train/distill/divergence', 'eval/distill/divergence'), False),
  ('By kind of text', 'held-out bits per byte', ('eval/*/bits_per_byte',), False),
  ('Gradient norm', 'before clipping', ('train/grad_norm',), True),
  ('Learning rate', '', ('train/lr',), False),
  ('Epochs', 'times read', ('data/epochs', 'data/*/epochs'), False),
  ('Throughput', 'tokens a second', ('perf/tokens_per_s',), False),
  ('Waiting for data', 'share of the step', ('perf/data_wait',), False),
)

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1f2933;background:#fff;max-width:1060px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem} h2{font-size:1.15rem;margin:2.2rem 0 .6rem;border-bottom:1px solid #e4e7eb}
.figures{display:flex;flex-wrap:wrap;gap:1rem;margin:1rem 0}
.figures div{background:#f5f7fa;border-radius:8px;padding:.6rem 1rem} .figures b{display:block;font-size:1.35rem}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(460px,1fr));gap:.5rem} svg{width:100%;height:auto}
table{border-collapse:collapse;margin:.4rem 0} td,th{padding:.15rem 1.2rem .15rem 0;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums} .tables{display:flex;flex-wrap:wrap;gap:2.5rem}
.sample{white-space:pre-wrap;background:#f5f7fa;border-radius:8px;padding:.6rem 1rem;margin:.4rem 0}
.sample{overflow-wrap:anywhere}
.chapter td,.chapter th{border-top:1px solid #e4e7eb;padding:.4rem .8rem .4rem 0;max-width:20rem;overflow-wrap:anywhere}
.sample small{color:#7b8794;display:block} .sample b{color:#0b69a3}
details pre{background:#f5f7fa;padding:1rem;border-radius:8px;overflow:auto} h3{font-size:1rem;margin:.8rem 0 .2rem}
"""


def write(run: Any) -> epath.Path:
  """Writes `report.html` into the run's folder from what the run wrote there, and returns its path.

  Raises InputError if the folder holds no metrics.
  """
  run = epath.Path(run)
  rows = read_rows(run / 'metrics.jsonl')
  if not rows:
    raise InputError(f'{run}: no metrics.jsonl with a row in it: not the folder of a run, or one that has not begun')
  facts = read_json(run / 'facts.json') if (run / 'facts.json').exists() else {}
  parts = [
    f'<h1>{html.escape(run.name)}</h1>',
    _figures(rows, facts),
    '<h2>Curves</h2><div class="curves">' + ''.join(_curves(rows, facts.get('held-out bits per byte', {}))) + '</div>',
    _warned(rows, run / 'config.json'),
    _gained(rows),
    _chapter(run / 'chapter.json'),
    _rewinds(run / 'rewinds.json'),
    _samples(read_rows(run / 'samples.jsonl')),
    '<h2>Facts</h2><div class="tables">' + ''.join(_table(name, values) for name, values in facts.items()) + '</div>',
    _config(run / 'config.json'),
  ]
  head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(run.name)}</title>'
  path = run / 'report.html'
  path.write_text(f'{head}<style>{STYLE}</style><body>{"".join(parts)}</body></html>\n')
  return path


def series(rows: Rows, name: str) -> tuple[list[int], list[float]]:
  """The steps and values of one metric, rows without it left out."""
  points = [(row['step'], row[name]) for row in rows if row.get(name) is not None]
  return [p[0] for p in points], [p[1] for p in points]


def _figures(rows: Rows, facts: Mapping[str, Any]) -> str:
  """The handful of numbers a reader looks for first."""

  def last(name: str) -> float | None:
    values = series(rows, name)[1]
    return values[-1] if values else None

  speeds = sorted(series(rows, 'perf/tokens_per_s')[1])
  shown = {
    'steps': f'{rows[-1]["step"]:,}',
    'parameters': f'{facts.get("model", {}).get("parameters", 0) / 1e6:.2f} M',
    'held-out bits per byte': _number(last('eval/bits_per_byte')),
    'held-out loss': _number(last('eval/loss')),
    'tokens a second (median)': f'{speeds[len(speeds) // 2]:,.0f}' if speeds else '',
    'skipped steps': _number(last('train/skipped')),
  }
  boxes = (f'<div>{html.escape(k)}<b>{v}</b></div>' for k, v in shown.items() if v)
  return f'<div class="figures">{"".join(boxes)}</div>'


def _curves(rows: Rows, baselines: Mapping[str, float]) -> list[str]:
  """One SVG for each entry of CURVES that has values; baselines are lines in the picture of bits per byte."""
  from matplotlib.figure import Figure

  pictures = []
  there = list(dict.fromkeys(name for row in rows for name in row))
  for title, unit, patterns, logarithmic in CURVES:
    names = dict.fromkeys(name for pattern in patterns for name in there if fnmatchcase(name, pattern))
    drawn = {name: series(rows, name) for name in names if series(rows, name)[0]}
    if not drawn:
      continue
    figure = Figure(figsize=(5.4, 2.9), layout='constrained')
    axes = figure.subplots()
    for name, (steps, values) in drawn.items():
      marker = 'o' if name.startswith('eval') else ''
      label = name if name.count('/') != 2 or '/rewards/' in name else name.split('/')[1]  # a kind's own name
      axes.plot(steps, values, label=label, linewidth=1.0, marker=marker, markersize=3)
    if title == 'Compression':
      for i, (name, value) in enumerate(baselines.items()):
        if name != 'this model':
          axes.axhline(value, linestyle='--', linewidth=0.9, color=f'C{i + 3}', label=f'{name} {value:.2f}')
      if min(min(values) for _, values in drawn.values()) < 4:  # the first steps would flatten the rest
        axes.set_ylim(top=min(axes.get_ylim()[1], 5))
    axes.set(title=title, xlabel='step', ylabel=unit, yscale='log' if logarithmic else 'linear')
    axes.spines[['top', 'right']].set_visible(False)
    if len(drawn) > 1 or title == 'Compression':
      axes.legend(frameon=False, fontsize=8, ncols=1 + len(drawn) // 6)
    out = io.StringIO()
    figure.savefig(out, format='svg', metadata={'Date': None})
    pictures.append(out.getvalue()[out.getvalue().index('<svg') :])
  return pictures


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
  table = gained(rows)
  if not table:
    return ''
  head = '<tr><th>held-out text</th><th>perplexity before</th><th>after</th><th></th></tr>'
  said = lambda change: f'{change:+.1%}, {"gained" if change < 0 else "forgotten"}'
  cells = lambda *figures: ''.join(f'<td class="n">{x:.2f}</td>' for x in figures)
  line = lambda kind, before, after, change: (
    f'<tr><td>{html.escape(kind)}</td>{cells(before, after)}<td>{said(change)}</td></tr>'
  )
  return f'<h2>Gained and forgotten</h2><table>{head}{"".join(line(*one) for one in table)}</table>'


def _warned(rows: Rows, config: epath.Path) -> str:
  """What the last steps of reinforcement learning warn of."""
  target = (read_json(config).get('rl') or {}).get('kl_target', 0.0) if config.exists() else 0.0
  lines = ''.join(f'<li>{html.escape(line)}</li>' for line in collapse.warnings(rows, kl_target=target).values())
  return f'<h2>Warnings</h2><ul>{lines}</ul>' if lines else ''


def _samples(rows: Rows) -> str:
  boxes = []
  for row in reversed(rows):
    text = f'<b>{html.escape(row["prompt"])}</b>{html.escape(row["text"])}'
    worth = f', reward {_number(row["reward"])}' if 'reward' in row else ''
    boxes.append(f'<div class="sample"><small>step {row["step"]}{worth}</small>{text}</div>')
  older = f'<details><summary>{len(boxes) - 6} earlier ones</summary>{"".join(boxes[6:])}</details>'
  shown = ''.join(boxes[:6]) + (older if len(boxes) > 6 else '')
  return f'<h2>Samples</h2>{shown}' if boxes else ''


def _table(title: str, values: Mapping[str, Any]) -> str:
  def cell(value: Any) -> str:
    kind = ' class="n"' if isinstance(value, int | float) else ''
    return f'<td{kind}>{html.escape(_number(value) if kind else str(value))}</td>'

  body = ''.join(f'<tr><td>{html.escape(k)}</td>{cell(v)}</tr>' for k, v in values.items())
  return f'<div><h3>{html.escape(title)}</h3><table>{body}</table></div>'


def _chapter(path: epath.Path) -> str:
  """A table with a header, from JSON that a run holds."""
  if not path.exists():
    return ''
  found = read_json(path)
  line = lambda tag, cells: '<tr>' + ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells) + '</tr>'
  body = line('th', found['header']) + ''.join(line('td', cells) for cells in found['rows'])
  return f'<h2>Pre-trained against fine-tuned</h2><table class="chapter">{body}</table>'


def _rewinds(path: epath.Path) -> str:
  if not path.exists():
    return ''
  lines = ''.join(
    f'<li>loss spike at step {r["spike"]}: back to step {r["step"]}, on with batch {r["cursor"]}</li>'
    for r in read_json(path, list)
  )
  return f'<h2>Rewinds</h2><ul>{lines}</ul>'


def _config(path: epath.Path) -> str:
  if not path.exists():
    return ''
  return (
    f'<h2>Configuration</h2><details><summary>config.json</summary><pre>{html.escape(path.read_text())}</pre></details>'
  )


def _number(value: float | None) -> str:
  if value is None:
    return ''
  return f'{value:,.0f}' if float(value).is_integer() else f'{value:.3f}'
