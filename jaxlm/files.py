"""Small files written whole, so that a reader finds the old text or the new one; digests of files of any size."""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from etils import epath


def write_whole(path: Any, text: str) -> None:
  """Writes a file in one piece, on disk when this returns; an object store's writes are in one piece by themselves."""
  path = epath.Path(path)
  if '://' in str(path):
    path.write_text(text)
    return
  part = Path(f'{os.fspath(path)}.part')
  with part.open('w', encoding='utf-8') as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  part.replace(path)


def seal(values: Mapping[str, Any]) -> str:
  """sha256 of the canonical JSON of what a file says, to be kept in that file beside it."""
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def digests(folder: epath.Path, *, but: Collection[str] = ()) -> dict[str, str]:
  """sha256 of every file below the folder, by its path in there; files named as in `but` are left out."""
  names, folders = {}, [folder]
  while folders:
    for entry in folders.pop().iterdir():
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
