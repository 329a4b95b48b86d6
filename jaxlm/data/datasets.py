"""Data sets by name: those of TFDS, read without TensorFlow, and those of the Hugging Face hub, as files."""

import fnmatch
import importlib
import os
import re
import socket
import struct
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxlm.errors import InputError

TFDS, HUB = 'tfds:', 'hf://'
LEGACY = ('question_answering', 'structured', 'summarization', 'text', 'translate')  # TFDS knows them once imported
BATCH_BYTES = 4 << 20  # of records in memory, about: their mean length is known, not their lengths
MASK_DELTA = 0xA282EAD8  # of the TFRecord format
ENDINGS = tuple(kind + packed for kind in ('.jsonl', '.parquet', '.txt') for packed in ('', '.gz', '.zst'))
CARDS = ('readme', 'license', 'licence', 'copying', 'notice', 'citation', 'dataset_card', 'datacard', 'changelog')

OnBad = Callable[[InputError], None]


class Tfds(NamedTuple):
  """A parsed `tfds:` spec; `column` is None where the data set's own choice is meant."""

  name: str
  split: str
  column: str | None


class Hub(NamedTuple):
  """A parsed `hf://` spec."""

  repo: str
  revision: str | None
  glob: str

  @property
  def name(self) -> str:
    return self.repo.split('/')[1]


class _Shard(NamedTuple):
  path: epath.Path
  form: str  # 'array_record', 'parquet', 'tfrecord'
  records: int
  features: Any


# a name or a path, a version after ':' belonging to the name; a slice in brackets may hold ':' itself
_TFDS_SPEC = re.compile(
  r'(?P<name>(?:[a-z0-9]+://)?[^:]+?(?::(?:\d+|\*)(?:\.(?:\d+|\*)){2})?)'
  r'(?::(?P<split>[^:\[\]]*(?:\[[^\]]*\][^:\[\]]*)*)(?::(?P<column>.+))?)?'
)
_HUB_SPEC = re.compile(
  r'(?:datasets/)?(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<glob>.*))?'
)


def parse_tfds(spec: str) -> Tfds:
  """The parts of `tfds:NAME[:split[:column]]`; NAME is as TFDS takes it (`c4/en:3.1.0`), or a prepared folder."""
  found = _TFDS_SPEC.fullmatch(spec.removeprefix(TFDS))
  if not found:
    raise InputError(f'{spec}: expected tfds:NAME[:split[:column]], as in tfds:wikipedia/20230601.en:train:text')
  return Tfds(found['name'], found['split'] or 'train', found['column'])


def parse_hub(spec: str) -> Hub:
  """The parts of `hf://datasets/ORG/NAME[@REVISION][/GLOB]`."""
  found = _HUB_SPEC.fullmatch(spec.removeprefix(HUB))
  if not found:
    raise InputError(
      f'{spec}: expected hf://datasets/ORG/NAME[@REVISION][/GLOB], as in hf://datasets/ORG/NAME/en/*.jsonl'
    )
  revision = found['revision'] and urllib.parse.unquote(found['revision'])
  return Hub(found['repo'], revision, (found['glob'] or '').strip('/'))


def shards(spec: str, text: bool = True) -> list[epath.Path]:
  """The files of the data set, split and slice that a `tfds:` spec names, in their order; each goes to `read_shard`.

  Without `text` to `read_rows`, and no column has to be the text.

  A folder, or a name that is already prepared below TFDS_DATA_DIR (else TFDS's own default), is taken as it lies; any
  other name is downloaded and prepared there by TFDS, in array_record. A slice is of whole files (`train[:2shard]`).
  Raises InputError for an unknown name, split or column, a slice through a file, no records, a file that is missing.
  """
  wanted = parse_tfds(spec)
  info = _builder(wanted.name, spec).info
  if text:
    _column(info.features, wanted.column, spec)
  whole = 'give whole files, as in train[:2shard]'
  try:
    parts = info.splits[wanted.split].file_instructions
  except Exception as error:  # TFDS raises what it likes for a split it does not understand
    known = ', '.join(f'{name} ({split.num_shards} files)' for name, split in info.splits.items()) or 'none'
    raise InputError(f'{spec}: no split {wanted.split!r}; its splits are {known}; of a slice {whole}') from error
  for part in parts:
    if part.skip or part.take not in (-1, part.examples_in_shard):
      raise InputError(f'{spec}: the slice ends inside {epath.Path(part.filename).name}: {whole}')
  if not parts:
    raise InputError(f'{spec}: no records in {wanted.split!r}')
  paths = [epath.Path(part.filename) for part in parts]
  for path in paths:
    if not path.exists():
      raise InputError(f'{path}: this file of {spec} is missing: copy or prepare the data set again')
  return paths


