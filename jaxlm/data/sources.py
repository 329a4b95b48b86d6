"""Where text comes from: files, folders and globs of text, JSONL and Parquet, plain, .gz or .zst, read as a stream."""

import gzip
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from etils import epath

from jaxlm.data import datasets
from jaxlm.errors import InputError

BOM = '\ufeff'
PART_BYTES = 32 << 20  # a longer text file is several documents: no memory holds them all
IN_MEMORY = 64 << 20  # an unpacked Parquet file beyond it goes to a temporary file

TERM = re.compile(r'(?:(?P<kind>[\w.-]+)=)?(?P<spec>.+?)(?:\*(?P<weight>\d+(?:\.\d+)?))?')
SHARD = re.compile(r'[-.]\d+-of-\d+$')  # of 'c4-train.00003-of-01024.json.gz'
OnBad = Callable[[InputError], None]
Make = Callable[[dict[str, Any], 'File', int], 'Document']  # of a row, its file, its number


class _Damaged(Exception):
  """A file is not whole, or not in its format; `read` says which and where."""


class Document(NamedTuple):
  """One text, where it came from, where it stands ('file:line') and the kind of text that it is mixed and scored as."""

  text: str
  source: str
  where: str
  kind: str


class Term(NamedTuple):
  """One part of a mixture as it was written: `[KIND=]SPEC[*WEIGHT]`."""

  spec: str
  kind: str | None
  weight: Fraction | None


class File(NamedTuple):
  """One file to read: its documents' kind, and the column or key that holds their text (None: whole rows)."""

  path: epath.Path
  kind: str
  column: str | None = 'text'
  tfds: bool = False  # a shard of a TFDS data set, whatever its ending


def terms(specs: Sequence[str]) -> list[Term]:
  """The parts of `specs`, each `[KIND=]SPEC[*WEIGHT]`, alone or joined by ' + '.

  'wiki=dumps/*.jsonl*0.5 + code*0.3' is a mixture of two. A path that exists as it stands is that path. Raises
  InputError where only some have a weight.
  """
  found = []
  for written in (part.strip() for spec in _listed(specs) for part in spec.split(' + ')):
    match = TERM.fullmatch(written)
    if not match or ('://' not in written and epath.Path(written).expanduser().exists()):
      found.append(Term(written, None, None))
    else:
      weight = match['weight']
      found.append(Term(match['spec'], match['kind'], None if weight is None else Fraction(weight)))
  bare = [term.spec for term in found if term.weight is None]
  if bare and len(bare) < len(found):
    raise InputError(f'{bare[0]}: has no weight, as others of this mixture have: write {bare[0]}*WEIGHT')
  if any(term.weight is not None and term.weight <= 0 for term in found):
    raise InputError(f'{" + ".join(_listed(specs))}: a weight must be above 0')
  return found


def documents(specs: Sequence[str]) -> Iterator[Document]:
  """All documents of `specs` (see `terms`), one after another: the specs in their order, the files of each sorted.

  A spec is a file, a folder (its files at any depth, without hidden ones) or a glob (`**` too). `.jsonl` (`.json` too:
  C4 is called so) holds one object a line with a string `text` and, if wanted, a string `source` (else its kind); blank
  lines are skipped. `.parquet` has the same as columns. Anything else is UTF-8 text, one document a file (one for every
  32 MB, cut at line breaks). All may end in `.gz` or `.zst` too. `tfds:NAME[:split[:column]]` is a TFDS data set and
  `hf://datasets/ORG/NAME[/GLOB]` one of the Hugging Face hub, both of the kind NAME (see `datasets`). Elsewhere, where
  no kind is given, it is the name of a `.jsonl` or `.parquet` file without its ending and shard number, and the name
  of a text file's folder.

  Raises InputError, naming file and line (in Parquet: row): no file matches, invalid UTF-8, a line or row of the wrong
  shape or after which a packed file is damaged or cut short, no text.
  """
  empty = True
  for file in files(specs):
    for document in read(file):
      empty = empty and not document.text.strip()
      yield document
  if empty:
    raise no_text(specs)


