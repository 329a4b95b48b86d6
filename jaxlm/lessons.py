"""Instructions and preferences made of plain text by rule, for the quickstart: what is right the text itself says."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from jaxlm.data.sources import Document
from jaxlm.evals.scores import words
from jaxlm.files import write_whole

SAMPLE = Path(__file__).parent / 'assets' / 'sample'
TEXT = (f'{SAMPLE}/*.jsonl',)

Row = dict[str, Any]

CHARACTERS = 160  # of a passage, about
WORDS = (5, 14)  # of a line that is asked about
SPOILT, SHARE, TRIES = 2, (0.2, 0.5), 16  # rejected answers of a line, the share of its tokens that is replaced
BROKEN = '\ufffd'  # what a part of a character decodes to
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


def prompts(rows: Iterable[Row]) -> list[Row]:
  """Of questions as `messages` each one once, as `prompt`, with its `answer`."""
  found: dict[str, Row] = {}
  for one in rows:
    asked, said = (message['content'] for message in one['messages'])
    found.setdefault(asked, {'prompt': asked, 'answer': said})
  return list(found.values())


def preferences(
  rows: Sequence[Row], encode: Callable[[str], list[int]], decode: Callable[[list[int]], str], *, seed: int = 0
) -> list[Row]:
  """Pairs by rule: `chosen` is the line that the text goes on with, `rejected` it with some tokens replaced.

  A fifth to a half of its tokens are replaced by ones of all the lines, `SPOILT` times a line. Lengths tell nothing:
  both answers have equally many tokens. Lines of which that does not come about are left out.
  """
  rng, lines = np.random.default_rng(seed), [encode(row['answer']) for row in rows]
  pool, found = np.concatenate(lines), []
  for row, ids in list(zip(rows, lines, strict=True)) * SPOILT:
    for _ in range(TRIES):
      places = rng.choice(len(ids), max(1, round(len(ids) * rng.uniform(*SHARE))), replace=False)
      new = np.array(ids)
      new[places] = rng.choice(pool, len(places))
      text = decode(new.tolist()).strip()
      if text != row['answer'] and BROKEN not in text and len(encode(text)) == len(ids):
        found.append({'prompt': row['prompt'], 'chosen': row['answer'], 'rejected': text})
        break
  return found


def known(texts: Iterable[str]) -> Callable[[str], float]:
  """The share of an answer's words that are words of `texts`: what invents words is told; 0 of an answer of none."""
  there = {word for text in texts for word in words(text)}

  def share(said: str) -> float:
    found = words(said)
    return sum(word in there for word in found) / len(found) if found else 0.0

  return share


def variety(said: Sequence[str]) -> dict[str, float]:
  """How many answers are others than all before, and how many words, in percent; and words an answer."""
  found = [word for text in said for word in words(text)]
  percent = lambda some: 100.0 * len(set(some)) / max(1, len(some))
  return {
    'different answers': percent(said),
    'different words': percent(found),
    'words': len(found) / max(1, len(said)),
  }


def write(path: epath.PathLike, rows: Iterable[Row]) -> None:
  """Rows as lines of JSON, unless they are there: what is prepared of them goes by the file's time."""
  path, text = epath.Path(path), '\n'.join(json.dumps(row, ensure_ascii=False) for row in rows) + '\n'
  if not path.exists() or path.read_text() != text:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
