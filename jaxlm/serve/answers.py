"""What clients are told, in OpenAI's JSON: chunks as they come, or one object at the end."""

import abc
import secrets
import time
from collections.abc import Sequence
from typing import Any

from jaxlm.serve.api import Asked
from jaxlm.serve.engine import Piece, Token
from jaxlm.serve.text import Spelling
from jaxlm.serve.tools import Call, Calls

JSON = dict[str, Any]


class Usage:
  """Tokens of a request."""

  def __init__(self, asked: Asked):
    self.prompt = sum(len(prompt.ids) for prompt in asked.prompts)  # once, however many answers there are
    self._made: dict[int, int] = {}
    self._cached: dict[int, int] = {}

  def add(self, choice: int, piece: Piece) -> None:
    self._made[choice] = max(self._made.get(choice, 0), piece.made)
    self._cached[choice] = max(self._cached.get(choice, 0), piece.cached)

  def told(self) -> JSON:
    made = sum(self._made.values())
    return {
      'prompt_tokens': self.prompt,
      'completion_tokens': made,
      'total_tokens': self.prompt + made,
      'prompt_tokens_details': {'cached_tokens': min(sum(self._cached.values()), self.prompt)},
    }


class Answer(abc.ABC):
  """What a request is answered with. `chunks` come as pieces do; `whole` is all of them together."""

  chunk_object = whole_object = prefix = ''

  def __init__(self, asked: Asked, spelling: Spelling):
    self.asked, self.spelling, self.usage = asked, spelling, Usage(asked)
    self.id, self.created = f'{self.prefix}-{secrets.token_hex(12)}', int(time.time())
    self._pieces: dict[int, list[Piece]] = {i: [] for i in range(asked.n * len(asked.prompts))}

  def _frame(self, kind: str, choices: list[JSON]) -> JSON:
    return {'id': self.id, 'object': kind, 'created': self.created, 'model': self.asked.model.name, 'choices': choices}

  def begin(self) -> list[JSON]:
    """What comes before any token."""
    return []

  def chunks(self, choice: int, piece: Piece) -> list[JSON]:
    """What is streamed of a piece."""
    self.usage.add(choice, piece)
    found = [self._frame(self.chunk_object, [one]) for one in self._told(choice, piece)]
    return [{**chunk, 'usage': None} for chunk in found] if self.asked.include_usage else found

  def last(self) -> list[JSON]:
    """What comes after the last token."""
    return [{**self._frame(self.chunk_object, []), 'usage': self.usage.told()}] if self.asked.include_usage else []

  def keep(self, choice: int, piece: Piece) -> None:
    """For `whole`."""
    self.usage.add(choice, piece)
    self._pieces[choice].append(piece)

  def whole(self) -> JSON:
    """Everything that was kept."""
    joined = (_joined(pieces) for pieces in self._pieces.values())
    choices = [self._choice(i, piece) for i, piece in enumerate(joined)]
    return {**self._frame(self.whole_object, choices), 'usage': self.usage.told()}

  @abc.abstractmethod
  def _told(self, choice: int, piece: Piece) -> list[JSON]:
    """The choices of a streamed chunk."""

  @abc.abstractmethod
  def _choice(self, choice: int, piece: Piece) -> JSON:
    """A choice of the whole answer."""


def _joined(pieces: Sequence[Piece]) -> Piece:
  text, tokens = ''.join(piece.text for piece in pieces), [t for piece in pieces for t in piece.tokens]
  return Piece(text, tokens, pieces[-1].finish, pieces[-1].made, pieces[0].prompt, pieces[0].cached)


