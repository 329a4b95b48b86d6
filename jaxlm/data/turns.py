"""A conversation as token ids and, for each, whether it is learned: what a chat template says the assistant writes.

The text is tokenised once, as a whole; which of its characters are the assistant's is found while it is rendered.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath

from jaxlm.data import chat
from jaxlm.data.conversations import Conversation
from jaxlm.data.template import MARKS
from jaxlm.data.tokenizer import Span, Tokenizer
from jaxlm.errors import InputError
from jaxlm.files import read_text

Learn = Literal['assistant', 'last', 'all']

ASSETS = epath.Path(__file__).parents[1] / 'assets' / 'templates'
BUILT_IN = {  # the control tokens that a template needs beside beginning and end of text
  'chatml': ('<|im_start|>', '<|im_end|>'),
  'llama3': ('<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'),
  'gemma': ('<start_of_turn>', '<end_of_turn>'),
  'mistral': ('[INST]', '[/INST]'),
  'qwen': ('<|im_start|>', '<|im_end|>'),
  'plain': (),
}
GENERATION = re.compile(r'\{%[-+]?\s*generation\b')
PLAIN_KEYS = {'role', 'content', 'name'}  # a message with others (tool calls, thoughts) is more than its content

Place = tuple[int, int]  # characters [start, end) of the rendered text


class Encoded(NamedTuple):
  """The ids of a conversation, int64 [n], which of them are learned, bool [n], and messages dropped from its end."""

  ids: np.ndarray
  learned: np.ndarray
  dropped: int = 0


class _Spans(NamedTuple):
  """Where the assistant writes, in the order of the text."""

  places: list[Place]
  whole_turns: bool = False  # they go on behind the token that ends a turn, which is to be cut off


def choose(asked: str | None, own: str | None) -> tuple[str, str]:
  """The name and the text of a template: 'model' (its `own`), the name of one that comes with the package, or a file.

  Where none is asked for it is the model's own, else 'chatml'. Raises InputError for what is none of these.
  """
  name = asked or ('model' if own else 'chatml')
  if name == 'model':
    if not own:
      raise InputError('--template model: no chat template beside the tokenizer: name another')
    return name, own
  if name in BUILT_IN:
    return name, (ASSETS / f'{name}.jinja').read_text()
  path = epath.Path(name).expanduser()
  if not path.exists() or path.is_dir():
    raise InputError(f"--template {name}: no file, and none of {', '.join(BUILT_IN)} and 'model'")
  return name, read_text(path, 1 << 24)


def encode(
  template: str, conversation: Conversation, tokenizer: Tokenizer, learn: Learn = 'assistant', limit: int | None = None
) -> Encoded | None:
  """The ids that `chat.encode` gives, and the mask: the assistant's turns ('assistant'), its last one, or 'all'.

  A turn is learned from its first token on to the control token that ends it; where the template writes nothing after
  the last turn, the tokenizer's end of text is appended and learned. Where the turns are is what the template's own
  generation blocks say, or marks around the messages' contents where these change nothing else, or what rendering the
  beginning of the conversation shows. A token counts if any character of it does.

  With more than `limit` tokens turns are dropped from the end, so that it ends with a turn of the assistant again;
  None where not even the first one fits. Raises InputError as `chat.encode` does, and where no turn can be found.
  """
  ends = [i for i, message in enumerate(conversation.messages, 1) if message['role'] == 'assistant']
  if not ends:
    raise InputError('no turn of the assistant')
  count = len(conversation.messages)
  for stop in dict.fromkeys([count, *reversed(ends)]):
    found = _encoded(template, conversation._replace(messages=conversation.messages[:stop]), tokenizer, learn)
    if limit is None or len(found.ids) <= limit:
      return found._replace(dropped=count - stop)
  return None


def end_ids(template: str, tokenizer: Tokenizer) -> list[int]:
  """The ids that end a turn of the assistant, as an answer's generation has to know them: the last that is learned."""
  messages = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
  ids, learned, _ = _encoded(template, Conversation(messages), tokenizer, 'assistant')
  last = int(ids[learned][-1])
  return [last] if last in tokenizer.control_ids else []


def _encoded(template: str, conversation: Conversation, tokenizer: Tokenizer, learn: Learn) -> Encoded:
  tools = {'tools': conversation.tools} if conversation.tools else {}
  rendering = chat.Rendering(template, conversation.messages, tokenizer, **tools)
  text = rendering.text()
  tokens = rendering.tokens(text)
  ids = np.array([i for i, _, _ in tokens], np.int64)
  if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:
    raise InputError('chat template: it begins with two tokens for the beginning of a text')
  assistant = [i for i, message in enumerate(conversation.messages) if message['role'] == 'assistant']
  spans = _spans(rendering, text, assistant[-1:] if learn == 'last' else assistant)
  learned, unended = _learned(tokens, spans, text, tokenizer)
  if unended:
    ids, learned = np.append(ids, tokenizer.eos_id), np.append(learned, True)
  return Encoded(ids, np.ones_like(learned) if learn == 'all' else learned)


