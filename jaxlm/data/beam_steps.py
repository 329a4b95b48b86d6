"""What workers do when `beam` prepares: plain functions of elements, each documented as `element -> elements`.

A file is read in chunks of about a million characters. `chunk` is (number of the file, number of the chunk in it), and
a document's `place` is its chunk and its number there: in their order documents are as if they were read one by one.
Several kinds of output are told apart by a name (`_tag`); the first kind has none.
"""

import functools
import importlib
import itertools
import json
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxlm import files
from jaxlm.data import neardup, records, sources
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.choice import DUPLICATE, EMPTY, NEAR, POOR, SPLITS, Kept, Rules, digest_of, split_of
from jaxlm.data.neardup import Place
from jaxlm.data.prepared import Count
from jaxlm.data.quality import fault
from jaxlm.data.sources import Document, File
from jaxlm.errors import InputError

CHUNK_CHARS = 1 << 20
PROGRESS: list[Callable[[str], None]] = []  # who is told what is being done, where that is this process

Chunk = tuple[int, int]


class _Enough(Exception):
  """A file has more bad records than all may have together."""


def _tag(name: str, value: Any) -> Any:
  return importlib.import_module('apache_beam.pvalue').TaggedOutput(name, value)


def _tell(what: str) -> None:
  for tell in PROGRESS:
    tell(what)


def listed(path: str) -> Iterator[tuple[int, list[Any]]]:
  """A JSON list of files -> (number of the file, File as a list)."""
  yield from enumerate(json.loads(epath.Path(path).read_text()))


def read(element: tuple[int, list[Any]], max_bad: int) -> Iterator[Any]:
  """A file -> (chunk, (kind, [(text, source, where)])); bad: (number, kind, [messages], what ended it early)."""
  number, (path, *rest) = element
  file, bad, end = File(epath.Path(path), *rest), [], ''
  _tell('reading')

  def on_bad(error: InputError) -> None:
    bad.append(str(error))
    if len(bad) > max_bad:
      raise _Enough

  texts: list[tuple[str, str, str]] = []
  size, chunks = 0, itertools.count()
  try:
    for document in sources.read(file, on_bad):
      texts.append(document[:3])
      size += len(document.text)
      if size >= CHUNK_CHARS:
        yield (number, next(chunks)), (file.kind, texts)
        texts, size = [], 0
  except _Enough:
    pass
  except InputError as error:
    end = str(error)
  if texts:
    yield (number, next(chunks)), (file.kind, texts)
  yield _tag('bad', (number, file.kind, bad, end))


def is_refused(bad: Iterable[tuple[int, str, list[str], str]], max_bad: int) -> bool:
  """All of `read`'s bad -> whether nothing will come of it."""
  return any(end for *_, end in bad) or sum(len(messages) for _, _, messages, _ in bad) > max_bad


@functools.lru_cache(1)
def _sketcher(threshold: float) -> neardup.Sketcher:
  return neardup.Sketcher(threshold)


def looked_at(element: tuple[Chunk, Any], rules: Rules) -> Iterator[tuple[bytes, tuple[Place, bool, bytes]]]:
  """A chunk -> (half of the text's sha256, (place, has a fault, sketch)) of each document that is not empty."""
  chunk, (_, texts) = element
  _tell('looking for duplicates')
  for nth, (text, *_) in enumerate(texts):
    if text.strip():
      poor = bool(rules.quality and fault(text, rules.quality))
      sketch = b'' if poor or rules.near is None else _sketcher(rules.near).sketch(text)
      yield digest_of(text)[:16], ((*chunk, nth), poor, sketch)


def _left_out(place: Place, reason: str) -> Any:
  return _tag('left_out', (place[:2], (place[2], reason)))


def first_ones(group: tuple[bytes, Iterable[tuple[Place, bool, bytes]]], near: bool) -> Iterator[Any]:
  """All of one text -> left_out: (chunk, (nth, reason)); where near ones are looked for, (sketch, place) of the first
  and copies: (place of the first, place) of the others, whose reason is the first one's or that they are copies."""
  first, poor, sketch = min(group[1])
  for place, *_ in group[1]:
    if poor:
      yield _left_out(place, POOR)
    elif near and place != first:
      yield _tag('copies', (first, place))
    elif place != first:
      yield _left_out(place, DUPLICATE)
  if sketch:
    yield sketch, first


