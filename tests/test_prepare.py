"""Preparation: every byte comes back, splits are stable, an unfinished folder is never taken for a finished one."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm import cli, files
from jaxlm.data import prepared, records
from jaxlm.data import tokenizer as tok
from jaxlm.data.prepare import prepare
from jaxlm.data.prepared import load
from jaxlm.errors import InputError

TEXTS = [f'Document {i}: the whale\n' * (1 + i % 7) + 'नमस्ते' * (i % 3) for i in range(60)]


@pytest.fixture(scope='module')
def t() -> tok.Tokenizer:
  return tok.train(TEXTS, 300)


def jsonl(path: Path, texts: list[str], **columns: str) -> str:
  """A file old enough for its time to be trusted."""
  path.write_text(''.join(json.dumps({'text': text, **columns}) + '\n' for text in texts))
  os.utime(path, (time.time() - 100,) * 2)
  return str(path)


def in_validation(text: str, fraction: float) -> bool:
  return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < fraction


def snapshot(folder: Path) -> dict[str, int]:
  return {str(p): p.stat().st_mtime_ns for p in folder.rglob('*') if p.is_file()}


def test_documents_come_back_in_order_in_their_split(tmp_path, t):
  summary = prepare([jsonl(tmp_path / 'a.jsonl', TEXTS)], t, tmp_path / 'out', val_fraction=0.3)
  ready = load(tmp_path / 'out')
  held_out = [text for text in TEXTS if in_validation(text, 0.3)]
  assert 5 < len(held_out) < 35
  assert list(ready.texts('validation')) == held_out
  assert list(ready.texts('train')) == [text for text in TEXTS if text not in held_out]
  assert ready.document_bytes('validation') == ''.join(held_out).encode()
  assert ready.summary == summary
  assert ready.tokenizer.digest == t.digest
  assert ready.split('validation').bytes == len(''.join(held_out).encode())


def test_tokens_are_bos_text_eos_and_any_window_reads_the_same(tmp_path, t, monkeypatch):
  monkeypatch.setattr(records, 'RECORD_TOKENS', 13)
  prepare([jsonl(tmp_path / 'a.jsonl', TEXTS)], t, tmp_path / 'out', val_fraction=0)
  tokens = load(tmp_path / 'out').split('train')
  expected = [np.array([t.bos_id, *t.encode(text), t.eos_id]) for text in TEXTS]
  stream = np.concatenate(expected)
  begins = np.concatenate([np.arange(len(ids)) == 0 for ids in expected])
  assert len(tokens) == len(stream)
  for start, stop in [(0, len(stream)), (12, 14), (13, 26), (5, 101), (len(stream) - 3, len(stream) + 9), (7, 7)]:
    got, got_begins = tokens.read(start, stop)
    assert (got.dtype, got_begins.dtype) == (np.int32, np.bool_)
    np.testing.assert_array_equal(got, stream[start:stop])
    np.testing.assert_array_equal(got_begins, begins[start:stop])


def test_it_is_a_tfds_data_set_without_tensorflow(tmp_path, t):
  import tensorflow_datasets as tfds

  source = jsonl(tmp_path / 'a.jsonl', TEXTS, source='sea')
  prepare([source], t, tmp_path / 'out', val_fraction=0)
  record = tfds.builder_from_directory(tmp_path / 'out' / 'records').as_data_source(split='train')[7]
  assert record['document'] == 7
  assert record['source'] == b'sea'
  assert np.frombuffer(record['tokens'], '<u2').tolist() == [t.bos_id, *t.encode(TEXTS[7]), t.eos_id]
  assert 'tensorflow' not in sys.modules


def test_records_are_the_same_bytes_in_every_process(tmp_path, t):
  """A map of protobuf has another order in each, unless it is asked for."""
  from array_record.python.array_record_module import ArrayRecordReader

  source = jsonl(tmp_path / 'a.jsonl', TEXTS, source='sea')
  prepare([source], t, tmp_path / 'out', val_fraction=0)
  raw = ArrayRecordReader(str(tmp_path / 'out' / 'records' / 'tokens-train.array_record-00000')).read([7])[0]
  names = [b'\x08document\x12', b'\x04kind\x12', b'\x06source\x12', b'\x06tokens\x12']
  assert [raw.count(name) for name in names] == [1] * 4 and sorted(names, key=raw.index) == names


def test_a_long_document_is_cut_without_loss(tmp_path, t, monkeypatch):
  monkeypatch.setattr(records, 'PIECE_CHARS', 50)
  monkeypatch.setattr(records, 'GROUP_CHARS', 120)
  monkeypatch.setattr(records, 'RECORD_TOKENS', 7)
  texts = ['line one\n\n' * 40 + 'no break ' * 40 + 'x' * 333 + '\n', 'é', 'नमस्ते' * 100]
  summary = prepare([jsonl(tmp_path / 'a.jsonl', texts)], t, tmp_path / 'out', val_fraction=0)
  ready = load(tmp_path / 'out')
  assert list(ready.texts('train')) == texts
  ids, begins = ready.split('train').read(0, 1 << 30)
  assert begins.sum() == (ids == t.bos_id).sum() == (ids == t.eos_id).sum() == 3
  assert summary.splits['train'] == prepared.Count(3, len(ids), len(''.join(texts).encode()))


def test_no_piece_costs_the_tokenizer_more_than_a_megabyte(tmp_path, t):
  class Weighed(tok.Tokenizer):
    def encode_batch(self, texts):
      sizes.extend(len(text.encode()) for text in texts)
      return super().encode_batch(texts)

  sizes: list[int] = []
  texts = [('नमस्ते दुनिया ' * 9 + '\n') * 5000, '𒀀' * 700_000, 'x' * 2_500_000]
  summary = prepare([jsonl(tmp_path / 'a.jsonl', texts)], Weighed(t.inner, t.names), tmp_path / 'out', val_fraction=0)
  assert sum(sizes) == summary.splits['train'].bytes == sum(len(text.encode()) for text in texts)
  assert max(sizes) <= 1 << 20


def test_pieces_end_after_a_line_break_else_before_a_space():
  piece = 'a' * (records.PIECE_CHARS - 10)
  assert records._cut(f'{piece}\nbc de fghijkl', 0) == len(piece) + 1
  assert records._cut(f'{piece}bc de fghijkl', 0) == len(piece) + 5
  assert records._cut('a' * (records.PIECE_CHARS + 5), 0) == records.PIECE_CHARS
  assert records._cut('\n' + piece, 1) == len(piece) + 1


def test_duplicates_and_empty_documents_are_dropped_and_counted(tmp_path, t):
  a = jsonl(tmp_path / 'a.jsonl', [*TEXTS, TEXTS[3], '', ' \n'])
  b = jsonl(tmp_path / 'b.jsonl', [TEXTS[5], 'new', TEXTS[3] + ' '], source='more')
  summary = prepare([a, b], t, tmp_path / 'out', val_fraction=0)
  assert summary.dropped == {'duplicate': {'a': 1, 'b': 1}, 'empty': {'a': 2}, 'bad': {}}
  assert summary.read()['b'] == {'read': 3, 'duplicate': 1, 'empty': 0, 'bad': 0, 'kept': 2}
  assert list(load(tmp_path / 'out').texts('train')) == [*TEXTS, 'new', TEXTS[3] + ' ']


def test_counts_by_split_kind_and_source_add_up(tmp_path, t, monkeypatch):
  monkeypatch.setattr(records, 'MOST_SOURCES', 2)
  paths = [jsonl(tmp_path / f'{name}.jsonl', [f'{name} {text}' for text in TEXTS], source=name) for name in 'abcd']
  summary = prepare([*paths[:2], *(f'k={path}' for path in paths[2:])], t, tmp_path / 'out', val_fraction=0.3)
  assert summary.groups == [('a', 'a'), ('b', 'b'), ('k', 'other')]
  for split, total in summary.splits.items():
    for counts in (summary.by_group[split], summary.kinds(split).values()):
      assert sum(c.documents for c in counts) == total.documents
      assert sum(c.tokens for c in counts) == total.tokens == len(load(tmp_path / 'out').split(split))
      assert sum(c.bytes for c in counts) == total.bytes
  assert summary.kinds('validation')['a'].bytes == sum(
    len(f'a {x}'.encode()) for x in TEXTS if in_validation(f'a {x}', 0.3)
  )


def test_one_kind_read_alone(tmp_path, t, monkeypatch):
  monkeypatch.setattr(records, 'RECORD_TOKENS', 13)
  texts = {name: [f'{name} {text}' for text in TEXTS] for name in 'abc'}
  prepare([jsonl(tmp_path / f'{name}.jsonl', texts[name]) for name in 'abc'], t, tmp_path / 'out', val_fraction=0.2)
  ready = load(tmp_path / 'out')
  held_out = [text for text in texts['b'] if in_validation(text, 0.2)]
  assert list(ready.texts('validation', 'b')) == held_out
  alone, whole = ready.split('train', 'b'), ready.split('train')
  assert alone.bytes == ready.summary.kinds('train')['b'].bytes
  documents = whole.documents(0, len(whole))
  groups = whole.document_groups()[documents]
  assert len(groups) == len(whole) and set(groups) == {0, 1, 2}
  lengths = [len(t.encode(text)) + 2 for name in 'abc' for text in texts[name] if not in_validation(text, 0.2)]
  np.testing.assert_array_equal(np.bincount(documents), lengths)
  np.testing.assert_array_equal(alone.read(0, len(alone))[0], whole.read(0, len(whole))[0][groups == 1])
  for start, stop in [(0, 5), (12, 30), (len(whole) - 3, len(whole) + 9), (7, 7)]:
    np.testing.assert_array_equal(whole.documents(start, stop), documents[start:stop])
  with pytest.raises(InputError, match="no kind 'd': it has a, b, c"):
    ready.split('train', 'd')


def test_adding_documents_moves_none(tmp_path, t):
  prepare([jsonl(tmp_path / 'a.jsonl', TEXTS[:30])], t, tmp_path / 'small', val_fraction=0.3)
  prepare([jsonl(tmp_path / 'b.jsonl', TEXTS[::-1])], t, tmp_path / 'large', val_fraction=0.3)
  for split in ('train', 'validation'):
    assert set(load(tmp_path / 'small').texts(split)) < set(load(tmp_path / 'large').texts(split))


def test_token_type_follows_the_vocabulary(tmp_path, t):
  class Wide(tok.Tokenizer):
    vocab_size = 1 << 17

  source = jsonl(tmp_path / 'a.jsonl', TEXTS)
  assert prepare([source], t, tmp_path / 'narrow').dtype == 'uint16'
  assert prepare([source], Wide(t.inner), tmp_path / 'wide').dtype == 'uint32'
  read = [load(tmp_path / name).split('train').read(0, 1000)[0] for name in ('narrow', 'wide')]
  np.testing.assert_array_equal(*read)


def test_a_tokenizer_without_bos_puts_eos_at_both_ends(tmp_path, t):
  import tokenizers
  from tokenizers import AddedToken, decoders, models, pre_tokenizers

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  inner: Any = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
  inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  inner.add_special_tokens([AddedToken('</s>', special=True)])
  bare = tok.Tokenizer(inner, {'eos': '</s>'})
  assert bare.bos_id is None
  prepare([jsonl(tmp_path / 'a.jsonl', ['ab', 'c'])], bare, tmp_path / 'out', val_fraction=0)
  ids, begins = load(tmp_path / 'out').split('train').read(0, 99)
  end = bare.eos_id
  assert ids.tolist() == [end, *bare.encode('ab'), end, end, *bare.encode('c'), end]
  assert begins.nonzero()[0].tolist() == [0, 4]


def test_preparing_again_does_nothing_unless_something_changed(tmp_path, t):
  source, out = tmp_path / 'a.jsonl', tmp_path / 'out'
  jsonl(source, TEXTS)
  first = prepare([str(source)], t, out)
  before = snapshot(out)
  assert prepare([str(source)], t, out) == first
  assert snapshot(out) == before
  assert prepare([str(source)], t, out, val_fraction=0.5) != first
  prepare([str(source)], t, out)
  other = tok.train(TEXTS, 280)
  assert prepare([str(source)], other, out).digest == load(out).tokenizer.digest == other.digest
  jsonl(source, [*TEXTS, 'one more'])
  assert prepare([str(source)], other, out).splits != first.splits
  assert len(list(load(out).texts('train'))) + len(list(load(out).texts('validation'))) == 61


def test_a_file_changed_in_the_second_it_was_read_is_seen(tmp_path, t):
  source = tmp_path / 'a.jsonl'
  for word in ('one', 'two'):  # same size, and most likely the same second
    source.write_text(json.dumps({'text': word}))
    prepare([str(source)], t, tmp_path / 'out', val_fraction=0)
    assert list(load(tmp_path / 'out').texts('train')) == [word]


def test_bad_input_leaves_what_was_prepared_before(tmp_path, t):
  out = tmp_path / 'out'
  prepare([jsonl(tmp_path / 'a.jsonl', TEXTS)], t, out)
  before = snapshot(out)
  (tmp_path / 'b.jsonl').write_text('{"text": "x"}\n{"text": 3}\n')
  with pytest.raises(InputError, match=r'b\.jsonl:2: "text" must be a string'):
    prepare([str(tmp_path / 'b.jsonl')], t, out)
  with pytest.raises(InputError, match=r'all documents \(60\) fall into validation'):
    prepare([str(tmp_path / 'a.jsonl')], t, out, val_fraction=1 - 1e-9)
  with pytest.raises(InputError, match='threshold must be between 0 and 1|need datasketch'):
    prepare([str(tmp_path / 'a.jsonl')], t, out, near=5.0)
  assert snapshot(out) == before


def test_the_limit_of_bad_records_holds_for_what_is_there_already(tmp_path, t):
  source = Path(jsonl(tmp_path / 'a.jsonl', TEXTS))
  source.write_text(source.read_text() + '{}\n{}\n')
  os.utime(source, (time.time() - 100,) * 2)
  first = prepare([str(source)], t, tmp_path / 'out', max_bad=2)
  before = snapshot(tmp_path / 'out')
  assert prepare([str(source)], t, tmp_path / 'out', max_bad=3) == first
  with pytest.raises(InputError, match='2 bad records are more than max_bad=1'):
    prepare([str(source)], t, tmp_path / 'out', max_bad=1)
  assert snapshot(tmp_path / 'out') == before


def test_a_full_disk_is_one_line(disk, t, tmp_path, capsys):
  t.save(tmp_path / 'tokenizer.json')
  source = jsonl(tmp_path / 'a.jsonl', [f'{i} {np.random.default_rng(i).integers(0, 9, 999)}' for i in range(500)])
  (disk / 'filler').write_bytes(bytes(shutil.disk_usage(disk).free - 200_000))
  args = ['prepare', source, '--tokenizer', str(tmp_path / 'tokenizer.json'), '--out', str(disk / 'out')]
  assert cli.main(args) == 1
  err = capsys.readouterr().err
  assert err.startswith(f'jaxlm: {disk}/out') and 'No space left on device' in err and err.count('\n') == 1


def test_a_recorded_tokenizer_that_the_one_there_does_not_match(tmp_path, t):
  """The file is as it was, and another version of the library makes another digest of it."""
  out = tmp_path / 'out'
  prepare([jsonl(tmp_path / 'a.jsonl', TEXTS)], t, out)
  raw = json.loads((out / 'prepared.json').read_text())
  raw.pop('seal')
  raw['digest'] = '0' * 64
  (out / 'prepared.json').write_text(json.dumps(raw | {'seal': files.seal(raw)}))
  with pytest.raises(InputError, match='is not the one that it was prepared with'):
    load(out)


def test_nothing_that_is_not_ours_is_removed(tmp_path, t):
  out = tmp_path / 'out'
  (out / 'records').mkdir(parents=True)
  mine = [out / 'notes.txt', out / 'records' / 'notes.txt']
  for path in mine:
    path.write_text('keep')
  for fraction in (0.1, 0.2):
    prepare([jsonl(tmp_path / 'a.jsonl', TEXTS)], t, out, val_fraction=fraction)
  assert [path.read_text() for path in mine] == ['keep', 'keep']
  assert load(out).summary.inputs['val_fraction'] == 0.2


def test_an_interrupted_preparation_is_refused_and_started_over(tmp_path, t):
  """SIGKILL after the first group, and just before the marker is written, over a folder that was finished before."""
  t.save(tmp_path / 'tokenizer.json')
  source = jsonl(tmp_path / 'a.jsonl', TEXTS)
  code = """
