"""Where text comes from: files, folders and globs of plain UTF-8 text and JSONL, read as a stream of documents."""

import json
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from etils import epath

from jaxlm.errors import InputError

BOM = '\ufeff'


class Document(NamedTuple):
  """One text, the kind of text it is counted under, and where it stands ('file:line')."""

  text: str
  source: str
  where: str


def documents(specs: Sequence[str]) -> Iterator[Document]:
  """All documents of `specs`, one after another: the specs in their order, the files of each sorted.

  A spec is a file, a folder (its files at any depth, without hidden ones) or a glob (`**` too). `.jsonl` holds one
  object a line with a string `text` and, if wanted, a string `source` (else the file's name without ending); blank
  lines are skipped. Anything else is UTF-8 text, one document a file, whose source is the name of its folder.

  Raises InputError, naming file and line: no file matches, invalid UTF-8, a JSONL line of the wrong shape, no text.
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


def read(path: epath.Path) -> Iterator[Document]:
  """The documents of one file; see `documents`."""
  if path.suffix == '.jsonl':
    yield from _read_jsonl(path)
  else:
    text = _decode(path.read_bytes(), path, 1)
    yield Document(text.removeprefix(BOM), path.absolute().parent.name, f'{path}:1')


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


def _read_jsonl(path: epath.Path) -> Iterator[Document]:
  with path.open('rb') as lines:
    for number, raw in enumerate(lines, 1):
      line = _decode(raw, path, number).removeprefix(BOM if number == 1 else '')
      if line.strip():
        yield _from_json(line, path, number)


def _from_json(line: str, path: epath.Path, number: int) -> Document:
  where = f'{path}:{number}'
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise InputError(f'{where}: not JSON: {error}') from error
  if not isinstance(row, dict):
    raise InputError(f'{where}: expected a JSON object with a string "text", found {type(row).__name__}')
  if not isinstance(text := row.get('text'), str):
    raise InputError(f'{where}: no string "text"; its keys are {", ".join(row) or "none"}')
  if not isinstance(source := row.get('source', path.stem), str):
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
