"""The container of GGUF files (versions 2 and 3): a header that is checked before it is believed, and rows of tensors.

Nothing is allocated for a count or a length that the file is too short for, so a damaged or hostile header costs no
more than its own bytes. Tensors are read and not mapped: pages of a mapped file would count as memory of the process.
"""

import struct
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jaxlm.errors import InputError

KINDS = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K')
STORED = {'F32': np.dtype('<f4'), 'F16': np.dtype('<f2'), 'BF16': np.dtype(ml_dtypes.bfloat16)}
NUMBERS = {0: 'u1', 1: 'i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4', 10: '<u8', 11: '<i8', 12: '<f8'}
BOOL, STRING, ARRAY = 7, 8, 9
HEADER_BYTES = 1 << 28  # bounds the memory of a hostile header, as STRINGS bounds the time
STRINGS = 1 << 21
NAME_BYTES = 256  # ggml itself takes 64
MAX_DIMS = 4
CHUNK = 1 << 17  # bytes dequantized at a time
AGAIN = 'download or convert it again'


class Entry(NamedTuple):
  """One tensor in the file."""

  shape: tuple[int, ...]  # the last axis is contiguous, as in numpy: the reverse of what GGUF writes
  kind: str  # 'F32', 'Q4_K', ...
  offset: int  # in bytes, from the start of the file

  @property
  def row_bytes(self) -> int:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
    return self.shape[-1] // block * size

  @property
  def rows(self) -> int:
    count = 1
    for n in self.shape[:-1]:
      count *= n  # Python's integers do not overflow
    return count


