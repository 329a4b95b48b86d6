"""Text to tokens on disk: a TFDS data set in array_record, with an index of offsets beside it.

A prepared folder holds `records/` (the data set: at most 4096 tokens a record), `SPLIT.offsets.npy`,
`SPLIT.begins.npy` and `SPLIT.groups.npy` (each record's kind and source), `tokenizer.json`, `quarantine.jsonl` where
bad records were left out, and `prepared.json`, written last: without it the folder does not count. `beam` makes the
same folder, byte for byte, with many machines. Of conversations (`Chat`) it holds `SPLIT.learned.npy` (a bit a token)
and `chat_template.jinja` too, of preferences `SPLIT.labels.npy` and `SPLIT.margins.npy` (one a document) besides.
"""

import dataclasses
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
from jaxlm.data import choice, records, sources
from jaxlm.data.choice import SPLITS, Choice, Quarantine, Rules
from jaxlm.data.prepared import ANSWERS, LEARNED, MARKER, TEMPLATE, VERSION, Count, Summary, read_summary
from jaxlm.data.prepared import load as load
from jaxlm.data.quality import Thresholds
from jaxlm.data.sources import Document, File
from jaxlm.data.talks import LONG, Talks
from jaxlm.data.talks import Chat as Chat
from jaxlm.data.talks import chat_of as chat_of
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError, within
from jaxlm.files import write_whole

QUARANTINE = 'quarantine.jsonl'

Progress = Callable[[int, int], None]


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
    options['chat'] = chat.asked()
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
  kind; rows of preferences become a document an answer, all in one split, and 'preference' is 'pairs' or 'labels'.
  With few documents 'validation' may stay empty. A folder that was finished
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
    has = {'masked': chat is not None, 'labelled': bool(chat and chat.preference)}
    writer = records.Writer(folder / 'records', records.dtype_for(tokenizer), **has)
    talks = Talks(chat, tokenizer, bad) if chat else None
    kept = chosen.kept(_reported(this.files, on_progress, bad, talks.make if talks else None))
    if talks:
      for some in talks.encoded(kept):
        writer.add(*some)
    else:
      for pieces in records.encoded(kept, tokenizer):
        writer.add(pieces)
    groups, dropped = list(writer.groups.numbers), chosen.dropped | (talks.dropped if talks else {})
    contents = writer.index.contents(writer.dtype, groups)
    said = talks.said(writer) if talks else None
    made = Made(groups, writer.by_group, dropped | {'bad': bad.counts}, contents, said)
    need_training(this, made)
    writer.finish(folder)
    if chat:
      (folder / TEMPLATE).write_text(chat.template)
    return seal_up(this, folder, made)


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
  make = this.chat.reader() if this.chat else None
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
  names = [
    QUARANTINE,
    TEMPLATE,
    *(f'{split}.{kind}.npy' for split in SPLITS for kind in (*records.INDEX, LEARNED, *ANSWERS)),
  ]
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
    if long := sum(dropped.get(LONG, {}).values()):
      raise InputError(f'{" ".join(specs)}: no row is left, {long} are longer than max_len (a run: than data.seq_len)')
    raise sources.no_text(specs)
  if not counts['train']:
    raise InputError(
      f'{" ".join(specs)}: all documents ({counts["validation"]}) fall into validation, none is left to train '
      'on: give more documents, or a smaller val_fraction'
    )