def read_shard(path: epath.Path, column: str | None, on_bad: OnBad) -> Iterator[tuple[str, str]]:
  """(text, 'file:record', counted from 1) of each record of one file of `shards`; memory does not grow with the file.

  The text is the feature `column` (nested ones as 'a/b'), else `text`, else the only string feature. `on_bad` gets the
  error of a record without that text or whose text is not UTF-8, which is then left out. Raises InputError, naming
  file and record, where a file is damaged or holds another number of records than TFDS wrote.
  """
  from tensorflow_datasets.core.example_parser import ExampleParserNp

  shard = _shard(path)
  name = _column(shard.features, column, str(path))
  parse = ExampleParserNp(_only(shard.features, name).get_serialized_info()).parse_example
  file = str(path)
  for number, record in _records(shard):
    where = f'{file}:{number}'
    try:
      text = _text(parse, record, name, where)
    except InputError as error:
      on_bad(error)
    else:
      yield text, where


def read_rows(path: epath.Path, on_bad: OnBad) -> Iterator[tuple[int, dict[str, Any]]]:
  """(number from 1, all features by name) of each record of one file of `shards`: text, numbers, lists, dictionaries.

  A sequence of dictionaries is a list of them. Raises InputError as `read_shard` does.
  """
  shard = _shard(path)
  for number, record in _records(shard):
    try:
      row = _plain(shard.features.deserialize_example_np(record))
    except Exception as error:  # protobuf's and whatever TFDS makes of a record of another shape
      on_bad(InputError(f'{path}:{number}: this record cannot be read: {_line(error)}'))
    else:
      yield number, row


def _plain(value: Any) -> Any:
  """What TFDS decodes as Python's own types; a dictionary of equally long lists of it is a list of dictionaries."""
  if isinstance(value, dict):
    found = {name: _plain(one) for name, one in value.items()}
    return {
      name: [dict(zip(one, parts, strict=True)) for parts in zip(*one.values(), strict=True)]
      if isinstance(one, dict) and one and all(isinstance(part, list) for part in one.values())
      else one
      for name, one in found.items()
    }
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, np.ndarray | list | tuple):
    return [_plain(one) for one in value]
  return value.item() if isinstance(value, np.generic) else value