class GGUFFile(NamedTuple):
  """A header, and where the tensors are."""

  path: epath.Path
  metadata: dict[str, Any]  # numbers, bools, strings, lists of strings, numpy arrays of numbers
  tensors: dict[str, Entry]

  def read_rows(self, entry: Entry, first: int, count: int) -> np.ndarray:
    """Rows first ... first + count of a tensor as [count, width], in float32 or the float type they are stored in.

    Raises InputError if the file is shorter by now.
    """
    width, size = entry.shape[-1], entry.row_bytes
    out = np.empty((count, width), STORED.get(entry.kind, np.float32))
    step = max(1, CHUNK // size)
    with self.path.open('rb') as file:
      file.seek(entry.offset + first * size)
      for start in range(0, count, step):
        stop = min(start + step, count)
        raw = file.read((stop - start) * size)
        if len(raw) != (stop - start) * size:
          raise InputError(f'{self.path}: it became shorter while it was read; {AGAIN}')
        out[start:stop] = _floats(raw, entry.kind, stop - start, width)
    return out


def _floats(raw: bytes, kind: str, rows: int, width: int) -> np.ndarray:
  if kind in STORED:
    return np.frombuffer(raw, STORED[kind]).reshape(rows, width)
  with np.errstate(all='ignore'):  # a scale may be damaged: infinite is then what the file says
    # one long row: the library takes sixteen at a time, and its blocks know nothing of rows
    return dequantize(np.frombuffer(raw, np.uint8)[None], GGMLQuantizationType[kind]).reshape(rows, width)


def open_container(path: epath.PathLike) -> GGUFFile:
  """Reads and checks the header. Raises InputError, naming the file, if it is no whole, sound GGUF file."""
  path = epath.Path(path)
  try:
    size = path.stat().length
    with path.open('rb') as file:
      return _Header(file, int(size), str(path)).parse(path)
  except OSError as error:
    raise InputError(f'{path}: cannot be read: {error.strerror or error}') from error


def shown(value: Any) -> str:
  """A name or a value of the file's for a message: on one line and short."""
  text = ' '.join(repr(value).split())
  return text if len(text) <= 80 else f'{text[:77]}...'


class _Header:
  """A cursor that never reads past the end of the file."""

  def __init__(self, file: IO[Any], size: int, where: str):
    self.file, self.size, self.where = file, size, where
    self.at = self.strings = 0

  def fail(self, what: str, todo: str = AGAIN) -> InputError:
    return InputError(f'{self.where}: {what}; {todo}')

  def take(self, count: int) -> bytes:
    if count > self.size - self.at:
      raise self.fail(f'not a whole GGUF file: {count} bytes are due at byte {self.at}, of {self.size}')
    if self.at + count > HEADER_BYTES:
      raise self.fail(f'its header is longer than {HEADER_BYTES} bytes, which no model needs')
    data = self.file.read(count)
    if len(data) != count:
      raise self.fail(f'it became shorter while it was read: {len(data)} of {count} bytes at byte {self.at}')
    self.at += count
    return data

  def number(self, code: str) -> int:
    return struct.unpack(f'<{code}', self.take(struct.calcsize(f'<{code}')))[0]

  def count(self, least: int, what: str) -> int:
    """A number of things that need at least `least` bytes each."""
    value = self.number('Q')
    if value * least > self.size - self.at:
      raise self.fail(f'damaged: {value} {what} do not fit into its {self.size} bytes')
    return value

  def text(self, limit: int = HEADER_BYTES) -> str:
    self.strings += 1
    if self.strings > STRINGS:
      raise self.fail(f'its header has more than {STRINGS} strings, which no model needs')
    length = self.count(1, 'bytes of a string')
    if length > limit:
      raise self.fail(f'damaged: a name of {length} bytes at byte {self.at}')
    try:
      return self.take(length).decode()
    except UnicodeDecodeError as error:
      raise self.fail(f'damaged: a string at byte {self.at - length} is no UTF-8') from error

  def value(self, kind: int, key: str) -> Any:
    if kind == STRING:
      return self.text()
    if kind == BOOL:
      flag = self.number('B')
      if flag > 1:
        raise self.fail(f'damaged: {shown(key)} is neither true nor false')
      return bool(flag)
    if kind in NUMBERS:
      dtype = np.dtype(NUMBERS[kind])
      return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
    if kind == ARRAY:
      return self.array(self.number('I'), key)
    raise self.fail(f'damaged: {shown(key)} has the unknown type {kind}')

  def array(self, kind: int, key: str) -> Any:
    if kind == STRING:
      return [self.text() for _ in range(self.count(8, f'strings of {shown(key)}'))]
    if kind != BOOL and kind not in NUMBERS:
      raise self.fail(f'damaged: {shown(key)} is an array of the unknown type {kind}')
    dtype = np.dtype('u1' if kind == BOOL else NUMBERS[kind])
    values = np.frombuffer(self.take(dtype.itemsize * self.count(dtype.itemsize, f'values of {shown(key)}')), dtype)
    return values.astype(bool) if kind == BOOL else values

  def named(self, count: int, what: str, read: Callable[[str], Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(count):
      name = self.text(NAME_BYTES)
      if name in found:
        raise self.fail(f'damaged: two {what} are called {shown(name)}')
      found[name] = read(name)
    return found

  def entry(self, name: str) -> Entry:
    dims = self.number('I')
    if not 1 <= dims <= MAX_DIMS:
      raise self.fail(f'damaged: tensor {shown(name)} has {dims} dimensions')
    shape = struct.unpack(f'<{dims}Q', self.take(8 * dims))[::-1]
    code, offset = self.number('I'), self.number('Q')
    known = code in GGMLQuantizationType._value2member_map_
    kind = GGMLQuantizationType(code).name if known else f'type {code}'
    if kind not in KINDS:
      raise self.fail(f'tensor {shown(name)} is stored as {kind}, which is not read', f'take one of {", ".join(KINDS)}')
    block = GGML_QUANT_SIZES[GGMLQuantizationType(code)][0]
    if min(shape) < 1 or shape[-1] % block:
      raise self.fail(f'damaged: tensor {shown(name)} has shape {shape}, stored as {kind} in blocks of {block}')
    return Entry(shape, kind, offset)

  def parse(self, path: epath.Path) -> GGUFFile:
    if self.size < 4 or self.take(4) != b'GGUF':
      raise self.fail('not a GGUF file: it does not begin with GGUF', 'give a .gguf file')
    version = self.number('I')
    if version and version % (1 << 16) == 0:
      raise self.fail('a big-endian GGUF file', "convert it with gguf's gguf-convert-endian")
    if version not in (2, 3):
      raise self.fail(f'GGUF version {version} is not read, 2 and 3 are', 'convert the model again')
    tensor_count = self.count(32, 'tensors')
    metadata = self.named(self.count(13, 'keys'), 'keys', lambda key: self.value(self.number('I'), key))
    tensors = self.named(tensor_count, 'tensors', self.entry)
    align = metadata.get('general.alignment', 32)
    if type(align) is not int or not 0 < align <= 1 << 20 or align & (align - 1):
      raise self.fail(f'damaged: general.alignment is {align!r}, not a power of two')
    start = -(-self.at // align) * align
    tensors = {name: entry._replace(offset=start + entry.offset) for name, entry in tensors.items()}
    self.check_places(tensors, start, align)
    return GGUFFile(path, metadata, tensors)

  def check_places(self, tensors: dict[str, Entry], start: int, align: int) -> None:
    end, before = start, ''
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].offset):
      if (entry.offset - start) % align:
        raise self.fail(f'damaged: tensor {shown(name)} does not begin at a multiple of {align} bytes')
      if entry.offset < end:
        raise self.fail(f'damaged: tensors {shown(before)} and {shown(name)} overlap')
      end, before = entry.offset + entry.rows * entry.row_bytes, name
      if end > self.size:
        raise self.fail(f'not a whole GGUF file: tensor {shown(name)} ends at byte {end}, of {self.size}')
