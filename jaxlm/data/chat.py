"""Conversations to token ids by a model's own template; what people type never becomes a control token."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.data import template as templates
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError

Message = Mapping[str, Any]
ESCAPES = ''.join(map(chr, range(0xE000, 0xE010)))  # private use: one that no message has marks what was typed


def render(
  template: str, messages: Sequence[Message], tokenizer: Tokenizer, *, generation: bool = False, **variables: Any
) -> str:
  """The conversation as text, control tokens spelled out; `generation` opens the assistant's turn.

  Raises InputError for messages without a role, and for a template that refuses them or does not end.
  """
  for i, message in enumerate(messages):
    if not isinstance(message.get('role'), str):
      raise InputError(f'message {i + 1}: no string "role"; its keys are {", ".join(message) or "none"}')
  names = {f'{role}_token': tokenizer.names.get(role, '') for role in ('bos', 'eos')}
  return templates.render(
    template, {'messages': list(messages), 'add_generation_prompt': generation, **names, **variables}
  )


def encode(
  template: str, messages: Sequence[Message], tokenizer: Tokenizer, *, generation: bool = False, **variables: Any
) -> list[int]:
  """The ids of a conversation: those of its text in one piece, but control tokens typed in a message are text."""
  control = sorted((tokenizer.inner.id_to_token(i) for i in tokenizer.control_ids), key=len, reverse=True)
  escape = next((c for c in ESCAPES if c not in str(messages)), None)
  if escape is None:
    raise InputError('chat: a message has too many characters of private use')
  typed = re.compile('|'.join(map(re.escape, control))) if control else None
  marked = _mapped(messages, lambda text: typed.sub(lambda m: m[0][0] + escape + m[0][1:], text) if typed else text)
  text = render(template, marked, tokenizer, generation=generation, **variables)
  ids: list[int] = []
  for part in re.split(f'({typed.pattern})', text) if typed else [text]:
    if typed and typed.fullmatch(part):
      ids.append(tokenizer.inner.token_to_id(part))
    elif part:
      ids += tokenizer.encode(part.replace(escape, ''))
  return ids


def _mapped(value: Any, change: Any) -> Any:
  """The same with every string in it changed, but for the names of keys and roles."""
  if isinstance(value, str):
    return change(value)
  if isinstance(value, Mapping):
    return {key: x if key == 'role' else _mapped(x, change) for key, x in value.items()}
  return [_mapped(x, change) for x in value] if isinstance(value, Sequence) else value
