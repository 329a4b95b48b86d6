"""Preparation on Apache Beam: every file of the folder is that of the local path, byte for byte."""

import importlib.util
import json
import os
import random
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import cli, files
from jaxlm.data import beam, neardup, prepare, records
from jaxlm.data import beam_steps as steps
from jaxlm.data import tokenizer as tok
from jaxlm.data.sources import Document
from jaxlm.errors import InputError

# TFDS looks at a field in a way that the protobuf which Beam wants tells it not to
pytestmark = pytest.mark.filterwarnings(r'ignore:label\(\) is deprecated:DeprecationWarning')
WORDS = [f'{a}{b}{c}' for a in ('ka', 'le', 'mi') for b in ('no', 'pu', 'ra', 'se') for c in 'bdfghjklmnprstvwxyz']
EVERYTHING = {'near': 0.8, 'quality': True, 'max_bad': 5, 'val_fraction': 0.3}


@pytest.fixture
def library():
  pytest.importorskip('apache_beam', reason="apache_beam is not installed: pip install -e '.[beam]'")


@pytest.fixture
def small(monkeypatch):
  """Sizes at which a few documents make many chunks, pieces, records and shards."""
  for name, size in {
    'RECORD_TOKENS': 90,
    'RECORDS_PER_FILE': 37,
    'PIECE_CHARS': 400,
    'GROUP_CHARS': 900,
    'MOST_SOURCES': 4,
  }.items():
    monkeypatch.setattr(records, name, size)
  monkeypatch.setattr(steps, 'CHUNK_CHARS', 2500)


def prose(seed: int, count: int = 150) -> str:
  """Words in an order of their own."""
  return ' '.join(random.Random(seed).choices(WORDS, k=count))


def edited(text: str, start: int) -> str:
  """Three of the words replaced."""
  words = text.split()
  for at in (start, start + 40, start + 80):
    words[at] = f'edit{at}'
  return ' '.join(words)


def write(path: Path, rows: list) -> str:
  """JSONL of texts, of (text, source) and of lines as they stand; old enough for its time to be trusted."""
  lines = []
  for row in rows:
    text, source = row if isinstance(row, tuple) else (row, None)
    lines.append(text if text.startswith('{') else json.dumps({'text': text} | ({'source': source} if source else {})))
  path.write_text('\n'.join(lines), encoding='utf-8')
  os.utime(path, (time.time() - 100,) * 2)
  return str(path)


HINDI = 'उस सुबह समुद्र शांत था और बूढ़े मछुआरे दीवार पर बैठकर अपने जाल ठीक कर रहे थे। बच्चे सीपियाँ खोजते हुए दौड़ रहे थे।'
CHAIN = [prose(90), edited(prose(90), 3), edited(edited(prose(90), 3), 20)]  # each like the next, the ends not alike


@pytest.fixture
def corpus(tmp_path) -> list[str]:
  """Files of several kinds with all that may be left out, in one file and across them."""
  many = [(prose(n), f'from{n % 7}') for n in range(1, 40)]
  (tmp_path / 'plain').mkdir()
  (tmp_path / 'plain' / 'x.txt').write_text(f'{prose(60, 3000)}\n\n{HINDI}\n' * 2, encoding='utf-8')
  (tmp_path / 'plain' / 'y.txt').write_text('')
  for path in (tmp_path / 'plain').iterdir():
    os.utime(path, (time.time() - 100,) * 2)
  again = ['too short', CHAIN[1].upper(), f'{prose(62)} end']
  a = [*many[:20], '', CHAIN[0], '{"text": 3}', 'too short', prose(3), prose(61, 2000), f'{HINDI} {prose(64, 20)}']
  b = [CHAIN[1], many[4], (prose(7), 'other'), (' \n', 'x'), *many[15:], '{', *again]
  c = [*(f'{n}. {HINDI}' for n in range(30)), CHAIN[2], CHAIN[1], CHAIN[2], '{"no": 1}', prose(62), HINDI, '']
  return [
    write(tmp_path / 'a.jsonl', a),
    f'kind={write(tmp_path / "b.jsonl", b)}',
    str(tmp_path / 'plain'),
    f'hindi={write(tmp_path / "c.jsonl", [*c, *["x y z"] * 3])}',
    f'kind={write(tmp_path / "d.jsonl", [f"{prose(63)}. {n}" for n in range(9)])}',
  ]


