"""Conversations to token ids by a model's own template; what people type never becomes a control token."""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxlm.data import template as templates
from jaxlm.data.tokenizer import Span, Tokenizer
from jaxlm.errors import InputError

Message = Mapping[str, Any]
PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # Unicode's private use


def render(
  template: str, messages: Sequence[Message], tokenizer: Tokenizer, *, generation: bool = False, **variables: Any
) -> str:
  """The conversation as text, control tokens spelled out; `generation` opens the assistant's turn.

  The template sees what transformers shows it: a token that the tokenizer does not name is undefined. Raises
  InputError for messages without a role, and for a template that refuses them or does not end.
  """
  for i, message in enumerate(messages):
    if not isinstance(message.get('role'), str):
      raise InputError(f'message {i + 1}: no string "role"; its keys are {", ".join(message) or "none"}')
  tokens = {f'{role}_token': name for role, name in tokenizer.names.items() if role not in tokenizer.unnamed}
  shown = [{key: value for key, value in message.items() if value is not None} for message in messages]
  given = {'messages': shown, 'tools': None, 'documents': None, 'add_generation_prompt': generation}
  return templates.render(template, {**given, **tokens, **variables})


def encode(
  template: str, messages: Sequence[Message], tokenizer: Tokenizer, *, generation: bool = False, **variables: Any
) -> list[int]:
  """The ids of a conversation: those of its text in one piece, but control tokens typed in a message are text.

  Each is one character of private use while the template runs. What a template itself puts together of pieces (it
  removes letters, or writes brackets around a role) is the template's. Raises InputError as `render` does, and for a
  role that holds a control token.
  """
  rendering = Rendering(template, messages, tokenizer, **variables)
  return [i for i, _, _ in rendering.tokens(rendering.text(generation=generation))]


class Rendering:
  """A conversation to be rendered, once or more often: control tokens typed in it are single characters meanwhile.

  `messages` are those with these characters. Raises InputError for a role that holds a control token.
  """

  def __init__(self, template: str, messages: Sequence[Message], tokenizer: Tokenizer, **variables: Any):
    self.template, self.tokenizer = template, tokenizer
    self._typed = _Typed(template, [messages, variables], tokenizer)
    for i, message in enumerate(messages):
      if self._typed.hide(str(message.get('role', ''))) != str(message.get('role', '')):
        raise InputError(f'message {i + 1}: its role {message["role"]!r} holds a control token')
    self.messages: list[Message] = _mapped(list(messages), self._typed.hide)
    self._variables = _mapped(variables, self._typed.hide)

  def marks(self) -> tuple[str, str]:
    """Two characters that stand in no text of this conversation."""
    return next(self._typed.free), next(self._typed.free)

  def text(
    self, messages: Sequence[Message] | None = None, *, generation: bool = False, marks: Sequence[str] = (), **more: Any
  ) -> str:
    """`render` of these messages, or of others made of them in which `marks` may stand."""
    given = self.messages if messages is None else messages
    text = render(self.template, given, self.tokenizer, generation=generation, **self._variables, **more)
    for hidden in (*self._typed.shown, *marks):
      text = text.replace(_escaped(hidden), hidden)
    return text

  def tokens(self, text: str) -> list[Span]:
    """The ids of a text that was rendered, each with its characters [start, end) in it."""
    shown = self._typed.shown
    found: list[Span] = []
    at = 0
    for part in re.split(f'([{"".join(shown)}])', text) if shown else [text]:
      if said := shown.get(part):
        found += [(i, at, at + 1) for i, _, _ in self.tokenizer.spans(said, inside=bool(found))]
      elif part:
        spans = self.tokenizer.spans(part, controls=True, inside=bool(found))
        found += [(i, at + start, at + end) for i, start, end in spans]
      at += len(part)
    return found


class _Typed:
  """Control tokens in what was typed, each spelling behind a character that no text of this conversation has."""

  def __init__(self, template: str, said: Any, tokenizer: Tokenizer):
    self.reader, self.control_ids = tokenizer.reader, tokenizer.control_ids - {tokenizer.unk_id}
    names = sorted((tokenizer.inner.id_to_token(i) for i in tokenizer.control_ids), key=len, reverse=True)
    self.pattern = re.compile('|'.join(map(re.escape, names)) or '(?!)', re.IGNORECASE)  # a template may change case
    self.free = _unused(template + json.dumps(said, ensure_ascii=False))
    self.shown: dict[str, str] = {}  # {character: spelling}
    self.hidden: dict[str, str] = {}

  def hide(self, text: str) -> str:
    text = self.pattern.sub(lambda found: self._one(found[0]), text)
    try:
      read = self.reader.encode(text, add_special_tokens=False)
    except TypeError:  # no text in UTF-8, which is said where it is rendered
      return text
    spans = [span for i, span in zip(read.ids, read.offsets, strict=True) if i in self.control_ids]  # by normalization
    for start, end in reversed(spans):
      text = text[:start] + self._one(text[start:end]) + text[end:]
    return text

  def _one(self, spelling: str) -> str:
    if spelling not in self.hidden:
      self.hidden[spelling] = next(self.free)
      self.shown[self.hidden[spelling]] = spelling
    return self.hidden[spelling]


def _escaped(char: str) -> str:
  """What tojson(ensure_ascii=true) makes of it."""
  return json.dumps(char)[1:-1]


def _unused(text: str) -> Iterator[str]:
  used = set(text)
  yield from (c for c in map(chr, itertools.chain(*PRIVATE)) if c not in used and _escaped(c) not in text)
  raise InputError('chat: the messages have too many characters of private use')


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
  """The same with every string in it changed, keys too."""
  if isinstance(value, str):
    return change(value)
  if isinstance(value, Mapping):
    return {_mapped(key, change): _mapped(x, change) for key, x in value.items()}
  return [_mapped(x, change) for x in value] if isinstance(value, Sequence) else value
