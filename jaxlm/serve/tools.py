"""Calls of functions: how models write them, and grammars that answers have to obey (llguidance).

Two ways are known: JSON between <tool_call> tags (Hermes, and with it ChatML and Qwen), and an answer that is nothing
but JSON (Llama 3, and Mistral's list). A template that says nothing of tools is told of them in the first way.
"""

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

OPEN, CLOSE = '<tool_call>', '</tool_call>'
# One way of writing each value, the commonest: where spaces are free a model may write nothing else.
SPACES = {'whitespace_flexible': False, 'item_separator': ', ', 'key_separator': ': '}


TOLD = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""  # Qwen's wording of what Hermes began


class Call(NamedTuple):
  """Of a function; `arguments` is JSON."""

  id: str
  name: str
  arguments: str


class Calls:
  """Splits an answer that grows into its text and its calls; only functions that there are can be called."""

  def __init__(self, functions: Collection[str]):
    self.functions = functions
    self.found = 0
    self._held = ''
    self._begun = self._bare = self._called = False

  def add(self, text: str, last: bool) -> tuple[str, list[Call]]:
    """What is now known to be text, and calls that are complete."""
    self._held += text
    if not self._begun and (start := self._held.lstrip()):
      self._begun, self._bare = True, start[0] in '[{'
    if self._bare or not self._begun:
      return self._whole() if last else ('', [])
    said, calls = '', []
    while True:
      if self._called:  # lines between calls are no text
        self._held = self._held.lstrip('\n')
      at = self._held.find(OPEN)
      end = self._held.find(CLOSE, at) if at >= 0 else -1
      if end < 0:
        break
      found = self._calls(self._held[at + len(OPEN) : end])
      said += self._held[: at if found else end + len(CLOSE)]
      self._held, self._called = self._held[end + len(CLOSE) :], bool(found)
      calls += found
    if last and at >= 0 and (found := self._calls(self._held[at + len(OPEN) :])):  # some end their turn for a tag
      said, self._held, calls = said + self._held[:at], '', calls + found
      return said, calls
    keep = len(self._held) - at if at >= 0 else _begins(self._held, OPEN)
    more = self._held if last else self._held[: len(self._held) - keep]
    self._held = self._held[len(more) :]
    self._called &= not more
    return said + more, calls

  def _whole(self) -> tuple[str, list[Call]]:
    text, self._held = self._held, ''
    calls = self._calls(text)
    return ('', calls) if calls else (text, [])

  def _calls(self, text: str) -> list[Call]:
    found = []
    for call in _objects(text):
      arguments = call.get('arguments', call.get('parameters', {})) if isinstance(call, dict) else None
      name = call.get('name') if isinstance(call, dict) else None
      if not isinstance(arguments, dict) or not isinstance(name, str) or name not in self.functions:
        return []
      try:  # half a pair of surrogates is no text, and a number beyond float64 no JSON: then it is no call
        shown = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        shown.encode()
      except ValueError:
        return []
      found.append(Call(f'call_{secrets.token_hex(12)}', name, shown))
    self.found += len(found)
    return found


def _objects(text: str) -> list[Any]:
  """What is in a list of JSON, or values with semicolons or lines between them; nothing if a text is anything else."""
  found, at, decoder = [], 0, json.JSONDecoder()
  text = text.strip()
  while at < len(text):
    try:
      value, at = decoder.raw_decode(text, at)
    except (ValueError, RecursionError):
      return []
    found += value if isinstance(value, list) else [value]
    rest = text[at:].lstrip('; \n')
    if at + len(rest) == len(text) and rest:  # nothing stands between it and what follows
      return []
    at = len(text) - len(rest)
  return found


def _begins(text: str, word: str) -> int:
  """Characters at the end of a text that may become the word."""
  return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if word.startswith(text[-n:])), 0)


def json_grammar(schema: Mapping[str, Any]) -> str:
  """Of answers that are JSON by a schema."""
  return json.dumps({'grammars': [{'json_schema': {**schema, 'x-guidance': SPACES}}]})


def instructed(messages: Sequence[Mapping[str, Any]], given: Sequence[Any]) -> list[dict[str, Any]]:
  """A conversation for a template that says nothing of tools: they, calls and what came of these are written out."""
  told = TOLD.format(tools='\n'.join(json.dumps(tool, ensure_ascii=False) for tool in given))
  found: list[dict[str, Any]] = [{'role': 'system', 'content': told}]
  for i, message in enumerate(messages):
    message, content = dict(message), message['content']
    if i == 0 and message['role'] == 'system':
      found[0]['content'] = f'{content}\n\n{told}'
    elif message['role'] == 'tool':
      answered = f'<tool_response>\n{content}\n</tool_response>'
      if i and messages[i - 1]['role'] == 'tool':
        found[-1]['content'] += f'\n{answered}'
      else:
        found.append({'role': 'user', 'content': answered})
    else:
      calls = [_written(call['function']) for call in message.pop('tool_calls', [])]
      found.append({**message, 'content': '\n'.join([content, *calls] if content else calls or [content])})
  return found


def _written(function: Mapping[str, Any]) -> str:
  call = {'name': function['name'], 'arguments': function['arguments']}
  return f'{OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{CLOSE}'


def grammar(functions: Mapping[str, Any], tagged: bool) -> str:
  """Of answers that are one call of one of the functions, {name: schema of its parameters}, between tags or bare."""
  key = 'arguments' if tagged else 'parameters'
  one = lambda name, schema: {
    'type': 'object',
    'properties': {'name': {'const': name}, key: schema},
    'required': ['name', key],
    'additionalProperties': False,
  }
  schema = {'anyOf': [one(*pair) for pair in functions.items()]}
  if not tagged:
    return json_grammar(schema)
  spaced = {**schema, 'x-guidance': SPACES}
  lark = f'start: {json.dumps(OPEN)} "\\n" call "\\n" {json.dumps(CLOSE)}\ncall: %json {json.dumps(spaced)}\n'
  return json.dumps({'grammars': [{'lark_grammar': lark}]})
