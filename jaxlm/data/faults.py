"""What is wrong with prepared documents, before a run learns it: masks of zeros, turns without an end, and the like."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.prepared import Prepared, Tokens
from jaxlm.data.tokenizer import Tokenizer

MOST = 200_000  # documents that are checked, the first ones
BLOCK = 1 << 20  # tokens read at a time


class Fault(NamedTuple):
  """A document with a fault: where it stands in its split, and what it is, in words."""

  start: int
  stop: int
  what: str


def first(folder: Prepared, split: str) -> Fault | None:
  """The first fault among the first MOST documents of a split.

  Two tokens for the beginning of a text; no end-of-text at the end; and of conversations, unless all is learned, a mask
  of zeros or of ones, and a learned turn that no control token ends.
  """
  tokens, tokenizer, chat = folder.split(split), folder.tokenizer, folder.summary.chat
  for number, (start, ids, learned) in enumerate(documents(tokens)):
    if number >= MOST:
      return None
    if why := of(ids, learned, tokenizer, chat):
      return Fault(start, start + len(ids), f'document {number} of {split}: {why}')
  return None


def documents(tokens: Tokens) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
  """(start, ids, learned) of each document, read in blocks."""
  starts = tokens.document_starts()
  first = 0
  while first < len(starts) - 1:
    last = max(first + 1, int(np.searchsorted(starts, starts[first] + BLOCK, 'right')) - 1)
    begin, end = int(starts[first]), int(starts[last])
    ids, learned = tokens.read(begin, end)[0], tokens.learned(begin, end)
    for a, b in itertools.pairwise(starts[first : last + 1] - begin):
      yield begin + int(a), ids[a:b], None if learned is None else learned[a:b]
    first = last


def of(ids: np.ndarray, learned: np.ndarray | None, tokenizer: Tokenizer, chat: Mapping[str, Any] | None) -> str | None:
  """What is wrong with a document's ids and mask; `chat` is `Summary.chat`."""
  if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id != tokenizer.eos_id:
    return f'begins with two {tokenizer.names["bos"]}'
  if chat is None or learned is None:
    return None if ids[-1] == tokenizer.eos_id else f'does not end with {tokenizer.names["eos"]}'
  if chat['learn'] == 'all':
    return None if learned.all() and np.isin(ids, chat['end']).any() else 'no turn of the assistant has an end'
  if not learned.any():
    return 'nothing of it is learned'
  if learned.all():
    return 'all of it is learned, the questions too'
  edges = np.flatnonzero(np.diff(np.concatenate([[False], learned, [False]])))
  for start, stop in zip(edges[::2], edges[1::2], strict=True):
    if not _ended(ids[start:stop], tokenizer):
      return f'no token ends the turn that is learned at {start} to {stop - 1}'
  return None


def _ended(turn: np.ndarray, tokenizer: Tokenizer) -> bool:
  """Whether the last token that is no white space is a control token."""
  for i in map(int, turn[::-1]):
    if i in tokenizer.control_ids:
      return True
    if tokenizer.decode([i]).strip():
      return False
  return False
