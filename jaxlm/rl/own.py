"""Code of a user's own by its place, `FILE.py:NAME`."""

import importlib.util
from pathlib import Path
from typing import Any

from jaxlm.errors import InputError


def named(where: str, what: str) -> Any:
  """What `FILE.py` defines as `NAME`. Raises InputError, which begins with `what`, where it does not.

  Whatever the file raises is told with its name.
  """
  path, _, name = where.rpartition(':')
  spec = importlib.util.spec_from_file_location('jaxlm_own', path) if Path(path).is_file() else None
  if spec is None or spec.loader is None or not name:
    raise InputError(f'{what}: is not FILE.py:NAME with a file that is there')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:  # whatever the owner's code raises
    raise InputError(f'{what}: {path}: {type(error).__name__}: {error}') from error
  if not hasattr(module, name):
    raise InputError(f'{what}: {path} defines no {name}')
  return getattr(module, name)
