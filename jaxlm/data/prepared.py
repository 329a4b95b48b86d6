"""Prepared data read back: counts, the tokenizer, and the tokens of a split by random access."""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
from etils import epath

from jaxlm import files
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError

VERSION = 4  # of the layout; raise it when a folder prepared before can't be read any more
MARKER = 'prepared.json'
LEARNED = 'learned'  # SPLIT.learned.npy: np.packbits of one bit a token; where there is none, all are learned
ANSWERS = {'labels': '?', 'margins': '<f4'}  # of preferences, SPLIT.NAME.npy: one a document
TEMPLATE = 'chat_template.jinja'


@dataclasses.dataclass
class Count:
  """Documents kept, tokens stored for them (BOS and EOS included), bytes of their text in UTF-8."""

  documents: int = 0
  tokens: int = 0
  bytes: int = 0

  @property
  def figures(self) -> tuple[int, int, int]:
    return self.documents, self.tokens, self.bytes


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a prepared folder holds; `prepared.json` is this."""

  version: int
  digest: str  # of the tokenizer
  vocab_size: int
  dtype: str
  splits: dict[str, Count]
  groups: list[tuple[str, str]]  # (kind, source) by group number; past 1000 sources a kind's rest is 'other'
  by_group: dict[str, list[Count]]  # by split, in the order of groups
  weights: dict[str, float]  # share of the training rows by kind, where the sources were given as a mixture
  dropped: dict[str, dict[str, int]]  # documents left out by kind: 'duplicate' of an earlier one, 'empty', 'bad'
  contents: str  # sha256 of all tokens and of where documents begin: equal ones train alike
  files: dict[str, str]  # sha256 of every file of the data set, its index and the tokenizer
  inputs: dict[str, Any]  # options and the input files' sizes and times: what makes preparing again unnecessary
  chat: dict[str, Any] | None = None  # of conversations alone, see `prepare`; then there are LEARNED and TEMPLATE

  def to_json(self) -> dict[str, Any]:
    """The fields that are written."""
    return {name: value for name, value in dataclasses.asdict(self).items() if name != 'chat' or value}

  @property
  def preference(self) -> str | None:
    """'pairs' (two documents a row, the better answer first) or 'labels' (one), where rows are preferences."""
    return (self.chat or {}).get('preference')

  @property
  def answers(self) -> int:
    """Documents that a row became."""
    return 2 if self.preference == 'pairs' else 1

  def kinds(self, split: str) -> dict[str, Count]:
    """What a split holds of each kind, in the order in which the kinds were met."""
    found: dict[str, Count] = {}
    for (kind, _), count in zip(self.groups, self.by_group[split], strict=True):
      one = found.setdefault(kind, Count())
      one.documents, one.tokens = one.documents + count.documents, one.tokens + count.tokens
      one.bytes += count.bytes
    return found

  def read(self) -> dict[str, dict[str, int]]:
    """Rows by kind: how many were 'read', how many left out for each reason, how many 'kept'."""
    kept = [{kind: count.documents for kind, count in self.kinds(split).items()} for split in self.splits]
    kinds = dict.fromkeys(kind for counts in (*kept, *self.dropped.values()) for kind in counts)
    found = {}
    for kind in kinds:
      left_out = {why: counts.get(kind, 0) for why, counts in self.dropped.items()}
      stays = sum(counts.get(kind, 0) for counts in kept) // self.answers
      found[kind] = {'read': stays + sum(left_out.values()), **left_out, 'kept': stays}
    return found


def verify(path: epath.PathLike) -> list[str]:
  """What is wrong with a finished folder: one line for each damaged or missing file; empty when all is whole."""
  path = epath.Path(path)
  summary = read_summary(path)
  if summary is None or summary.version != VERSION:
    return [f'{MARKER} is missing, damaged or of another layout']
  return _changed(path, summary.files)


def _changed(path: epath.Path, expected: dict[str, str], shards: bool = True) -> list[str]:
  """What is damaged or missing; without `shards` the files of records, which may be many GB, only have to be there."""
  there = [name for name in expected if (path / name).exists()]
  read = lambda name: shards or not name.startswith('records/tokens-')
  return files.changes(expected, {name: files.sha256(path / name) if read(name) else expected[name] for name in there})


def _copied(path: epath.Path, summary: Summary) -> epath.Path:
  """A copy on this machine of a folder on an object store, made once: records are read by random access."""
  home = epath.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
  here = home / 'jaxlm' / 'prepared' / summary.contents
  known = read_summary(here)
  if known is None or known.files != summary.files:
    files.copy(path, here, [*summary.files, MARKER])
  if damaged := _changed(here, summary.files):
    (here / MARKER).unlink(missing_ok=True)
    raise InputError(f'{path}: damaged: {"; ".join(damaged)}: run `jaxlm prepare` again')
  return here


def load(path: epath.PathLike) -> 'Prepared':
  """Open a prepared folder, with a check of all but the records, which have to be there; `verify` reads everything.

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
        f'no {MARKER}: its preparation was interrupted: run `jaxlm prepare` again'
        if started
        else 'no prepared data here: run `jaxlm prepare` first'
      )
    )
  if summary.version != VERSION:
    raise InputError(f'{path}: prepared in layout {summary.version}, this is {VERSION}: run `jaxlm prepare` again')
  if files.remote(path):
    path = _copied(path, summary)
  if damaged := _changed(path, summary.files, shards=False):
    raise InputError(f'{path}: damaged: {"; ".join(damaged)}: run `jaxlm prepare` again')
  tokenizer = tokenizers.load(path / 'tokenizer.json')
  if tokenizer.digest != summary.digest:
    raise InputError(
      f'{path}: its tokenizer.json ({tokenizer.digest[:12]}) is not the one that it was prepared with '
      f'({summary.digest[:12]}): run `jaxlm prepare` again'
    )
  return Prepared(path, summary, tokenizer)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A prepared folder, opened: its tokenizer, its counts, its splits."""

  path: epath.Path
  summary: Summary
  tokenizer: Tokenizer

  def split(self, name: str, kind: str | None = None) -> 'Tokens':
    """The token stream of 'train' or 'validation', or what it has of one kind. Raises InputError for another name."""
    if name not in self.summary.splits:
      raise InputError(f'{self.path}: no split {name!r}: it has {", ".join(self.summary.splits)}')
    if kind is not None and kind not in (kinds := self.summary.kinds(name)):
      raise InputError(f'{self.path}: no kind {kind!r}: it has {", ".join(kinds)}')
    return Tokens(self.path, name, self.summary, kind)

  @property
  def chat_template(self) -> str | None:
    """Of a folder of conversations, what rendered them."""
    return (self.path / TEMPLATE).read_text() if self.summary.chat else None

  def texts(self, name: str, kind: str | None = None) -> Iterator[str]:
    """The split's documents as text, in their order, decoded from the tokens (exact with a byte-level tokenizer)."""
    tokens = self.split(name, kind)
    for start, stop in itertools.pairwise(tokens.document_starts()):
      yield self.tokenizer.decode(tokens.read(start, stop)[0].tolist())

  def document_bytes(self, name: str, kind: str | None = None) -> bytes:
    """All text of a split in UTF-8, documents joined with nothing between: what compressors are measured on."""
    return b''.join(text.encode() for text in self.texts(name, kind))


