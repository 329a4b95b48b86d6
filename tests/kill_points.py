"""SIGKILL at each distinct write, rename and fsync of training and of preparing, and at random moments.

    python tests/kill_points.py [--short] [--in-a-row 6]

A library preloaded into `jaxlm` (kill_points.c) names every call that changes a file. One undisturbed process gives the
list of points and what must come out. Then the process dies at each point in turn, and everything acknowledged before
must still be whole; then the same command, started again, must end as if nothing had happened.
"""

import argparse
import collections
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np
from forked import Forks
from tiny_run import BASE, SOURCE, furnish, quick, rows_and_samples, saved_state, unfinished

from jaxlm.console import clock
from jaxlm.data import prepared
from jaxlm.train.checkpoint import Checkpoints, verify

WATCH = dataclasses.replace(BASE.watch, save_every=3, sample_every=4, keep_last=2)
CONFIG = dataclasses.replace(BASE, watch=WATCH, steps=12)  # saves at 3, 6, 9 and 12; two of them are deleted again
ACKNOWLEDGES = 'checkpoints/#/digest.json'


class Point(NamedTuple):
  """One call in the log: `name` is its path with numbers and hashes left out, `nth` counts it among its likes."""

  time: int
  kind: str
  name: str
  path: str
  nth: int


@dataclasses.dataclass(frozen=True)
class Kill:
  """Where a process is to die: before that call, in the middle of a write, or some microseconds after it."""

  job: 'Job'
  point: Point
  half: bool = False
  after: int | None = None
  moment: str = ''

  def __str__(self) -> str:
    how = f'{self.after / 1000:.1f} ms after ' if self.after is not None else 'half of ' if self.half else ''
    moment = f'{self.moment}: ' if self.moment else ''
    return f'{self.job.verb}: {moment}{how}{self.point.kind} {self.point.name or "."} ({self.point.nth})'

  @property
  def env(self) -> dict[str, str]:
    env = {'KILL_POINTS_AT': f'{self.point.nth} {self.point.kind} {self.point.name}'}
    return (
      env
      | ({'KILL_POINTS_HALF': '1'} if self.half else {})
      | ({'KILL_POINTS_AFTER': str(self.after)} if self.after is not None else {})
    )


def build(folder: Path) -> Path | None:
  """The library, or None where there is no C compiler or nothing is preloaded."""
  compiler = shutil.which('cc')
  if not compiler or sys.platform != 'linux':
    return None
  library = folder / 'kill_points.so'
  source = Path(__file__).with_name('kill_points.c')
  subprocess.run([compiler, '-shared', '-fPIC', '-O1', '-o', library, source, '-ldl', '-lpthread'], check=True)
  return library


def read_log(path: Path) -> list[Point]:
  """The points of a process, in their order."""
  seen: collections.Counter = collections.Counter()
  points = []
  for line in path.read_text().splitlines() if path.exists() else []:
    _, nanoseconds, kind, name, where = line.split('\t')
    seen[kind, name] += 1
    points.append(Point(int(nanoseconds), kind, name, where, seen[kind, name]))
  return points


class Job:
  """A command that is killed and started again; `place` is what it writes to, always of the same name."""

  verb = ''

  def __init__(self, home: Path, forks: Forks, in_a_row: int = 1):
    self.home, self.forks, self.points = home, forks, list[Point]()
    self.folder, self.killed, self.kills_in_a_row = home / 'none', list[Kill](), in_a_row

  def arguments(self, folder: Path) -> tuple[str, ...]:
    raise NotImplementedError

  def furnish(self, folder: Path) -> None:
    """What is in the place before the first process."""

  def begin(self, folder: Path) -> None:
    """Called before each process."""

  def check_killed(self, folder: Path, log: list[Point]) -> None:
    raise NotImplementedError

  def check_end(self, folder: Path, out: str) -> None:
    raise NotImplementedError

  def process(self, folder: Path, **env: str) -> tuple[int, str, list[Point]]:
    """(exit code, output, points) of a process in that folder."""
    log = folder.with_suffix('.log')
    log.unlink(missing_ok=True)
    self.begin(folder)
    watched = {'KILL_POINTS_BELOW': str(folder), 'KILL_POINTS_LOG': str(log)}
    return *self.forks.run(folder.with_suffix('.out'), *self.arguments(folder), **watched, **env), read_log(log)

  def reference(self, timed: bool) -> None:
    """One process left alone: its points and its result; `timed`, after one that compiled."""
    for name in ('warm', 'alone') if timed else ('alone',):
      folder = self.home / f'{self.verb}-{name}'
      self.furnish(folder)
      code, out, self.points = self.process(folder)
      assert code == 0, out

  def distinct(self, rng: random.Random) -> Iterator[Kill]:
    """One kill for each kind of call on each name, at one of its times; a write is cut in two."""
    found = collections.defaultdict(list)
    for point in self.points:
      found[point.kind, point.name].append(point)
    for points in found.values():
      yield Kill(self, rng.choice(points), half=points[0].kind == 'write')

  def survives(self, kill: Kill, number: int) -> None:
    """Kills and checks; what it is killed in may have been killed before. Raises AssertionError with what is wrong."""
    if not self.killed:
      self.folder = self.home / f'kill-{number}'
      self.furnish(self.folder)
    else:  # fewer calls are left
      kill = dataclasses.replace(kill, point=kill.point._replace(nth=1))
    code, out, points = self.process(self.folder, **kill.env)
    if code == 0 and self.killed:
      self._ended(out)
      return self.survives(kill, number)
    assert code == -signal.SIGKILL, f'was not killed but left with {code}: {out}'
    self.check_killed(self.folder, points if kill.half or kill.after is not None else points[:-1])
    self.killed.append(kill)
    if len(self.killed) == self.kills_in_a_row:
      self.end()
    return None

  def end(self) -> None:
    """Starts the killed command again, and compares what it leaves."""
    if self.killed:
      code, out, _ = self.process(self.folder)
      assert code == 0, out
      self._ended(out)

  def _ended(self, out: str) -> None:
    self.check_end(self.folder, out)
    self.forget()

  def forget(self) -> None:
    """The next kill gets a new folder."""
    shutil.rmtree(self.folder, ignore_errors=True)
    self.killed = []


