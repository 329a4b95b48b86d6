"""Answers that have to obey a grammar: which tokens may come next (llguidance)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError


class Obeying:
  """One answer on its way through a grammar. Where that fails (a schema may ask for too much) the answer ends."""

  def __init__(self, matcher: Any, words: int, ends: Sequence[int]):
    self._matcher, self._failed = matcher, False
    self._end = np.zeros(words, np.uint32)
    for i in ends:
      self._end[i // 32] |= np.uint32(1 << i % 32)

  def mask(self) -> np.ndarray:
    """uint32 [words]: the tokens that may come next; the end of an answer where it may end."""
    mask = np.zeros_like(self._end)
    try:
      found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
      mask[: len(found)] = found[: len(mask)]
    except Exception:  # the library's own limits of time and size
      self._failed = True
    return mask if mask.any() else self._end

  def accept(self, token: int) -> bool:
    """Takes the next token; whether nothing can follow it."""
    return self._failed or not self._matcher.consume_token(token) or bool(self._matcher.is_stopped())


class Grammars:
  """Of one tokenizer; made when the first grammar is asked for."""

  def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: frozenset[int]):
    self._tokenizer, self._ends, self._words = tokenizer, sorted(ends), -(-vocab_size // 32)
    self._made: Any = None

  def matcher(self, grammar: str) -> Obeying:
    """Raises InputError for a grammar that cannot be followed, and where llguidance is not installed."""
    try:
      import llguidance
    except ImportError as error:
      raise InputError("response_format and forced tools need llguidance: pip install -e '.[serve]'") from error
    if self._made is None:
      self._made = llguidance.LLTokenizer(self._tokenizer.inner.to_str(), eos_token=self._ends)
    try:
      matcher = llguidance.LLMatcher(self._made, grammar, log_level=0)
    except Exception as error:  # whatever the library finds wrong with a schema that somebody sent
      raise InputError(f'the schema cannot be followed: {error}') from error
    if matcher.is_error():
      raise InputError(f'the schema cannot be followed: {matcher.get_error()}')
    return Obeying(matcher, self._words, self._ends)