class Tokens:
  """The tokens of a split, or of one kind in it, as one long sequence read by position; the index is memory-mapped."""

  def __init__(self, path: epath.Path, split: str, summary: Summary, kind: str | None = None):
    self._path, self._split, self._files = path, split, summary.files
    self._dtype = np.dtype(summary.dtype).newbyteorder('<')
    self._offsets, self._begins, self._groups = (
      np.load(os.fspath(path / f'{split}.{name}.npy'), mmap_mode='r') for name in ('offsets', 'begins', 'groups')
    )
    self._places = self._offsets[:-1]  # of the records among the bits
    learned = path / f'{split}.{LEARNED}.npy'
    there = f'{split}.{LEARNED}.npy' in summary.files
    self._answers = {name: path / f'{split}.{name}.npy' for name in ANSWERS if f'{split}.{name}.npy' in summary.files}
    self.numbers = np.arange(int(self._begins.sum()))  # of the documents among those of the split
    self._learned: np.ndarray | None = np.load(os.fspath(learned), mmap_mode='r') if there else None
    self._numbers: np.ndarray | None = None  # of the records, where they are not all
    self.bytes = summary.splits[split].bytes
    if kind is not None:
      wanted = [number for number, group in enumerate(summary.groups) if group[0] == kind]
      picked = np.isin(self._groups, wanted)
      self._numbers, self.numbers = np.flatnonzero(picked), np.flatnonzero(picked[self._begins])
      self._begins, self._groups = self._begins[self._numbers], self._groups[self._numbers]
      self._places = self._places[self._numbers]
      self._offsets = np.concatenate([[0], np.cumsum(np.diff(self._offsets)[self._numbers])])
      self.bytes = summary.kinds(split)[kind].bytes

  def __len__(self) -> int:
    return int(self._offsets[-1])

  def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32, begins bool) at [start, stop), cut at the end; `begins` marks the first token of a document."""
    start, stop = max(start, 0), min(stop, len(self))
    if start >= stop:
      return np.zeros(0, np.int32), np.zeros(0, np.bool_)
    first, last, offsets = self._span(start, stop)
    tokens = np.concatenate([self._record(i, n) for i, n in enumerate(np.diff(offsets), first)])
    begins = np.zeros(len(tokens), np.bool_)
    begins[offsets[:-1] - offsets[0]] = self._begins[first:last]
    window = slice(start - offsets[0], stop - offsets[0])
    return tokens[window].astype(np.int32), begins[window]

  def learned(self, start: int, stop: int) -> np.ndarray | None:
    """bool: which of the tokens at [start, stop), cut at the end, are to be learned; None where all are."""
    start, stop = max(start, 0), min(stop, len(self))
    if self._learned is None:
      return None
    if start >= stop:
      return np.zeros(0, np.bool_)
    first, last, offsets = self._span(start, stop)
    places = np.asarray(self._places[first:last])
    bits = [_bits(self._learned, place, n) for place, n in zip(places, np.diff(offsets), strict=True)]
    return np.concatenate(bits)[start - offsets[0] : stop - offsets[0]]

  def answers(self) -> tuple[np.ndarray, np.ndarray]:
    """(labels bool, margins float32), one a document: which are the better or good ones, and by how much.

    Raises InputError where rows were no preferences.
    """
    if not self._answers:
      raise InputError(f'{self._path}: holds no preferences: prepare them with `jaxlm prepare --preference`')
    labels, margins = (np.load(os.fspath(self._answers[name])) for name in ANSWERS)
    return labels[self.numbers], margins[self.numbers]

  def documents(self, start: int, stop: int) -> np.ndarray:
    """int64: which document, from 0, each token at [start, stop), cut at the end, belongs to."""
    start, stop = max(start, 0), min(stop, len(self))
    if start >= stop:
      return np.zeros(0, np.int64)
    first, last, offsets = self._span(start, stop)
    return np.repeat(self._begun[first:last] - 1, np.diff(np.clip(offsets, start, stop)))

  @cached_property
  def _begun(self) -> np.ndarray:
    """int64 [records]: documents that have begun with it."""
    return np.cumsum(self._begins)

  def document_groups(self) -> np.ndarray:
    """[documents]: the group (kind and source, see `Summary.groups`) of each."""
    return self._groups[self._begins]

  def _span(self, start: int, stop: int) -> tuple[int, int, np.ndarray]:
    """The records [first, last) that cover the tokens [start, stop), and their offsets, the end included."""
    first = int(np.searchsorted(self._offsets, start, 'right')) - 1
    last = int(np.searchsorted(self._offsets, stop, 'left'))
    return first, last, np.asarray(self._offsets[first : last + 1])

  def document_starts(self) -> np.ndarray:
    """int64 [documents + 1]: where each document begins, and the length of the stream."""
    return np.append(self._offsets[:-1][self._begins], len(self))

  @cached_property
  def _records(self) -> Callable[[int], bytes]:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.decode import DeserializeMethod
    from tensorflow_datasets.core.example_parser import ExampleParserNp

    builder: Any = tfds.builder_from_directory(self._path / 'records')
    only = tfds.features.FeaturesDict({'tokens': builder.info.features['tokens']})  # the rest costs as much again
    parse: Any = ExampleParserNp(only.get_serialized_info()).parse_example
    source = builder.as_data_source(split=self._split, deserialize_method=DeserializeMethod.RAW_BYTES)
    return lambda index: parse(source[index])['tokens']

  def _record(self, index: int, length: int) -> np.ndarray:
    index = index if self._numbers is None else int(self._numbers[index])
    try:
      tokens = np.frombuffer(self._records(index), self._dtype)
      if len(tokens) != length:
        raise ValueError(f'record {index} holds {len(tokens)} tokens, not {length}')
      return tokens
    except Exception as error:  # TFDS, array_record and protobuf each have their own for what is damaged
      if not (damaged := _changed(self._path, self._files)):
        raise  # not the files' fault
      where = f'{self._path}: record {index} of {self._split!r}'
      raise InputError(f'{where} cannot be read: {"; ".join(damaged)}: run `jaxlm prepare` again') from error


def _bits(packed: np.ndarray, start: int, count: int) -> np.ndarray:
  """bool [count]: the bits from `start` on."""
  inside = start % 8
  return np.unpackbits(packed[start // 8 : (start + count + 7) // 8])[inside : inside + count].astype(np.bool_)


def read_summary(path: epath.Path) -> Summary | None:
  """What `prepared.json` says; None if it is missing, was cut short or changed."""
  if not (path / MARKER).exists():
    return None
  try:
    raw = json.loads((path / MARKER).read_text())
    if raw.pop('seal', '') != files.seal(raw) and raw['version'] == VERSION:
      return None
    splits = {split: Count(**count) for split, count in raw.pop('splits').items()}
    by_group = {split: [Count(**count) for count in counts] for split, counts in raw.pop('by_group').items()}
    groups = [tuple(group) for group in raw.pop('groups')]
    return Summary(splits=splits, groups=groups, by_group=by_group, **raw)
  except (ValueError, KeyError, TypeError, AttributeError):
    return None
