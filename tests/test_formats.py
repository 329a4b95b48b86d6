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
  assert 'null.parquet:2: no string "text"' in refused(tmp_path / 'null.parquet')
  parquet(tmp_path / 'type.parquet', text=[1, 2])
  assert 'type.parquet:1: no string "text"' in refused(tmp_path / 'type.parquet')
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
  assert summary.dropped == {'duplicate': 0, 'empty': 0, 'bad': 3}
  rows = [json.loads(line)['why'] for line in (out / prepare.QUARANTINE).read_text().splitlines()]
  assert [row[: len(f'{path}:4')] for row in rows] == [f'{path}:{n}' for n in (4, 5, 6)]
  assert list(prepared.load(out).texts('train')) == [*TEXTS, 'last']

  path.write_bytes(JSONL + b'{}\n')
  with pytest.raises(InputError, match='a.jsonl:4: no string'):  # the limit is 0 where none is given
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
  assert 'a.jsonl:4: no string "text"' in capsys.readouterr().err
  assert cli.main([*args, '--val-fraction', '0', '--max-bad', '1']) == 0
  assert '1 bad' in (out := capsys.readouterr().out) and f'{tmp_path}/out/quarantine.jsonl' in out
