"""One writer to a run's folder: a second process is refused at once, a dead owner's lock is taken over.

A lock is a file that only one process can create, `lock-00000N`; the highest N is the one in force. Taking over means
to create the next one, so of two that try only one succeeds, and nothing is renamed or deleted while it matters. The
same holds on an object store.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath

from jaxlm import files, hosts
from jaxlm.errors import InputError

BEAT = 10.0  # seconds between an owner's signs of life, for processes on other hosts to see
WRITING = 2.0  # for so long a lock that says nothing, or half of it, may be of a process about to write it
UNWRITTEN: dict[str, Any] = {}
STALE = 60.0  # without one for so long, an owner on another host counts as dead


@contextmanager
def hold(folder: Any) -> Generator[None]:
  """Holds the folder's lock for the time of the block. Raises InputError, naming the owner, if another process does."""
  folder = epath.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  mine = {'host': socket.gethostname(), 'pid': os.getpid(), 'started': _started(os.getpid())}
  path = _claim(folder, mine)
  done = threading.Event()
  beating = threading.Thread(target=_beat, args=(path, done), daemon=True)
  beating.start()
  try:
    with hosts.last_act(lambda: path.unlink(missing_ok=True)):
      yield
  finally:
    done.set()
    beating.join()
    path.unlink(missing_ok=True)


def _claim(folder: epath.Path, mine: dict[str, Any]) -> epath.Path:
  while True:
    locks = _locks(folder)
    owners = [owner for owner in map(_living_owner, locks) if owner is not None]
    if UNWRITTEN in owners:
      time.sleep(0.05)
      continue  # soon it says who, or is old enough to be of one that was killed in the middle
    for owner in owners:
      raise InputError(f'{folder}: is being written by process {owner["pid"]} on {owner["host"]}; use another --run')
    number = int(locks[-1].name[5:]) + 1 if locks else 1
    path = folder / f'lock-{number:06d}'
    try:
      files.create(path, json.dumps(mine))
    except FileExistsError:
      continue  # somebody was quicker: look who
    if any(_living_owner(other) is not None for other in _locks(folder)[:-1]):
      path.unlink()  # what we saw was older than a lock that came and went, and another has begun since
      continue
    for old in locks:
      old.unlink(missing_ok=True)
    return path


def _locks(folder: epath.Path) -> list[epath.Path]:
  return [path for path in files.children(folder) if path.name.startswith('lock-')]


def _living_owner(path: epath.Path) -> dict[str, Any] | None:
  """Who holds this lock, or None if that process is gone."""
  try:
    text, age = path.read_text(), time.time() - path.stat().mtime
  except FileNotFoundError:
    return None
  try:
    owner = json.loads(text)
  except ValueError:
    return UNWRITTEN if abs(age) < WRITING else None
  if owner['host'] != socket.gethostname():
    return owner if age < STALE else None
  return owner if owner['started'] == _started(owner['pid']) else None


def _started(pid: int) -> str | None:
  """When a process of this machine began, as its kernel counts, so that a pid used again is another; None if gone."""
  stat = Path(f'/proc/{pid}/stat')
  if Path('/proc/self/stat').exists():
    return stat.read_text().rsplit(')', 1)[1].split()[19] if stat.exists() else None
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except PermissionError:
    pass
  return 'running'


def _beat(path: epath.Path, done: threading.Event) -> None:
  text = path.read_text()
  while not done.wait(BEAT):
    if files.remote(path):
      path.write_text(text)
    else:
      os.utime(path)
