"""Prepared data read back: counts, the tokenizer, and the tokens of a split by random access."""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from etils import epath

from jaxlm import files
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError

VERSION = 2  # of the layout; raise it when a folder prepared before can't be read any more
MARKER = 'prepared.json'


@dataclasses.dataclass
class Count:
  """Documents kept, tokens stored for them (BOS and EOS included), bytes of their text in UTF-8."""

  documents: int = 0
  tokens: int = 0
  bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a prepared folder holds; `prepared.json` is this."""

  version: int
  digest: str  # of the tokenizer
  vocab_size: int
  dtype: str
  splits: dict[str, Count]
  sources: dict[str, dict[str, Count]]  # by split and source; past 1000 sources the rest is 'other'
  dropped: dict[str, int]  # documents left out: 'duplicate' of an earlier one, 'empty', 'bad'
  contents: str  # sha256 of all tokens and of where documents begin: equal ones train alike
  files: dict[str, str]  # sha256 of every file of the data set, its index and the tokenizer
  inputs: dict[str, Any]  # options and the input files' sizes and times: what makes preparing again unnecessary


def verify(path: epath.PathLike) -> list[str]:
  """What is wrong with a finished folder: one line for each damaged or missing file; empty when all is whole."""
  path = epath.Path(path)
  summary = read_summary(path)
  if summary is None or summary.version != VERSION:
    return [f'{MARKER} is missing, damaged or of another layout']
  return _changed(path, summary.files)


def _changed(path: epath.Path, expected: dict[str, str]) -> list[str]:
  found = {name: files.sha256(path / name) for name in expected if (path / name).exists()}
  return files.changes(expected, found)


def load(path: epath.PathLike) -> 'Prepared':
  """Open a prepared folder, with a check of its index; `verify` reads everything.

  Raises InputError if it is none, was not finished, was changed, or holds another tokenizer's ids.
  """
  path = epath.Path(path)
  summary = read_summary(path)
  if summary is None:
    started = (path / 'records').exists()
    if (path / MARKER).exists():
      raise InputError(f'{path}: {MARKER} is damaged: run `jaxlm prepare` again')
    raise InputError(
      f'{path}: '
      + (
        'its preparation was interrupted: run `jaxlm prepare` again'
        if started
        else 'no prepared data here: run `jaxlm prepare` first'
      )
    )
  if summary.version != VERSION:
    raise InputError(f'{path}: prepared in layout {summary.version}, this is {VERSION}: run `jaxlm prepare` again')
  tokenizer = tokenizers.load(path / 'tokenizer.json')
  if tokenizer.digest != summary.digest:
    raise InputError(
      f'{path}: its tokenizer.json ({tokenizer.digest[:12]}) is not the one that it was prepared with '
      f'({summary.digest[:12]}): run `jaxlm prepare` again'
    )
  if damaged := _changed(path, {name: digest for name, digest in summary.files.items() if name.endswith('.npy')}):
    raise InputError(f'{path}: damaged: {"; ".join(damaged)}: run `jaxlm prepare` again')
  return Prepared(path, summary, tokenizer)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A prepared folder, opened: its tokenizer, its counts, its splits."""

  path: epath.Path
  summary: Summary
  tokenizer: Tokenizer

  def split(self, name: str) -> 'Tokens':
    """The token stream of 'train' or 'validation'. Raises InputError for another name."""
    if name not in self.summary.splits:
      raise InputError(f'{self.path}: no split {name!r}: it has {", ".join(self.summary.splits)}')
    return Tokens(self.path, name, self.summary)

  def texts(self, name: str) -> Iterator[str]:
    """The split's documents as text, in their order, decoded from the tokens (exact with a byte-level tokenizer)."""
    tokens = self.split(name)
    for start, stop in itertools.pairwise(tokens.document_starts()):
      yield self.tokenizer.decode(tokens.read(start, stop)[0].tolist())

  def document_bytes(self, name: str) -> bytes:
    """All text of a split in UTF-8, documents joined with nothing between: what compressors are measured on."""
    return b''.join(text.encode() for text in self.texts(name))


class Tokens:
  """The tokens of a split as one long sequence, read by position; nothing is held but the memory-mapped index."""

  def __init__(self, path: epath.Path, split: str, summary: Summary):
    self._path, self._split = path, split
    self._dtype = np.dtype(summary.dtype).newbyteorder('<')
    self._offsets: np.ndarray = np.load(os.fspath(path / f'{split}.offsets.npy'), mmap_mode='r')
    self._begins: np.ndarray = np.load(os.fspath(path / f'{split}.begins.npy'), mmap_mode='r')
    self.bytes = summary.splits[split].bytes

  def __len__(self) -> int:
    return int(self._offsets[-1])

  def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32, begins bool) at [start, stop), cut at the end; `begins` marks the first token of a document."""
    start, stop = max(start, 0), min(stop, len(self))
    if start >= stop:
      return np.zeros(0, np.int32), np.zeros(0, np.bool_)
    first = int(np.searchsorted(self._offsets, start, 'right')) - 1
    last = int(np.searchsorted(self._offsets, stop, 'left'))
    offsets = np.asarray(self._offsets[first : last + 1])
    tokens = np.concatenate([self._record(i, n) for i, n in enumerate(np.diff(offsets), first)])
    begins = np.zeros(len(tokens), np.bool_)
    begins[offsets[:-1] - offsets[0]] = self._begins[first:last]
    window = slice(start - offsets[0], stop - offsets[0])
    return tokens[window].astype(np.int32), begins[window]

  def document_starts(self) -> np.ndarray:
    """int64 [documents + 1]: where each document begins, and the length of the stream."""
    return np.append(self._offsets[:-1][self._begins], len(self))

  @cached_property
  def _records(self) -> Any:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(self._path / 'records')
    return builder.as_data_source(split=self._split)

  def _record(self, index: int, length: int) -> np.ndarray:
    tokens = np.frombuffer(self._records[index]['tokens'], self._dtype)
    if len(tokens) != length:
      raise InputError(
        f'{self._path}: record {index} of {self._split!r} holds {len(tokens)} tokens, not {length}:'
        ' the folder is damaged: run `jaxlm prepare` again'
      )
    return tokens


def read_summary(path: epath.Path) -> Summary | None:
  """What `prepared.json` says; None if it is missing, was cut short or changed."""
  if not (path / MARKER).exists():
    return None
  try:
    raw = json.loads((path / MARKER).read_text())
    if raw.pop('seal', '') != files.seal(raw) and raw['version'] == VERSION:
      return None
    splits = {split: Count(**count) for split, count in raw.pop('splits').items()}
    named = {split: {n: Count(**c) for n, c in counts.items()} for split, counts in raw.pop('sources').items()}
    return Summary(splits=splits, sources=named, **raw)
  except (ValueError, KeyError, TypeError, AttributeError):
    return None
