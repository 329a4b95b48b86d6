"""Text to tokens on disk: a TFDS data set in array_record, with an index of offsets beside it.

A prepared folder holds `records/` (the data set: at most 4096 tokens a record), `SPLIT.offsets.npy`,
`SPLIT.begins.npy` and `SPLIT.groups.npy` (each record's kind and source), `tokenizer.json`, `quarantine.jsonl` where
bad records were left out, and `prepared.json`, written last: without it the folder does not count.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxlm import files
from jaxlm.data import sources
from jaxlm.data.prepared import MARKER, VERSION, Count, Summary, read_summary
from jaxlm.data.prepared import load as load
from jaxlm.data.sources import Document, File
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError, within
from jaxlm.files import write_whole

SPLITS = ('train', 'validation')
QUARANTINE = 'quarantine.jsonl'
RECORD_TOKENS = 4096  # what reading one token costs at most
RECORDS_PER_FILE = 1 << 16
PIECE_CHARS = 1 << 18  # at most 1 MB of UTF-8: the tokenizer takes 160 times a text's size in memory
GROUP_CHARS = 1 << 20
MOST_SOURCES = 1000  # sources counted by name; one URL a document would fill the memory
OTHER = 'other'  # what the sources past them are called
INDEX = {'offsets': '<i8', 'begins': '?', 'groups': '<u2'}  # the arrays beside the data set

Progress = Callable[[int, int], None]


def prepare(
  specs: Sequence[str],
  tokenizer: Tokenizer,
  out: epath.PathLike,
  *,
  val_fraction: float = 0.05,
  max_bad: int = 0,
  column: str = 'text',
  near: float | None = None,
  on_progress: Progress | None = None,
) -> Summary:
  """Tokenize the documents of `specs` (see `sources.terms`) into the folder `out`; returns what is in there.

  Each document becomes BOS + tokens + EOS (a tokenizer without BOS: EOS at both ends). It goes to 'validation' or
  'train' by the hash of its text alone, so adding documents moves none; exact duplicates and empty ones are dropped,
  and with `near` those whose Jaccard similarity to a kept one is at least that (see `neardup`). Weights that `specs`
  give are kept as the mixture that training draws unless told otherwise; nothing is left out for them.
  With few documents 'validation' may stay empty. A folder that was finished with the same files (size and time),
  tokenizer and options is left as it is; anything else is started over. `on_progress(done, total)` gets bytes of the
  input files. Up to `max_bad` bad records are left out and listed in `quarantine.jsonl`, with file, line and reason.
  Raises InputError as `sources.documents` does, at one bad record too many, or if every document falls into
  validation; a folder that was finished before is then still whole. Raises OSError for a full disk, which leaves `out`
  without what was there: two preparations have no room beside each other.
  """
  within('[0, 1)', val_fraction=val_fraction)
  out, found_files, weights = epath.Path(out), sources.files(specs, column), sources.weights(specs)
  inputs = _inputs(found_files, {'val_fraction': val_fraction, 'near': near, 'weights': weights})
  found = read_summary(out)
  same = found and (found.version, found.digest, found.inputs) == (VERSION, tokenizer.digest, inputs)
  if found and same and sum(found.dropped['bad'].values()) <= max_bad:
    return found
  choice = _Choice(val_fraction, near)
  if found:  # bad input must not cost what is there already
    looked_at = _reported(found_files, None, Quarantine(None, max_bad))
    splits = Counter(kept.split for kept in _Choice(val_fraction).kept(looked_at))
    _need_training(specs, splits['train'], splits['validation'])
  with _workplace(out) as folder:
    bad = Quarantine(folder / QUARANTINE, max_bad)
    writer = _Writer(folder / 'records', np.dtype('<u2' if tokenizer.vocab_size <= 1 << 16 else '<u4'))
    kept = choice.kept(_reported(found_files, on_progress, bad))
    for group in _grouped(_pieces(kept)):
      writer.add(group, _tokens(group, tokenizer))
    _need_training(specs, writer.counts['train'].documents, writer.counts['validation'].documents)
    writer.finish(folder)
    tokenizer.save(folder / 'tokenizer.json')
    vocabulary = [folder / 'tokenizer.json', folder / 'tokenizer_config.json']
    written = [*(path for path in _ours(folder) if path.name != QUARANTINE), *vocabulary]
    summary = Summary(
      VERSION,
      tokenizer.digest,
      tokenizer.vocab_size,
      writer.dtype.name,
      writer.counts,
      list(writer.groups),
      writer.by_group,
      weights,
      {why: dict(counts) for why, counts in (choice.dropped | {'bad': bad.counts}).items()},
      writer.contents(),
      {str(path.relative_to(folder)): files.sha256(path) for path in sorted(written)},
      inputs,
    )
    fields = dataclasses.asdict(summary)
    files.settle(folder)
    write_whole(folder / MARKER, json.dumps(fields | {'seal': files.seal(fields)}, indent=2, ensure_ascii=False))
  return summary


@contextmanager
def _workplace(out: epath.Path) -> Generator[epath.Path]:
  """Where to write: `out` itself, cleared, or for an object store a folder here that is copied there at the end."""
  if not files.remote(out):
    _clear(out)
    yield out
    return
  with tempfile.TemporaryDirectory() as here:
    folder = epath.Path(here)
    yield folder
    _clear(out)
    names = [str(path.relative_to(folder)) for path in [*_ours(folder), *folder.glob('tokenizer*')]]
    files.copy(folder, out, [*names, MARKER])


def training_texts(
  specs: Sequence[str], val_fraction: float, column: str = 'text', bad: 'Quarantine | None' = None
) -> Iterator[str]:
  """The texts of `specs` without those that `prepare` holds out: what a tokenizer may learn from."""
  for file in sources.files(specs, column):
    for document in sources.read(file, (bad or Quarantine()).of(file.kind)):
      if split_of(hashlib.sha256(document.text.encode()).digest(), val_fraction) == 'train':
        yield document.text


def split_of(digest: bytes, val_fraction: float) -> str:
  """'train' or 'validation' from the sha256 of a text; a larger fraction only adds to validation."""
  return 'validation' if int.from_bytes(digest[:8], 'big') < val_fraction * 2**64 else 'train'


def features() -> Any:
  """The TFDS features of a record; tokens are raw little-endian integers: lists of varints are slow to parse."""
  import tensorflow_datasets as tfds

  raw = tfds.features.Tensor(shape=(), dtype=np.bytes_)
  text = tfds.features.Text()
  return tfds.features.FeaturesDict({'tokens': raw, 'document': np.int64, 'kind': text, 'source': text})


class _Kept(NamedTuple):
  split: str
  number: int
  document: Document


class _Piece(NamedTuple):
  kept: _Kept
  text: str
  first: bool
  last: bool


class _Choice:
  """Which documents are kept, and in which split."""

  def __init__(self, val_fraction: float, near: float | None = None):
    self.val_fraction = val_fraction
    self.dropped = {'duplicate': Counter(), 'empty': Counter()}
    self.similar: Callable[[str], bool] | None = None
    if near is not None:
      from jaxlm.data import neardup

      self.similar, self.dropped['near-duplicate'] = neardup.NearDuplicates(near).seen, Counter()

  def kept(self, documents: Iterable[Document]) -> Iterator[_Kept]:
    seen: set[bytes] = set()
    for document in documents:
      digest = hashlib.sha256(document.text.encode()).digest()
      if not document.text.strip():
        self.dropped['empty'][document.kind] += 1
      elif digest[:16] in seen:
        self.dropped['duplicate'][document.kind] += 1
      elif self.similar and self.similar(document.text):
        self.dropped['near-duplicate'][document.kind] += 1
      else:
        yield _Kept(split_of(digest, self.val_fraction), len(seen), document)
        seen.add(digest[:16])


class Quarantine:
  """Counts the bad records that were left out, lists them in `path` if there is one; refuses what is past `limit`."""

  def __init__(self, path: epath.Path | None = None, limit: int = 0):
    self.path, self.limit, self.counts = path, limit, Counter[str]()

  def of(self, kind: str) -> sources.OnBad:
    """What to do with a bad record of this kind."""
    return lambda error: self._add(error, kind)

  def _add(self, error: InputError, kind: str) -> None:
    self.counts[kind] += 1
    if self.counts.total() > self.limit:
      count = f'{self.counts.total()} bad records are more than max_bad={self.limit}'
      raise InputError(f'{count}; the last is {error}' if self.limit else str(error))
    if self.path:
      with self.path.open('a') as file:
        file.write(json.dumps({'why': str(error)}, ensure_ascii=False) + '\n')


class _Writer:
  """Appends records to the TFDS data set, and keeps what the index and the summary need.

  TFDS's SequentialWriter, since its builders hold a whole split in memory and, past 1 GB of it, need TensorFlow.
  """

  def __init__(self, folder: epath.Path, dtype: np.dtype):
    import tensorflow_datasets as tfds

    self.dtype = dtype
    self.counts = {split: Count() for split in SPLITS}
    self.groups: dict[tuple[str, str], int] = {}  # (kind, source) -> its number
    self.by_group: dict[str, list[Count]] = {split: [] for split in SPLITS}
    self._lengths = {split: array('q') for split in SPLITS}
    self._begins = {split: array('b') for split in SPLITS}
    self._groups = {split: array('H') for split in SPLITS}
    self._hashes = {split: hashlib.sha256() for split in SPLITS}
    folder.mkdir(parents=True, exist_ok=True)
    self._folder = folder
    identity = tfds.core.DatasetIdentity(
      name='tokens', version=tfds.core.Version(f'{VERSION}.0.0'), data_dir=os.fspath(folder), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features(), disable_shuffling=True)
    self._tfds = tfds.core.SequentialWriter(info, RECORDS_PER_FILE, file_format='array_record')
    self._tfds.initialize_splits(list(SPLITS))

  def add(self, group: list[_Piece], tokens: list[np.ndarray]) -> None:
    examples: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for piece, ids in zip(group, tokens, strict=True):
      split, number, document = piece.kept
      size, group_id = len(piece.text.encode()), self._group(document)
      for count in (self.counts[split], self.by_group[split][group_id]):
        count.documents += piece.first
        count.tokens += len(ids)
        count.bytes += size
      for start in range(0, len(ids), RECORD_TOKENS):
        part = ids[start : start + RECORD_TOKENS]
        raw = part.astype(self.dtype).tobytes()
        self._hashes[split].update(raw)
        named = {'kind': document.kind, 'source': document.source}
        examples[split].append({'tokens': raw, 'document': number, **named})
        self._lengths[split].append(len(part))
        self._groups[split].append(group_id)
        self._begins[split].append(piece.first and start == 0)
    with _told(self._folder):
      self._tfds.add_examples(examples)

  def finish(self, out: epath.Path) -> None:
    """Close the data set and write the index beside it."""
    with _told(self._folder):
      self._tfds.close_all()
    for split in SPLITS:
      lengths = np.frombuffer(self._lengths[split], np.int64)
      offsets = np.concatenate([[0], np.cumsum(lengths)])
      arrays = {'offsets': offsets, 'begins': self._begins[split], 'groups': self._groups[split]}
      for name, dtype in INDEX.items():
        _save(out / f'{split}.{name}.npy', np.asarray(arrays[name]).astype(dtype))

  def contents(self) -> str:
    """sha256 of the tokens, their type, the index and the groups' names; known once all was added."""
    whole = hashlib.sha256(f'{self.dtype.name} {json.dumps(list(self.groups))}'.encode())
    for split in SPLITS:
      whole.update(self._hashes[split].digest())
      for values in (self._lengths, self._begins, self._groups):
        whole.update(bytes(values[split]))
    return whole.hexdigest()

  def _group(self, document: Document) -> int:
    key = document.kind, document.source
    if key not in self.groups and len(self.groups) >= MOST_SOURCES:
      key = document.kind, OTHER
    if key not in self.groups:
      if len(self.groups) > np.iinfo('u2').max:
        raise InputError(f'{document.where}: more than {len(self.groups)} kinds: give one with KIND=SPEC')
      self.groups[key] = len(self.groups)
      for counts in self.by_group.values():
        counts.append(Count())
    return self.groups[key]


