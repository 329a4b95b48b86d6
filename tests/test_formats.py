"""Packed files, Parquet, long text and the quarantine: real files on disk, whole, damaged and cut short."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxlm import cli
from jaxlm.data import prepare, prepared, sources
from jaxlm.data import tokenizer as tok
from jaxlm.errors import InputError

TEXTS = ['Call me Ishmael.\nSome years ago', 'सभी मनुष्यों को गौरव', 'd\u2028é\r\n']
JSONL = ''.join(json.dumps({'text': text}) + '\n' for text in TEXTS).encode()


def zstd(data: bytes) -> bytes:
  return pa.compress(data, 'zstd', asbytes=True)


def parquet(path: Path, **columns: list) -> bytes:
  pq.write_table(pa.table(columns), path)
  return path.read_bytes()


PACK = {'': lambda data: data, '.gz': gzip.compress, '.zst': zstd}


@pytest.mark.parametrize('packed', PACK)
@pytest.mark.parametrize('kind', ['txt', 'jsonl', 'parquet'])
def test_every_format_plain_and_packed_gives_the_same_documents(tmp_path, kind, packed):
  data = {'txt': TEXTS[0].encode(), 'jsonl': JSONL}.get(kind) or parquet(tmp_path / 'plain', text=TEXTS)
  path = tmp_path / 'novels' / f'moby.{kind}{packed}'
  path.parent.mkdir()
  path.write_bytes(PACK[packed](data))
  texts, source = (TEXTS[:1], 'novels') if kind == 'txt' else (TEXTS, 'moby')
  found = list(sources.documents([str(path)]))
  assert found == [(text, source, f'{path}:{i}', source) for i, text in enumerate(texts, 1)]


def test_parquet_has_a_source_column_and_is_read_over_many_batches(tmp_path):
  path = tmp_path / 'a.parquet'
  texts = [f'document {i}' for i in range(1013)]
  parquet(path, text=texts, source=['web' if i % 2 else None for i in range(1013)], other=list(range(1013)))
  found = list(sources.documents([str(path)]))
  assert [d.text for d in found] == texts
  assert [d.source for d in found[:3]] == ['a', 'web', 'a'] and found[-1].where == f'{path}:1013'


def refused(path: Path) -> str:
  with pytest.raises(InputError) as info:
    list(sources.documents([str(path)]))
  assert str(info.value).startswith(str(path)) and '\n' not in str(info.value)
  return str(info.value)


def test_bad_parquet_is_named(tmp_path):
  parquet(tmp_path / 'columns.parquet', body=TEXTS)
  assert 'no column "text"; its columns are body' in refused(tmp_path / 'columns.parquet')
  parquet(tmp_path / 'null.parquet', text=['good', None])
  assert 'null.parquet:2: "text" must be a string, found null' in refused(tmp_path / 'null.parquet')
  parquet(tmp_path / 'type.parquet', text=[1, 2])
  assert 'type.parquet:1: "text" must be a string, found 1' in refused(tmp_path / 'type.parquet')
  (tmp_path / 'not.parquet').write_bytes(b'PAR1 no')
  assert 'not a Parquet file' in refused(tmp_path / 'not.parquet')


@pytest.mark.parametrize('packed', ['.gz', '.zst'])
def test_a_packed_file_cut_short_or_changed_is_named(tmp_path, packed):
  rng = random.Random(3)
  lines = ''.join(json.dumps({'text': ''.join(rng.choices('abcdefgh ', k=97))}) + '\n' for _ in range(997))
  whole = PACK[packed](lines.encode())
  damaged = {'cut': whole[: len(whole) // 2], 'tail': whole[:-1], 'other': b'not packed at all'}
  if packed == '.gz':  # what pyarrow packs with zstd carries no checksum, so that only the format itself could tell
    damaged['flipped'] = whole[:4000] + bytes([whole[4000] ^ 255]) + whole[4001:]
  for name, data in damaged.items():
    path = tmp_path / f'{name}.jsonl{packed}'
    path.write_bytes(data)
    refused(path)


@pytest.mark.parametrize('packed', ['.gz', '.zst'])
def test_damage_is_told_with_the_last_line_that_was_whole(tmp_path, packed):
  rng = random.Random(3)
  texts = [''.join(rng.choices('abcdefgh ', k=97)) for _ in range(9973)]
  whole = PACK[packed](''.join(json.dumps({'text': text}) + '\n' for text in texts).encode())
  path = tmp_path / f'a.jsonl{packed}'
  path.write_bytes(whole[: len(whole) // 2])
  read, found = [], sources.documents([str(path)])
  with pytest.raises(InputError, match='damaged or cut short after this record') as info:
    read.extend(iter(lambda: next(found), None))
  assert read and [d.text for d in read] == texts[: len(read)]
  assert str(info.value).startswith(f'{path}:{len(read)}: ')


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.txt.zst', 'a.parquet.gz'])
def test_a_packed_file_of_no_bytes_is_damaged(tmp_path, name):
  (tmp_path / name).touch()
  assert 'damaged or cut short: a packed file has more than 0 bytes' in refused(tmp_path / name)


def test_damaged_parquet_is_told_with_its_row(tmp_path):
  rng = random.Random(5)
  path = tmp_path / 'a.parquet'
  table = pa.table({'text': [''.join(rng.choices('abcdefgh ', k=97)) for _ in range(1009)]})
  pq.write_table(table, path, row_group_size=256, compression='zstd', use_dictionary=False)
  raw = path.read_bytes()
  path.write_bytes(raw[: len(raw) // 2] + bytes(1000) + raw[len(raw) // 2 + 1000 :])
  read, found = [], sources.documents([str(path)])
  with pytest.raises(InputError, match='damaged or cut short after this record') as info:
    read.extend(iter(lambda: next(found), None))
  assert 256 <= len(read) < 1009 and str(info.value).startswith(f'{path}:{len(read)}: ')


def test_parquet_text_that_is_no_utf8_is_one_bad_row(tmp_path):
  texts = ['good text', 'caf\xe9 latin', 'नमस्ते']
  raw = pa.array([texts[0].encode(), texts[1].encode('latin-1'), texts[2].encode()], pa.binary())
  column = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
  large = pa.array(raw.to_pylist(), pa.large_binary()).view(pa.large_string())
  for name, values in {'plain': column, 'dictionary': column.dictionary_encode(), 'large': large}.items():
    path = tmp_path / f'{name}.parquet'
    pq.write_table(pa.table({'text': values, 'source': ['a', None, 'b']}), path)
    bad: list[InputError] = []
    found = list(sources.read(sources.files([str(path)])[0], bad.append))
    assert [(d.text, d.source) for d in found] == [(texts[0], 'a'), (texts[2], 'b')]
    assert len(bad) == 1 and str(bad[0]).startswith(f'{path}:2: not UTF-8: byte 4 of the line is 0xe9')


@pytest.mark.parametrize('packed', ['', '.gz'])
def test_a_long_text_file_is_read_in_parts_that_join_to_it(tmp_path, monkeypatch, packed):
  monkeypatch.setattr(sources, 'PART_BYTES', 11)
  text = 'नमस्ते दुनिया\nx\n\nCall me 𝒳𝒴𝒵 Ishmael. Some years ago\nnever mind'
  path = tmp_path / f'a.txt{packed}'
  for cut in range(len(text)):
    path.write_bytes(PACK[packed](text[: cut + 1].encode()))
    parts = list(sources.documents([str(path)])) if text[: cut + 1].strip() else []
    assert ''.join(part.text for part in parts) in (text[: cut + 1], '')
  assert len(parts) > 3
  lines = [int(part.where.rsplit(':', 1)[1]) for part in parts]
  before = [text[: text.index(part.text)].count('\n') + 1 for part in parts]
  assert lines == before
  path.write_bytes(PACK[packed](text.encode() + b'\n' + 'क'.encode()[:2]))
  assert ':6: not UTF-8' in refused(path)


@pytest.fixture(scope='module')
def t() -> tok.Tokenizer:
  return tok.train(TEXTS, 300)


def test_bad_records_go_to_a_quarantine_up_to_a_limit(tmp_path, t):
  bad = [b'{"text": 3}\n', b'{"text": "\xff"}\n', b'{"cut\n']
  path = tmp_path / 'a.jsonl'
  path.write_bytes(JSONL + b''.join(bad) + b'{"text": "last"}\n')
  out = tmp_path / 'out'
  with pytest.raises(InputError, match='^3 bad records are more than max_bad=2; the last is .*a.jsonl:6: not JSON'):
    prepare.prepare([str(path)], t, out, val_fraction=0, max_bad=2)
  with pytest.raises(InputError, match='interrupted'):
    prepared.load(out)
  summary = prepare.prepare([str(path)], t, out, val_fraction=0, max_bad=3)
  assert summary.dropped == {'duplicate': {}, 'empty': {}, 'bad': {'a': 3}}
  assert summary.read() == {'a': {'read': 7, 'duplicate': 0, 'empty': 0, 'bad': 3, 'kept': 4}}
  rows = [json.loads(line)['why'] for line in (out / prepare.QUARANTINE).read_text().splitlines()]
  assert [row[: len(f'{path}:4')] for row in rows] == [f'{path}:{n}' for n in (4, 5, 6)]
  assert list(prepared.load(out).texts('train')) == [*TEXTS, 'last']

  path.write_bytes(JSONL + b'{}\n')
  with pytest.raises(InputError, match='a.jsonl:4: no "text"'):  # the limit is 0 where none is given
    prepare.prepare([str(path)], t, out, val_fraction=0)
  assert list(prepared.load(out).texts('train')) == [*TEXTS, 'last']
  path.write_bytes(JSONL)
  prepare.prepare([str(path)], t, out, val_fraction=0)
  assert not (out / prepare.QUARANTINE).exists()


def test_prepare_says_where_the_bad_records_are_listed(tmp_path, t, capsys):
  t.save(tmp_path / 'tokenizer.json')
  (tmp_path / 'a.jsonl').write_bytes(JSONL + b'{}\n')
  args = ['prepare', f'{tmp_path}/a.jsonl', '--tokenizer', f'{tmp_path}/tokenizer.json', '--out', f'{tmp_path}/out']
  assert cli.main([*args, '--val-fraction', '0']) == 1
  assert 'a.jsonl:4: no "text"; it is empty' in capsys.readouterr().err
  assert cli.main([*args, '--val-fraction', '0', '--max-bad', '1']) == 0
  out = capsys.readouterr().out
  assert f'{tmp_path}/out/quarantine.jsonl' in out
  cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in out.splitlines()]
  assert cells[0] == ['kind', 'read', 'duplicate', 'empty', 'bad', 'kept']
  assert cells[2] == ['a', '4', '0', '0', '1', '3'] and cells[3] == ['all', *cells[2][1:]]

  args = ['tokenizer', f'{tmp_path}/a.jsonl', '--out', f'{tmp_path}/new.json', '--vocab-size', '300']
  assert cli.main(args) == 1
  assert 'a.jsonl:4: no "text"' in capsys.readouterr().err
  assert cli.main([*args, '--max-bad', '1']) == 0
  assert 'left out: 1 bad records' in capsys.readouterr().out
  assert cli.main([*args, '--max-bad', '-1']) == 1
  assert 'max_bad=-1 must be at least 0' in capsys.readouterr().err
