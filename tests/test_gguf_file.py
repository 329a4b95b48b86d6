"""Damaged and hostile GGUF files are refused at once, in one line that names them, within bounded memory."""

import hashlib
import os
import random
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf_files import V, small
from tokenizers import pre_tokenizers

from jaxlm.errors import InputError
from jaxlm.interop import gguf_file
from jaxlm.interop.gguf import open_file


def string(text: bytes) -> bytes:
  return struct.pack('<Q', len(text)) + text


def tensor(name: bytes = b't', dims: tuple[int, ...] = (2, 2), kind: int = 0, offset: int = 0) -> bytes:
  return string(name) + struct.pack(f'<I{len(dims)}QIQ', len(dims), *dims, kind, offset)


def container(keys: list[bytes] = (), tensors: list[bytes] = (), data: int = 64, version=3, counts=None) -> bytes:
  n_tensors, n_keys = counts or (len(tensors), len(keys))
  header = struct.pack('<4sIQQ', b'GGUF', version, n_tensors, n_keys) + b''.join(keys) + b''.join(tensors)
  return header + bytes(-len(header) % 32) + bytes(data)


HUGE = 1 << 63
A_KEY = string(b'a') + struct.pack('<IB', 0, 1)
HOSTILE = {
  'empty': (b'', 'does not begin with GGUF'),
  'wrong magic': (b'GGML' + container()[4:], 'does not begin with GGUF'),
  'version 1': (container(version=1), 'version 1 is not read'),
  'version 4': (container(version=4), 'version 4 is not read'),
  'big-endian': (container(version=3 << 24), 'big-endian'),
  'tensor count of 2^63': (container(counts=(HUGE, 0)), f'{HUGE} tensors do not fit'),
  'key count of 2^63': (container(counts=(0, HUGE)), f'{HUGE} keys do not fit'),
  'key count of 1000': (container(counts=(0, 1000)), '1000 keys do not fit'),
  'a key of 2^63 bytes': (container([struct.pack('<Q', HUGE)]), f'{HUGE} bytes of a string do not fit'),
  'a long key': (container([string(b'x' * 5000) + b'\0' * 5]), 'a name of 5000 bytes'),
  'a text of 2^40 bytes': (container([string(b'a') + struct.pack('<IQ', 8, 1 << 40)]), 'do not fit'),
  'an array of 2^63': (container([string(b'a') + struct.pack('<IIQ', 9, 5, HUGE)]), f'{HUGE} values of .a. do not fit'),
  'strings of 2^61': (container([string(b'a') + struct.pack('<IIQ', 9, 8, 1 << 61)]), 'strings of .a. do not fit'),
  'nested arrays': (container([string(b'a') + struct.pack('<IIQ', 9, 9, 1)]), 'array of the unknown type 9'),
  'unknown type': (container([string(b'a') + struct.pack('<IQ', 77, 1)]), 'unknown type 77'),
  'neither true nor false': (container([string(b'a') + struct.pack('<IB', 7, 2)]), 'neither true nor false'),
  'no UTF-8': (container([string(b'\xff\xfe') + struct.pack('<IB', 0, 1)]), 'no UTF-8'),
  'a key twice': (container([A_KEY, A_KEY]), 'two keys are called .a.'),
  'a tensor twice': (container(tensors=[tensor(), tensor(offset=32)]), 'two tensors are called .t.'),
  'overlapping': (container(tensors=[tensor(dims=(4, 4)), tensor(b'u', offset=32)]), 'overlap'),
  'the same place': (container(tensors=[tensor(), tensor(b'u')]), 'overlap'),
  'beyond the end': (container(tensors=[tensor(dims=(17,))]), 'not a whole GGUF file: tensor .t. ends'),
  'offset beyond': (container(tensors=[tensor(offset=1 << 40)]), 'not a whole GGUF file: tensor .t. ends'),
  'offset of 2^64 - 32': (container(tensors=[tensor(offset=(1 << 64) - 32)]), 'not a whole GGUF file'),
  'unaligned': (container(tensors=[tensor(offset=4)]), 'multiple of 32'),
  'a product of 2^64': (container(tensors=[tensor(dims=(1 << 32, 1 << 32))]), 'not a whole GGUF file'),
  'a product of 2^248': (container(tensors=[tensor(dims=(1 << 62,) * 4)]), 'not a whole GGUF file'),
  'a dimension of 0': (container(tensors=[tensor(dims=(0, 3))]), 'has shape'),
  'no dimension': (container(tensors=[tensor(dims=())]), 'has 0 dimensions'),
  '2^31 dimensions': (container(tensors=[string(b't') + struct.pack('<IQQ', 1 << 31, 1, 1)]), 'dimensions'),
  'half a block': (container(tensors=[tensor(dims=(33, 2), kind=8)]), 'blocks of 32'),
  'kind 99': (container(tensors=[tensor(kind=99)]), 'stored as type 99'),
  'alignment 0': (
    container([string(b'general.alignment') + struct.pack('<II', 4, 0)]),
    'general.alignment is 0, not a power of two',
  ),
  'alignment as text': (
    container([string(b'general.alignment') + struct.pack('<I', 8) + string(b'32')]),
    'general.alignment is',
  ),
  'no keys at all': (container(), 'architecture None is not supported'),
  'architecture of numbers': (
    container([string(b'general.architecture') + struct.pack('<IIQII', 9, 4, 2, 1, 1)]),
    'general.architecture is',
  ),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_files_are_refused_quickly_within_bounded_memory(tmp_path, name):
  data, message = HOSTILE[name]
  path = tmp_path / 'a.gguf'
  path.write_bytes(data)
  tracemalloc.start()
  began = time.perf_counter()
  try:
    with pytest.raises(InputError, match=message) as caught:
      open_file(path)
    took, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert took < 1 and peak < 1 << 20
  assert str(caught.value).startswith(f'{path}: ') and '\n' not in str(caught.value)


def test_a_huge_sparse_file_costs_no_more(tmp_path):
  """The counts fit into a file of 8 GB: what is read before it is refused is bounded all the same."""
  path = tmp_path / 'a.gguf'
  path.write_bytes(container([string(b'a') + struct.pack('<IIQ', 9, 5, 1 << 30)]))
  os.truncate(path, 1 << 33)
  tracemalloc.start()
  try:
    with pytest.raises(InputError, match='its header is longer than'):
      open_file(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
  finally:
    tracemalloc.stop()


def test_what_is_no_file_is_named(tmp_path):
  for path in (tmp_path / 'none.gguf', tmp_path):
    with pytest.raises(InputError, match='cannot be read'):
      open_file(path)


def test_a_file_that_became_shorter_is_named(tmp_path):
  path = small(tmp_path / 'a.gguf')
  opened = open_file(path)
  os.truncate(path, path.stat().st_size // 2)
  with pytest.raises(InputError, match='became shorter'):
    for name in opened.shapes:
      np.asarray(opened.read(name))


def with_tokenizer(path: Path) -> tuple[Path, int]:
  """A small whole file with a tokenizer, and the size of its header."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: V - 2]
  tokens = ['<s>', '</s>', *letters]
  more = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'gpt-2',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': [3, 3] + [1] * (len(tokens) - 2),
    'tokenizer.ggml.merges': [],
    'tokenizer.ggml.bos_token_id': 0,
    'tokenizer.ggml.eos_token_id': 1,
    'tokenizer.chat_template': '{{ messages }}',
  }
  more = {k: v for k, v in more.items() if v != []}
  small(path, more=more)
  return path, min(entry.offset for entry in gguf_file.open_container(path).tensors.values())


def contents(path: Path):
  """All that a file gives; a tensor's bytes stand for it."""
  opened = open_file(path)
  tensors = {}
  for name, shape in opened.shapes.items():
    value = np.asarray(opened.read(name))
    assert value.shape == shape and value.dtype in (np.float32, *gguf_file.STORED.values())
    tensors[name] = hashlib.sha256(value.tobytes()).digest()
  digest = opened.tokenizer and opened.tokenizer.digest
  return opened.config, tensors, digest, opened.chat_template, opened.generation


def test_a_file_cut_anywhere_is_refused(tmp_path):
  path, header = with_tokenizer(tmp_path / 'a.gguf')
  whole, size = path.read_bytes(), path.stat().st_size
  end = max(e.offset + e.rows * e.row_bytes for e in gguf_file.open_container(path).tensors.values())
  cut = tmp_path / 'cut.gguf'
  cut.write_bytes(whole)
  for length in [*range(size - 1, end - 9, -1), *range(end - 9, header, -997), *range(header, -1, -1)]:
    os.truncate(cut, length)
    began = time.perf_counter()
    if length >= end:  # what fills up the last tensor's alignment holds nothing
      assert contents(cut) == contents(path)
    else:
      with pytest.raises(InputError, match='not a whole GGUF file|do not fit|does not begin') as caught:
        open_file(cut)
      assert str(caught.value).startswith(f'{cut}: ') and '\n' not in str(caught.value)
    assert time.perf_counter() - began < 1


def test_flipped_bytes_of_the_header_raise_nothing_else(tmp_path):
  """A header has no checksum, so another number may be a sound file: then all of it must be there to read."""
  path, header = with_tokenizer(tmp_path / 'a.gguf')
  whole, rng, flipped = path.read_bytes(), random.Random(11), tmp_path / 'flipped.gguf'
  flipped.write_bytes(whole)
  refused = 0
  for _ in range(1500):
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8))):
      data[rng.randrange(header)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    with flipped.open('r+b') as file:  # in place: much faster than a new file
      file.write(data[:header])
    began = time.perf_counter()
    try:
      contents(flipped)
    except InputError as error:
      refused += 1
      assert str(error).startswith(f'{flipped}: ') and '\n' not in str(error)
    assert time.perf_counter() - began < 1
  assert refused > 500