def _records(shard: _Shard) -> Iterator[tuple[int, bytes]]:
  """The records of a file, counted from 1. Raises InputError where there are others than TFDS wrote."""
  path, number = shard.path, 0
  batch = max(1, min(1024, BATCH_BYTES * shard.records // max(1, path.stat().length)))
  read = {'array_record': array_records, 'parquet': _parquet_records, 'tfrecord': _tf_records}[shard.form]
  for number, record in enumerate(read(path, batch), 1):
    yield number, record
  if number != shard.records:
    hint = "; TFDS's own Parquet writer loses records beyond a hundred a file" if shard.form == 'parquet' else ''
    raise InputError(
      f'{path}: {number} records, but dataset_info.json says {shard.records}: cut short, or of another version{hint}: '
      'copy or prepare the data set again'
    )


def hub_files(spec: str) -> list[epath.Path]:
  """The local files, sorted, of `hf://datasets/ORG/NAME[@REVISION][/GLOB]`, downloaded where the cache lacks them.

  GLOB is a file, a folder or a pattern whose `*` also crosses `/`. Without one, and in a folder, the files that end in
  .jsonl, .parquet or .txt (or those in .gz, .zst) are meant. READMEs and licences are data only where named in full.
  With HF_HUB_OFFLINE=1 only the cache is used. Raises InputError where the hub or the cache does not give them.
  """
  try:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects
  except ImportError as error:
    raise InputError(f"{spec}: reading from the hub needs huggingface_hub: pip install -e '.[hub]'") from error
  repo, revision, glob = parse_hub(spec)
  below = f'{glob}/' if glob else ''
  patterns = [glob] * bool(glob) + [f'{below}*{ending}' for ending in ENDINGS]
  try:
    folder = huggingface_hub.snapshot_download(repo, repo_type='dataset', revision=revision, allow_patterns=patterns)
  except Exception as error:  # of the hub, of its HTTP library, of the file system
    raise InputError(
      f'{spec}: not to be had: {_line(error)}: check name, revision, access and network (HF_HUB_OFFLINE=1: the cache)'
    ) from error
  root = epath.Path(folder)
  names = sorted(str(path.relative_to(root)) for path in _files_below(root))
  kept = [name for name in filter_repo_objects(names, allow_patterns=patterns) if name == glob or not _is_card(name)]
  if not kept:
    raise InputError(f'{spec}: no such file, and no file matches; there are {_few(names)}')
  return [root / name for name in kept]


def _builder(name: str, spec: str) -> Any:
  """The TFDS builder of a folder, or of a name: as it lies on disk, else prepared now."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import read_only_builder

  folder = epath.Path(name).expanduser()
  if re.match(r'[/.~]|[a-z0-9]+://', name) or (folder / 'dataset_info.json').exists():
    return _opened(folder)
  data_dir = os.environ.get('TFDS_DATA_DIR') or None
  try:
    return read_only_builder.builder_from_files(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError:
    return _opened(_prepared(name, data_dir, spec))
  except Exception as error:
    raise InputError(f'{spec}: TFDS cannot open it: {_line(error)}') from error


def _opened(folder: epath.Path) -> Any:
  import tensorflow_datasets as tfds

  if not (folder / 'dataset_info.json').exists():
    raise InputError(
      f'{folder}: no dataset_info.json in there: give the folder of one version, as in tfds:DATA_DIR/NAME/1.0.0'
    )
  try:
    return tfds.builder_from_directory(folder)
  except Exception as error:
    raise InputError(f'{folder}: not a data set that TFDS can open: {_line(error)}') from error


def _prepared(name: str, data_dir: str | None, spec: str) -> epath.Path:
  """Download and prepare `name`; returns its folder."""
  import tensorflow_datasets as tfds

  advice = 'prepare it where it can be had and give its folder, as in tfds:DATA_DIR/NAME/1.0.0'
  for package in LEGACY:
    importlib.import_module(f'tensorflow_datasets.{package}')
  try:
    build: Any = tfds.builder  # wrapped beyond what a type checker follows
    builder = build(name, file_format='array_record', data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    where = data_dir or tfds.core.constants.DATA_DIR
    raise InputError(f'{spec}: no data set {name!r}, neither in {where} nor known to TFDS: check the name') from error
  except Exception as error:
    raise InputError(
      f'{spec}: TFDS cannot build it: {_line(error)}: check name and configuration, or {advice}'
    ) from error
  downloads = epath.Path(builder.data_dir_root) / 'downloads' / builder.name
  if not (builder.MANUAL_DOWNLOAD_INSTRUCTIONS or any(_files_below(downloads)) or _network()):
    raise InputError(f'{spec}: not in {builder.data_dir_root}, and there is no network to download it: {advice}')
  try:
    builder.download_and_prepare()
  except Exception as error:  # whatever the data set's own code raises
    raise InputError(f'{spec}: TFDS could not prepare it: {_line(error)}: check the network, or {advice}') from error
  return epath.Path(builder.data_dir)


def _network() -> bool:
  """False only where no name resolves and no proxy is set: TFDS would try for minutes."""
  try:
    return bool(urllib.request.getproxies() or socket.getaddrinfo('storage.googleapis.com', 443))
  except OSError:
    return False


def _strings(features: Any, prefix: str = '') -> dict[str, Any]:
  """All single strings among the features; nested dictionaries as 'a/b', sequences left out."""
  import tensorflow_datasets as tfds

  found: dict[str, Any] = {}
  for name, feature in features.items():
    if isinstance(feature, tfds.features.FeaturesDict):
      found |= _strings(feature, f'{prefix}{name}/')
    elif isinstance(feature, tfds.features.Tensor) and not feature.shape and np.dtype(feature.np_dtype).kind in 'OSU':
      found[prefix + name] = feature
  return found


def _column(features: Any, column: str | None, where: str) -> str:
  """The name of the feature that holds the text."""
  strings = list(_strings(features)) if hasattr(features, 'items') else []
  if column in strings:
    return column
  if column is None and ('text' in strings or len(strings) == 1):
    return 'text' if 'text' in strings else strings[0]
  known = ', '.join(sorted(strings)) or f'none (its features are {", ".join(features)})'
  if column is not None:
    raise InputError(f'{where}: no string feature {column!r}; its string features are {known}')
  raise InputError(f'{where}: which feature is the text? Name one, as in tfds:NAME:train:COLUMN, of {known}')


def _only(features: Any, name: str) -> Any:
  """The features with nothing but `name`: parsing the others would cost time."""
  import tensorflow_datasets as tfds

  head, _, rest = name.partition('/')
  if name in features:  # a name may hold '/' itself
    return tfds.features.FeaturesDict({name: features[name]})
  return tfds.features.FeaturesDict({head: _only(features[head], rest)})


def _text(parse: Callable[[bytes], Any], record: bytes, name: str, where: str) -> str:
  try:
    value = parse(record)
    for key in [name] if name in value else name.split('/'):
      value = value[key]
  except Exception as error:  # protobuf's and whatever TFDS makes of a record of another shape
    raise InputError(f'{where}: no string {name!r} in this record: {_line(error)}') from error
  if not isinstance(value, bytes):
    raise InputError(f'{where}: no string {name!r} in this record, found {type(value).__name__}')
  try:
    return value.decode()
  except UnicodeDecodeError as error:
    raise InputError(f'{where}: {name!r} is not UTF-8: byte {error.start + 1} is 0x{value[error.start]:02x}') from error


def _shard(path: epath.Path) -> _Shard:
  """What TFDS knows of one file of a data set."""
  info = _opened(path.parent).info
  form = info.file_format.value if info.file_format else 'tfrecord'
  if form not in ('array_record', 'parquet', 'tfrecord'):
    raise InputError(f'{path}: the format {form} cannot be read without TensorFlow: prepare it in array_record')
  for split in info.splits.values():
    for part in split.file_instructions:
      if epath.Path(part.filename) == path:
        return _Shard(path, form, part.examples_in_shard, info.features)
  raise InputError(f'{path}: not a file of the data set in {path.parent}')


def array_records(path: epath.Path, batch: int) -> Iterator[bytes]:
  module = importlib.import_module('array_record.python.array_record_module')  # compiled, without types
  start = 0
  try:
    reader = module.ArrayRecordReader(os.fspath(path))
    total = reader.num_records()
    for start in range(0, total, batch):
      yield from reader.read(start, min(start + batch, total))
    reader.close()
  except (RuntimeError, ValueError, IndexError) as error:
    if batch > 1:
      yield from islice(array_records(path, 1), start, None)  # up to the very record, which raises
    raise _damaged(path, start + 1, _line(error)) from error


def _parquet_records(path: epath.Path, batch: int) -> Iterator[bytes]:
  import pyarrow
  import pyarrow.parquet

  number = 0
  try:
    with path.open('rb') as file:
      for rows in pyarrow.parquet.ParquetFile(file, page_checksum_verification=True).iter_batches(batch):
        for value in rows.column(0):
          number += 1
          yield value.as_py()
  except (pyarrow.ArrowInvalid, OSError) as error:
    if isinstance(error, OSError) and error.errno is not None:
      raise  # the file system's, not the format's
    raise _damaged(path, number + 1, _line(error)) from error


def _tf_records(path: epath.Path, batch: int) -> Iterator[bytes]:
  """The records of a TFRecord file: length (8), masked crc32c of it (4), the record, masked crc32c of it (4)."""
  import google_crc32c

  def masked(raw: bytes) -> int:
    crc = google_crc32c.value(raw)
    return ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF

  number = 0
  with path.open('rb') as file:
    while head := file.read(12):
      number += 1
      if len(head) < 12:
        raise _damaged(path, number, 'the file ends within it')
      size, check = struct.unpack('<QI', head)
      if masked(head[:8]) != check:
        raise _damaged(path, number, 'the checksum of its length is wrong')
      record, tail = file.read(size), file.read(4)
      if len(tail) < 4:
        raise _damaged(path, number, 'the file ends within it')
      if masked(record) != struct.unpack('<I', tail)[0]:
        raise _damaged(path, number, 'its checksum is wrong')
      yield record


def _damaged(path: epath.Path, number: int, what: str) -> InputError:
  return InputError(f'{path}:{number}: damaged or cut short: {what}: copy or prepare the data set again')


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
  for child in folder.iterdir() if folder.is_dir() else ():
    if child.is_dir():
      yield from _files_below(child)
    else:
      yield child


def _is_card(name: str) -> bool:
  last = PurePosixPath(name).name.lower()
  return any(fnmatch.fnmatchcase(last, f'{card}{end}') for card in CARDS for end in ('', '.*', '[-_]*'))


def _few(names: list[str]) -> str:
  return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '') if names else 'none'


def _line(error: Exception) -> str:
  """The first line of what a library says."""
  said = str(error).strip().splitlines()
  return f'{type(error).__name__}: {said[0][:300]}' if said else type(error).__name__
