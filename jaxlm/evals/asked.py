"""Prompts that models are asked alike: what a run held out, or rows of one's own, as messages with what rows say."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxlm.data import chat, prepared
from jaxlm.data.prepared import TEMPLATE, Prepared
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.evals import tasks
from jaxlm.loops import bases
from jaxlm.rl import prompts

Say = Callable[[str], None]
Row = Mapping[str, Any]  # with a `prompt`, a text or messages

SEED = 0x6E11  # of tasks that are named: other examples than a run's own
TURNS = 8  # of a conversation, at most, that is read back from its tokens


def rows(run: str, data: Sequence[str] = (), most: int = 200, say: Say = lambda line: None) -> list[Row]:
  """Up to `most` prompts, evenly from the first to the last.

  `data`: what `rl.prompts.rows` reads, files of rows or 'gym:TASK', or prepared folders, whose held-out conversations
  these are. Without it those that the run held out. Raises InputError
  where there are none.
  """
  found = [row for source in data for row in _of_source(source, say)] if data else _of_run(run, say)
  if not found:
    raise InputError(f'{", ".join(data) or run}: no held-out prompt: name rows of prompts with --data')
  count = min(most, len(found))
  return [found[i] for i in np.arange(count) * len(found) // count]


def _of_run(run: str, say: Say) -> list[Row]:
  if not bases.is_run(run):
    raise InputError(f'{run}: is no run, which would know its prompts: name rows of prompts with --data')
  config = bases.newest(run).config
  if config.rl.algo:
    return list(prompts.split(prompts.rows(config.data.path, config.seed), config.rl.held_out)[0])
  folder = prepared.load(config.data.path)
  if not folder.summary.chat:
    raise InputError(f'{run}: was trained on text, not on conversations: name rows of prompts with --data')
  return of_folder(folder, say)


def _of_source(source: str, say: Say) -> list[Row]:
  if (epath.Path(source) / prepared.MARKER).exists():
    return of_folder(prepared.load(source), say)
  return list(prompts.rows(source, SEED))


def of_folder(folder: Prepared, say: Say = lambda line: None) -> list[Row]:
  """The held-out conversations of a prepared folder as rows `prompt` (messages), `answer`, `kind`.

  A folder holds tokens: messages are read back through its template, and those that it would not make the very same
  tokens of are left out. Raises InputError where that are all of them.
  """
  found = tasks.examples(folder, folder.summary.splits['validation'].documents)
  read = _reader((epath.Path(folder.path) / TEMPLATE).read_text(), folder.tokenizer)
  rows: list[Row] = [{'prompt': said, 'answer': e.reference, 'kind': e.kind} for e in found if (said := read(e.prompt))]
  if found and not rows:
    raise InputError(f'{folder.path}: its tokens do not tell where messages begin: name rows of prompts with --data')
  if left := len(found) - len(rows):
    say(f'{folder.path}: {left} of {len(found)} held-out prompts are not to be read back from their tokens: left out')
  return rows


def _reader(template: str, tokenizer: Tokenizer) -> Callable[[list[int]], list[dict[str, str]] | None]:
  """What makes messages of the tokens of a prompt, None where they are not these messages' tokens."""
  forms = [_form(template, tokenizer, system, turns) for turns in range(1, TURNS, 2) for system in (False, True)]

  def read(ids: list[int]) -> list[dict[str, str]] | None:
    text = tokenizer.inner.decode(ids, skip_special_tokens=False)
    for roles, pattern in filter(None, forms):
      if match := pattern.fullmatch(text):
        said = [{'role': role, 'content': part} for role, part in zip(roles, match.groups(), strict=True)]
        if chat.encode(template, said, tokenizer, generation=True) == ids:
          return said
    return None

  return read


def _form(template: str, tokenizer: Tokenizer, system: bool, turns: int) -> tuple[list[str], re.Pattern[str]] | None:
  """The roles of a conversation and the pattern of its text; None where the template refuses such a one."""
  roles = ['system'] * system + [('user', 'assistant')[i % 2] for i in range(turns)]
  marks = [f'\ue000{i}\ue001' for i in range(len(roles))]
  said = [{'role': role, 'content': mark} for role, mark in zip(roles, marks, strict=True)]
  try:
    text = chat.render(template, said, tokenizer, generation=True)
  except InputError:
    return None
  parts = re.split('\ue000\\d+\ue001', text)
  if [text.count(mark) for mark in marks] != [1] * len(marks):
    return None
  return roles, re.compile('(.*)'.join(map(re.escape, parts)), re.DOTALL)