def no_text(specs: Sequence[str]) -> InputError:
  """The error for sources that hold nothing to learn from."""
  return InputError(f'{" ".join(_listed(specs))}: no text in there: every document is empty')


def files(specs: Sequence[str], column: str | None = 'text') -> list[File]:
  """The files that `specs` stand for, each once; without a `column`, to be read by whole rows.

  Raises InputError for a spec that matches none.
  """
  return list({str(file.path): file for term in terms(specs) for file in _of(term, column)}.values())


def weights(specs: Sequence[str], column: str | None = 'text') -> dict[str, float]:
  """What share of the training rows each kind is to be, as `specs` say it; empty where they give no weights.

  Raises InputError for a weight on a spec of several kinds, and for two weights of one kind.
  """
  found: dict[str, float] = {}
  for term in terms(specs):
    if term.weight is not None:
      kinds = {file.kind for file in _of(term, column)}
      if len(kinds) > 1 or kinds & found.keys():
        why = f'holds {", ".join(sorted(kinds))}' if len(kinds) > 1 else f'{kinds.pop()!r} has a weight already'
        raise InputError(
          f'{term.spec}*{float(term.weight):g}: a weight is for one kind, and this {why}: write KIND=SPEC'
        )
      found[kinds.pop()] = float(term.weight)
  return found


def _of(term: Term, column: str | None) -> list[File]:
  if term.spec.startswith(datasets.TFDS):
    wanted, shards = datasets.parse_tfds(term.spec), datasets.shards(term.spec, text=column is not None)
    return [File(path, term.kind or path.name.split('-')[0], wanted.column, tfds=True) for path in shards]
  if term.spec.startswith(datasets.HUB):
    kind = term.kind or datasets.parse_hub(term.spec).name
    return [File(path, kind, column) for path in datasets.hub_files(term.spec)]
  found = [File(path, term.kind or _kind(path), column) for path in sorted(_matches(term.spec))]
  if not found:
    raise InputError(f'{term.spec}: no such file, and no file matches: give a file, a folder or a quoted glob')
  return found


def _kind(path: epath.Path) -> str:
  name = _without_packing(path)
  stem = SHARD.sub('', name.stem) if name.suffix in READERS else path.absolute().parent.name
  return stem or name.stem


def refuse(error: InputError) -> None:
  """What to do with a bad record where nothing else was said."""
  raise error


def read(file: File, on_bad: OnBad = refuse, make: Make | None = None) -> Iterator[Document]:
  """The documents of one file (see `documents`); `on_bad` gets the error of each bad record, which is then left out.

  With `make` that makes each of a whole row; then the file has rows: it is JSONL, Parquet or of TFDS.
  """
  if file.tfds and make:
    for number, row in datasets.read_rows(file.path, on_bad):
      yield from _made(make, row, file, number, on_bad)
    return
  if file.tfds:
    for text, where in datasets.read_shard(file.path, file.column, on_bad):
      yield Document(text, file.kind, where, file.kind)
    return
  reader, last = READERS.get(_without_packing(file.path).suffix), ''
  if make and not reader:
    raise InputError(f'{file.path}: no rows in there: give .jsonl, .json or .parquet, plain, .gz or .zst')
  try:
    with _unpacked(file.path) as stream:
      made = reader(stream, file, on_bad, make or _from_row) if reader else _read_text(stream, file, on_bad)
      for document in made:
        yield document
        last = document.where
  except (EOFError, zlib.error, OSError, _Damaged) as error:
    if isinstance(error, OSError) and error.errno is not None:
      raise  # the file system's, not the format's
    where = f'{last}: damaged or cut short after this record' if last else f'{file.path}: damaged or cut short'
    raise InputError(f'{where}: {str(error).splitlines()[0]}') from error