@contextmanager
def _told(folder: epath.Path) -> Generator[None]:
  """Turns what array_record raises for a full disk or a quota into an OSError with the folder's name."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(None, str(error).splitlines()[0], os.fspath(folder)) from error


def _tokens(group: list[_Piece], tokenizer: Tokenizer) -> list[np.ndarray]:
  """Ids of each piece, with the marks that begin and end a document."""
  end = [tokenizer.eos_id]
  start = tokenizer.prefix_ids or end  # something has to be there that the first token follows
  encoded = tokenizer.encode_batch([piece.text for piece in group])
  return [np.array(start * p.first + ids + end * p.last) for p, ids in zip(group, encoded, strict=True)]


def _pieces(kept: Iterable[_Kept]) -> Iterator[_Piece]:
  for one in kept:
    text, start = one.document.text, 0
    while start < len(text):
      stop = _cut(text, start)
      yield _Piece(one, text[start:stop], start == 0, stop == len(text))
      start = stop


def _cut(text: str, start: int) -> int:
  """Where the piece from `start` on ends: after a line break if there is one, else before a space, else anywhere."""
  stop = start + PIECE_CHARS
  if stop >= len(text):
    return len(text)
  line = text.rfind('\n', start, stop) + 1
  return line or max(text.rfind(' ', start + 1, stop), 0) or stop


def _grouped(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
  """Lists of pieces of about a million characters in all, enough to keep every core of the tokenizer busy."""
  group: list[_Piece] = []
  size = 0
  for piece in pieces:
    group.append(piece)
    size += len(piece.text)
    if size >= GROUP_CHARS:
      yield group
      group, size = [], 0
  if group:
    yield group


def _reported(found: list[File], on_progress: Progress | None, bad: Quarantine) -> Iterator[Document]:
  """The documents of the files, telling `on_progress` how many of their bytes were read."""
  sizes = [file.path.stat().length for file in found]
  total, before = sum(sizes), 0
  for file, size in zip(found, sizes, strict=True):
    inside = 0
    for document in sources.read(file, bad.of(file.kind)):
      yield document
      inside = min(inside + len(document.text.encode()), size)  # JSON's own bytes are made up for at the file's end
      if on_progress:
        on_progress(before + inside, total)
    before += size
  if on_progress:
    on_progress(total, total)


def _inputs(found: list[File], options: dict[str, Any]) -> dict[str, Any]:
  now = int(time.time())
  listed: list[list[Any]] = []
  for file in found:
    stat = file.path.stat()
    # Times are whole seconds: a file of this very second may still change unseen, so it never counts as unchanged.
    changed = stat.mtime if stat.mtime < now else f'after {time.time()}'
    listed.append([os.fspath(file.path), stat.length, changed, file.kind, file.column])
  return options | {'record_tokens': RECORD_TOKENS, 'files': listed}


def _ours(out: epath.Path) -> list[epath.Path]:
  """The files of a preparation that are there, marker and tokenizer left out."""
  names = [QUARANTINE, *(f'{split}.{kind}.npy' for split in SPLITS for kind in INDEX)]
  found = [out / name for name in names if (out / name).exists()]
  if (out / 'records').exists():
    patterns = ('tokens-*', 'dataset_info.json', 'features.json')
    found += [path for pattern in patterns for path in (out / 'records').glob(pattern)]
  return found


def _clear(out: epath.Path) -> None:
  """Remove what an earlier preparation left, the marker first, and nothing that is not ours."""
  for path in [out / MARKER, *_ours(out)]:
    path.unlink(missing_ok=True)


def _save(path: epath.Path, values: np.ndarray) -> None:
  with path.open('wb') as file:
    np.save(file, values, allow_pickle=False)


def _need_training(specs: Sequence[str], train: int, validation: int) -> None:
  if not train + validation:
    raise sources.no_text(specs)
  if not train:
    raise InputError(
      f'{" ".join(specs)}: all documents ({validation}) fall into validation, none is left to train '
      'on: give more documents, or a smaller val_fraction'
    )
