"""Several runs on one page: where they come from, what they were set to, how they went, how they ended."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from jaxlm.errors import InputError
from jaxlm.report import curves, lineage, markup, page, runs
from jaxlm.report.runs import Run, series

FILE = 'comparison.html'
ENVIRONMENT = ('devices', 'mesh', 'dtype', 'jax')


def write(paths: Sequence[Any], out: Any = FILE) -> epath.Path:
  """Writes the page that compares runs, in the order given, and the own page of each; returns the first's path.

  Raises InputError if a folder holds no metrics, or is named twice.
  """
  found, out = [runs.read(path) for path in paths], epath.Path(out)
  nodes = lineage.family([run.path for run in found], descendants=False)
  keys = list(nodes) if len(nodes) == len(found) else [key for key in nodes if _is(nodes[key], found)]
  if len(keys) < len(found):
    raise InputError('the same run is named twice: each once')
  order = {key: i for i, run in enumerate(found) for key in keys if _is(nodes[key], [run])}
  marks = {key: markup.chip(i) for key, i in order.items()}
  names = runs.called([run.path for run in found])
  written = {key: page.write(nodes[key].path).name for key in keys}
  drawn, alone = _pictures(found, names)
  parts = [
    f'<h1>{len(found)} runs</h1>{_heads(found, names, out)}',
    markup.section('Lineage', lineage.tree(nodes, out, marks, written)),
    markup.section('At the end', _ends(found, names)),
    markup.section('Curves', f'<div class="curves">{drawn}</div>' if drawn else '', alone),
    markup.section('Time', _times(found, names)),
    markup.section('Set differently', _settings(found, names)),
  ]
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(markup.document(' · '.join(names), parts))
  return out


def _is(node: lineage.Node, found: Sequence[Run]) -> bool:
  return any(node.path is not None and node.path == run.path for run in found)


def _heads(found: Sequence[Run], names: Sequence[str], out: epath.Path) -> str:
  """Each run in its colour, linked to its own page."""
  lines = []
  for i, (run, name) in enumerate(zip(found, names, strict=True)):
    target = markup.escape(lineage.reference(run.path / page.FILE, out))
    tag = f' <span class="tag">{markup.escape(run.stage)}</span>' if run.stage else ''
    lines.append(f'<p>{markup.chip(i)}<a href="{target}">{markup.escape(name)}</a>{tag}</p>')
  return ''.join(lines)


def _ends(found: Sequence[Run], names: Sequence[str]) -> str:
  """The newest values side by side; the best of a line is bold where better has a direction."""
  lines = [
    ('steps', [run.rows[-1]['step'] for run in found], 0),
    ('parameters', [run.facts.get('model', {}).get('parameters') for run in found], 0),
  ]
  for name in _shared(found, least=1):
    kind = next(kind for kind in (*curves.LEARNING, *curves.MACHINE) if name in curves.found(kind, [name, kind.needs]))
    if name not in ('train/lr',):
      lines.append((name, [run.last(name) for run in found], kind.better))
  lines += [('perf/device_gib', [run.last('perf/device_gib') for run in found], -1)]
  body = ''.join(_end(*line) for line in lines if any(value is not None for value in line[1]))
  head = ''.join(f'<th class="n">{markup.chip(i)}{markup.escape(name)}</th>' for i, name in enumerate(names))
  said = '<p class="faint">The newest value of each; bold: the best of the line, where one is better than another.</p>'
  return f'{said}<div class="wide"><table class="ruled"><tr><th></th>{head}</tr>{body}</table></div>'


def _end(name: str, values: Sequence[float | None], better: int) -> str:
  there = [value for value in values if value is not None]
  best = max(there, key=lambda value: better * value) if better and len(there) > 1 else None
  shown = lambda value: (
    f'<b>{markup.number(value)}</b>' if value is not None and value == best else markup.number(value)
  )
  cells = ''.join(f'<td class="n">{shown(value)}</td>' for value in values)
  return f'<tr><td>{markup.escape(name)}</td>{cells}</tr>'


def _shared(found: Sequence[Run], least: int) -> list[str]:
  """The metrics of pictures that so many runs have, in the order of the pictures."""
  there = dict.fromkeys(name for run in found for name in run.names)
  wanted = dict.fromkeys(
    name for kind in (*curves.LEARNING, *curves.MACHINE) for name in curves.found(kind, there) if name in there
  )
  return [name for name in wanted if sum(bool(series(run.rows, name)[0]) for run in found) >= least]


def _pictures(found: Sequence[Run], names: Sequence[str]) -> tuple[str, str]:
  """What two runs or more have, a colour a run, what is held out dashed; and which metrics only one has."""
  drawn, shared = [], _shared(found, least=2)
  for kind in (*curves.LEARNING, *curves.MACHINE):
    mine = [name for name in curves.found(kind, [*shared, kind.needs]) if name in shared]
    groups: dict[str, list[str]] = {}
    for name in mine:
      groups.setdefault(name.removeprefix('train/').removeprefix('eval/'), []).append(name)
    for label, together in zip(curves.labels(list(groups)), groups.values(), strict=True):
      lines = [line for i, run in enumerate(found) for line in _lines(run, names[i], i, together)]
      title = f'{kind.title}: {label}' if label else kind.title
      drawn.append(curves.draw(curves.Picture(kind._replace(title=title), lines)))
  alone = [name for name in _shared(found, least=1) if name not in shared]
  said = f'<p class="faint">Of one run alone, on its own page: {markup.escape(", ".join(alone))}</p>' if alone else ''
  return ''.join(drawn), said


def _lines(run: Run, name: str, colour: int, metrics: Sequence[str]) -> list[curves.Line]:
  """One run's curves of a picture."""
  lines = []
  for metric in metrics:
    steps, values = series(run.rows, metric)
    if steps:
      held_out = metric.startswith('eval/')
      label = f'{name}, held out' if held_out and len(metrics) > 1 else name
      lines.append(curves.Line(label, steps, values, colour, held_out))
  return lines


def _times(found: Sequence[Run], names: Sequence[str]) -> str:
  """A bar a run: what its time went into."""
  bars = []
  for i, (run, name) in enumerate(zip(found, names, strict=True)):
    parts = runs.spent(run)
    said = {what: markup.duration(seconds) for what, seconds in parts.items()}
    if parts:
      whole = markup.duration(sum(parts.values()))
      bars.append(f'<h3>{markup.chip(i)}{markup.escape(name)}: {whole}</h3>{markup.shares(parts, said)}')
  return ''.join(bars)


def _settings(found: Sequence[Run], names: Sequence[str]) -> str:
  """Every setting, and what it ran on, in which they are not all alike."""
  flat = [
    _flat(run.config) | {f'on {k}': run.facts.get('environment', {}).get(k) for k in ENVIRONMENT} for run in found
  ]
  settings = list(dict.fromkeys(name for one in flat for name in one))
  told = lambda value: '' if value is None else str(value)
  lines = [
    (name, *(told(one.get(name)) for one in flat))
    for name in settings
    if name != 'run' and any(one.get(name) != flat[0].get(name) for one in flat)
  ]
  return markup.grid(('', *names), lines)


def _flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  values: dict[str, Any] = {}
  for name, value in config.items():
    values |= _flat(value, f'{prefix}{name}.') if isinstance(value, Mapping) else {f'{prefix}{name}': value}
  return values