def _without_packing(path: epath.Path) -> PurePosixPath:
  return PurePosixPath(path.name.removesuffix('.gz').removesuffix('.zst'))


@contextmanager
def _unpacked(path: epath.Path) -> Generator[Any]:
  """The file's bytes as a stream, without their compression."""
  with path.open('rb') as raw:
    if path.suffix in ('.gz', '.zst') and not path.stat().length:
      raise _Damaged('a packed file has more than 0 bytes')
    if path.suffix == '.gz':
      with gzip.open(raw) as file:
        yield file
    elif path.suffix == '.zst':
      import io

      import pyarrow

      with io.BufferedReader(pyarrow.input_stream(raw, compression='zstd'), 1 << 16) as file:
        yield file
    else:
      yield raw


def _listed(specs: Sequence[str]) -> list[str]:
  return [specs] if isinstance(specs, str) else list(specs)


def _matches(spec: str) -> Iterator[epath.Path]:
  path = epath.Path(spec).expanduser()
  if path.is_dir():
    yield from _expand(path, ['**', '*'])
  elif path.exists():
    yield path
  else:
    first = next((i for i, part in enumerate(path.parts) if re.search(r'[*?[]', part)), len(path.parts))
    yield from _expand(epath.Path(*path.parts[:first]), list(path.parts[first:]))


def _expand(folder: epath.Path, pattern: list[str]) -> Iterator[epath.Path]:
  """The files under `folder` that match; written out because epath's own glob knows no `**`."""
  if not pattern or not folder.is_dir():
    return
  head, *rest = pattern
  if head == '**':
    yield from _expand(folder, rest or ['*'])
  for child in folder.iterdir():
    if child.name.startswith('.') and not head.startswith('.'):
      continue
    if head == '**':
      yield from _expand(child, pattern)
    elif fnmatchcase(child.name, head) and rest:
      yield from _expand(child, rest)
    elif fnmatchcase(child.name, head) and not child.is_dir():
      yield child


def _read_text(stream: Any, file: File, on_bad: OnBad) -> Iterator[Document]:
  path, line, carried, empty = file.path, 1, b'', True
  while raw := stream.read(PART_BYTES):
    empty = False
    if len(raw) == PART_BYTES:
      raw += stream.readline(PART_BYTES)
    raw, carried = _whole_characters(carried + raw)
    try:
      text = _decode(raw, path, line)
      yield Document(text.removeprefix(BOM) if line == 1 else text, file.kind, f'{path}:{line}', file.kind)
    except InputError as error:
      on_bad(error)
    line += raw.count(b'\n')
  if carried:
    on_bad(InputError(f'{path}:{line}: not UTF-8: the file ends within a character: convert the file to UTF-8'))
  elif empty:
    yield Document('', file.kind, f'{path}:1', file.kind)


def _whole_characters(raw: bytes) -> tuple[bytes, bytes]:
  """`raw` up to its last whole character of UTF-8, and the few bytes of a begun one."""
  for back in range(1, min(4, len(raw) + 1)):
    byte = raw[-back]
    if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4
      size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
      return (raw[:-back], raw[-back:]) if back < size else (raw, b'')
    if byte < 0x80:
      break
  return raw, b''


def _made(make: Make, row: dict[str, Any], file: File, number: int, on_bad: OnBad) -> Iterator[Document]:
  try:
    document = make(row, file, number)
  except InputError as error:
    on_bad(error)
  else:
    yield document


def _read_jsonl(stream: Any, file: File, on_bad: OnBad, make: Make) -> Iterator[Document]:
  for number, raw in enumerate(stream, 1):
    try:
      line = _decode(raw, file.path, number).removeprefix(BOM if number == 1 else '')
      row = _from_json(line, file, number) if line.strip() else None
    except InputError as error:
      on_bad(error)
    else:
      if row is not None:
        yield from _made(make, row, file, number, on_bad)


