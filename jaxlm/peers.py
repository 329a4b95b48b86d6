"""Who of a run's processes is alive and how far it is: a stop that all agree on, and nobody left waiting for the dead.

Every second each process writes a beat into JAX's coordination service, which lives in process 0. That one reads them
all, and names a process that gives none, or whose main thread stays behind; the others read its beat, and follow.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

CODE = 76  # the exit code of those that leave because of another; EX_PROTOCOL of sysexits.h
BEAT = 1.0  # seconds between beats
DEAD = 15.0  # without one for so long a process counts as dead,
BROKEN = 8.0  # or for so long, where a connection to some process broke
GRACE = 10.0  # seconds in which a process that fails has said why and is gone
SLOW = 10  # times the step timeout: for what compiles, evaluates or saves
FOLDER = 'jaxlm/beat/'


class Watch:
  """Two threads beside a run: one talks to the coordination service, one looks at the clock and may end the process."""

  def __init__(self, client: Any, rank: int, count: int, address: str, step_timeout: float):
    """`step_timeout`: seconds that a main thread may stay behind the others; 0: for ever."""
    self.rank, self.count = rank, count
    self.last_acts: list[Callable[[], None]] = []  # what is done before this process is ended from here
    self._client, self._address, self._timeout = client, address, step_timeout
    self._state, self._leaving, self._ended = threading.Condition(), threading.Lock(), threading.Event()
    self._asked: Callable[[], int] = lambda: 0
    self._calls, self._failing = 0, False
    self._own: dict[str, Any] = {'host': socket.gethostname(), 'number': 0, 'asked': 0, 'calls': None, 'fault': ''}
    self._own |= {'broken': False, 'stop_at': 0}
    self._beats: dict[int, dict[str, Any]] = {}  # by rank, the newest of each
    self._since = dict.fromkeys(range(count), time.monotonic())  # when each was last seen to be alive
    self._heard = time.monotonic()  # when the coordination service last answered
    self._marks, self._place, self._reached = 0, 'start', time.monotonic()
    self._limit = step_timeout * SLOW  # it may read much

  def begin(self) -> None:
    """Starts the threads."""
    on_abort(self._aborted)  # XLA aborts at once when process 0 is gone, and Gloo may where another is
    for act in (self._talk, self._judge):
      threading.Thread(target=act, daemon=True, name=f'peers{act.__name__}').start()

  def mark(self, place: str, *, slow: bool = False) -> None:
    """Says where the main thread is; all processes pass the same marks in the same order. `slow`: it may take long."""
    with self._state:
      self._marks, self._place, self._reached = self._marks + 1, place, time.monotonic()
      self._limit = self._timeout * (SLOW if slow else 1)

  def listen(self, asked: Callable[[], int]) -> Callable[[], bool]:
    """`asked()` gives the signal that told this process to stop, or 0. Returns what all are to ask after every step.

    It becomes true in all processes after the same step. Once one was told, each tells after how many steps it last
    went on, and goes no further until process 0 knows all: the step after the greatest of these numbers is the last.
    """
    self._asked = asked
    return self._stop

  def _stop(self) -> bool:
    with self._state:
      self._state.wait_for(lambda: self._own['calls'] is None or self._own['stop_at'])
      self._calls += 1
      stops = 0 < self._own['stop_at'] <= self._calls
    self.mark(f'step {self._calls} done')
    return stops

  @property
  def signal(self) -> int:
    """The signal for which all stop, once they do."""
    return self._own['asked']

  def fail(self, line: str) -> None:
    """Tells the others why this process leaves; to be called before it does."""
    self._failing = True
    self._ended.set()
    self._publish(f'rank {self.rank} ({self._own["host"]}) left: {line}')

  def suspect(self) -> None:
    """To be called when something between processes broke: if another is at fault, this does not return."""
    self._own |= {'broken': True}
    time.sleep(BROKEN + 6 * BEAT)

  def end(self) -> None:
    """Returns once all processes are at their end; from then on none watches the others."""
    self.mark('end', slow=True)
    self._client.wait_at_barrier('jaxlm/end', 3_600_000)
    self._ended.set()

  def _talk(self) -> None:
    while not self._ended.is_set():
      with contextlib.suppress(Exception):  # no answer is what `_heard` tells
        self._exchange()
      frozen = self._own['calls'] is not None and not self._own['stop_at']
      self._ended.wait(0.05 if frozen else BEAT)

  def _exchange(self) -> None:
    now, own = time.monotonic(), self._own
    with self._state:
      own |= {'number': own['number'] + 1, 'asked': own['asked'] or self._asked()}
      own |= {'marks': self._marks, 'place': self._place, 'late': now - self._reached > self._limit > 0}
      own |= {'waited': now - self._reached}
    self._client.key_value_set(f'{FOLDER}{self.rank}', json.dumps(own), allow_overwrite=True)
    if self.rank:
      read = [(f'{FOLDER}0', self._client.key_value_try_get(f'{FOLDER}0'))]
    else:
      read = self._client.key_value_dir_get(FOLDER)
    found = {int(key.rpartition('/')[2]): json.loads(text) for key, text in read}
    self._heard = time.monotonic()
    for rank, beat in found.items():
      if beat['number'] != self._beats.get(rank, {}).get('number'):
        self._since[rank] = self._heard
    self._beats = found
    self._agree()

  def _agree(self) -> None:
    """One step towards a common last step, if somebody was told to stop."""
    beats = list(self._beats.values())
    told = next((beat['asked'] for beat in beats if beat['asked']), 0)
    if not told or self._own['stop_at']:
      return
    with self._state:
      self._own |= {'asked': told, 'calls': self._calls}
      calls = [beat['calls'] for beat in beats]
      if self.rank:
        self._own |= {'stop_at': beats[0]['stop_at']}
      elif len(beats) == self.count and None not in calls:
        self._own |= {'stop_at': max(calls) + 1}
      self._state.notify_all()

  def _judge(self) -> None:
    last = time.monotonic()
    while not self._ended.wait(BEAT / 2):
      now = time.monotonic()
      if now - last > 5 * BEAT:  # this very process was stopped, or starved: what it did not hear says nothing
        self._heard, self._since = now, dict.fromkeys(self._since, now)
      last = now
      if line := self._fault(now):
        self._leave(line)

  def _fault(self, now: float) -> str:
    """Who is at fault and why, in one line; nothing where nobody is."""
    beats = dict(self._beats)
    told = [beat['fault'] for rank, beat in beats.items() if beat['fault'] and rank != self.rank]
    if told:
      return told[0]
    patience = BROKEN if self._own['broken'] or any(beat['broken'] for beat in beats.values()) else DEAD
    if self.rank and now - self._heard > patience:
      return f'{self._named([0])}, the coordinator, has not answered for {now - self._heard:.0f} s'
    seen = range(1, self.count) if self.rank == 0 else (0,)
    silent = [rank for rank in seen if now - self._since[rank] > patience]
    if silent:
      return f'{self._named(silent)}: no sign of life for {patience:.0f} s'
    if len(beats) < self.count:
      return ''
    least = min(beat['marks'] for beat in beats.values())
    behind = {rank: beat for rank, beat in beats.items() if beat['marks'] == least}
    late = {rank: beat for rank, beat in behind.items() if beat['late']}
    if not late:
      return ''
    place, waited = next((beat['place'], beat['waited']) for beat in late.values())
    if len(late) == self.count:
      return f'no rank got past "{place}" for {waited:.0f} s (watch.step_timeout)'
    return f'{self._named(late)} hangs: not past "{place}" for {waited:.0f} s (watch.step_timeout), and others are'

  def _named(self, ranks: Any) -> str:
    names = [f'{rank} ({self._beats[rank]["host"]})' if rank in self._beats else str(rank) for rank in sorted(ranks)]
    return f'rank{"s" * (len(names) > 1)} {", ".join(names)}'

  def _publish(self, line: str) -> None:
    """Gives the line to all; process 0 stays until they can have read it, since they read it there."""
    self._own |= {'fault': line}
    text = json.dumps(self._own | {'marks': self._marks, 'late': False})
    tell = lambda: self._client.key_value_set(f'{FOLDER}{self.rank}', text, allow_overwrite=True)
    _in_time(tell, 1.5 * BEAT)
    if not self.rank:
      time.sleep(2.5 * BEAT)

  def _leave(self, line: str) -> None:
    """Ends this process."""
    with self._leaving:
      print(f'jaxlm: {line}; the same command goes on from the last save', file=sys.stderr, flush=True)
      self._publish(line)
      self.finish()
      os._exit(CODE)

  def finish(self) -> None:
    """Does the last acts."""
    for act in self.last_acts:
      _in_time(act, 3 * BEAT)

  def _aborted(self) -> None:
    """Where the abort was for the loss of another process, that is the last line; else it takes its course.

    The port of process 0 may take connections for a while still (a process that is killed gives its sockets back one
    after the other), but only one that lives speaks there.
    """
    if self._failing:
      time.sleep(GRACE)  # it has its own line to say, and ends with its own code
    elif not self._ended.is_set():
      if self.rank and not any(_speaks(self._address) for _ in range(3)):
        last_line(f'{self._named([0])}, the coordinator, is gone; the same command goes on from the last save')
      self.suspect()


def _speaks(address: str) -> bool:
  """Whether who listens there says something within a beat; a gRPC server greets first."""
  host, port = address.rsplit(':', 1)
  try:
    with socket.create_connection((host, int(port)), BEAT) as connection:
      return bool(connection.recv(1))
  except OSError:
    return False


_handlers: list[Any] = []  # what C calls has to stay


def on_abort(act: Callable[[], None] | None) -> None:
  """Does this where C++ aborts the process, after the dump of its stack that it prints; None: nothing any more.

  Python's own handlers do not run before the process is gone.
  """
  _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: act()) if act else None)
  ctypes.CDLL(None).signal(signal.SIGABRT, _handlers[-1])


def last_line(line: str) -> None:
  """Says it and ends the process as one that leaves because of another."""
  print(f'jaxlm: {line}', file=sys.stderr, flush=True)
  os._exit(CODE)


def _in_time(act: Callable[[], None], seconds: float) -> None:
  """Does it in a thread that is left alone after so many seconds: it may hang where a peer or a store is gone."""

  def tried() -> None:
    with contextlib.suppress(Exception):
      act()

  thread = threading.Thread(target=tried, daemon=True)
  thread.start()
  thread.join(seconds)
