"""Where prompts are read: caches of one row that remember what they read, for prompts that begin like it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.serve import slots

READ = 64  # tokens of a prompt that are read at once


class Lobby:
  """A cache of one row and the tokens that it knows."""

  def __init__(self, cache: Any):
    self.cache, self.tokens, self.used = cache, [], 0
    self.logits_1V: Any = None  # after the last token, once all of a prompt was read
    self.scored = False  # by the program that scores, whose last piece rounds in another way


def choose(lobbies: Sequence[Lobby], prompt: Sequence[int], *, scored: bool, rings: bool) -> tuple[Lobby, int]:
  """A lobby for a prompt, and how many of its tokens need not be read; `rings` have forgotten what is before an end.

  It is the one that knows most of it, where the prompt goes on from its end or nothing but that end is lost; else the
  one that was not used for longest, with a copy of what the other has in common.
  """

  def known(lobby: Lobby) -> int:
    if scored:
      return 0
    tokens = lobby.tokens
    if lobby.logits_1V is not None and not lobby.scored and list(prompt) == tokens:
      return len(prompt)
    limit = min(len(prompt) - 1, len(tokens))
    differs = np.flatnonzero(np.array(prompt[:limit]) != np.array(tokens[:limit]))
    common = int(differs[0]) if len(differs) else limit
    return 0 if rings and common < len(tokens) else common // READ * READ

  best = max(lobbies, key=lambda lobby: (known(lobby), -lobby.used))
  oldest, start = min(lobbies, key=lambda lobby: lobby.used), known(best)
  if oldest is best or len(best.tokens) - start < READ:
    return best, start
  if start:
    oldest.cache = slots.copied(best.cache)
  oldest.tokens, oldest.logits_1V = best.tokens[:start], None
  return oldest, start