def _read_parquet(stream: Any, file: File, on_bad: OnBad, make: Make) -> Iterator[Document]:
  import pyarrow
  import pyarrow.parquet

  path = file.path
  with tempfile.SpooledTemporaryFile(IN_MEMORY) as whole:
    if path.suffix != '.parquet':  # Parquet is read from its end
      shutil.copyfileobj(stream, whole)
      whole.seek(0)
      stream = whole
    try:
      table = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
      there = table.schema_arrow.names
      if file.column is not None and file.column not in there:
        raise InputError(f'{path}: no column "{file.column}"; its columns are {", ".join(there)}')
      wanted = there if file.column is None else [name for name in (file.column, 'source') if name in there]
      batches = table.iter_batches(256, columns=wanted)
      rows = (row for batch in batches for row in _undecoded(batch).to_pylist())
      for number, row in enumerate(rows, 1):
        try:
          text = lambda x, number=number: _decode(x, path, number) if isinstance(x, bytes) else x
          values = {name: text(x) for name, x in row.items() if name == file.column or x is not None}
        except InputError as error:
          on_bad(error)
        else:
          yield from _made(make, values, file, number, on_bad)
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
      raise _Damaged(f'not a Parquet file, or a damaged one: {error}') from error


def _undecoded(batch: Any) -> Any:
  """A batch of Parquet rows with its strings as bytes, so that one that is no UTF-8 is one bad row."""
  import pyarrow

  columns = []
  for column in batch.columns:
    if pyarrow.types.is_dictionary(column.type):
      column = column.dictionary_decode()
    text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    columns.append(column.cast(pyarrow.large_binary()) if text else column)
  return pyarrow.record_batch(columns, names=batch.schema.names)


def _from_json(line: str, file: File, number: int) -> dict[str, Any]:
  where = f'{file.path}:{number}'
  if number == 1 and _without_packing(file.path).suffix == '.json' and line.lstrip().startswith('['):
    raise InputError(f"{where}: a JSON array: write one object a line, as with jq -c '.[]'")
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise InputError(f'{where}: not JSON: {error}') from error
  if not isinstance(row, dict):
    wanted = '' if file.column is None else f' with a string "{file.column}"'
    raise InputError(f'{where}: expected a JSON object{wanted}, found {type(row).__name__}')
  return row


def _from_row(row: dict[str, Any], file: File, number: int) -> Document:
  where = f'{file.path}:{number}'
  if file.column not in row:
    keys = f'its keys are {", ".join(row)}: name the one with the text (--text-column)' if row else 'it is empty'
    raise InputError(f'{where}: no "{file.column}"; {keys}')
  if not isinstance(text := row[file.column], str):
    raise InputError(f'{where}: "{file.column}" must be a string, found {json.dumps(text, default=str)[:40]}')
  if not isinstance(source := row.get('source', file.kind), str):
    raise InputError(f'{where}: "source" must be a string, found {json.dumps(source, default=str)[:40]}')
  if found := re.search('[\ud800-\udfff]', text):
    raise InputError(
      f'{where}: "{file.column}" has half of a surrogate pair at character {found.start()}, which is no text'
    )
  return Document(text, source, where, file.kind)


def _decode(raw: bytes, path: epath.Path, line: int) -> str:
  """`raw` as text, where `line` is the file's line on which it begins."""
  try:
    return raw.decode()
  except UnicodeDecodeError as error:
    before = raw[: error.start]
    line += before.count(b'\n')
    column = error.start - before.rfind(b'\n')
    raise InputError(
      f'{path}:{line}: not UTF-8: byte {column} of the line is 0x{raw[error.start]:02x}: convert the file to UTF-8'
    ) from error


READERS = {'.jsonl': _read_jsonl, '.json': _read_jsonl, '.parquet': _read_parquet}
