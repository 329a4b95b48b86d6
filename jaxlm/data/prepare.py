"""Text to tokens on disk: a TFDS data set in array_record, with an index of offsets beside it.

A prepared folder holds `records/` (the data set: at most 4096 tokens a record), `SPLIT.offsets.npy`,
`SPLIT.begins.npy` and `SPLIT.groups.npy` (each record's kind and source), `tokenizer.json`, `quarantine.jsonl` where
bad records were left out, and `prepared.json`, written last: without it the folder does not count. `beam` makes the
same folder, byte for byte, with many machines. Of conversations (`Chat`) it holds `SPLIT.learned.npy` (a bit a token)
and `chat_template.jinja` too.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from etils import epath

from jaxlm import files
from jaxlm.data import choice, conversations, records, sources, turns
from jaxlm.data.choice import SPLITS, Choice, Quarantine, Rules
from jaxlm.data.prepared import LEARNED, MARKER, TEMPLATE, VERSION, Count, Summary, read_summary
from jaxlm.data.prepared import load as load
from jaxlm.data.quality import Thresholds
from jaxlm.data.sources import Document, File
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError, within
from jaxlm.files import write_whole

QUARANTINE = 'quarantine.jsonl'
TALKS = 256  # conversations that are written together

LONG = 'too long'  # conversations of which not even the first turn of the assistant fits

Progress = Callable[[int, int], None]


class Chat(NamedTuple):
  """How conversations become tokens: the template's text, what is learned of them, the most tokens of one.

  `columns` say which are the conversation's, where that is not to be guessed (see `conversations.parse_columns`).
  """

  template: str
  learn: turns.Learn = 'assistant'
  max_len: int | None = None
  columns: Mapping[str, str] | None = None


def chat_of(
  asked: str | None,
  own: str | None,
  tokenizer: Tokenizer,
  columns: Sequence[str] = (),
  *,
  learn: turns.Learn = 'assistant',
  max_len: int | None = None,
) -> tuple[str, Tokenizer, Chat]:
  """The name of the template that was asked for (see `turns.choose`), the tokenizer with its control tokens, a Chat."""
  name, template = turns.choose(asked, own)
  named = conversations.parse_columns(columns) or None
  return name, tokenizer.with_controls(turns.BUILT_IN.get(name, ())), Chat(template, learn, max_len, named)


class Job(NamedTuple):
  """What is to be prepared; `job` makes one."""

  specs: Sequence[str]
  tokenizer: Tokenizer
  out: epath.Path
  files: list[File]
  weights: dict[str, float]
  val_fraction: float
  max_bad: int
  rules: Rules
  inputs: dict[str, Any]
  chat: Chat | None = None


class Made(NamedTuple):
  """What the summary says of documents that were prepared; the counts go by split, in the order of groups."""

  groups: list[records.Group]
  by_group: dict[str, list[Count]]
  dropped: Mapping[str, Mapping[str, int]]
  contents: str
  chat: dict[str, Any] | None = None

  @property
  def splits(self) -> dict[str, Count]:
    """What each split holds."""
    return {
      split: Count(*map(sum, zip(*(count.figures for count in counts), strict=True))) if counts else Count()
      for split, counts in self.by_group.items()
    }


def job(
  specs: Sequence[str],
  tokenizer: Tokenizer,
  out: epath.PathLike,
  *,
  val_fraction: float = 0.05,
  max_bad: int = 0,
  column: str = 'text',
  near: float | None = None,
  quality: bool = False,
  chat: Chat | None = None,
) -> Job:
  """The arguments of `prepare`, looked up."""
  within('[0, 1)', val_fraction=val_fraction)
  read = None if chat else column
  found, weights = sources.files(specs, read), sources.weights(specs, read)
  rules = Rules(near, Thresholds() if quality else None)
  options = {'val_fraction': val_fraction, 'near': near, 'weights': weights}
  if rules.quality:  # named where it is on, so that what was prepared before there was one stays as it is
    options['quality'] = dataclasses.asdict(rules.quality)
  if chat:
    options['chat'] = chat._asdict()
  inputs = _inputs(found, options)
  return Job(specs, tokenizer, epath.Path(out), found, weights, val_fraction, max_bad, rules, inputs, chat)


def prepare(
  specs: Sequence[str],
  tokenizer: Tokenizer,
  out: epath.PathLike,
  *,
  val_fraction: float = 0.05,
  max_bad: int = 0,
  column: str = 'text',
  near: float | None = None,
  quality: bool = False,
  chat: Chat | None = None,
  on_progress: Progress | None = None,
) -> Summary:
  """Tokenize the documents of `specs` (see `sources.terms`) into the folder `out`; returns what is in there.

  Each document becomes BOS + tokens + EOS (a tokenizer without BOS: EOS at both ends). It goes to 'validation' or
  'train' by the hash of its text alone, so adding documents moves none. Exact duplicates and empty ones are dropped,
  with `near` those whose Jaccard similarity to a kept one is at least that (see `neardup`), with `quality` those that
  have a fault (see `quality`). Weights that `specs` give are kept as the mixture that training draws unless told
  otherwise; nothing is left out for them. With `chat` the sources hold rows of conversations, each becomes what its
  template makes of it (see `turns.encode`), longer ones lose turns, and `Summary.chat` has the template's digest,
  'learn', the 'end' ids of a turn, 'formats' by kind, tokens 'learned' by split and kind, conversations 'truncated' by
  kind. With few documents 'validation' may stay empty. A folder that was finished
  with the same files (size and time), tokenizer and options is left as it is; anything else is started over.
  `on_progress(done, total)` gets bytes of the input files. Up to `max_bad` bad records are left out and listed in
  `quarantine.jsonl`, with file, line and reason. Raises InputError as `sources.documents` does, at one bad record too
  many, or if every document falls into validation; a folder that was finished before is then still whole. Raises
  OSError for a full disk, which leaves `out` without what was there: two preparations have no room beside each other.
  """
  options = {'val_fraction': val_fraction, 'max_bad': max_bad, 'column': column, 'near': near, 'quality': quality}
  this = job(specs, tokenizer, out, **options, chat=chat)
  if done := finished(this):
    return done
  chosen = Choice(val_fraction, this.rules)
  if read_summary(this.out):  # bad input must not cost what is there already
    _look_through(this)
  with workplace(this.out) as folder:
    bad = Quarantine(folder / QUARANTINE, max_bad)
    writer = records.Writer(folder / 'records', records.dtype_for(tokenizer), masked=chat is not None)
    talks = _Talks(this, bad) if chat else None
    kept = chosen.kept(_reported(this.files, on_progress, bad, talks.make if talks else None))
    if talks:
      for pieces, masks in talks.encoded(kept):
        writer.add(pieces, masks)
    else:
      for pieces in records.encoded(kept, tokenizer):
        writer.add(pieces)
    groups, dropped = list(writer.groups.numbers), chosen.dropped | ({LONG: talks.too_long} if talks else {})
    contents = writer.index.contents(writer.dtype, groups)
    said = talks.said(writer) if talks else None
    made = Made(groups, writer.by_group, dropped | {'bad': bad.counts}, contents, said)
    need_training(this, made)
    writer.finish(folder)
    if chat:
      (folder / TEMPLATE).write_text(chat.template)
    return seal_up(this, folder, made)


class _Talks:
  """Conversations on their way to tokens, and what is counted of them."""

  def __init__(self, this: Job, bad: Quarantine):
    assert this.chat
    self.chat, self.tokenizer, self.bad = this.chat, this.tokenizer, bad
    self.make = conversations.Reader(this.chat.columns)
    self.too_long, self.truncated = Counter[str](), Counter[str]()

  def encoded(self, kept: Iterator[choice.Kept]) -> Iterator[tuple[list[tuple[records.Piece, Any]], list[Any]]]:
    """The conversations' pieces with their ids, and their masks, some at a time."""
    pieces, masks = [], []
    for one in kept:
      found = self._encoded(one.document)
      if found:
        text = self.tokenizer.decode(found.ids.tolist())
        pieces.append((records.Piece(one, text, True, True), found.ids))
        masks.append(found.learned)
      if len(pieces) == TALKS:
        yield pieces, masks
        pieces, masks = [], []
    yield pieces, masks

  def _encoded(self, document: Document) -> turns.Encoded | None:
    talk = conversations.Conversation.from_json(document.text)
    try:
      found = turns.encode(self.chat.template, talk, self.tokenizer, self.chat.learn, self.chat.max_len)
    except InputError as error:
      self.bad.of(document.kind)(InputError(f'{document.where}: {error}'))
      return None
    self.too_long[document.kind] += not found
    self.truncated[document.kind] += bool(found and found.dropped)
    return found

  def said(self, writer: records.Writer) -> dict[str, Any]:
    """`Summary.chat`."""
    learned: dict[str, dict[str, int]] = {}
    for split, counts in writer.learned.items():
      of = learned.setdefault(split, {})
      for (kind, _), number in writer.groups.numbers.items():
        of[kind] = of.get(kind, 0) + counts[number]
    return {
      'template': hashlib.sha256(self.chat.template.encode()).hexdigest(),
      'learn': self.chat.learn,
      'end': turns.end_ids(self.chat.template, self.tokenizer),
      'formats': self.make.formats,
      'learned': learned,
      'truncated': dict(self.truncated),
    }