def bands(group: tuple[bytes, Iterable[Place]], threshold: float) -> Iterator[Any]:
  """All of one sketch -> (band, (place, sketch)) of the first; near: the others, which are as near to it as can be."""
  sketch, first = group[0], min(group[1])
  for place in group[1]:
    if place != first:
      yield _tag('near', (place, None))
  for band in _sketcher(threshold).bands(sketch):
    yield band, (first, sketch)


def alike(group: tuple[bytes, Iterable[tuple[Place, bytes]]], threshold: float) -> Iterator[tuple[Place, Place]]:
  """All with one band -> (later, earlier) of those that are alike."""
  return neardup.pairs(_sketcher(threshold), group[1])


def near_ones(pairs: list[tuple[Place, Place]]) -> Iterator[tuple[Place, None]]:
  """All pairs -> those that go."""
  _tell('choosing among near-duplicates')
  yield from ((place, None) for place in neardup.later_ones(pairs))


def with_copies(element: tuple[Place, Mapping[str, list[Any]]]) -> Iterator[Any]:
  """Of one text: is the first 'near' an earlier one, and its 'copies' -> left_out."""
  first, found = element
  reason = NEAR if found['near'] else DUPLICATE
  for place in [first] * bool(found['near']) + found['copies']:
    yield _left_out(place, reason)


class Record(NamedTuple):
  """A record, its document's number in the chunk and source, and the size of that text at its first record."""

  raw: bytes
  document: int
  source: str
  size: int | None


@functools.lru_cache(1)
def _opened(path: str) -> tokenizers.Tokenizer:
  return tokenizers.load(epath.Path(path))


def tokenized(
  element: tuple[Chunk, Mapping[str, list[Any]]], refused: bool, tokenizer: str, val_fraction: float
) -> Iterator[Any]:
  """A chunk and who is 'left_out' of it -> (chunk, (kind, {split: records})).

  counts: (file, (chunk, documents, records by split)); dropped: (reason, file, documents);
  met: {group: (place, where)} of the groups' first documents.
  """
  chunk, found = element
  if refused or not found['chunk']:
    return
  _tell('tokenizing')
  ((kind, texts),) = found['chunk']
  reasons = dict(found['left_out']) | {nth: EMPTY for nth, (text, *_) in enumerate(texts) if not text.strip()}
  kept = [(nth, Document(*text, kind)) for nth, text in enumerate(texts) if nth not in reasons]
  splits = [split_of(digest_of(document.text), val_fraction) for _, document in kept]
  both = zip(splits, kept, strict=True)
  numbered = (Kept(split, number, document) for number, (split, (_, document)) in enumerate(both))
  made: dict[str, list[tuple[Any, ...]]] = {split: [] for split in SPLITS}
  vocabulary = _opened(tokenizer)
  for piece, ids in itertools.chain.from_iterable(records.encoded(numbered, vocabulary)):
    split, number, document = piece.kept
    for nth, raw in enumerate(records.raw_parts(ids, records.dtype_for(vocabulary))):
      size = len(document.text.encode()) if piece.first and nth == 0 else None
      made[split].append((raw, number, document.source, size))
  met: dict[tuple[str, str], tuple[Place, str]] = {}
  for nth, document in kept:
    met.setdefault((kind, document.source), ((*chunk, nth), document.where))
  yield chunk, (kind, made)
  yield _tag('counts', (chunk[0], (chunk[1], len(kept), *(len(made[split]) for split in SPLITS))))
  yield _tag('met', met)
  for reason, count in Counter(reasons.values()).items():
    yield _tag('dropped', (reason, chunk[0], count))


def starts(group: tuple[int, Iterable[tuple[int, ...]]]) -> Iterator[Any]:
  """A file's counts -> (chunk, what comes before it in the file); totals: (file, documents, records by split)."""
  file, counts = group
  before = [0] * (1 + len(SPLITS))
  for chunk, *sizes in sorted(counts):
    yield (file, chunk), tuple(before)
    before = [a + b for a, b in zip(before, sizes, strict=True)]
  yield _tag('totals', (file, *before))


