"""Work that may not end, or that holds the interpreter, in a process of its own: a line of JSON in, one out."""

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from jaxlm.errors import InputError

START = 60.0  # seconds until the child is there, which say nothing of its work
ORPHAN = 10.0  # seconds by which a child outlives a limit that nobody is left to enforce
LEAVE = 1.0  # seconds to end by itself, once nothing more is asked


def answer(work: Callable[[Any], Any], *, memory: int | None = None) -> None:
  """The child's side: 'ready', then for each line {asked, seconds} one out, {found} or {error}.

  `memory` (bytes) limits its address space, where the system can. What the work prints goes to stderr, and what it
  reads is empty: programs that it starts have no part in the questions.
  """
  if memory:
    import resource

    with contextlib.suppress(ValueError, OSError):
      resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
  signal.signal(signal.SIGTERM, lambda *_: None)  # meant for the run, which may have use for it until it ends
  given, out = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), 'w')
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  os.dup2(2, 1)
  sys.stdout.reconfigure(line_buffering=True)  # ty: ignore
  print('ready', file=out, flush=True)
  for line in given:
    asked = json.loads(line)
    signal.alarm(math.ceil(asked['seconds'] + ORPHAN))  # the system's own: it needs no interpreter
    try:
      said = json.dumps({'found': work(asked['asked'])})
    except BaseException as error:  # whatever it raises, the end of the process too
      own = isinstance(error, InputError)  # is a line for the user as it is
      line = str(error) if own else f'{type(error).__name__}: {error}'
      said = json.dumps({'error': line.partition('\n')[0][:300], 'input': own})
    signal.alarm(0)
    print(said, file=out, flush=True)


class Failed(Exception):
  """What the work raised, in a line; an InputError raises one here."""


class Child:
  """The process, started when it is first needed and again after one that had to be killed.

  `code` is Python that ends in `answer`, with the paths of this process; `first`, if there is one, is asked of each new
  process before all else. What the work starts ends with it.
  """

  def __init__(self, code: str, *, first: Any = None, start: float = START):
    self._code, self._first, self._start = code, first, start
    self._running: list[subprocess.Popen] = []
    self._lock = threading.Lock()
    weakref.finalize(self, _end, self._running, LEAVE)

  def close(self) -> None:
    """Ends the process."""
    _end(self._running, LEAVE)

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
    killed, the next call begins another), ChildProcessError where it ended, and OSError where it cannot be started.
    """
    with self._lock:
      return self._answer(self._process(), asked, seconds)

  def _process(self) -> subprocess.Popen:
    if not self._running or self._running[0].poll() is not None:
      _end(self._running)
      code, pipe = f'import sys; sys.path[:] = {sys.path!r}; {self._code}', subprocess.PIPE
      command = [sys.executable, '-P', '-c', code]
      made = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)  # out of ctrl-c's reach
      os.set_blocking(made.stdin.fileno(), False)  # ty: ignore
      self._running.append(made)
      try:
        if _line(made, time.monotonic() + self._start).strip() != b'ready':
          raise ChildProcessError('said something else before it was ready')
        if self._first is not None:
          self._answer(made, self._first, self._start)
      except ChildProcessError as error:
        _end(self._running)
        raise ChildProcessError(f'its process did not start: {error}') from error
      except BaseException:
        _end(self._running)
        raise
    return self._running[0]

  def _answer(self, process: subprocess.Popen, asked: Any, seconds: float) -> Any:
    line, end = json.dumps({'asked': asked, 'seconds': seconds}), time.monotonic() + seconds
    try:
      _write(process, f'{line}\n'.encode(), end)
      said = json.loads(_line(process, end))
    except TimeoutError as error:
      _end(self._running)
      raise TimeoutError(f'took more than {seconds:g} seconds') from error
    except BrokenPipeError as error:
      _end(self._running)
      raise ChildProcessError('ran out of memory or died') from error
    except BaseException:  # interrupted, too: what it still says would be taken for its next answer
      _end(self._running)
      raise
    if 'error' in said:
      raise (InputError if said['input'] else Failed)(said['error'])
    return said['found']


def _write(process: subprocess.Popen, data: bytes, end: float) -> None:
  fd, left = process.stdin.fileno(), memoryview(data)  # ty: ignore
  while left:
    _wait(fd, select.POLLOUT, end)
    left = left[os.write(fd, left) :]


def _line(process: subprocess.Popen, end: float) -> bytes:
  _wait(process.stdout.fileno(), select.POLLIN, end)  # ty: ignore
  if not (line := process.stdout.readline()):  # ty: ignore
    raise ChildProcessError('ran out of memory or died')
  return line


def _wait(fd: int, event: int, end: float) -> None:
  ready = select.poll()
  ready.register(fd, event)
  if not ready.poll(max(0.0, end - time.monotonic()) * 1000):
    raise TimeoutError


def _end(running: list[subprocess.Popen], leave: float = 0.0) -> None:
  """With all that it started; `leave`: seconds for what is done at the end of a program."""
  while running:
    process = running.pop()
    process.stdin.close()  # ty: ignore
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(leave)
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()  # ty: ignore
    process.wait()
