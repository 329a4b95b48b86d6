"""Instructions made of plain text by rule, for the quickstart: small tasks whose right answer the text itself gives."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from jaxlm.data.sources import Document

Row = dict[str, Any]

CHARACTERS = 160  # of a passage, about
WORDS = (5, 14)  # of a line that is asked about
EACH = 240  # rows of a task and a kind of text, at most


def lessons(documents: Iterable[Document]) -> dict[str, list[Row]]:
  """{task: rows} with `messages` of one question and its answer.

  `kind`: which kind of text a passage is of; `continue`: the line after a line; `write`: any line of a kind.
  """
  tasks: dict[str, Callable[[Document], Iterable[tuple[str, str]]]] = {
    'kind': _kind,
    'write': _write,
    'continue': _continue,
  }
  found: dict[str, list[Row]] = {task: [] for task in tasks}
  count: Counter[tuple[str, str]] = Counter()
  for document in documents:
    for task, pairs in tasks.items():
      for question, answer in pairs(document):
        if count[task, document.kind] < EACH:
          count[task, document.kind] += 1
          found[task].append(row(question, answer))
  return found


def row(question: str, answer: str) -> Row:
  """One question and its answer, as `messages`."""
  return {'messages': [{'role': 'user', 'content': question}, {'role': 'assistant', 'content': answer}]}


def _kind(document: Document) -> Iterable[tuple[str, str]]:
  words, passage = document.text.split(), ''
  for word in words:
    passage = f'{passage} {word}'.strip()
    if len(passage) >= CHARACTERS:
      yield f'Which kind of text is this?\n{passage}', document.kind
      passage = ''


def _split(document: Document) -> list[str]:
  return [' '.join(line.split()) for line in re.split(r'\n+|(?<=[.;:?!]) ', document.text)]


def _fits(line: str) -> bool:
  return WORDS[0] <= len(line.split()) <= WORDS[1]


def _write(document: Document) -> Iterable[tuple[str, str]]:
  lines = [line for line in _split(document) if _fits(line)]
  return [(f'Write a line of {document.kind}.', line) for line in lines[1::3]]


def _continue(document: Document) -> Iterable[tuple[str, str]]:
  lines = _split(document)
  for one, two in zip(lines[::2], lines[1::2], strict=False):
    if _fits(one) and _fits(two):
      yield f'Continue.\n{one}', two