import os, signal, sys
from jaxlm.data import prepare as prep, records, tokenizer
at, source, out = sys.argv[1:]
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
target = {'group': (records.Writer, 'add'), 'end': (records.Writer, 'finish')}[at]
whole = getattr(*target)
setattr(*target, lambda *args: (whole(*args), kill()))
prep.prepare([source], tokenizer.load(os.path.dirname(source)), out)
"""
  for at in ('group', 'end'):
    out = tmp_path / at
    prepare([source], t, out, val_fraction=0.3)
    assert subprocess.run([sys.executable, '-c', code, at, source, str(out)], check=False).returncode == -9
    with pytest.raises(InputError, match='prepared.json: its preparation was interrupted: run `jaxlm prepare` again'):
      load(out)
    prepare([source], t, out, val_fraction=0)
    assert list(load(out).texts('train')) == TEXTS


def test_a_marker_cut_short_does_not_count(tmp_path, t):
  source, out = jsonl(tmp_path / 'a.jsonl', TEXTS), tmp_path / 'out'
  prepare([source], t, out, val_fraction=0)
  marker = out / 'prepared.json'
  marker.write_text(marker.read_text()[:-20])
  with pytest.raises(InputError, match='interrupted|prepared.json is damaged'):
    load(out)
  prepare([source], t, out, val_fraction=0)
  assert list(load(out).texts('train')) == TEXTS


def test_what_load_refuses(tmp_path, t):
  out = tmp_path / 'out'
  with pytest.raises(InputError, match='no prepared data here: run `jaxlm prepare` first'):
    load(tmp_path)
  prepare([jsonl(tmp_path / 'a.jsonl', TEXTS)], t, out)
  with pytest.raises(InputError, match="no split 'test': it has train, validation"):
    load(out).split('test')
  marker = (out / 'prepared.json').read_text()
  (out / 'prepared.json').write_text(marker.replace(f'"version": {prepared.VERSION}', '"version": 0'))
  with pytest.raises(InputError, match='prepared in layout 0'):
    load(out)
  (out / 'prepared.json').write_text(marker)
  tok.train(TEXTS, 280).save(out / 'tokenizer.json')
  with pytest.raises(InputError, match='damaged: tokenizer.json has changed: run `jaxlm prepare` again'):
    load(out)


def test_a_changed_index_and_records_of_another_length_are_refused(tmp_path, t):
  out = tmp_path / 'out'
  prepare([jsonl(tmp_path / 'a.jsonl', TEXTS)], t, out, val_fraction=0)
  prepare([jsonl(tmp_path / 'b.jsonl', TEXTS[1:])], t, tmp_path / 'other', val_fraction=0)
  offsets = np.load(out / 'train.offsets.npy')
  np.save(out / 'train.offsets.npy', offsets[:-1])
  with pytest.raises(InputError, match='damaged: train.offsets.npy has changed: run `jaxlm prepare` again'):
    load(out)
  np.save(out / 'train.offsets.npy', offsets)
  record = next((out / 'records').glob('tokens-train*'))
  record.write_bytes(next((tmp_path / 'other' / 'records').glob('tokens-train*')).read_bytes())
  with pytest.raises(InputError, match="record 0 of 'train' cannot be read: records/tokens-train.* has changed: run"):
    load(out).split('train').read(0, 5)


@pytest.mark.parametrize('fraction', [-0.1, 1.0])
def test_val_fraction_is_checked(tmp_path, t, fraction):
  with pytest.raises(InputError, match='val_fraction'):
    prepare([jsonl(tmp_path / 'a.jsonl', TEXTS)], t, tmp_path / 'out', val_fraction=fraction)


def test_an_empty_corpus_is_refused(tmp_path, t):
  with pytest.raises(InputError, match='no text in there'):
    prepare([jsonl(tmp_path / 'a.jsonl', ['', ' '])], t, tmp_path / 'out')


def test_progress_rises_to_all_bytes_of_the_files(tmp_path, t):
  paths = [jsonl(tmp_path / f'{name}.jsonl', [name + text for text in TEXTS]) for name in 'ab']
  total = sum(Path(path).stat().st_size for path in paths)
  seen: list[tuple[int, int]] = []
  prepare(paths, t, tmp_path / 'out', on_progress=lambda done, all_: seen.append((done, all_)))
  done = [d for d, _ in seen]
  assert done == sorted(done)
  assert {all_ for _, all_ in seen} == {total}
  assert done[-1] == total
  assert len(set(done)) > 100


def test_near_duplicates_are_dropped_and_counted(tmp_path, t):
  pytest.importorskip('datasketch', reason="datasketch is not installed: pip install -e '.[dedup]'")
  words = [' '.join(f'word{i * 37 % 101}{j}' for i in range(101)) for j in range(5)]
  texts = [*words, words[2].replace('word372', 'other'), words[4] + ' end']
  summary = prepare([jsonl(tmp_path / 'a.jsonl', texts)], t, tmp_path / 'out', val_fraction=0, near=0.8)
  assert summary.dropped == {'duplicate': {}, 'empty': {}, 'near-duplicate': {'a': 2}, 'bad': {}}
  assert list(load(tmp_path / 'out').texts('train')) == words
  again = prepare([jsonl(tmp_path / 'a.jsonl', texts)], t, tmp_path / 'out', val_fraction=0)
  assert again.splits['train'].documents == 7
