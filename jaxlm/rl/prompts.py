"""What is asked in reinforcement learning: rows with a prompt, of files in any form that conversations come in."""

import ast
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jaxlm.data import conversations, sources
from jaxlm.errors import InputError
from jaxlm.rl import rewards

Row = dict[str, Any]

GYM, GYM_ROWS = 'gym:', 4096


def rows(specs: str, seed: int) -> list[Row]:
  """The rows of `specs`, each prompt once: files with a column "prompt", or conversations, or 'gym:TASK,NAME=VALUE'.

  A conversation is asked up to its last turn of a user; what was answered there becomes the column "answer", where
  there is none. Raises InputError for rows that are neither.
  """
  found = _gym(specs.removeprefix(GYM), seed) if specs.startswith(GYM) else _read(specs)
  if not found:
    raise InputError(f'{specs}: no rows in there')
  return list({digest(row): row for row in found}.values())


def messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The turns of a row's prompt."""
  prompt = row['prompt']
  return [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else list(prompt)


def digest(row: Mapping[str, Any]) -> str:
  """Of its prompt alone."""
  return hashlib.sha256(json.dumps(row['prompt'], ensure_ascii=False).encode()).hexdigest()


def split(rows: list[Row], kept: int) -> tuple[list[Row], list[Row]]:
  """So many rows that are held out, and the others, by the digest of their prompts."""
  rows = sorted(rows, key=digest)
  return rows[:kept], rows[kept:]


def _gym(spec: str, seed: int) -> list[Row]:
  name, *settings = spec.split(',')
  parts = [setting.partition('=') for setting in settings]
  try:
    how = {key: ast.literal_eval(value) for key, _, value in parts}
  except (ValueError, SyntaxError) as error:
    raise InputError(f'gym:{spec}: after the task come settings such as max_terms=2') from error
  return [dict(row) for row in rewards.gym_rows(name, GYM_ROWS, seed, **how)]


def _read(specs: str) -> list[Row]:
  found: list[Row] = []

  def make(row: Row, file: sources.File, number: int) -> sources.Document:
    where = f'{file.path}:{number}'
    found.append(_asking(row, where))
    return sources.Document('', file.kind, where, file.kind)

  for file in sources.files([specs], None):
    for _ in sources.read(file, make=make):
      pass
  return found


def _asking(row: Row, where: str) -> Row:
  if row.get('prompt'):
    return row
  try:
    talk = conversations.checked(conversations.guess(list(row)).read(row)).messages
  except InputError as error:
    raise InputError(f'{where}: {error}') from error
  last = max((i for i, turn in enumerate(talk) if turn['role'] == 'user'), default=-1)
  if last < 0:
    raise InputError(f'{where}: a conversation in which no user asks')
  answered = {'answer': talk[last + 1]['content']} if len(talk) > last + 1 else {}
  return answered | row | {'prompt': talk[: last + 1]}
