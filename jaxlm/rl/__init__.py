"""Learning from rewards: what advantages are made of (arrays in, arrays out), rollouts, and rewards by name.

Each part is imported when its name is first used: rewards are scored by processes that need no JAX.
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
  if name == 'advantages':
    return importlib.import_module(f'jaxlm.rl.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
