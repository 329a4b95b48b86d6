"""Tokens to text as they come: whole characters only, and nothing of what may become a stop string."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from jaxlm.data.tokenizer import BYTE, Tokenizer

BROKEN = '\ufffd'  # what a character of which a token is still missing decodes to
PENDING = 12  # tokens that may wait for the rest of a character: none has so many


class Text:
  """An answer that grows. What `add` returned is never taken back."""

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
    self.tokenizer, self.stop = tokenizer, tuple(stop)
    self.ids: list[int] = []
    self.said = ''  # what was made, whole characters
    self.told = 0  # characters of it that were returned
    self.stopped = False
    self._from, self._to = 0, 0  # the tokens of the last characters: what follows is decoded together with them

  def add(self, token: int) -> str:
    """What can be told now: after a stop string was found, what is before it."""
    self.ids.append(token)
    known, whole = (self.tokenizer.decode(self.ids[self._from : end]) for end in (self._to, len(self.ids)))
    if len(whole) <= len(known) or (whole.endswith(BROKEN) and len(self.ids) - self._to < PENDING):
      return ''
    before = len(self.said)
    self.said += whole[len(known) :]
    self._from, self._to = self._to, len(self.ids)
    return self._tell(before)

  def _tell(self, before: int) -> str:
    longest = max(map(len, self.stop), default=1)
    found = [at for stop in self.stop if (at := self.said.find(stop, max(0, before - longest + 1))) >= 0]
    if found:
      self.said, self.stopped = self.said[: min(found)], True
      return self._rest(len(self.said))
    return self._rest(len(self.said) - self._held())

  def _held(self) -> int:
    """Characters at the end that a stop string begins with."""
    most = max((len(stop) - 1 for stop in self.stop), default=0)
    tail = self.said[-most:] if most else ''
    return next((n for n in range(len(tail), 0, -1) if any(s.startswith(tail[-n:]) for s in self.stop)), 0)

  def _rest(self, end: int) -> str:
    piece = self.said[self.told : end]
    self.told = max(self.told, end)
    return piece

  def finish(self) -> str:
    """What is left when no more tokens come."""
    if not self.stopped:
      known, whole = (self.tokenizer.decode(self.ids[self._from : end]) for end in (self._to, len(self.ids)))
      before = len(self.said)
      self.said += whole[len(known) :]
      self._from = self._to = len(self.ids)
      if self.stop and before < len(self.said):
        piece = self._tell(before)
        if self.stopped:
          return piece
        return piece + self._rest(len(self.said))
    return self._rest(len(self.said))


@cache
def _letters() -> dict[str, int]:
  """The byte that each letter of byte-level BPE stands for (Radford et al. 2019, GPT-2)."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in plain]
  return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


class Spelling:
  """The bytes that each token of a tokenizer stands for, and a name for those that are no text."""

  def __init__(self, tokenizer: Tokenizer):
    inner: Any = tokenizer.inner
    self._inner, self._added = inner, {i: t.content for i, t in inner.get_added_tokens_decoder().items()}
    self._controls = tokenizer.control_ids
    self._byte_level = bool(re.search(r'"type":\s*"ByteLevel"', inner.to_str()))

  def bytes(self, i: int) -> bytes:
    """UTF-8; may be a part of a character."""
    token = self._added.get(i) or self._inner.id_to_token(i) or ''
    if i in self._added:
      return token.encode()
    if self._byte_level and all(c in _letters() for c in token):
      return bytes(_letters()[c] for c in token)
    if BYTE.fullmatch(token):
      return bytes([int(token[3:5], 16)])
    return token.replace('\u2581', ' ').encode()

  def text(self, i: int) -> str:
    """As OpenAI's answers spell a token: 'bytes:\\xe2\\x82' where it is no whole character."""
    raw = self.bytes(i)
    try:
      return raw.decode()
    except UnicodeDecodeError:
      return 'bytes:' + ''.join(f'\\x{b:02x}' for b in raw)

  def said(self, i: int) -> str:
    """What a token adds to a text: nothing if it stands for none, or for a part of a character."""
    return '' if i in self._controls else self.bytes(i).decode(errors='ignore')