def finished(this: Job) -> Summary | None:
  """What is in the folder already, if that is what the job would make."""
  found = read_summary(this.out)
  same = found and (found.version, found.digest, found.inputs) == (VERSION, this.tokenizer.digest, this.inputs)
  return found if found and same and sum(found.dropped['bad'].values()) <= this.max_bad else None


def need_training(this: Job, made: Made) -> None:
  """Raises InputError if nothing was kept, or nothing to train on."""
  counts = {split: count.documents for split, count in made.splits.items()}
  _need_training(this.specs, counts, made.dropped)


def seal_up(this: Job, folder: epath.Path, made: Made, digests: Mapping[str, str] | None = None) -> Summary:
  """Write the tokenizer and the marker into a folder that has all else; returns what the marker says.

  `digests` are those of files that are known, by their path in the folder; the others are read for them.
  """
  this.tokenizer.save(folder / 'tokenizer.json')
  vocabulary = [folder / 'tokenizer.json', folder / 'tokenizer_config.json']
  written = {path for path in [*_ours(folder), *vocabulary] if path.name != QUARANTINE}
  known = {folder / name: digest for name, digest in (digests or {}).items()}
  summary = Summary(
    VERSION,
    this.tokenizer.digest,
    this.tokenizer.vocab_size,
    records.dtype_for(this.tokenizer).name,
    made.splits,
    made.groups,
    made.by_group,
    this.weights,
    {why: dict(counts) for why, counts in made.dropped.items()},
    made.contents,
    {
      str(path.relative_to(folder)): known[path] if path in known else files.sha256(path)
      for path in sorted(written | known.keys())
    },
    this.inputs,
    made.chat,
  )
  fields = summary.to_json()
  files.settle(folder)
  write_whole(folder / MARKER, json.dumps(fields | {'seal': files.seal(fields)}, indent=2, ensure_ascii=False))
  return summary


