"""Conversations on their way to tokens: what renders them, which of them fit, and what is counted of them."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.data import choice, conversations, preferences, records, turns
from jaxlm.data.choice import Quarantine
from jaxlm.data.conversations import Conversation
from jaxlm.data.preferences import Preference
from jaxlm.data.sources import Document
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError

TALKS = 256  # conversations that are written together
LONG = 'too long'  # conversations of which not even the first turn of the assistant fits, preferences that do not
SAME = 'no difference'  # pairs whose answers are the same tokens
KINDS = {1: 'labels', 2: 'pairs'}  # what preferences are, by how many answers one has

Label = tuple[bool, float]  # of an answer: whether it is the better one (or a good one), and by how much
Part = tuple[turns.Encoded, Label]


class Chat(NamedTuple):
  """How conversations become tokens: the template's text, what is learned of them, the most tokens of one.

  `columns` say which are the conversation's, where that is not to be guessed (see `conversations.parse_columns`). With
  `preference` rows say what is preferred (see `preferences.guess`): each becomes its answers, one document after
  another, of which the last turn is learned.
  """

  template: str
  learn: turns.Learn = 'assistant'
  max_len: int | None = None
  columns: Mapping[str, str] | None = None
  preference: bool = False

  def asked(self) -> dict[str, Any]:
    """The fields that make it another preparation; `preference` is named where it is on."""
    return {name: value for name, value in self._asdict().items() if name != 'preference' or value}

  def reader(self) -> conversations.Reader:
    """What makes documents of rows."""
    kinds = (preferences.guess, preferences.checked) if self.preference else ()
    return conversations.Reader(self.columns, *kinds)


def chat_of(
  asked: str | None,
  own: str | None,
  tokenizer: Tokenizer,
  columns: Sequence[str] = (),
  *,
  learn: turns.Learn = 'assistant',
  max_len: int | None = None,
  preference: bool = False,
) -> tuple[str, Tokenizer, Chat]:
  """The name of the template that was asked for (see `turns.choose`), the tokenizer with its control tokens, a Chat."""
  name, template = turns.choose(asked, own)
  named = (preferences if preference else conversations).parse_columns(columns) or None
  known = tokenizer.with_controls(turns.BUILT_IN.get(name, ()))
  return name, known, Chat(template, 'last' if preference else learn, max_len, named, preference)


class Talks:
  """Encodes the rows of a preparation; those with a fault go to `bad`."""

  def __init__(self, chat: Chat, tokenizer: Tokenizer, bad: Quarantine):
    self.chat, self.tokenizer, self.bad, self.make = chat, tokenizer, bad, chat.reader()
    self.too_long, self.truncated, self.same = Counter[str](), Counter[str](), Counter[str]()
    self._answers = 0  # that a preference has

  @property
  def dropped(self) -> dict[str, Counter[str]]:
    """Rows left out here, by reason and kind."""
    return {LONG: self.too_long} | ({SAME: self.same} if self.chat.preference else {})

  def encoded(
    self, kept: Iterator[choice.Kept]
  ) -> Iterator[tuple[list[tuple[records.Piece, Any]], list[Any], list[Label]]]:
    """The documents' pieces with their ids, their masks and their labels, some at a time."""
    pieces, masks, labels = [], [], []
    for one in kept:
      for found, label in self._parts(one.document):
        text = self.tokenizer.decode(found.ids.tolist())
        pieces.append((records.Piece(one, text, True, True), found.ids))
        masks.append(found.learned)
        labels.append(label)
      if len(pieces) >= TALKS:
        yield pieces, masks, labels
        pieces, masks, labels = [], [], []
    yield pieces, masks, labels

  def _parts(self, document: Document) -> list[Part]:
    try:
      return self._preference(document) if self.chat.preference else self._conversation(document)
    except InputError as error:
      self.bad.of(document.kind)(InputError(f'{document.where}: {error}'))
      return []

  def _encode(self, talk: Conversation, limit: int | None) -> turns.Encoded | None:
    return turns.encode(self.chat.template, talk, self.tokenizer, self.chat.learn, limit)

  def _conversation(self, document: Document) -> list[Part]:
    found = self._encode(Conversation.from_json(document.text), self.chat.max_len)
    self.too_long[document.kind] += not found
    self.truncated[document.kind] += bool(found and found.dropped)
    return [(found, (True, 0.0))] if found else []

  def _preference(self, document: Document) -> list[Part]:
    row = Preference.from_json(document.text)
    if self._answers and self._answers != len(row.answers):
      raise InputError(f'{document.where}: pairs and single labelled answers: prepare them into a folder each')
    self._answers = len(row.answers)
    found = [one for answer in row.answers if (one := self._encode(answer, None))]
    if self.chat.max_len and max(len(one.ids) for one in found) > self.chat.max_len:
      self.too_long[document.kind] += 1
      return []
    if len(found) == 2 and found[0].ids.tolist() == found[1].ids.tolist():
      self.same[document.kind] += 1
      return []
    return [(one, (label, row.margin)) for one, label in zip(found, row.labels, strict=True)]

  def said(self, writer: records.Writer) -> dict[str, Any]:
    """`Summary.chat`."""
    learned: dict[str, dict[str, int]] = {}
    for split, counts in writer.learned.items():
      of = learned.setdefault(split, {})
      for (kind, _), number in writer.groups.numbers.items():
        of[kind] = of.get(kind, 0) + counts[number]
    return {
      'template': hashlib.sha256(self.chat.template.encode()).hexdigest(),
      'learn': self.chat.learn,
      'end': turns.end_ids(self.chat.template, self.tokenizer),
      'formats': self.make.formats,
      'learned': learned,
      'truncated': dict(self.truncated),
    } | ({'preference': KINDS.get(self._answers, 'pairs')} if self.chat.preference else {})
