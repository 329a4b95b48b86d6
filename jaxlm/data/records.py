"""Documents as records of tokens: cut into pieces, tokenized, cut again, written as a TFDS data set with an index."""

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxlm.data import datasets
from jaxlm.data.choice import SPLITS, Kept
from jaxlm.data.prepared import ANSWERS, LEARNED, VERSION, Count
from jaxlm.data.sources import Document
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError

RECORD_TOKENS = 4096  # what reading one token costs at most
RECORDS_PER_FILE = 1 << 16
PIECE_CHARS = 1 << 18  # at most 1 MB of UTF-8: the tokenizer takes 160 times a text's size in memory
GROUP_CHARS = 1 << 20
MOST_SOURCES = 1000  # sources counted by name; one URL a document would fill the memory
MOST_GROUPS = 1 << 16  # their numbers have two bytes
OTHER = 'other'  # what the sources past them are called
INDEX = {'offsets': '<i8', 'begins': '?', 'groups': '<u2'}  # the arrays beside the data set

Group = tuple[str, str]  # kind, source


class Piece(NamedTuple):
  """A part of a document, small enough for the tokenizer."""

  kept: Kept
  text: str
  first: bool
  last: bool


def encoded(kept: Iterable[Kept], tokenizer: Tokenizer) -> Iterator[list[tuple[Piece, np.ndarray]]]:
  """The documents' pieces with their ids, the marks that begin and end a document included, some at a time."""
  end = [tokenizer.eos_id]
  start = tokenizer.prefix_ids or end  # something has to be there that the first token follows
  for group in _grouped(_pieces(kept)):
    ids = tokenizer.encode_batch([piece.text for piece in group])
    yield [(p, np.array(start * p.first + ids + end * p.last)) for p, ids in zip(group, ids, strict=True)]


def dtype_for(tokenizer: Tokenizer) -> np.dtype:
  """The type of stored tokens."""
  return np.dtype('<u2' if tokenizer.vocab_size <= 1 << 16 else '<u4')


def raw_parts(ids: np.ndarray, dtype: np.dtype) -> list[bytes]:
  """The tokens of the records that a piece becomes."""
  return [ids[at : at + RECORD_TOKENS].astype(dtype).tobytes() for at in range(0, len(ids), RECORD_TOKENS)]


def _pieces(kept: Iterable[Kept]) -> Iterator[Piece]:
  for one in kept:
    text, start = one.document.text, 0
    while start < len(text):
      stop = _cut(text, start)
      yield Piece(one, text[start:stop], start == 0, stop == len(text))
      start = stop


def _cut(text: str, start: int) -> int:
  """Where the piece from `start` on ends: after a line break if there is one, else before a space, else anywhere."""
  stop = start + PIECE_CHARS
  if stop >= len(text):
    return len(text)
  line = text.rfind('\n', start, stop) + 1
  return line or max(text.rfind(' ', start + 1, stop), 0) or stop


def _grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
  """Lists of pieces of about a million characters in all, enough to keep every core of the tokenizer busy."""
  group: list[Piece] = []
  size = 0
  for piece in pieces:
    group.append(piece)
    size += len(piece.text)
    if size >= GROUP_CHARS:
      yield group
      group, size = [], 0
  if group:
    yield group


def features() -> Any:
  """The TFDS features of a record; tokens are raw little-endian integers: lists of varints are slow to parse."""
  import tensorflow_datasets as tfds

  raw = tfds.features.Tensor(shape=(), dtype=np.bytes_)
  text = tfds.features.Text()
  return tfds.features.FeaturesDict({'tokens': raw, 'document': np.int64, 'kind': text, 'source': text})


def example(raw: bytes, document: int, group: Group) -> dict[str, Any]:
  """A record as those features: its tokens, its document's number among those kept, the kind and the source."""
  return {'tokens': raw, 'document': document, 'kind': group[0], 'source': group[1]}


def _info(folder: epath.PathLike) -> Any:
  import tensorflow_datasets as tfds

  identity = tfds.core.DatasetIdentity(
    name='tokens',
    version=tfds.core.Version(f'{VERSION}.0.0'),
    data_dir=os.fspath(folder),
    module_name='jaxlm.data.prepare',
  )
  return tfds.core.DatasetInfo(builder=identity, features=features(), disable_shuffling=True)


def _deterministic(described: Any) -> Any:
  """TFDS's serializer with features in the order of their names: its own order is another one in every process."""
  from tensorflow_datasets.core.example_serializer import ExampleSerializer

  class Deterministic(ExampleSerializer):
    def serialize_example(self, example: Any) -> bytes:
      return self.get_tf_example(example).SerializeToString(deterministic=True)

  return Deterministic(described.get_serialized_info())