def _spans(rendering: chat.Rendering, text: str, wanted: list[int]) -> _Spans:
  """Where the wanted messages of the assistant stand in the text."""
  if found := _blocks(rendering, text, wanted):
    return _Spans(found)
  found = _contents(rendering, text, wanted, outer=True) or _contents(rendering, text, wanted, outer=False)
  if not found:
    return _Spans(_prefixes(rendering, text, wanted), whole_turns=True)
  if 'add_generation_prompt' not in rendering.template:
    return _Spans(found)
  opened = rendering.text(rendering.messages[: wanted[-1]], generation=True)
  if text.startswith(opened) and len(opened) < found[-1][0]:  # what stands between is the model's to write
    found[-1] = len(opened), found[-1][1]
  return _Spans(found)


def _blocks(rendering: chat.Rendering, text: str, wanted: list[int]) -> list[Place] | None:
  """The template's own generation blocks, if there is one for each message of the assistant."""
  if not GENERATION.search(rendering.template):
    return None
  marks = rendering.marks()
  named: dict[str, Any] = dict(zip(MARKS, marks, strict=True))
  found = _between(rendering.text(marks=marks, **named), text, marks)
  turns = [i for i, message in enumerate(rendering.messages) if message['role'] == 'assistant']
  if found is None or (len(found) != len(turns) and wanted != turns):
    return None
  return [found[turns.index(i)] for i in wanted] if len(found) == len(turns) else found


def _contents(rendering: chat.Rendering, text: str, wanted: list[int], *, outer: bool) -> list[Place] | None:
  """Marks around the contents, or within their outer spaces, where the text without them is what it was."""
  messages = [dict(message) for message in rendering.messages]
  if any(messages[i].keys() - PLAIN_KEYS for i in wanted):
    return None
  begin, end = rendering.marks()
  for i in wanted:
    content = messages[i]['content']
    inner = content if outer else content.strip()
    messages[i]['content'] = content.replace(inner, f'{begin}{inner}{end}', 1)
  try:
    found = _between(rendering.text(messages, marks=(begin, end)), text, (begin, end))
  except InputError:  # a template may look into a content
    return None
  return found if found and len(found) == len(wanted) else None


def _prefixes(rendering: chat.Rendering, text: str, wanted: list[int]) -> list[Place]:
  """What a message adds to the conversation before it with the assistant's turn opened."""
  found = []
  for i in wanted:
    before = rendering.text(rendering.messages[:i], generation=True)
    after = text if i + 1 == len(rendering.messages) else rendering.text(rendering.messages[: i + 1])
    if not text.startswith(before) or not text.startswith(after) or len(after) <= len(before):
      raise InputError(
        f'chat template: where message {i + 1} stands is not to be seen: it shows it otherwise once more follow; '
        'use another template, one with {% generation %} blocks, or learn the last turn only'
      )
    found.append((len(before), len(after)))
  return found


def _between(marked: str, text: str, marks: Sequence[str]) -> list[Place] | None:
  """The places between pairs of marks, in the text without them; None where that is not `text` or they are no pairs."""
  begin, end = marks
  if re.sub(f'[{begin}{end}]', '', marked) != text:
    return None
  found, at, opened = [], 0, -1
  for part in re.split(f'([{begin}{end}])', marked):
    if part in marks:
      if (part == begin) != (opened < 0):
        return None
      if part == end and at > opened:
        found.append((opened, at))
      opened = at if part == begin else -1
    else:
      at += len(part)
  return found if opened < 0 and found else None


def _learned(tokens: list[Span], spans: _Spans, text: str, tokenizer: Tokenizer) -> tuple[np.ndarray, bool]:
  """bool [n], and whether the text ends with a turn that no token ends."""
  learned = np.zeros(len(tokens), np.bool_)
  starts, ends = np.array([s for _, s, _ in tokens], np.int64), np.array([e for _, _, e in tokens], np.int64)
  is_end = lambda i: i in tokenizer.control_ids and (i != tokenizer.bos_id or i == tokenizer.eos_id)
  blank = lambda token: not text[token[1] : token[2]].strip()
  unended = False
  for start, end in spans.places:
    first, stop = int(np.searchsorted(ends, start, 'right')), int(np.searchsorted(starts, end, 'left'))
    last = stop
    while last > first and not is_end(tokens[last - 1][0]) and blank(tokens[last - 1]):
      last -= 1
    if last > first and is_end(tokens[last - 1][0]):  # it holds its end
      stop = last if spans.whole_turns else stop
    else:
      last = stop
      while last < len(tokens) and not is_end(tokens[last][0]) and blank(tokens[last]):
        last += 1
      unended = last == len(tokens)
      stop = last if unended else last + 1 if is_end(tokens[last][0]) else stop
    learned[first:stop] = True
  return learned, unended
