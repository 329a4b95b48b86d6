"""Work that may not end, or that holds the interpreter, in a process of its own: a line of JSON in, one out."""

import contextlib
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from jaxlm.errors import InputError

START = 60.0  # seconds until the child is there, which say nothing of its work
ORPHAN = 10.0  # seconds by which a child outlives a limit that nobody is left to enforce


def answer(work: Callable[[Any], Any], *, memory: int | None = None) -> None:
  """The child's side: 'ready', then for each line {asked, seconds} one out, {found} or {error}.

  `memory` (bytes) limits its address space. What the work prints goes to stderr.
  """
  if memory:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
  signal.signal(signal.SIGTERM, lambda *_: None)  # meant for the run, which may have use for it until it ends
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  print('ready', file=out, flush=True)
  for line in sys.stdin:
    asked = json.loads(line)
    signal.alarm(math.ceil(asked['seconds'] + ORPHAN))  # the system's own: it needs no interpreter
    try:
      said = json.dumps({'found': work(asked['asked'])})
    except BaseException as error:  # whatever it raises, the end of the process too
      own = isinstance(error, InputError)  # is a line for the user as it is
      line = str(error) if own else f'{type(error).__name__}: {error}'
      said = json.dumps({'error': line.splitlines()[0][:300], 'input': own})
    signal.alarm(0)
    print(said, file=out, flush=True)


class Failed(Exception):
  """What the work raised, in a line; an InputError raises one here."""


class Child:
  """The process, started when it is first needed and again after one that had to be killed.

  `code` is Python that ends in `answer`; `first`, if there is one, is asked of each new process before all else.
  """

  def __init__(self, code: str, *, first: Any = None, start: float = START):
    self._command, self._first, self._start = [sys.executable, '-c', code], first, start
    self._running: list[subprocess.Popen] = []
    self._lock = threading.Lock()
    weakref.finalize(self, _end, self._running)

  def close(self) -> None:
    """Ends the process."""
    _end(self._running)

  def start(self) -> None:
    """Has the process there. Raises as `ask` does."""
    with self._lock:
      self._process()

  @property
  def pid(self) -> int | None:
    """Of the process, where it is there."""
    return self._running[0].pid if self._running else None

  def ask(self, asked: Any, seconds: float) -> Any:
    """What the work makes of it.

    Raises Failed or InputError for what the work raises, TimeoutError where nothing comes in that time (the process is
    killed, the next call begins another) and ChildProcessError where the process ended.
    """
    with self._lock:
      return self._answer(self._process(), asked, seconds)

  def _process(self) -> subprocess.Popen:
    if not self._running or self._running[0].poll() is not None:
      _end(self._running)
      pipe = subprocess.PIPE
      made = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, start_new_session=True)  # out of ctrl-c's reach
      self._running.append(made)
      try:
        self._line(made, self._start)
        if self._first is not None:
          self._answer(made, self._first, self._start)
      except BaseException:
        _end(self._running)
        raise
    return self._running[0]

  def _answer(self, process: subprocess.Popen, asked: Any, seconds: float) -> Any:
    line = json.dumps({'asked': asked, 'seconds': seconds}, ensure_ascii=True)
    try:
      process.stdin.write(f'{line}\n'.encode())  # ty: ignore
      process.stdin.flush()  # ty: ignore
      said = json.loads(self._line(process, seconds))
    except BrokenPipeError as error:
      _end(self._running)
      raise ChildProcessError('ran out of memory or died') from error
    except BaseException:  # interrupted, too: what it still says would be taken for its next answer
      _end(self._running)
      raise
    if 'error' in said:
      raise (InputError if said['input'] else Failed)(said['error'])
    return said['found']

  @staticmethod
  def _line(process: subprocess.Popen, seconds: float) -> bytes:
    if not select.select([process.stdout], [], [], seconds)[0]:  # ty: ignore
      raise TimeoutError(f'took more than {seconds:g} seconds')
    if not (line := process.stdout.readline()):  # ty: ignore
      raise ChildProcessError('ran out of memory or died')
    return line


def _end(running: list[subprocess.Popen]) -> None:
  while running:
    process = running.pop()
    process.kill()
    for pipe in (process.stdin, process.stdout):
      with contextlib.suppress(BrokenPipeError):  # of what was not yet written
        pipe.close()  # ty: ignore
    process.wait()