class Training(Job):
  """`jaxlm pretrain`."""

  verb = 'pretrain'

  def arguments(self, folder: Path) -> tuple[str, ...]:
    return 'pretrain', str(self.home / 'tiny.py'), '--run', str(folder)

  def begin(self, folder: Path) -> None:
    self.saved = Checkpoints(folder / 'checkpoints').steps()

  def reference(self, timed: bool) -> None:
    super().reference(timed)
    folder = self.home / 'pretrain-alone'
    self.steps = Checkpoints(folder / 'checkpoints').steps()
    self.texts, self.state = rows_and_samples(folder), saved_state(folder, CONFIG.steps)
    assert self.steps == [9, 12]
    assert [row['step'] for row in self.texts[0] if 'train/loss' in row] == [2, 4, 6, 8, 10, 12]
    assert [row['step'] for row in self.texts[0] if 'eval/loss' in row] == [5, 10, 12]

  def check_killed(self, folder: Path, log: list[Point]) -> None:
    """What was acknowledged, and not deleted for newer ones, is there and whole."""
    of = lambda kind: {int(p.path.split('/')[1]) for p in log if p.kind == kind and p.name == ACKNOWLEDGES}
    acknowledged, deleted = of('rename') | {*self.saved}, of('unlink')
    assert len(deleted) <= max(0, len(acknowledged) - WATCH.keep_last), f'{acknowledged} less {deleted}'
    checkpoints = Checkpoints(folder / 'checkpoints')
    lost = acknowledged - deleted - set(checkpoints.steps())
    assert not lost, f'acknowledged and lost: {lost}'
    damaged = {step: verify(checkpoints.path(step)) for step in checkpoints.steps()}
    assert not any(damaged.values()), damaged

  def check_end(self, folder: Path, out: str) -> None:
    """Continued from the newest step, and ended bitwise as the run left alone, with nothing left over."""
    for step in self.saved[-1:]:
      assert f'continues from step {step} of' in out, out
    found = Checkpoints(folder / 'checkpoints').steps()
    assert found == self.steps, f'saved: {found}'
    rows, samples = rows_and_samples(folder)
    assert rows == self.texts[0], 'metrics.jsonl differs'
    assert samples == self.texts[1], 'samples.jsonl differs'
    jax.tree.map(np.testing.assert_array_equal, saved_state(folder, CONFIG.steps), self.state)
    assert not unfinished(folder), f'left over: {unfinished(folder)}'
    kept = lambda run: {path.name for path in run.iterdir() if 'tfevents' not in path.name}
    left = kept(folder) ^ kept(self.home / 'pretrain-alone')
    assert not left, f'left over or missing: {left}'

  def at_random(self, rng: random.Random, during: str) -> Kill:
    """A moment of a step, of an evaluation, or of a save."""
    if during == 'save':
      point = rng.choice([point for point in self.points if point.name.startswith('checkpoints')])
      return Kill(self, point, half=point.kind == 'write' and rng.random() < 0.5, moment=during)
    rows = [point for point in self.points if (point.kind, point.name) == ('write', 'metrics.jsonl')]
    evaluated = ['eval/loss' in row for row in self.texts[0]]
    assert len(rows) == len(evaluated)
    number = rng.choice([i for i in range(1, len(rows)) if evaluated[i] == (during == 'evaluation')])
    span = (rows[number].time - rows[number - 1].time) / 1000
    return Kill(self, rows[number - 1], after=int(rng.uniform(0, 0.8 * span)), moment=during)


