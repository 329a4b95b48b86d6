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
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from etils import epath

from jaxlm.errors import InputError

BOM = '\ufeff'
PART_BYTES = 32 << 20  # a longer text file is several documents: no memory holds them all
IN_MEMORY = 64 << 20  # an unpacked Parquet file beyond it goes to a temporary file

OnBad = Callable[[InputError], None]


class Document(NamedTuple):
  """One text, the kind of text it is counted under, and where it stands ('file:line')."""

  text: str
  source: str
  where: str


def documents(specs: Sequence[str]) -> Iterator[Document]:
  """All documents of `specs`, one after another: the specs in their order, the files of each sorted.

  A spec is a file, a folder (its files at any depth, without hidden ones) or a glob (`**` too). `.jsonl` holds one
  object a line with a string `text` and, if wanted, a string `source` (else the file's name without ending); blank
  lines are skipped. `.parquet` has the same as columns. Anything else is UTF-8 text, one document a file (one for
  every 32 MB, cut at line breaks), whose source is the name of its folder. All may end in `.gz` or `.zst` too.

  Raises InputError, naming file and line (in Parquet: row): no file matches, invalid UTF-8, a line or row of the wrong
  shape, a packed file that is damaged, no text.
  """
  empty = True
  for path in files(specs):
    for document in read(path):
      empty = empty and not document.text.strip()
      yield document
  if empty:
    raise no_text(specs)


def no_text(specs: Sequence[str]) -> InputError:
  """The error for sources that hold nothing to learn from."""
  return InputError(f'{" ".join(_listed(specs))}: no text in there: every document is empty')


def files(specs: Sequence[str]) -> list[epath.Path]:
  """The files that `specs` stand for, each once. Raises InputError for a spec that matches none."""
  found: dict[str, epath.Path] = {}
  for spec in _listed(specs):
    matched = sorted(_matches(spec))
    if not matched:
      raise InputError(f'{spec}: no such file, and no file matches: give a file, a folder or a quoted glob')
    found.update((str(path), path) for path in matched)
  return list(found.values())


def refuse(error: InputError) -> None:
  """What to do with a bad record where nothing else was said."""
  raise error


def read(path: epath.Path, on_bad: OnBad = refuse) -> Iterator[Document]:
  """The documents of one file (see `documents`); `on_bad` gets the error of each bad record, which is then left out."""
  name = PurePosixPath(path.name.removesuffix('.gz').removesuffix('.zst'))
  readers = {'.jsonl': _read_jsonl, '.parquet': _read_parquet}
  try:
    with _unpacked(path) as file:
      yield from readers.get(name.suffix, _read_text)(file, path, name.stem, on_bad)
  except (EOFError, zlib.error, OSError) as error:
    if isinstance(error, OSError) and error.errno is not None:
      raise  # the file system's, not the format's
    raise InputError(f'{path}: damaged or cut short: {error}') from error


@contextmanager
def _unpacked(path: epath.Path) -> Generator[Any]:
  """The file's bytes as a stream, without their compression."""
  with path.open('rb') as raw:
    if path.suffix == '.gz':
      with gzip.open(raw) as file:
        yield file
    elif path.suffix == '.zst':
      import io

      import pyarrow

      with io.BufferedReader(pyarrow.input_stream(raw, compression='zstd'), 1 << 20) as file:
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


def _read_text(file: Any, path: epath.Path, stem: str, on_bad: OnBad) -> Iterator[Document]:
  line, carried, empty = 1, b'', True
  while raw := file.read(PART_BYTES):
    empty = False
    if len(raw) == PART_BYTES:
      raw += file.readline(PART_BYTES)
    raw, carried = _whole_characters(carried + raw)
    try:
      text = _decode(raw, path, line)
      yield Document(text.removeprefix(BOM) if line == 1 else text, path.absolute().parent.name, f'{path}:{line}')
    except InputError as error:
      on_bad(error)
    line += raw.count(b'\n')
  if carried:
    on_bad(InputError(f'{path}:{line}: not UTF-8: the file ends within a character: convert the file to UTF-8'))
  elif empty:
    yield Document('', path.absolute().parent.name, f'{path}:1')


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


def _read_jsonl(file: Any, path: epath.Path, stem: str, on_bad: OnBad) -> Iterator[Document]:
  for number, raw in enumerate(file, 1):
    try:
      line = _decode(raw, path, number).removeprefix(BOM if number == 1 else '')
      document = _from_json(line, path, number, stem) if line.strip() else None
    except InputError as error:
      on_bad(error)
    else:
      if document:
        yield document


def _read_parquet(file: Any, path: epath.Path, stem: str, on_bad: OnBad) -> Iterator[Document]:
  import pyarrow
  import pyarrow.parquet

  with tempfile.SpooledTemporaryFile(IN_MEMORY) as whole:
    if path.suffix != '.parquet':  # Parquet is read from its end
      shutil.copyfileobj(file, whole)
      whole.seek(0)
      file = whole
    try:
      table = pyarrow.parquet.ParquetFile(file)
      there = table.schema_arrow.names
      if 'text' not in there:
        raise InputError(f'{path}: no column "text"; its columns are {", ".join(there)}')
      batches = table.iter_batches(256, columns=[name for name in ('text', 'source') if name in there])
      rows = (row for batch in batches for row in batch.to_pylist())
      for number, row in enumerate(rows, 1):
        try:
          document = _from_row({k: v for k, v in row.items() if v is not None}, path, number, stem)
        except InputError as error:
          on_bad(error)
        else:
          yield document
    except pyarrow.ArrowInvalid as error:
      raise InputError(f'{path}: not a Parquet file, or a damaged one: {str(error).splitlines()[0]}') from error


def _from_json(line: str, path: epath.Path, number: int, stem: str) -> Document:
  where = f'{path}:{number}'
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise InputError(f'{where}: not JSON: {error}') from error
  if not isinstance(row, dict):
    raise InputError(f'{where}: expected a JSON object with a string "text", found {type(row).__name__}')
  return _from_row(row, path, number, stem)


def _from_row(row: dict[str, Any], path: epath.Path, number: int, stem: str) -> Document:
  where = f'{path}:{number}'
  if not isinstance(text := row.get('text'), str):
    raise InputError(f'{where}: no string "text"; its keys are {", ".join(row) or "none"}')
  if not isinstance(source := row.get('source', stem), str):
    raise InputError(f'{where}: "source" must be a string, found {source!r}')
  if found := re.search('[\ud800-\udfff]', text):
    raise InputError(f'{where}: "text" has half of a surrogate pair at character {found.start()}, which is no text')
  return Document(text, source, where)


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