def file_starts(totals: list[tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
  """All totals -> {file: what comes before it}."""
  found, before = {}, [0] * (1 + len(SPLITS))
  for file, *sizes in sorted(totals):
    found[file] = tuple(before)
    before = [a + b for a, b in zip(before, sizes, strict=True)]
  return found


def first_met(some: Iterable[Mapping[tuple[str, str], Any]], most: int | None) -> dict[tuple[str, str], Any]:
  """Maps of groups to where they were met first -> one map, of the `most` that were met first."""
  found: dict[tuple[str, str], Any] = {}
  for one in some:
    for group, met in one.items():
      found[group] = min(met, found.get(group, met))
  return dict(sorted(found.items(), key=lambda item: item[1])[:most])


def others_met(met: Mapping[tuple[str, str], Any], first: Mapping[tuple[str, str], Any]) -> dict[tuple[str, str], Any]:
  """A chunk's groups -> {(kind, 'other'): where} for those that are not among the first MOST_SOURCES."""
  beyond = [(group, at) for group, at in met.items() if group not in first]
  others = ({(kind, records.OTHER): at} for (kind, _), at in beyond if (kind, records.OTHER) not in first)
  return first_met(others, None)


def all_groups(others: Mapping[tuple[str, str], Any], first: Mapping[tuple[str, str], Any]) -> list[list[str]]:
  """Both -> [[kind, source, where it was met first]] in the order of `records.Groups`."""
  both = [*first.items(), *sorted(others.items(), key=lambda item: item[1])]
  return [[*group, where] for group, (_, where) in both]


def placed(
  element: tuple[Chunk, Mapping[str, list[Any]]], files_before: Mapping[int, tuple[int, ...]]
) -> Iterator[tuple[tuple[str, int], tuple[int, int, str, list[Any]]]]:
  """A chunk's 'records' and 'start' -> ((split, shard), (number of the first one, documents before, kind, records))."""
  (file, _), found = element
  if not found['records']:
    return
  ((kind, made),), (start,) = found['records'], found['start']
  documents, *first = (a + b for a, b in zip(files_before[file], start, strict=True))
  for split, number in zip(SPLITS, first, strict=True):
    rest = made[split]
    while rest:
      shard, inside = divmod(number, records.RECORDS_PER_FILE)
      part, rest = rest[: (room := records.RECORDS_PER_FILE - inside)], rest[room:]
      yield (split, shard), (number, documents, kind, part)
      number += len(part)


def written(
  group: tuple[tuple[str, int], Iterable[tuple[int, int, str, list[Any]]]],
  groups: list[list[str]],
  folder: str,
  dtype: str,
) -> None:
  """All of one shard -> its file, its index (.npz) and its counts (.json) in `folder`, the last one last."""
  (split, shard), blocks = group
  if len(groups) > records.MOST_GROUPS:
    return  # which is refused when all is known
  name = records.shard_name(split, shard)
  _tell(f'writing {name}')
  numbers = {(kind, source): number for number, (kind, source, _) in enumerate(groups)}
  counts: dict[int, Count] = {}
  index = records.Index()
  with tempfile.TemporaryDirectory() as here:
    data_set = records.DataSet(epath.Path(here))
    for _, documents, kind, part in sorted(blocks, key=lambda block: block[0]):
      examples = []
      for record in itertools.starmap(Record, part):
        number = numbers.get((kind, record.source))
        number = numbers[kind, records.OTHER] if number is None else number
        length = len(record.raw) // np.dtype(dtype).itemsize
        index.add(split, length, record.size is not None, number)
        count = counts.setdefault(number, Count())
        count.documents += record.size is not None
        count.tokens += length
        count.bytes += record.size or 0
        examples.append(records.example(record.raw, documents + record.document, (kind, record.source)))
      data_set.add({split: examples})
    data_set.close()
    path = epath.Path(here) / records.shard_name(split, 0)
    digest, size = files.sha256(path), data_set.stored_bytes(split)
    with (path.parent / 'index.npz').open('wb') as file:
      np.savez(file, lengths=index.lengths[split], begins=index.begins[split], groups=index.groups[split])
    publish(path, epath.Path(folder) / name)
    publish(path.parent / 'index.npz', epath.Path(folder) / f'{name}.npz')
  facts = {'sha256': digest, 'bytes': size, 'records': len(index.lengths[split])}
  by_group = {str(number): count.figures for number, count in counts.items()}
  save_json(facts | {'groups': by_group}, f'{folder}/{name}.json')


def publish(path: epath.Path, target: epath.Path) -> None:
  """Copies a file to where others look for it, whole or not at all; a step that runs twice puts the same there."""
  remote = files.remote(target)  # where a write is in one piece by itself
  part = target if remote else target.parent / f'{target.name}.{os.getpid()}-{threading.get_ident()}.part'
  with path.open('rb') as source, part.open('wb') as copy:
    shutil.copyfileobj(source, copy, 1 << 22)
  if not remote:
    part.replace(target)


def save_json(value: Any, path: str) -> None:
  """Any -> a file."""
  files.write_whole(path, json.dumps(value))
