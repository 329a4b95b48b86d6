"""Several runs on one page: where they come from, what they were set to, how they went, how they ended."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from jaxlm.errors import InputError
from jaxlm.report import curves, lineage, markup, page, runs
from jaxlm.report.runs import Run, series

FILE = 'comparison.html'
KINDS = (*curves.LEARNING, *curves.MACHINE)
ENVIRONMENT = ('devices', 'mesh', 'dtype', 'jax')


def write(paths: Sequence[Any], out: Any = None) -> epath.Path:
  """Writes the page that compares runs, in the order given, and the own page of each; returns the first's path.

  Raises InputError if a folder holds no metrics, or is named twice.
  """
  found, out = [runs.read(path) for path in paths], epath.Path(FILE if out is None else out)
  keys = [lineage.key_of(run.path) for run in found]
  if len(set(keys)) < len(keys):
    raise InputError('the same run is named twice: each once')
  nodes = lineage.family([run.path for run in found], descendants=False)
  marks = {key: markup.chip(i) for i, key in enumerate(keys)}
  names = runs.called([run.path for run in found])
  for run in found:
    page.write(run.path)
  drawn, alone = _pictures(found, names)
  parts = [
    f'<h1>{len(found)} runs</h1>{_heads(found, names, out)}',
    markup.section('Lineage', lineage.tree(nodes, out, marks, keys)),
    markup.section('At the end', _ends(found, names)),
    markup.section('Curves', f'<div class="curves">{drawn}</div>' if drawn else '', alone),
    markup.section('Time', _times(found, names)),
    markup.section('Set differently', _settings(found, names)),
  ]
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(markup.document(' · '.join(names), parts))
  return out


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
  lines = [('steps', [run.rows[-1]['step'] for run in found], 0)]
  lines += [('parameters', [run.facts.get('model', {}).get('parameters') for run in found], 0)]
  alike = len({run.stage.removesuffix(' (LoRA)') for run in found}) == 1  # losses of other stages say nothing here
  for kind in KINDS:
    better = kind.better if alike or kind in curves.MACHINE else 0
    for name in _metrics(kind, found, 1) if kind.title != 'Learning rate' else ():
      said, of = (f'{name}, median', _median) if kind in curves.MACHINE else (name, Run.last)
      lines.append((said, [of(run, name) for run in found], better))
  body = ''.join(_end(*line) for line in lines if any(value is not None for value in line[1]))
  head = ''.join(f'<th class="n">{markup.chip(i)}{markup.escape(name)}</th>' for i, name in enumerate(names))
  said = 'The newest value of each; bold: the best of a line in which runs can be compared.'
  table = f'<div class="wide"><table class="ruled ends"><tr><th></th>{head}</tr>{body}</table></div>'
  return f'<p class="faint">{said}</p>{table}'


def _median(run: Run, name: str) -> float | None:
  values = sorted(series(run.rows, name)[1])
  return values[len(values) // 2] if values else None


def _end(name: str, values: Sequence[float | None], better: int) -> str:
  there = [value for value in values if value is not None]
  best = max(there, key=lambda value: better * value) if better and len(there) > 1 else None
  plain = map(markup.number, values)
  shown = (f'<b>{x}</b>' if value is not None and value == best else x for value, x in zip(values, plain, strict=True))
  cells = ''.join(f'<td class="n">{one}</td>' for one in shown)
  return f'<tr><td>{markup.escape(name)}</td>{cells}</tr>'


def _metrics(kind: curves.Kind, found: Sequence[Run], least: int) -> list[str]:
  """Those of a kind that so many runs have values of."""
  of_each = [[n for n in curves.found(kind, run.names) if run.last(n) is not None] for run in found]
  names = dict.fromkeys(name for one in of_each for name in one)
  return [name for name in names if sum(name in one for one in of_each) >= least]


def _pictures(found: Sequence[Run], names: Sequence[str]) -> tuple[str, str]:
  """What two runs or more have, a colour a run, what is held out dashed; and which metrics only one has."""
  drawn, alone = [], []
  for kind in KINDS:
    groups: dict[str, list[str]] = {}
    for name in (shared := _metrics(kind, found, 2)):
      groups.setdefault(name.removeprefix('train/').removeprefix('eval/'), []).append(name)
    for label, together in zip(curves.labels(list(groups)), groups.values(), strict=True):
      lines = [line for i, run in enumerate(found) for line in _lines(run, names[i], i, together)]
      title = f'{kind.title}: {label}' if label else kind.title
      drawn.append(curves.draw(curves.Picture(kind._replace(title=title), lines)))
    alone += [name for name in _metrics(kind, found, 1) if name not in shared]
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
  on = lambda run: {f'on {name}': run.facts.get('environment', {}).get(name) for name in ENVIRONMENT}
  flat = [_flat(run.config) | on(run) for run in found]
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
