"""Small files written whole: a reader finds the old text or the new one, whatever kills the writer."""

import os
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