class Completion(Answer):
  """`/v1/completions`."""

  chunk_object = whole_object = 'text_completion'
  prefix = 'cmpl'

  def __init__(self, asked: Asked, spelling: Spelling):
    super().__init__(asked, spelling)
    self._begun: set[int] = set()

  def _told(self, choice: int, piece: Piece) -> list[JSON]:
    return [self._choice(choice, piece)]

  def _choice(self, choice: int, piece: Piece) -> JSON:
    asked, text, before = self.asked, piece.text, ''
    if asked.echo:
      before = asked.prompts[choice // asked.n].text
      text = text if choice in self._begun else before + text
    self._begun.add(choice)
    logprobs = None if asked.told is None else self._logprobs(piece, len(before))
    return {'index': choice, 'text': text, 'logprobs': logprobs, 'finish_reason': piece.finish}

  def _logprobs(self, piece: Piece, before: int) -> JSON:
    """Those of the prompt too, where they are there; offsets are in the text that is told."""
    spell, offsets, at = self.spelling.text, [], 0
    for token in piece.prompt:
      offsets.append(at)
      at = min(before, at + len(self.spelling.said(token.id)))
    offsets += [before + token.offset for token in piece.tokens]
    tokens = [*piece.prompt, *piece.tokens]
    tops = [None if t.logp is None else self._top(t) for t in tokens]
    return {
      'tokens': [spell(t.id) for t in tokens],
      'token_logprobs': [t.logp for t in tokens],
      'top_logprobs': tops if self.asked.told else None,
      'text_offset': offsets,
    }

  def _top(self, token: Token) -> dict[str, float]:
    """The likeliest, and the token itself."""
    found: dict[str, float] = {}
    for i, logp in [*token.top, (token.id, token.logp)]:
      found.setdefault(self.spelling.text(i), logp)  # ty: ignore
    return found


class Chat(Answer):
  """`/v1/chat/completions`."""

  chunk_object, whole_object, prefix = 'chat.completion.chunk', 'chat.completion', 'chatcmpl'

  def __init__(self, asked: Asked, spelling: Spelling):
    super().__init__(asked, spelling)
    self._calls = {i: Calls(asked.functions) for i in self._pieces} if asked.functions else {}

  def begin(self) -> list[JSON]:
    first = lambda i: {'index': i, 'delta': {'role': 'assistant', 'content': ''}, 'finish_reason': None}
    return [self._frame(self.chunk_object, [{**first(i), 'logprobs': None}]) for i in self._pieces]

  def _split(self, choice: int, piece: Piece) -> tuple[str, list[Call], str | None]:
    """Text, calls, and why it ended."""
    if choice not in self._calls:
      return piece.text, [], piece.finish
    splitter = self._calls[choice]
    text, calls = splitter.add(piece.text, last=piece.finish is not None)
    return text, calls, 'tool_calls' if splitter.found and piece.finish == 'stop' else piece.finish

  def _told(self, choice: int, piece: Piece) -> list[JSON]:
    text, calls, finish = self._split(choice, piece)
    delta: JSON = {'content': text} if text else {}
    if calls:
      first = self._calls[choice].found - len(calls)
      delta['tool_calls'] = [{'index': first + i, **_call(call)} for i, call in enumerate(calls)]
    one = {'index': choice, 'delta': delta, 'logprobs': self._logprobs(piece), 'finish_reason': finish}
    return [one] if delta or finish or piece.tokens else []

  def _choice(self, choice: int, piece: Piece) -> JSON:
    text, calls, finish = self._split(choice, piece)
    message: JSON = {'role': 'assistant', 'content': text or None if calls else text, 'refusal': None}
    if calls:
      message['tool_calls'] = [_call(call) for call in calls]
    return {'index': choice, 'message': message, 'logprobs': self._logprobs(piece), 'finish_reason': finish}

  def _logprobs(self, piece: Piece) -> JSON | None:
    if self.asked.told is None:
      return None
    told = lambda i, logp: {
      'token': self.spelling.text(i),
      'logprob': logp,
      'bytes': list(self.spelling.bytes(i)),
    }
    return {
      'content': [{**told(t.id, t.logp), 'top_logprobs': [told(*pair) for pair in t.top]} for t in piece.tokens],
      'refusal': None,
    }


def _call(call: Call) -> JSON:
  return {'id': call.id, 'type': 'function', 'function': {'name': call.name, 'arguments': call.arguments}}