class DataSet:
  """A TFDS data set in array_record that grows by records, RECORDS_PER_FILE of them a file.

  TFDS's SequentialWriter, since its builders hold a whole split in memory and, past 1 GB of it, need TensorFlow.
  """

  def __init__(self, folder: epath.Path):
    import tensorflow_datasets as tfds

    folder.mkdir(parents=True, exist_ok=True)
    self._folder, self._dataset = folder, _info(folder)
    self._tfds = tfds.core.SequentialWriter(self._dataset, RECORDS_PER_FILE, file_format='array_record')
    self._tfds._serializer = _deterministic(self._dataset.features)
    self._tfds.initialize_splits(list(SPLITS))

  def add(self, examples: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    with _told(self._folder):
      self._tfds.add_examples(dict(examples))

  def close(self) -> None:
    with _told(self._folder):
      self._tfds.close_all()

  def stored_bytes(self, split: str) -> int:
    """What the records of a split take before they are compressed, once all is closed; `describe` needs it."""
    return self._dataset.splits[split].num_bytes


@contextmanager
def _told(folder: epath.Path) -> Generator[None]:
  """Turns what array_record raises for a full disk or a quota into an OSError with the folder's name."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(None, str(error).splitlines()[0], os.fspath(folder)) from error


def shard_name(split: str, number: int) -> str:
  """What TFDS calls the files of a data set that grows."""
  return f'tokens-{split}.array_record-{number:05}'


def describe(folder: epath.Path, lengths: Mapping[str, list[int]], sizes: Mapping[str, int]) -> None:
  """Write the metadata of a data set whose files are there: of each split the records a file, and `stored_bytes`."""
  import tensorflow_datasets as tfds

  folder.mkdir(parents=True, exist_ok=True)
  info = _info(folder)
  info.set_file_format('array_record')
  names = lambda split: tfds.core.ShardedFileTemplate(
    dataset_name='tokens',
    data_dir=folder,
    split=split,
    filetype_suffix='array_record',
    template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}',
  )
  splits = [
    tfds.core.SplitInfo(
      name=split, shard_lengths=lengths[split], num_bytes=sizes[split], filename_template=names(split)
    )
    for split in SPLITS
  ]
  info.set_splits(tfds.core.SplitDict(splits))
  info.write_to_directory(folder)


def stored_tokens(path: epath.Path) -> Iterator[bytes]:
  """The raw tokens of each record of one file of a data set, in their order."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.example_parser import ExampleParserNp

  only = tfds.features.FeaturesDict({'tokens': features()['tokens']})
  parse: Any = ExampleParserNp(only.get_serialized_info()).parse_example
  return (parse(record)['tokens'] for record in datasets.array_records(path, 256))


class Groups:
  """Numbers of kinds and their sources, in the order in which they are met; past MOST_SOURCES a source is 'other'."""

  def __init__(self) -> None:
    self.numbers: dict[Group, int] = {}

  def of(self, document: Document) -> int:
    """The number of a document's group. Raises InputError for more groups than there are numbers."""
    key = document.kind, document.source
    if key not in self.numbers and len(self.numbers) >= MOST_SOURCES:
      key = document.kind, OTHER
    if key not in self.numbers:
      if len(self.numbers) >= MOST_GROUPS:
        raise too_many_groups(document.where)
      self.numbers[key] = len(self.numbers)
    return self.numbers[key]


def too_many_groups(where: str) -> InputError:
  """The error for the first document that finds no number left."""
  return InputError(f'{where}: more than {MOST_GROUPS} kinds: give one with KIND=SPEC')


class Bits:
  """Bits that are appended, eight to a byte."""

  def __init__(self) -> None:
    self._whole, self._rest = bytearray(), np.zeros(0, np.bool_)

  def add(self, bits: np.ndarray) -> None:
    bits = np.concatenate([self._rest, bits])
    whole = len(bits) // 8 * 8
    self._whole += np.packbits(bits[:whole]).tobytes()
    self._rest = bits[whole:]

  def packed(self) -> np.ndarray:
    """uint8: all of them, the last byte filled up with zeros."""
    return np.concatenate([np.frombuffer(self._whole, np.uint8), np.packbits(self._rest)])


class Index:
  """What is kept beside the records: of each its length in tokens, whether it begins a document, and its group."""

  def __init__(self) -> None:
    self.lengths = {split: array('q') for split in SPLITS}
    self.begins = {split: array('b') for split in SPLITS}
    self.groups = {split: array('H') for split in SPLITS}
    self.tokens = {split: hashlib.sha256() for split in SPLITS}
    self.learned: dict[str, Bits] | None = None  # which tokens are, where not all are
    self.answers: dict[str, dict[str, array]] | None = None  # by split the arrays of ANSWERS, of preferences

  def add(self, split: str, length: int, begins: bool, group: int) -> None:
    self.lengths[split].append(length)
    self.begins[split].append(begins)
    self.groups[split].append(group)

  def save(self, folder: epath.Path) -> None:
    """Write `SPLIT.NAME.npy` for each array of INDEX, and for LEARNED if there is one."""
    for split in SPLITS:
      lengths = np.frombuffer(self.lengths[split], np.int64)
      offsets = np.concatenate([[0], np.cumsum(lengths)])
      arrays = {'offsets': offsets, 'begins': self.begins[split], 'groups': self.groups[split]}
      for name, dtype in INDEX.items():
        with (folder / f'{split}.{name}.npy').open('wb') as file:
          np.save(file, np.asarray(arrays[name]).astype(dtype), allow_pickle=False)
      if self.learned:
        with (folder / f'{split}.{LEARNED}.npy').open('wb') as file:
          np.save(file, self.learned[split].packed(), allow_pickle=False)
      for name, values in self.answers[split].items() if self.answers else ():
        with (folder / f'{split}.{name}.npy').open('wb') as file:
          np.save(file, np.asarray(values).astype(ANSWERS[name]), allow_pickle=False)

  def contents(self, dtype: np.dtype, groups: Sequence[Group]) -> str:
    """sha256 of the tokens (all of them were given to `tokens`), their type, the index and the groups' names."""
    whole = hashlib.sha256(f'{dtype.name} {json.dumps(groups)}'.encode())
    for split in SPLITS:
      whole.update(self.tokens[split].digest())
      for values in (self.lengths, self.begins, self.groups):
        whole.update(bytes(values[split]))
      if self.learned:
        whole.update(self.learned[split].packed().tobytes())
      for values in self.answers[split].values() if self.answers else ():
        whole.update(bytes(values))
    return whole.hexdigest()


class Writer:
  """Appends documents to the data set, and keeps what the index and the summary need.

  With `masked`, pieces come with which of their tokens are learned; `learned` counts them by split and group. With
  `labelled`, each is a document and comes with its label and its margin.
  """

  def __init__(self, folder: epath.Path, dtype: np.dtype, masked: bool = False, labelled: bool = False):
    self.dtype, self.groups, self.index = dtype, Groups(), Index()
    self.learned = {split: Counter[int]() for split in SPLITS}
    if masked:
      self.index.learned = {split: Bits() for split in SPLITS}
    if labelled:
      self.index.answers = {split: {'labels': array('b'), 'margins': array('f')} for split in SPLITS}
    self.by_group: dict[str, list[Count]] = {split: [] for split in SPLITS}
    self._data_set = DataSet(folder)

  def add(
    self,
    pieces: Sequence[tuple[Piece, np.ndarray]],
    masks: Sequence[np.ndarray] = (),
    labels: Sequence[tuple[bool, float]] = (),
  ) -> None:
    for (piece, _), mask in zip(pieces, masks, strict=False):
      self.learned[piece.kept.split][self.groups.of(piece.kept.document)] += int(mask.sum())
      if self.index.learned:
        self.index.learned[piece.kept.split].add(mask)
    for (piece, _), label in zip(pieces, labels, strict=False):
      if self.index.answers:
        for value, values in zip(label, self.index.answers[piece.kept.split].values(), strict=True):
          values.append(value)
    examples: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for piece, ids in pieces:
      split, number, document = piece.kept
      count = self._count(split, group := self.groups.of(document))
      count.documents += piece.first
      count.tokens += len(ids)
      count.bytes += len(piece.text.encode())
      for nth, raw in enumerate(raw_parts(ids, self.dtype)):
        self.index.tokens[split].update(raw)
        self.index.add(split, len(raw) // self.dtype.itemsize, piece.first and nth == 0, group)
        examples[split].append(example(raw, number, (document.kind, document.source)))
    self._data_set.add(examples)

  def _count(self, split: str, group: int) -> Count:
    for counts in self.by_group.values():
      counts.extend(Count() for _ in range(len(self.groups.numbers) - len(counts)))
    return self.by_group[split][group]

  def finish(self, out: epath.Path) -> None:
    """Close the data set and write the index beside it."""
    self._data_set.close()
    self.index.save(out)
