"""Rows that say what is preferred, as conversations: chosen and rejected answers, or single ones, good or not."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.data import conversations
from jaxlm.data.conversations import Conversation, Format, Message, Row
from jaxlm.errors import InputError

PARTS = ('prompt', 'chosen', 'rejected', 'completion', 'label', 'margin', 'score_chosen', 'score_rejected')
PARTS += ('system', 'tools')  # what `columns` may name
SPOKEN = re.compile(r'\n\n(Human|Assistant): ?')  # how a whole conversation is written as one text (hh-rlhf)
SIDES = ('chosen', 'rejected')


class Preference(NamedTuple):
  """Two answers to one prompt, the better one first, and by how much it is; or one, and whether it is `good`."""

  answers: list[Conversation]
  good: bool = True
  margin: float = 0.0

  @property
  def labels(self) -> list[bool]:
    """Of each answer, whether it is the better one, or a good one."""
    return [True, False] if len(self.answers) == 2 else [self.good]

  def to_json(self) -> str:
    """One text for equal rows, by which duplicates and splits are found."""
    answers = [answer._asdict() for answer in self.answers]
    return json.dumps(self._asdict() | {'answers': answers}, ensure_ascii=False, sort_keys=True)

  @staticmethod
  def from_json(text: str) -> 'Preference':
    fields = json.loads(text)
    return Preference([Conversation(**answer) for answer in fields.pop('answers')], **fields)


def parse_columns(given: Sequence[str]) -> dict[str, str]:
  """('chosen=a,rejected=b',) as {'chosen': 'a', 'rejected': 'b'}. Raises InputError for other parts than PARTS."""
  found = conversations.named_columns(given, PARTS)
  if found and not _complete(found):
    raise InputError('--columns: name chosen and rejected (and prompt), or prompt, completion and label')
  return found


def _complete(named: Mapping[str, str]) -> bool:
  return set(SIDES) <= named.keys() or {'prompt', 'completion', 'label'} <= named.keys()


def guess(there: Sequence[str], columns: Mapping[str, str] | None = None) -> Format:
  """The format of rows with these columns; `columns` (see `parse_columns`) say it where it is not to be guessed.

  Raises InputError, with the columns that are there, where they fit none.
  """
  named = dict(columns or {part: part for part in PARTS if part in there})
  if missing := [name for name in named.values() if name not in there]:
    raise InputError(f'no column "{missing[0]}"; the columns are {conversations.listed(there)}')
  if not columns and 'label' in named and 'response' in there:
    named.setdefault('completion', 'response')
  if not _complete(named):
    raise InputError(
      f'no preferences have the columns {conversations.listed(there)}: chosen and rejected (and prompt), or prompt, '
      'completion and label; others are named with --columns chosen=...,rejected=...'
    )
  paired = set(SIDES) <= named.keys()
  left_out = {'completion', 'label'} if paired else {*SIDES, 'margin', 'score_chosen', 'score_rejected'}
  named = {part: name for part, name in named.items() if part not in left_out}
  shown = ', '.join(name if part == name else f'{part}={name}' for part, name in named.items())
  named = {'system': 'system', 'tools': 'tools'} | named
  if paired:
    return Format(f'chosen and rejected ({shown})', lambda row: _pair(row, named))
  return Format(f'labelled answers ({shown})', lambda row: _labelled(row, named))


def checked(found: Preference) -> Preference:
  """The same, plain (see `conversations.checked`). Raises InputError for answers that cannot be compared."""
  answers = [conversations.checked(answer) for answer in found.answers]
  for answer in answers:
    if answer.messages[-1]['role'] != 'assistant':
      raise InputError(f'ends with a turn of the {answer.messages[-1]["role"]}, not of the assistant')
  if len(answers) == 2:
    _check_common(answers[0].messages, answers[1].messages)
  return found._replace(answers=answers)


def _check_common(chosen: list[Message], rejected: list[Message]) -> None:
  together = zip(chosen[:-1], rejected[:-1], strict=False)
  shared = next((i for i, (a, b) in enumerate(together) if a != b), min(len(chosen), len(rejected)) - 1)
  if len(chosen) != len(rejected) or shared < len(chosen) - 1:
    raise InputError(f'chosen and rejected part at message {shared + 1}, before their last turn')


def _pair(row: Row, named: Mapping[str, str]) -> Preference:
  return Preference([_side(row, named, side) for side in SIDES], True, _margin(row, named))


def _side(row: Row, named: Mapping[str, str], side: str) -> Conversation:
  """An answer behind its prompt, which stands in a column of its own, or in front of the answer itself."""
  value, column = row.get(named[side]), named[side]
  if isinstance(value, list) and ('prompt' not in named or _asks(value)):
    return conversations.whole(row, {**named, 'messages': column})
  if 'prompt' in named:
    return conversations.pair(row, {**named, 'response': column})
  if not isinstance(value, str) or not SPOKEN.match(value):
    raise InputError(f'"{column}" holds no whole conversation, and there is no column with its prompt')
  _, *parts = SPOKEN.split(value)
  roles = {'Human': 'user', 'Assistant': 'assistant'}
  said = [{'role': roles[who], 'content': what} for who, what in zip(parts[::2], parts[1::2], strict=True)]
  return Conversation(said)


def _asks(messages: list[Any]) -> bool:
  roles = (one.get('role', one.get('from')) for one in messages if isinstance(one, Mapping))
  return any(conversations.NAMES.get(str(role)) == 'user' for role in roles)


def _margin(row: Row, named: Mapping[str, str]) -> float:
  """By how much the chosen answer is better: a column of its own, or a difference of scores; 0.0 where none is said."""
  parts = ('margin',) if 'margin' in named else ('score_chosen', 'score_rejected')
  values = [row.get(named[part]) for part in parts if part in named]
  if len(values) < len(parts) or None in values:
    return 0.0
  if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
    raise InputError(f'"{named[parts[0]]}" is no number: {values[0]!r}')
  return float(values[0] - sum(values[1:]))  # ty: ignore


def _labelled(row: Row, named: Mapping[str, str]) -> Preference:
  label = row.get(named['label'])
  if label not in (True, False):  # 1 and 0 too
    raise InputError(f'"{named["label"]}" is neither true nor false: {label!r}')
  return Preference([conversations.pair(row, {**named, 'response': named['completion']})], bool(label))