class Preparing(Job):
  """`jaxlm prepare` in a folder that holds another preparation."""

  verb = 'prepare'

  def arguments(self, folder: Path, held_out: float = 0.1) -> tuple[str, ...]:
    options = ('--tokenizer', str(self.home / 'tokenizer.json'), '--val-fraction', str(held_out))
    return 'prepare', SOURCE, '--out', str(folder), *options

  def furnish(self, folder: Path) -> None:
    before = self.home / 'prepare-before'
    if not before.exists():
      code, out = self.forks.run(self.home / 'before.out', *self.arguments(before, 0.3))
      assert code == 0, out
      self.before = prepared.read_summary(before)
    shutil.copytree(before, folder)

  def reference(self, timed: bool) -> None:
    super().reference(timed)
    self.summary = prepared.read_summary(self.home / 'prepare-alone')
    assert self.summary and self.summary.contents != self.before.contents

  def check_killed(self, folder: Path, log: list[Point]) -> None:
    """A folder that counts is wholly the old preparation or wholly the new one."""
    found = prepared.read_summary(folder)
    if found:
      assert found.contents in (self.before.contents, self.summary.contents), 'counts, and is neither old nor new'
      assert not prepared.verify(folder), prepared.verify(folder)

  def check_end(self, folder: Path, out: str) -> None:
    assert not prepared.verify(folder), prepared.verify(folder)
    found = prepared.read_summary(folder)
    assert found and found.contents == self.summary.contents, 'other contents'
    assert found.splits == self.summary.splits, 'other counts'
    names = lambda run: sorted(str(path.relative_to(run)) for path in run.rglob('*'))
    assert names(folder) == names(self.home / 'prepare-alone'), f'left over or missing: {names(folder)}'

  def at_random(self, rng: random.Random, during: str) -> Kill:
    """A call, or a moment between two."""
    number = rng.randrange(len(self.points) - 1)
    point, following = self.points[number : number + 2]
    if rng.random() < 0.5:
      return Kill(self, point, half=point.kind == 'write' and rng.random() < 0.5, moment=during)
    return Kill(self, point, after=int(rng.uniform(0, (following.time - point.time) / 1000)), moment=during)


def kills(training: Training, preparing: Preparing, short: bool, seed: int) -> list[Kill]:
  """All of them, or five: a cut write, a rename, an fsync, one while preparing, one at a random moment."""
  rng = random.Random(seed)
  distinct = [*training.distinct(rng), *preparing.distinct(rng)]
  if short:
    wanted = (('write', 'checkpoints/#/digest.json.part'), ('rename', ACKNOWLEDGES), ('fsync', 'metrics.jsonl'))
    chosen = [next(k for k in distinct if (k.point.kind, k.point.name) == point) for point in wanted]
    return [*chosen, preparing.at_random(rng, 'prepare'), training.at_random(rng, 'save')]
  moments = {'step': 8, 'save': 8, 'evaluation': 7}
  random_ones = [training.at_random(rng, during) for during, n in moments.items() for _ in range(n)]
  return [*distinct, *random_ones, *(preparing.at_random(rng, 'prepare') for _ in range(7))]


def run(home: Path, library: Path, *, short: bool, seed: int, in_a_row: int = 1) -> list[str]:
  """Everything, with a line for each kill; returns the lines of what failed."""
  began = time.monotonic()
  furnish(home, CONFIG)
  forks = Forks(LD_PRELOAD=str(library), **quick(home))
  try:
    jobs = Training(home, forks, in_a_row), Preparing(home, forks)
    for job in jobs:
      job.reference(timed=not short)
      count = collections.Counter(kind for kind, _ in {(point.kind, point.name) for point in job.points})
      kinds = ', '.join(f'{n} {kind}' for kind, n in sorted(count.items()))
      print(f'{job.verb}: {len(job.points)} calls, {count.total()} distinct: {kinds}', flush=True)
    planned = kills(*jobs, short, seed)
    print(f'{len(planned)} kills; {clock(time.monotonic() - began)} so far', flush=True)
    failed = _all(planned)
  finally:
    forks.close()
  print(f'{len(planned)} kills, {len(failed)} failed; {clock(time.monotonic() - began)}')
  return failed


def _all(planned: list[Kill]) -> list[str]:
  first, failed = time.monotonic(), []
  for number, kill in enumerate(planned, 1):
    job, verdict = kill.job, 'ok'
    before = [str(one) for one in job.killed]
    try:
      job.survives(kill, number)
      if number == len(planned) or planned[number].job is not job:
        job.end()
    except AssertionError as error:
      verdict = f'FAILED: {error}'
      failed.append(f'{kill}, after {before}: {error}')
      job.forget()
    left = (time.monotonic() - first) / number * (len(planned) - number)
    print(f'[{number}/{len(planned)}] {kill}: {verdict}  left {clock(left)}', flush=True)
  return failed


def main() -> int:
  """Exit code 0 if every kill was survived."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--short', action='store_true', help='five kills instead of all')
  parser.add_argument('--seed', type=int, default=0, help='of the occurrences and of the random moments')
  parser.add_argument(
    '--in-a-row', type=int, default=1, help='so many kills go into one run of training before its end'
  )
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    home = Path(folder).resolve()
    library = build(home)
    if not library:
      print('needs Linux and a C compiler called cc')
      return 1
    return bool(run(home, library, short=options.short, seed=options.seed, in_a_row=options.in_a_row))


if __name__ == '__main__':
  sys.exit(main())