@pytest.fixture(scope='module')
def t() -> tok.Tokenizer:
  return tok.train([prose(n) for n in range(9)] + [HINDI], 400)


def folder(path: Path) -> dict[str, bytes]:
  return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob('*')) if p.is_file()}


def same(specs, t, tmp_path, beam_options='', **choices):
  """Both ways give the same; returns what they gave."""
  local = prepare.prepare(specs, t, tmp_path / 'local', **choices)
  given = {'runner': 'DirectRunner', 'options': beam_options}
  assert beam.run(specs, t, tmp_path / 'beam', **given, **choices) == local
  expected, found = folder(tmp_path / 'local'), folder(tmp_path / 'beam')
  assert {name for name in expected | found if expected.get(name) != found.get(name)} == set()
  return local


@pytest.mark.usefixtures('library', 'small')
@pytest.mark.parametrize(
  'choices',
  [
    {'max_bad': 3, 'val_fraction': 0.3},
    {'max_bad': 3, 'near': 0.8},
    {'max_bad': 3, 'val_fraction': 0, 'quality': True},
    EVERYTHING,
  ],
  ids=['exact', 'near', 'quality', 'everything'],
)
def test_every_byte_is_the_local_one(corpus, t, tmp_path, choices):
  found = same(corpus, t, tmp_path, **choices)
  assert len(list((tmp_path / 'beam' / 'records').glob('tokens-train*'))) > 3
  assert found.dropped['bad'] == {'a': 1, 'kind': 1, 'hindi': 1} and len(found.groups) > records.MOST_SOURCES
  assert found.dropped['empty'] == {'a': 1, 'kind': 1, 'plain': 1, 'hindi': 1}
  if 'near' in choices:
    # CHAIN[1], also in capitals, and all but the first of d.jsonl; HINDI with numbers and without, CHAIN[1], prose(62)
    assert found.dropped['near-duplicate'] == {'kind': 2 + 8, 'hindi': 30 + 2}
    assert found.dropped['duplicate']['hindi'] == (1 if 'quality' in choices else 3)  # CHAIN[2], and 'x y z'
  if 'quality' in choices:
    assert found.dropped['quality'] == {'a': 1, 'kind': 1, 'plain': 1, 'hindi': 3}


def test_the_chain_is_one():
  sketcher = neardup.Sketcher(0.8) if pytest.importorskip('datasketch') else None
  values = sketcher.values([sketcher.sketch(text) for text in CHAIN])
  assert sketcher.alike(values[1], values).all() and not sketcher.alike(values[0], values[2:]).any()


@pytest.mark.usefixtures('library', 'small')
@pytest.mark.parametrize('workers', [1, 3])
def test_the_order_in_which_things_are_done_does_not_matter(corpus, t, tmp_path, monkeypatch, workers):
  """Files come from the last to the first, and groups in any order; three workers do parts of each step at once."""
  listed, written, first_ones = steps.listed, steps.written, steps.first_ones
  turned = lambda group: (group[0], list(group[1])[::-1])
  monkeypatch.setattr(steps, 'listed', lambda path: list(listed(path))[::-1])
  monkeypatch.setattr(steps, 'written', lambda group, *given: written(turned(group), *given))
  monkeypatch.setattr(steps, 'first_ones', lambda group, near: first_ones(turned(group), near))
  options = f'--direct_num_workers={workers} --direct_running_mode=multi_threading' if workers > 1 else ''
  same(corpus, t, tmp_path, options, **EVERYTHING)


@pytest.mark.usefixtures('library')
def test_workers_in_other_processes_from_the_command_line(corpus, t, tmp_path, capfd):
  t.save(tmp_path / 'tokenizer.json')
  args = [
    *corpus,
    '--tokenizer',
    str(tmp_path / 'tokenizer.json'),
    '--max-bad',
    '3',
    '--quality',
    '--near-duplicates',
    '0.8',
  ]
  assert cli.main(['prepare', *args, '--out', str(tmp_path / 'local')]) == 0
  table = capfd.readouterr().out
  two = '--direct_num_workers=2 --direct_running_mode=multi_processing'
  beams = ['--beam-runner', 'directrunner', '--beam-options', two]
  assert cli.main(['prepare', *args, '--out', str(tmp_path / 'beam'), *beams]) == 0
  captured = capfd.readouterr()
  assert captured.out.replace('/beam/', '/local/') == table and ' quality ' in table
  assert 'Traceback' not in captured.err
  assert folder(tmp_path / 'beam') == folder(tmp_path / 'local')


