"""Curves as pictures within the page: which metrics go together, what tells them apart, and events beside them."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from jaxlm.report import markup, runs

POINTS = 600  # of a curve in a picture; of longer ones the least and the most of each piece are drawn
MARKS = 80  # of a kind of event


class Kind(NamedTuple):
  """Metrics that share a picture."""

  title: str
  unit: str
  patterns: tuple[str, ...]
  logarithmic: bool = False
  needs: str = '*'  # a metric that has to be there too
  better: int = 0  # 1: more of it is better, -1: less


LEARNING = (
  Kind('Loss', 'nats a token', ('train/loss', 'eval/loss'), better=-1),
  Kind('Compression', 'bits per byte', ('train/bits_per_byte', 'eval/bits_per_byte'), better=-1),
  Kind('Rewards', 'of answers', ('*/rewards/chosen', '*/rewards/rejected')),
  Kind('Margins', 'chosen - rejected', ('train/rewards/margins', 'eval/rewards/margins'), better=1),
  Kind('Told right', 'share of pairs', ('train/rewards/accuracies', 'eval/rewards/accuracies'), better=1),
  Kind('Chosen answers', 'nats a token', ('train/nll', 'eval/nll'), needs='*/rewards/*', better=-1),
  Kind('Reward', 'mean of answers', ('reward/mean', 'eval/reward/mean'), better=1),
  Kind('Distance to the reference', 'KL, nats a token', ('policy/kl', 'train/policy/kl')),
  Kind('Entropy', 'nats a token', ('train/policy/entropy',)),
  Kind('New over old policy', 'ratio', ('train/policy/ratio_min', 'train/policy/ratio_max')),
  Kind('Clipped', 'share of tokens', ('train/policy/clip_*',)),
  Kind('Length of answers', 'tokens', ('answers/length', 'eval/answers/length')),
  Kind('Cut answers, groups alike', 'share', ('answers/truncated', 'reward/equal_groups')),
  Kind('Value function', 'explained variance', ('train/value/explained_variance',), better=1),
  Kind('Sampler and training program', 'apart, nats a token', ('train/policy/sampler_gap*',), True),
  Kind('From the teacher', 'nats a token', ('train/distill/divergence', 'eval/distill/divergence'), better=-1),
  Kind('By kind of text', 'held-out bits per byte', ('eval/*/bits_per_byte',), better=-1),
  Kind('Gradient norm', 'before clipping', ('train/grad_norm',), True),
  Kind('Learning rate', '', ('train/lr',)),
  Kind('Epochs', 'times read', ('data/epochs', 'data/*/epochs')),
)
MACHINE = (
  Kind('Throughput', 'tokens a second', ('perf/tokens_per_s',), better=1),
  Kind('Utilisation', 'share of the peak FLOP/s', ('perf/mfu',), better=1),
  Kind('Waiting for data', 'share of the step', ('perf/data_wait',)),
  Kind('A step and its parts', 'seconds', ('perf/rollout_s', 'perf/scoring_s', 'perf/reading_s', 'perf/step_s')),
  Kind('Memory', 'GiB', ('perf/device_gib', 'perf/host_gib')),
)


class Line(NamedTuple):
  """One curve."""

  label: str
  steps: Sequence[int]
  values: Sequence[float]
  colour: int
  dotted: bool = False  # at each value, as of evaluations


class Picture(NamedTuple):
  """Curves with the same axes."""

  kind: Kind
  lines: Sequence[Line]
  levels: Mapping[str, float] = {}  # lines across


def found(kind: Kind, names: Iterable[str]) -> list[str]:
  """The metrics of a kind that are there."""
  names = list(names)
  if not any(fnmatchcase(name, kind.needs) for name in names):
    return []
  return list(dict.fromkeys(name for pattern in kind.patterns for name in names if fnmatchcase(name, pattern)))


def labels(names: Sequence[str]) -> list[str]:
  """What tells names apart: their parts less those that all begin and all end with, in one or more places.

  train/loss, eval/loss: train, eval; a name of which nothing is left is said to be of training.
  """
  parts = [name.split('/') for name in names]
  if len(names) < 2:
    return ['' for _ in names]
  if len({len(one) for one in parts}) == 1:
    same = [len(set(column)) == 1 for column in zip(*parts, strict=True)]
    return [' '.join(p for p, alike in zip(one, same, strict=True) if not alike) for one in parts]
  least = min(map(len, parts))
  tail = next((i for i in range(least) if len({one[-1 - i] for one in parts}) > 1), least)
  kept = [one[: len(one) - tail] for one in parts]
  plain = 'rollouts' if any(one == ['train'] for one in kept) else 'train'
  return [' '.join(one) or plain for one in kept]


def of_run(kinds: Iterable[Kind], run: runs.Run) -> list[Picture]:
  """The pictures of one run."""
  pictures = []
  for kind in kinds:
    names = [name for name in found(kind, run.names) if runs.series(run.rows, name)[0]]
    if not names:
      continue
    lines = [
      Line(label, *runs.series(run.rows, name), colour, name.startswith('eval/'))
      for colour, (name, label) in enumerate(zip(names, labels(names) if names[1:] else names, strict=True))
    ]
    levels = run.facts.get('held-out bits per byte', {}) if kind.title == 'Compression' else {}
    pictures.append(Picture(kind, lines, {k: v for k, v in levels.items() if k != 'this model'}))
  return pictures


def draw(picture: Picture, events: Mapping[str, Sequence[int]] | None = None) -> str:
  """A picture with its title, its legend with the newest values, and its curves."""
  kind = picture.kind
  unit = f' <small>{markup.escape(kind.unit)}</small>' if kind.unit else ''
  key = ''.join(
    _legend(markup.chip(line.colour, line.dotted) if len(picture.lines) > 1 else '', line.label, line.values[-1])
    for line in picture.lines
  )
  for i, (name, value) in enumerate(picture.levels.items()):
    key += _legend(markup.chip(len(picture.lines) + i, dashed=True), name, value)
  title = f'<figcaption>{markup.escape(kind.title)}{unit}</figcaption>'
  return f'<figure>{title}<div class="key">{key}</div>{_svg(picture, events or {})}</figure>'


def _legend(chip: str, label: str, value: float) -> str:
  return f'<span>{chip}{markup.escape(label)} <b>{markup.number(value)}</b></span>'


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
  """At most POINTS of a curve, spikes among them: the first, the last, and both ends of each piece's values."""
  if len(steps) <= POINTS:
    return list(steps), list(values)
  size = -(-len(steps) // (POINTS // 2 - 1))
  kept = {0, len(steps) - 1}
  for begin in range(0, len(steps), size):
    piece = range(begin, min(begin + size, len(steps)))
    kept |= {min(piece, key=values.__getitem__), max(piece, key=values.__getitem__)}
  return [steps[i] for i in sorted(kept)], [values[i] for i in sorted(kept)]


def _colour(name: str) -> str:
  """A stand-in that the drawing program knows, for a colour of the page that it does not."""
  names = [*(f's{i}' for i in range(markup.COLOURS)), 'faint', 'line', 'alert', 'fg']
  return f'#fe01{names.index(name):02x}'


def _svg(picture: Picture, events: Mapping[str, Sequence[int]]) -> str:
  import matplotlib
  from matplotlib.figure import Figure
  from matplotlib.ticker import LogLocator, MaxNLocator

  fg, faint, line = _colour('fg'), _colour('faint'), _colour('line')
  style: Any = {
    'xtick.color': faint,
    'ytick.color': faint,
    'axes.edgecolor': line,
    'xtick.labelcolor': fg,
    'font.size': 8,
  }
  style |= {'ytick.labelcolor': fg, 'svg.hashsalt': 'jaxlm', 'axes.facecolor': 'none', 'axes.labelcolor': faint}
  with matplotlib.rc_context(style):
    figure = Figure(figsize=(5.2, 2.5), layout='constrained', facecolor='none')
    axes = figure.subplots()
    _plot(axes, picture)
    _mark(axes, events)
    axes.set_xlabel('step')
    if _logarithmic(picture):
      axes.set_yscale('log')
      axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
      axes.yaxis.set_major_formatter('{x:g}')
      axes.yaxis.set_minor_formatter('{x:g}')
    if picture.kind in MACHINE:
      axes.set_ylim(bottom=0)
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', color=line, linewidth=0.5, alpha=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 2.5, 5, 10)))
    out = io.StringIO()
    figure.savefig(out, format='svg', metadata=dict.fromkeys(('Date', 'Creator', 'Format', 'Type')))
  return _inline(out.getvalue(), f'{picture.kind.title} by step')


def _plot(axes: Any, picture: Picture) -> None:
  for line in picture.lines:
    colour, marker = _colour(f's{line.colour % markup.COLOURS}'), 'o' if line.dotted else ''
    dashes = 'dashed' if line.dotted and len(line.steps) > 1 else 'solid'
    marker = marker or ('o' if len(line.steps) == 1 else '')
    axes.plot(
      *thinned(line.steps, line.values), color=colour, linewidth=1.1, linestyle=dashes, marker=marker, markersize=2.6
    )
  for i, value in enumerate(picture.levels.values()):
    axes.axhline(value, linestyle='dotted', linewidth=1, color=_colour(f's{(len(picture.lines) + i) % markup.COLOURS}'))
  if picture.kind.title == 'Compression' and min(min(line.values) for line in picture.lines) < 4:
    axes.set_ylim(top=min(axes.get_ylim()[1], 5))  # the first steps would flatten the rest


def _logarithmic(picture: Picture) -> bool:
  """Whether the kind is, and these values span enough for it."""
  if not picture.kind.logarithmic:
    return False
  least, most = (of(of(line.values) for line in picture.lines) for of in (min, max))
  return least > 0 and most > 4 * least


def _mark(axes: Any, events: Mapping[str, Sequence[int]]) -> None:
  """Saves and evaluations along the foot, skipped steps along the top, rewinds and starts across."""
  foot, faint = axes.get_xaxis_transform(), _colour('faint')
  looks = {
    'save': (0.03, '^', faint, 3.5),
    'evaluation': (0.03, '|', faint, 5),
    'skipped step': (0.96, 'x', _colour('alert'), 4.5),
  }
  first, last = axes.get_xlim()
  for name, (height, marker, colour, size) in looks.items():
    steps = [step for step in few(events.get(name, ())) if first <= step <= last]
    if steps:
      axes.plot(
        steps, [height] * len(steps), marker, color=colour, markersize=size, transform=foot, zorder=5, clip_on=False
      )
  for name, colour, dashes in (('rewind', _colour('alert'), 'dashed'), ('start', faint, 'dotted')):
    for step in few(events.get(name, ())):
      axes.axvline(step, color=colour, linestyle=dashes, linewidth=0.8)


def few(steps: Sequence[int]) -> list[int]:
  """At most MARKS of them, evenly."""
  every = -(-len(steps) // MARKS)
  return list(steps[:: every or 1])


def events_key(events: Mapping[str, Sequence[int]]) -> str:
  """What the marks mean, of those that are there, with their number."""
  signs = {
    'save': ('&#9650;', ''),
    'evaluation': ('&#10072;', ''),
    'skipped step': ('&#10005;', ' class="alert"'),
    'rewind': ('&#9482;', ' class="alert"'),
    'start': ('&#8942;', ''),
  }
  plural = {'start': 'continued'}
  named = lambda name, count: plural.get(name, f'{name}{"s" * (count != 1)}')
  spans = [
    f'<span><span{look}>{sign}</span> {named(name, len(events[name]))} <b>{len(events[name])}</b></span>'
    for name, (sign, look) in signs.items()
    if events.get(name)
  ]
  return f'<div class="key events">{"".join(spans)}</div>' if spans else ''


def _inline(svg: str, said: str) -> str:
  """The picture as a part of the page: its colours those of the page, no names that another picture may have."""
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|LineCollection)_\d+"', '', svg)
  svg = re.sub(r'<metadata>.*?</metadata>\s*', '', svg, flags=re.DOTALL)
  for name in (*(f's{i}' for i in range(markup.COLOURS)), 'faint', 'line', 'alert', 'fg'):
    svg = svg.replace(_colour(name), f'var(--{name})')
  return svg.replace('<svg ', f'<svg role="img" aria-label="{markup.escape(said)}" ', 1)
