"""What a person sees in the terminal while something runs: lines, and a progress bar with the time left."""

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  DownloadColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
  TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from jaxlm.errors import InputError

if TYPE_CHECKING:
  from jaxlm.inspector import Token

PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal to draw a bar on

SHOWN = {  # of metrics that some stages have: what they are called in a line
  'train/bits_per_byte': ('bpb', '.3f'),
  'reward/mean': ('reward', '.3f'),
  'policy/kl': ('kl', '.3f'),
  'train/policy/entropy': ('entropy', '.2f'),
  'answers/length': ('length', '.0f'),
  'train/rewards/accuracies': ('right', '.0%'),
  'train/rewards/margins': ('margin', '.3f'),
}


def clock(seconds: float) -> str:
  """Seconds as 1:02:03 or 2:03."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Lines of a Markdown table; numbers to the right, integers with thousands, other ones with three digits."""

  def cell(value: Any) -> str:
    return f'{value:,}' if isinstance(value, int) else f'{value:.3f}' if isinstance(value, float) else str(value)

  cells = [[cell(value) for value in row] for row in (header, *rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  numeric = [all(isinstance(x, int | float) or x == '' for x in column) for column in zip(*rows, strict=True)]
  rule = ['-' * (width - 1) + ':' if right else '-' * width for width, right in zip(widths, numeric, strict=True)]
  align = lambda text, width, right: text.rjust(width) if right else text.ljust(width)
  lines = [[align(*one) for one in zip(row, widths, numeric, strict=True)] for row in cells]
  return '\n'.join(f'| {" | ".join(line)} |' for line in (lines[0], rule, *lines[1:]))


def wrapped(header: Sequence[str], rows: Sequence[Sequence[str]], narrowest: int = 120) -> None:
  """Prints a table whose cells are texts that may be longer than a line."""
  console = Console(highlight=False)
  if not console.is_terminal:
    console.width = max(narrowest, console.width)
  shown = Table(*header, show_lines=True)
  for row in rows:
    shown.add_row(*map(Text, row))
  console.print(shown)


def figures(row: dict[str, float]) -> str:
  """A row of training metrics in one line."""
  shown = [
    f'loss {row["train/loss"]:.3f}',
    *(f'{short} {row[name]:{form}}' for name, (short, form) in SHOWN.items() if name in row),
    f'grad {row["train/grad_norm"]:.2f}',
    f'lr {row["train/lr"]:.1e}',
    f'{row["perf/tokens_per_s"]:,.0f} tok/s',
  ]
  if 'perf/mfu' in row:
    shown.append(f'mfu {row["perf/mfu"]:.0%}')
  shown.append(f'data {row["perf/data_wait"]:.0%}')
  if row['train/skipped']:
    shown.append(f'skipped {row["train/skipped"]:.0f}')
  if row.get('train/failed_saves'):
    shown.append(f'failed saves {row["train/failed_saves"]:.0f}')
  return '  '.join(shown)


@contextmanager
def reading() -> Generator[Callable[[int, int], None]]:
  """A progress bar over bytes, with speed and time left: yields `update(done, total)`. Nothing without a terminal."""
  console = Console()
  columns = BarColumn(bar_width=30), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
  with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
    task = bar.add_task('', total=None)
    yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def counting(what: str) -> Generator[Callable[[int, int], None]]:
  """A progress bar over things, with time left: yields `update(done, total)`. Nothing without a terminal."""
  console = Console(stderr=True)
  columns = TextColumn(what), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn()
  with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
    task = bar.add_task('', total=None)
    yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def terminable(*signals: signal.Signals) -> Generator[Callable[[], int]]:
  """Yields `asked()`: the number of the SIGTERM (or one of `signals`) that came, time to save and leave; before, 0.

  A second one ends the process at once.

  A handler of Python's runs only between the main thread's bytecodes, so not inside of a compilation, and there two
  signals count as one. The number of every signal is written to a pipe at once, and a thread reads it there.
  """
  caught = {signal.SIGTERM, *signals}
  asked: list[int] = []
  read, write = os.pipe()
  os.set_blocking(write, False)

  def listen() -> None:
    while number := os.read(read, 1):
      if number[0] in caught:
        if asked:
          os._exit(128 + number[0])
        asked.append(number[0])

  listener = threading.Thread(target=listen, daemon=True)
  listener.start()
  pipe_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  before = {one: signal.signal(one, lambda *_: None) for one in caught}
  try:
    yield lambda: asked[0] if asked else 0
  finally:
    for one, handler in before.items():
      signal.signal(one, handler)
    signal.set_wakeup_fd(pipe_before)
    os.close(write)
    listener.join()
    os.close(read)


def rows_shown(rows: 'Mapping[str, Sequence[Token]]', *, ids: bool = False) -> None:
  """Prints rows by their names: learned tokens bright, others dim, each segment under a line; with `ids` one a line."""
  console = Console(highlight=False)
  for name, tokens in rows.items():
    console.print(f'\n{name}', style='bold', markup=False)
    text, segment = Text(), 0
    for token in tokens:
      if token.segment != segment:
        segment = token.segment
        text.append(f'{"" if text.plain.endswith(chr(10)) or not text else chr(10)}-- segment {segment}\n', 'cyan')
      style = 'bold green' if token.loss else 'dim'
      if ids:
        mark = 'loss' if token.loss else '    '
        text.append(f'{token.position:6} {token.id:7} {mark}  {token.text!r}\n', style)
      else:
        text.append(token.text, style)
    console.print(text, soft_wrap=ids)
    if not console.is_terminal and not ids:
      console.print('learned: ' + ' | '.join(map(repr, learned_texts(tokens))), markup=False, soft_wrap=True)


def learned_texts(tokens: 'Sequence[Token]') -> list[str]:
  """The texts of the runs of tokens that are learned."""
  runs = itertools.groupby(tokens, lambda token: (token.loss, token.segment))
  return [''.join(token.text for token in run) for (loss, _), run in runs if loss]


class Training:
  """A progress bar for `total` steps; without a terminal, a line every few seconds.

  The time left is that of the steps still to do at the rate so far, evaluations, samples and saves included; the
  first step, which compiles, is left out of the rate.
  """

  def __init__(self, total: int, *, quiet: bool = False):
    self.total = total
    self.console = Console(highlight=False, quiet=quiet)
    self._first: tuple[int, float] | None = None
    self._printed = 0.0
    text = [TextColumn('{task.fields[figures]}'), TextColumn('left {task.fields[left]}')]
    self._bar = Progress(MofNCompleteColumn(), BarColumn(bar_width=20), *text, console=self.console)
    self._task = self._bar.add_task('', total=total, figures='compiling the step ...', left='?')

  def __enter__(self) -> 'Training':
    if self.console.is_terminal:
      self._bar.start()
    return self

  def __exit__(self, *_: Any) -> None:
    if self.console.is_terminal:
      self._bar.stop()

  def say(self, line: str) -> None:
    """A line above the bar, at once."""
    self.console.print(line, markup=False, soft_wrap=True)

  def step(self, step: int, row: dict[str, float]) -> None:
    """Moves the bar to `step`."""
    now = time.monotonic()
    left = '?'
    if self._first is None:
      self._first = step, now
    elif step > self._first[0]:
      left = clock((now - self._first[1]) / (step - self._first[0]) * (self.total - step))
    if self.console.is_terminal:
      self._bar.update(self._task, completed=step, figures=figures(row), left=left)
    elif now - self._printed > PLAIN_EVERY or step == self.total:
      self._printed = now
      self.say(f'step {step}/{self.total}  {figures(row)}  left {left}')


class Interrupts:
  """What ctrl-c does in a conversation: KeyboardInterrupt where a line is awaited, elsewhere only a note.

  An exception would come up wherever the main thread is: in the middle of a compilation, of a template's answer.
  """

  def __init__(self) -> None:
    self.awaiting = self.pressed = False

  def __enter__(self) -> 'Interrupts':
    self._before = signal.signal(signal.SIGINT, self._noted)
    return self

  def __exit__(self, *_: Any) -> None:
    signal.signal(signal.SIGINT, self._before)

  def _noted(self, *_: Any) -> None:
    if self.awaiting:
      raise KeyboardInterrupt
    self.pressed = True

  def line(self) -> str:
    """A line of input. Raises EOFError at its end, KeyboardInterrupt on ctrl-c."""
    self.awaiting = True
    try:
      return input('> ' if sys.stdin.isatty() else '')
    finally:
      self.awaiting = self.pressed = False


def conversation(answer: Callable[[int, list[dict[str, str]]], Iterator[str]], system: str | None = None) -> None:
  """Turns in the terminal until the input ends: `answer(turn, messages)` gives the pieces of what is said back.

  Ctrl-c stops an answer, whose beginning stays in the history; where nothing is being answered it ends the talk.
  """
  start = [{'role': 'system', 'content': system}] if system else []
  messages, turn = list(start), 0
  with Interrupts() as interrupts:
    while True:
      try:
        said = interrupts.line()
      except (EOFError, KeyboardInterrupt):
        print()
        return
      if said.strip() == '/exit':
        return
      if said.strip() == '/reset':
        messages = list(start)
      elif said.strip():
        messages.append({'role': 'user', 'content': said})
        try:
          told = _told(answer(turn, messages), interrupts)
        except InputError as error:  # too long a talk, or messages that the template refuses
          print(f'{error} (/reset forgets the conversation)\n')
          messages.pop()
          continue
        messages.append({'role': 'assistant', 'content': told})
        turn += 1


def _told(pieces: Iterator[str], interrupts: Interrupts) -> str:
  """Prints an answer as it comes, up to a ctrl-c; returns what was printed of it."""
  told = ''
  for piece in pieces:
    if interrupts.pressed:
      print(' ...', end='')
      break
    told += piece
    print(piece, end='', flush=True)
  print('\n')
  return told


def summary_shown(summary: Any) -> None:
  """Prints tables of what was read, left out, and kept of a prepared folder (its `Summary`), and what it lacks."""
  read, kinds = summary.read(), {split: summary.kinds(split) for split in summary.splits}
  whole = lambda rows: [*rows, ('all', *(sum(column) for column in list(zip(*rows, strict=True))[1:]))]
  rows = [(kind, *n.values()) for kind, n in read.items()]
  cut = summary.chat and summary.chat['truncated']
  header = ('kind', 'read', *summary.dropped, 'kept') + ('of them truncated',) * (cut is not None)
  print(table(header, whole([(*row, cut.get(row[0], 0)) for row in rows] if cut is not None else rows)))
  print()
  columns = ('documents', 'tokens', 'bytes') + ('learned',) * (summary.chat is not None)
  header = ('kind', *(f'{split} {what}' for split in kinds for what in columns))
  learned = lambda split, kind: [summary.chat['learned'][split].get(kind, 0)] if summary.chat else []
  figures = lambda kind: (n for split, of in kinds.items() for n in (*of[kind].figures, *learned(split, kind)))
  print(table(header, whole([(kind, *figures(kind)) for kind in kinds['train']])))
  if (share := summary.inputs['val_fraction']) and not summary.splits['validation'].documents:
    fell = f'none of {summary.splits["train"].documents} documents fell into it'
    print(f'\nnothing is held out: val_fraction is {share:g}, {fell}: give more, or a larger val_fraction')
