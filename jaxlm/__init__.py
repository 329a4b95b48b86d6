"""jaxlm: from raw text to an aligned, served language model, as pure functions on JAX.

`import jaxlm` loads nothing; each part is imported when its name is first used: `jaxlm.models`, `jaxlm.losses`, ...
"""

import importlib
from typing import Any

__version__ = '0.1.0'
_PARTS = (
  'data',
  'interop',
  'lora',
  'losses',
  'masked',
  'models',
  'objectives',
  'rl',
  'sample',
  'sharding',
  'train',
  'tree',
)


def __getattr__(name: str) -> Any:
  if name in _PARTS:
    return importlib.import_module(f'jaxlm.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return sorted([*globals(), *_PARTS])