@pytest.mark.usefixtures('library')
def test_either_way_sees_what_the_other_has_finished(t, tmp_path, capsys):
  source = write(tmp_path / 'a.jsonl', [prose(n) for n in range(20)])
  lines: list[str] = []
  first = beam.run([source], t, tmp_path / 'out', runner='DirectRunner', say=lines.append)
  assert [line.split(' (')[0] for line in lines] == [
    'beam: reading',
    'beam: looking for duplicates',
    'beam: tokenizing',
    'beam: writing tokens-train.array_record-00000',
    *(['beam: writing tokens-validation.array_record-00000'] if first.splits['validation'].documents else []),
    'beam: putting the index together',
  ]
  assert capsys.readouterr() == ('', '')
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').rglob('*')}
  assert prepare.prepare([source], t, tmp_path / 'out') == first
  assert beam.run([source], t, tmp_path / 'out', runner='DirectRunner') == first
  assert {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').rglob('*')} == before
  assert beam.run([source], t, tmp_path / 'out', runner='DirectRunner', quality=True).inputs != first.inputs


@pytest.mark.slow
@pytest.mark.usefixtures('library', 'small')
def test_sources_and_folder_on_an_object_store(bucket, corpus, t, tmp_path):
  for spec in corpus:
    if '.jsonl' in spec:
      path = Path(spec.rpartition('=')[2])
      (bucket / 'text' / path.name).write_bytes(path.read_bytes())
  time.sleep(1.1)  # a file of this second may still change and is never taken as unchanged
  specs = [f'{name}=gs://bucket/text/{name}.jsonl' for name in 'abc']
  expected = prepare.prepare(specs, t, tmp_path / 'local', **EVERYTHING)
  lines: list[str] = []
  assert beam.run(specs, t, bucket / 'beam', runner='DirectRunner', say=lines.append, **EVERYTHING) == expected
  found = {str(path.relative_to(bucket / 'beam')): path.read_bytes() for path in everything(bucket / 'beam')}
  assert found == folder(tmp_path / 'local') and lines
  assert prepare.prepare(specs, t, bucket / 'beam', **EVERYTHING) == expected
  assert list(prepare.load(bucket / 'beam').texts('train')) == list(prepare.load(tmp_path / 'local').texts('train'))


def everything(place: epath.Path) -> list[epath.Path]:
  """All files below a folder."""
  below = [everything(path) if path.is_dir() else [path] for path in files.children(place)]
  return [path for paths in below for path in paths]


@pytest.mark.usefixtures('library')
def test_bad_input_is_refused_in_the_same_words_and_costs_nothing(corpus, t, tmp_path):
  out = tmp_path / 'out'
  good = write(tmp_path / 'good.jsonl', [prose(n) for n in range(9)])
  prepare.prepare([good], t, out, val_fraction=0)
  (out / '.beam-left').mkdir()  # by one that was killed
  before = folder(out)
  cut = tmp_path / 'cut.jsonl.gz'
  cut.write_bytes(b'\x1f\x8b nothing of the kind')
  empty = write(tmp_path / 'empty.jsonl', ['', ' '])
  for specs, choices in [
    (corpus, {}),
    (corpus, {'max_bad': 2}),
    ([good, str(cut)], {}),
    ([*corpus, str(cut)], {'max_bad': 9}),
    ([str(cut), *corpus], {'max_bad': 1}),
    ([good], {'column': 'body', 'max_bad': 3}),
    ([good], {'val_fraction': 1 - 1e-9}),
    ([good], {'near': 5.0}),
    ([empty], {}),
  ]:
    with pytest.raises(InputError) as local:
      prepare.prepare(specs, t, tmp_path / 'local', **choices)
    with pytest.raises(InputError) as ours:
      beam.run(specs, t, out, runner='DirectRunner', **choices)
    assert str(ours.value) == str(local.value)
    assert folder(out) == before and not list(out.glob(f'{beam.STAGING}*'))


@pytest.mark.usefixtures('library')
def test_a_step_that_fails_is_one_line(t, tmp_path, monkeypatch):
  def fails(*_, **__):
    raise ValueError('of\ntwo lines')

  monkeypatch.setattr(steps, 'tokenized', fails)
  source = write(tmp_path / 'a.jsonl', [prose(n) for n in range(9)])
  with pytest.raises(InputError, match=r'^DirectRunner: the pipeline failed: .*two lines.*Tokenize'):
    beam.run([source], t, tmp_path / 'out', runner='DirectRunner')
  assert not list((tmp_path / 'out').iterdir())


@pytest.mark.usefixtures('library')
@pytest.mark.parametrize(
  'given, message',
  [
    ({'runner': 'NoRunner'}, '--beam-runner NoRunner: Beam has no such runner; it has .*DataflowRunner'),
    ({'runner': 'DirectRunner', 'options': '--tmp_location=gs://a'}, '--beam-options: Beam has no --tmp_location'),
    ({'runner': 'DirectRunner', 'options': '--project="a'}, 'Beam cannot read them: No closing quotation'),
    ({'runner': 'DirectRunner', 'options': '--direct_num_workers=x'}, 'Beam cannot read them'),
    ({'runner': 'DataflowRunner'}, 'out: workers of Dataflow cannot reach it: give a place on an object store'),
  ],
)
def test_what_beam_does_not_take_is_one_line(t, tmp_path, given, message, capfd):
  with pytest.raises(InputError, match=message):
    beam.run([write(tmp_path / 'a.jsonl', [prose(1)])], t, tmp_path / 'out', **given)
  assert not (tmp_path / 'out').exists() and capfd.readouterr().err == ''


def test_without_the_library_the_extra_is_named(t, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  source = write(tmp_path / 'a.jsonl', [prose(1)])
  t.save(tmp_path / 'tokenizer.json')
  args = ['prepare', source, '--tokenizer', str(tmp_path / 'tokenizer.json'), '--out', str(tmp_path / 'out')]
  assert cli.main([*args, '--beam-runner', 'DirectRunner']) == 1
  assert capsys.readouterr().err == "jaxlm: --beam-runner needs more than is installed: pip install -e '.[beam]'\n"
  assert cli.main([*args, '--beam-options', '--project=a']) == 1
  assert '--beam-options needs --beam-runner' in capsys.readouterr().err


@pytest.mark.usefixtures('library')
def test_dataflow_without_its_clients_names_the_extra():
  if importlib.util.find_spec('apitools'):
    pytest.skip('apache-beam[gcp] is installed')
  with pytest.raises(InputError, match=r"pip install 'apache-beam\[gcp\]'"):
    beam._engine('dataflowrunner', '')


GROUPS = st.lists(st.tuples(st.sampled_from('kl'), st.sampled_from(['a', 'b', 'c', 'd', 'other'])), max_size=30)


@settings(deadline=None)
@given(GROUPS, st.integers(1, 5), st.randoms())
def test_groups_are_numbered_as_one_by_one(met, most, rng):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(records, 'MOST_SOURCES', most)
    expected = records.Groups()
    numbers = [expected.of(Document('', source, '', kind)) for kind, source in met]
    chunks = [{(kind, source): ((0, 0, n), '')} for n, (kind, source) in enumerate(met)]
    rng.shuffle(chunks)
    cuts = [0, *sorted(rng.randrange(len(met) + 1) for _ in range(3)), len(met)]
    parts = [chunks[a:b] for a, b in pairwise(cuts)]
    first = steps.first_met([steps.first_met(part, most) for part in parts], most)
    others = steps.first_met([steps.others_met(chunk, first) for chunk in chunks], None)
    found = [tuple(group) for *group, _ in steps.all_groups(others, first)]
  assert found == list(expected.numbers)
  of = {group: n for n, group in enumerate(found)}
  assert [of.get(group, of.get((group[0], 'other'))) for group in met] == numbers


@settings(max_examples=200, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda pair: pair[1] < pair[0])), st.randoms())
def test_of_pairs_the_later_goes_where_the_earlier_stays(alike, rng):
  kept: list[int] = []
  for one in range(10):
    if not any((one, earlier) in alike for earlier in kept):
      kept.append(one)
  pairs = [((later,), (earlier,)) for later, earlier in alike]
  rng.shuffle(pairs)
  assert neardup.later_ones(pairs) == {(one,) for one in range(10) if one not in kept}


def test_a_shard_is_put_in_its_place_whole(tmp_path):
  (tmp_path / 'a').write_bytes(b'new')
  (tmp_path / 'there').write_bytes(b'old')
  steps.publish(epath.Path(tmp_path / 'a'), epath.Path(tmp_path / 'there'))
  assert (tmp_path / 'there').read_bytes() == b'new' and len(list(tmp_path.iterdir())) == 2
