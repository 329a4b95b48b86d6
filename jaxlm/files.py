"""Files here and on object stores: small ones written whole or created once, growing ones, listings, digests.

On a disk a file is written beside its place and renamed; on an object store (`gs://...`), which renames and locks
nothing, a write is in one piece by itself, and creating is a write on the condition that nothing is there.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from jaxlm.errors import InputError


def remote(path: Any) -> bool:
  """Whether this is a place on an object store."""
  return '://' in str(path)


def create(path: Any, text: str) -> None:
  """Writes a file that is not there yet. Raises FileExistsError if it is, however many try at once."""
  path = epath.Path(path)
  if remote(path):
    system, name = _system(path)
    system.pipe_file(name, text.encode(), mode='create')
    return
  with Path(path).open('x', encoding='utf-8') as f:
    f.write(text)


def children(folder: Any) -> list[epath.Path]:
  """What is in a folder now, sorted; nothing if there is none. Clients of object stores remember old listings."""
  folder = epath.Path(folder)
  if remote(folder):
    _system(folder)[0].invalidate_cache()
  return sorted(folder.iterdir()) if folder.exists() else []


def _system(path: epath.Path) -> tuple[Any, str]:
  """The client that etils uses for this object store, and the name that it knows the path by."""
  import fsspec

  scheme, _, name = str(path).partition('://')
  return fsspec.filesystem(scheme, **({'finalize_on_close': True} if scheme == 'gs' else {})), name


def write_whole(path: Any, text: str) -> None:
  """Writes a file in one piece, on disk when this returns; an object store's writes are in one piece by themselves."""
  path = epath.Path(path)
  if remote(path):
    _store(path, text.encode())
    return
  part = Path(f'{os.fspath(path)}.part')
  with part.open('w', encoding='utf-8') as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  part.replace(path)
  _sync(part.parent)


def read_text(path: Any, most: int = 1 << 28) -> str:
  """A file's text. Raises InputError on one that is no plain file, no UTF-8 or of more than `most` bytes."""
  if not remote(path):
    found = Path(os.fspath(path)).stat()
    if not stat.S_ISREG(found.st_mode):
      raise InputError(f'{path}: no plain file')
    if found.st_size > most:
      raise InputError(f'{path}: damaged: {found.st_size} bytes, where {most} are more than enough')
  try:
    return epath.Path(path).read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise InputError(f'{path}: damaged: no UTF-8 at byte {error.start}') from error


def read_json(path: Any, kind: type = dict) -> Any:
  """What a file of one JSON object (or list) says. Raises InputError if it was cut short or damaged."""
  try:
    found = json.loads(read_text(path))
  except (ValueError, RecursionError) as error:
    raise InputError(f'{path}: damaged: not JSON: {error}') from error
  if not isinstance(found, kind):
    raise InputError(f'{path}: damaged: not a JSON {"object" if kind is dict else "list"}')
  return found


def settle(folder: Any) -> None:
  """Returns once all files below a folder, their names and its own are on disk; an object store's writes are so."""
  if remote(folder):
    return
  folder = Path(os.fspath(folder))
  for where, _, names in os.walk(folder):
    for path in (*(Path(where) / name for name in names), Path(where)):
      _sync(path)
  _sync(folder.parent)


def _sync(path: Path) -> None:
  file = os.open(path, os.O_RDONLY)
  try:
    os.fsync(file)
  finally:
    os.close(file)


class Appended:
  """A file that grows: on a disk at once, on an object store written anew, with what it held, every EVERY seconds.

  What cannot be written (a full disk, a store out of reach) is kept, told to `say` once, and goes first when it can.
  """

  EVERY = 30.0

  def __init__(self, path: Any, say: Callable[[str], None] = lambda line: None):
    self.path, self._say, self._failed = epath.Path(path), say, False
    if remote(path):
      self._file, self._data = None, self.path.read_bytes() if self.path.exists() else b''
      self._stored, self._written = len(self._data), time.monotonic()
    else:
      self._file, self._data = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666), b''

  def add(self, data: bytes) -> None:
    """Appends some bytes."""
    self._data += data
    if self._file is not None or time.monotonic() - self._written > self.EVERY:
      with contextlib.suppress(OSError):
        self._write()

  def flush(self) -> None:
    """Returns once all that was added is on disk, or in the store. Raises OSError if it cannot be."""
    self._write()
    if self._file is not None:
      os.fsync(self._file)

  def close(self) -> None:
    """`flush`, then closes the file; what cannot be written even now is lost, and was told."""
    with contextlib.suppress(OSError):
      self.flush()
    if self._file is not None:
      os.close(self._file)

  def _write(self) -> None:
    try:
      if self._file is not None:
        while self._data:
          self._data = self._data[os.write(self._file, self._data) :]
      elif self._stored < len(self._data):
        self._written = time.monotonic()
        _store(self.path, self._data)
        self._stored = len(self._data)
    except OSError as error:
      if not self._failed:
        self._say(f'{self.path}: {error.strerror or error}; rows are kept in memory until they can be written')
      self._failed = True
      raise
    self._failed = False


def _store(path: epath.Path, data: bytes) -> None:
  try:
    path.write_bytes(data)
  except OSError:
    raise
  except Exception as error:  # clients of object stores have exceptions of their own
    raise OSError(None, f'{type(error).__name__}: {error}', str(path)) from error


def seal(values: Mapping[str, Any]) -> str:
  """sha256 of the canonical JSON of what a file says, to be kept in that file beside it."""
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digests(folder: epath.Path, *, but: Collection[str] = ()) -> dict[str, str]:
  """sha256 of every file below the folder, by its path in there; files named as in `but` are left out."""
  names, folders = {}, [folder]
  while folders:
    for entry in children(folders.pop()):
      if entry.is_dir():
        folders.append(entry)
      elif entry.name not in but:
        names[str(entry.relative_to(folder))] = sha256(entry)
  return dict(sorted(names.items()))


def sha256(path: epath.Path) -> str:
  """The digest of one file, read in pieces."""
  digest = hashlib.sha256()
  with path.open('rb') as f:
    while block := f.read(1 << 20):
      digest.update(block)
  return digest.hexdigest()


def changes(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
  """What differs between two of `digests`: a line for each missing, foreign or changed file; empty when nothing."""
  lines = [f'{name} is missing' for name in expected if name not in found]
  lines += [f'{name} does not belong to it' for name in found if name not in expected]
  return lines + [f'{name} has changed' for name in expected if name in found and expected[name] != found[name]]


def move(path: epath.Path, target: epath.Path) -> None:
  """Moves a file to another place in its file system or store, over what is there; its bytes do not come here."""
  target.parent.mkdir(parents=True, exist_ok=True)
  if not remote(path):
    path.replace(target)
    return
  system, name = _system(path)
  system.cp_file(name, _system(target)[1])
  system.rm_file(name)


def copy(source: epath.Path, target: epath.Path, names: Iterable[str]) -> None:
  """Copies files by their paths below `source`, over those that are there."""
  for name in names:
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    with (source / name).open('rb') as read, (target / name).open('wb') as write:
      shutil.copyfileobj(read, write, 1 << 22)
