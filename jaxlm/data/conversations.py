"""Rows in the formats that users have, as conversations: messages, ShareGPT, Alpaca, and pairs of any two columns."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.data.sources import Document, File
from jaxlm.errors import InputError

Message = dict[str, Any]
Row = Mapping[str, Any]

ROLES = ('system', 'user', 'assistant', 'tool')
NAMES = {  # what ShareGPT and others call the roles
  'human': 'user',
  'gpt': 'assistant',
  'chatgpt': 'assistant',
  'model': 'assistant',
  'function': 'tool',
  'observation': 'tool',
} | {role: role for role in ROLES}
PAIRS = (('prompt', 'completion'), ('prompt', 'response'), ('question', 'answer'), ('document', 'summary'))
PARTS = ('messages', 'conversations', 'prompt', 'response', 'system', 'tools')  # what `columns` may name
PREFERENCE = {'chosen', 'rejected', 'label'}  # columns of rows that also say what not to write


class Conversation(NamedTuple):
  """Messages with roles of ROLES, as OpenAI and Hugging Face write them, and the tools that the model may call."""

  messages: list[Message]
  tools: list[Any] | None = None

  def to_json(self) -> str:
    """One text for equal conversations, by which duplicates and splits are found."""
    return json.dumps({'messages': self.messages, 'tools': self.tools}, ensure_ascii=False, sort_keys=True)

  @staticmethod
  def from_json(text: str) -> 'Conversation':
    return Conversation(**json.loads(text))


class Format(NamedTuple):
  """A format, in words, and what makes a conversation of a row of it."""

  name: str
  read: Callable[[Row], Any]


def named_columns(given: Sequence[str], parts: Sequence[str]) -> dict[str, str]:
  """('prompt=q,response=a',) as {'prompt': 'q', 'response': 'a'}. Raises InputError for other parts than these."""
  found = {}
  for one in ','.join(given).split(',') if given else ():
    part, equals, column = one.strip().partition('=')
    if part not in parts or not equals or not column:
      raise InputError(f'--columns {one.strip()!r} is not PART=COLUMN, PART being one of {", ".join(parts)}')
    found[part] = column
  return found


def parse_columns(given: Sequence[str]) -> dict[str, str]:
  """The columns of a conversation. Raises InputError for other parts than PARTS, and for those that are none."""
  found = named_columns(given, PARTS)
  pair = 'prompt' in found and 'response' in found
  if found and sum([pair, 'messages' in found, 'conversations' in found]) != 1:
    raise InputError('--columns: name either messages, or conversations, or both prompt and response')
  return found


def guess(there: Sequence[str], columns: Mapping[str, str] | None = None) -> Format:
  """The format of rows with these columns; `columns` (see `parse_columns`) say it where it is not to be guessed.

  Raises InputError, with the columns that are there, where they fit none, and for preference rows.
  """
  named = dict(columns or {})
  if missing := [name for name in named.values() if name not in there and name != named.get('system')]:
    raise InputError(f'no column "{missing[0]}"; the columns are {listed(there)}')
  if not named:
    if 'messages' in there:
      named = {'messages': 'messages'}
    elif 'conversations' in there:
      named = {'conversations': 'conversations'}
    elif {'instruction', 'output'} <= set(there):
      return Format('Alpaca (instruction, input, output)', _alpaca)
    elif preference := PREFERENCE & set(there):
      raise InputError(
        f'the column "{min(preference)}" makes these preference rows: prepare them with --preference; to learn '
        f'one of their columns all the same, name it with --columns prompt=...,response=...; the columns are '
        f'{listed(there)}'
      )
    else:
      two = next((two for two in PAIRS if set(two) <= set(there)), None)
      if two is None:
        raise InputError(
          f'no known format has the columns {listed(there)}: name two with --columns prompt=...,response=...'
        )
      named = dict(zip(('prompt', 'response'), two, strict=True))
  shown = ', '.join(name if part == name else f'{part}={name}' for part, name in named.items())
  named = {'system': 'system', 'tools': 'tools'} | named
  if 'messages' in named or 'conversations' in named:
    return Format(f'messages ({shown})', lambda row: whole(row, named))
  return Format(f'prompt and response ({shown})', lambda row: pair(row, named))


class Reader:
  """Makes documents of rows: the text is the conversation's JSON. `formats` says what was guessed: {kind: format}.

  `guessing` and `checking` are `guess` and `checked`, or those of rows that hold more than a conversation.
  """

  def __init__(self, columns: Mapping[str, str] | None = None, guessing: Any = None, checking: Any = None):
    self.columns, self.formats = columns, dict[str, str]()
    self._guess, self._check = guessing or guess, checking or checked
    self._of: dict[str, Format] = {}

  def __call__(self, row: Row, file: File, number: int) -> Document:
    where = f'{file.path}:{number}'
    try:
      path = str(file.path)
      if path not in self._of:
        self._of[path] = self._guess(list(row), self.columns)
      form = self._of[path]
      self.formats.setdefault(file.kind, form.name)
      text = self._check(form.read(row)).to_json()
    except InputError as error:
      raise InputError(f'{where}: {error}') from error
    if re.search('[\ud800-\udfff]', text):
      raise InputError(f'{where}: half of a surrogate pair, which is no text')
    source = row.get('source')
    return Document(text, source if isinstance(source, str) else file.kind, where, file.kind)


def checked(conversation: Conversation, *, empty: bool = False) -> Conversation:
  """The same, plain: without nulls, text in parts as one. Raises InputError for what nothing can be learned from.

  With `empty` turns of the assistant may be so, as what a model has answered may be.
  """
  messages = [_checked(message, i, empty) for i, message in enumerate(conversation.messages, 1)]
  if not messages:
    raise InputError('an empty conversation')
  if not any(message['role'] == 'assistant' for message in messages):
    raise InputError(f'no turn of the assistant; the roles are {", ".join(message["role"] for message in messages)}')
  return Conversation(messages, conversation.tools)


def _checked(message: Any, number: int, empty: bool) -> Message:
  where = f'message {number}'
  if not isinstance(message, Mapping):
    raise InputError(f'{where}: expected an object, found {_short(message)}')
  found = {key: value for key, value in message.items() if value is not None}
  role = found.get('role')
  if not isinstance(role, str) or role not in NAMES:
    raise InputError(f'{where}: unknown role {_short(role)}; the roles are {", ".join(NAMES)}')
  found['role'] = NAMES[role]
  found['content'] = _content(found.get('content', ''), where)
  if calls := found.pop('tool_calls', None):
    found['tool_calls'] = [_call(call, where) for call in _list(calls, f'{where}: tool_calls')]
  if found['role'] == 'user' and not found['content'].strip():
    raise InputError(f'{where}: the user says nothing')
  if found['role'] == 'assistant' and not (found['content'].strip() or calls or empty):
    raise InputError(f'{where}: a turn of the assistant without text and tool calls')
  return found


def _content(content: Any, where: str) -> str:
  if isinstance(content, list):  # of parts
    texts = [part.get('text') if isinstance(part, Mapping) and part.get('type') == 'text' else None for part in content]
    content = None if None in texts else ''.join(map(str, texts))
  if not isinstance(content, str):
    raise InputError(f'{where}: its content is no text')
  return content


def _call(call: Any, where: str) -> dict[str, Any]:
  """A tool call whose arguments, where they are JSON in a string, are an object, as templates want them."""
  function = call.get('function', call) if isinstance(call, Mapping) else None
  if not isinstance(function, Mapping) or not isinstance(function.get('name'), str):
    raise InputError(f'{where}: a tool call without a name: {_short(call)}')
  arguments = function.get('arguments', {})
  if isinstance(arguments, str):
    arguments = _json(arguments or '{}', f'{where}: the arguments of {function["name"]!r}')
  made = {**function, 'arguments': arguments}
  return {**call, 'function': made} if 'function' in call else {'type': 'function', 'function': made}


def whole(row: Row, named: Mapping[str, str]) -> Conversation:
  """A conversation in one column, `named` as messages or conversations."""
  column = named.get('messages') or named['conversations']
  messages = [_share(one) for one in _list(row.get(column), f'"{column}"')]
  return _with_system(row, named, messages)


def _share(message: Any) -> Any:
  """A message of ShareGPT, {from, value}, under the usual names."""
  if isinstance(message, Mapping) and 'from' in message and 'role' not in message:
    return {'role': message['from'], 'content': message.get('value')}
  return message


def pair(row: Row, named: Mapping[str, str]) -> Conversation:
  """One whose prompt and response are texts, or lists of messages, in two columns."""
  sides = []
  for part, role in (('prompt', 'user'), ('response', 'assistant')):
    value, column = row.get(named[part]), named[part]
    if isinstance(value, str):
      sides.append([{'role': role, 'content': value}])
    else:
      sides.append([_share(one) for one in _list(value, f'"{column}"')])
  if any(isinstance(one, Mapping) and NAMES.get(str(one.get('role'))) == 'user' for one in sides[1]):
    raise InputError(f'"{named["response"]}" has a turn of the user')
  return _with_system(row, named, sides[0] + sides[1])


def _alpaca(row: Row) -> Conversation:
  parts = [row.get(name) or '' for name in ('instruction', 'input', 'output')]
  if wrong := [part for part in parts if not isinstance(part, str)]:
    raise InputError(f'expected text, found {_short(wrong[0])}')
  said = '\n\n'.join(part for part in parts[:2] if part.strip())
  messages = [{'role': 'user', 'content': said}, {'role': 'assistant', 'content': parts[2]}]
  return _with_system(row, {'system': 'system'}, messages)


def _with_system(row: Row, named: Mapping[str, str], messages: list[Any]) -> Conversation:
  """With the system message that stands in a column of its own, and the tools of one."""
  tools = row.get(named['tools']) if 'tools' in named else None
  tools = _list(tools, f'"{named["tools"]}"') if tools else None
  system = row.get(named['system'])
  if not system:
    return Conversation(messages, tools)
  return Conversation([{'role': 'system', 'content': system}, *messages], tools)


def _list(value: Any, what: str) -> list[Any]:
  """A list, or one in JSON."""
  if isinstance(value, str):
    value = _json(value, what)
  if not isinstance(value, list):
    raise InputError(f'{what} must be a list, found {_short(value)}')
  return value


def _json(text: str, what: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise InputError(f'{what} are no JSON: {_short(text)}') from error


def _short(value: Any) -> str:
  return json.dumps(value, default=str, ensure_ascii=False)[:60]


def listed(names: Sequence[str]) -> str:
  """Columns, in words."""
  return ', '.join(names) or 'none'