@contextmanager
def workplace(out: epath.Path, there: Mapping[str, epath.Path] | None = None) -> Generator[epath.Path]:
  """Where to write: `out` itself, cleared, or for an object store a folder here that is copied there at the end.

  Files that are `there` already, by their names in the folder, are moved into `out` and never come here.
  """
  there = there or {}
  if not files.remote(out):
    _clear(out)
    for name, path in there.items():
      files.move(path, out / name)
    yield out
    return
  with tempfile.TemporaryDirectory() as here:
    folder = epath.Path(here)
    yield folder
    _clear(out)
    for name, path in there.items():
      files.move(path, out / name)
    names = [str(path.relative_to(folder)) for path in [*_ours(folder), *folder.glob('tokenizer*')]]
    files.copy(folder, out, [*names, MARKER])


def training_texts(
  specs: Sequence[str], val_fraction: float, column: str = 'text', bad: Quarantine | None = None
) -> Iterator[str]:
  """The texts of `specs` without those that `prepare` holds out: what a tokenizer may learn from."""
  for file in sources.files(specs, column):
    for document in sources.read(file, (bad or Quarantine()).of(file.kind)):
      if choice.split_of(choice.digest_of(document.text), val_fraction) == 'train':
        yield document.text


def _look_through(this: Job) -> None:
  """Raises what preparing would raise for bad records and for splits, as far as near-duplicates do not matter."""
  looking = Choice(this.val_fraction, this.rules._replace(near=None))
  make = conversations.Reader(this.chat.columns) if this.chat else None
  documents = _reported(this.files, None, Quarantine(None, this.max_bad), make)
  splits = Counter(kept.split for kept in looking.kept(documents))
  _need_training(this.specs, splits, looking.dropped)


def _reported(
  found: list[File], on_progress: Progress | None, bad: Quarantine, make: sources.Make | None = None
) -> Iterator[Document]:
  """The documents of the files, telling `on_progress` how many of their bytes were read."""
  sizes = [file.path.stat().length for file in found]
  total, before = sum(sizes), 0
  for file, size in zip(found, sizes, strict=True):
    inside = 0
    for document in sources.read(file, bad.of(file.kind), make):
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
  return options | {'record_tokens': records.RECORD_TOKENS, 'files': listed}


def _ours(out: epath.Path) -> list[epath.Path]:
  """The files of a preparation that are there, marker and tokenizer left out."""
  names = [QUARANTINE, TEMPLATE, *(f'{split}.{kind}.npy' for split in SPLITS for kind in (*records.INDEX, LEARNED))]
  found = [out / name for name in names if (out / name).exists()]
  if (out / 'records').exists():
    patterns = ('tokens-*', 'dataset_info.json', 'features.json')
    found += [path for pattern in patterns for path in (out / 'records').glob(pattern)]
  return found


def _clear(out: epath.Path) -> None:
  """Remove what an earlier preparation left, the marker first, and nothing that is not ours."""
  for path in [out / MARKER, *_ours(out)]:
    path.unlink(missing_ok=True)


def _need_training(specs: Sequence[str], counts: Mapping[str, int], dropped: Mapping[str, Mapping[str, int]]) -> None:
  if not sum(counts.values()):
    if poor := sum(dropped.get(choice.POOR, {}).values()):
      raise InputError(f'{" ".join(specs)}: no document is left, {poor} have a fault: prepare it without --quality')
    raise sources.no_text(specs)
  if not counts['train']:
    raise InputError(
      f'{" ".join(specs)}: all documents ({counts["validation"]}) fall into validation, none is left to train '
      'on: give more documents, or a smaller val_fraction'
    )
