"""Named data sets: TFDS in three file formats gives the same documents, damage is named, a hub cache is files."""

import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import tensorflow_datasets as tfds

import jaxlm
from jaxlm.data import datasets, sources
from jaxlm.errors import InputError

SAMPLE = Path(jaxlm.__file__).parent / 'assets' / 'sample'
PER_FILE = 97
FEATURES = tfds.features.FeaturesDict(
  {
    'title': tfds.features.Text(),
    'text': tfds.features.Text(),
    'number': np.int64,
    'about': tfds.features.FeaturesDict({'place': tfds.features.Text(), 'years': tfds.features.Sequence(np.int64)}),
  }
)


def documents(count):
  """Real text in many scripts, cut into paragraphs of very different lengths."""
  lines = [line for path in sorted(SAMPLE.glob('*.jsonl')) for line in path.read_text('utf-8').split('\n') if line]
  texts = [json.loads(line)['text'] for line in lines]
  parts = [part for text in texts[:: max(1, len(texts) // 60)] for part in text.split('\n') if part.strip()]
  return ['', 'x' * 100_003, *parts[: count - 3], '\ufeffनमस्ते\x00']


TEXTS = documents(257)


def example(i, text):
  return {'title': f't{i}', 'text': text, 'number': i, 'about': {'place': f'p{i}', 'years': [i] * (i % 3)}}


class Prose(tfds.core.GeneratorBasedBuilder):
  """The texts, as a data set of TFDS's own making."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=FEATURES, disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    return ((i, example(i, text)) for i, text in enumerate(TEXTS))


def info_for(folder, features, file_format):
  identity = tfds.core.DatasetIdentity(
    name='prose', version=tfds.core.Version('1.0.0'), data_dir=str(folder), module_name='x'
  )
  info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
  info.set_file_format(file_format)
  return info


def framed(record):
  def masked(raw):
    crc = google_crc32c.value(raw)
    return struct.pack('<I', (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)

  size = struct.pack('<Q', len(record))
  return size + masked(size) + record + masked(record)


def write_tfrecord(folder, files, features=FEATURES):
  """A TFDS data set in TFRecord, whose files hold the given serialized records."""
  folder.mkdir(parents=True)
  info = info_for(folder, features, 'tfrecord')
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder, dataset_name='prose', split='train', filetype_suffix='tfrecord'
  )
  sizes = [sum(map(len, records)) for records in files]
  split = tfds.core.SplitInfo(
    name='train', shard_lengths=[len(r) for r in files], num_bytes=sum(sizes), filename_template=template
  )
  info.set_splits(tfds.core.splits.SplitDict([split]))
  info.write_to_directory(folder)
  for number, records in enumerate(files):
    path = folder / f'prose-train.tfrecord-{number:05}-of-{len(files):05}'
    path.write_bytes(b''.join(map(framed, records)))
  return folder


def write_array_record(folder, texts=TEXTS, features=FEATURES, make=example):
  folder.mkdir(parents=True)
  writer = tfds.core.SequentialWriter(info_for(folder, features, 'array_record'), PER_FILE, file_format='array_record')
  writer.initialize_splits(['train', 'empty'])
  writer.add_examples({'train': [make(i, text) for i, text in enumerate(texts)]})
  writer.close_all()
  return folder


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A TFDS data dir with the same texts in each format: ROOT/FORMAT/prose/1.0.0."""
  root = tmp_path_factory.mktemp('tfds')
  write_array_record(root / 'array_record' / 'prose' / '1.0.0')
  Prose(data_dir=root / 'parquet', file_format='parquet').download_and_prepare(
    download_config=tfds.download.DownloadConfig(num_shards=3)
  )
  records = [FEATURES.serialize_example(FEATURES.encode_example(example(i, text))) for i, text in enumerate(TEXTS)]
  files = [records[at : at + PER_FILE] for at in range(0, len(records), PER_FILE)]
  write_tfrecord(root / 'tfrecord' / 'prose' / '1.0.0', files)
  return root


def read(spec, on_bad=None):
  """[(text, where)] of all files of a spec."""

  def refuse(error):
    raise error

  column = datasets.parse_tfds(spec).column
  return [pair for path in datasets.shards(spec) for pair in datasets.read_shard(path, column, on_bad or refuse)]


def refused(spec):
  with pytest.raises(InputError) as info:
    read(spec)
  assert '\n' not in str(info.value)
  return str(info.value)


@pytest.mark.parametrize(
  ('spec', 'parts'),
  [
    ('tfds:c4', ('c4', 'train', None)),
    ('tfds:wikipedia/20230601.en:train', ('wikipedia/20230601.en', 'train', None)),
    ('tfds:c4/en:3.1.0', ('c4/en:3.1.0', 'train', None)),
    ('tfds:c4/en:3.*.*:validation:text', ('c4/en:3.*.*', 'validation', 'text')),
    ('tfds:c4/en:3.1.0:train[1shard:2shard]+test:a/b', ('c4/en:3.1.0', 'train[1shard:2shard]+test', 'a/b')),
    ('tfds:x::body', ('x', 'train', 'body')),
    ('tfds:/data/x/1.0.0:train', ('/data/x/1.0.0', 'train', None)),
    ('tfds:gs://bucket/x/1.0.0:test:a:b', ('gs://bucket/x/1.0.0', 'test', 'a:b')),
  ],
)
def test_a_spec_has_name_split_and_column(spec, parts):
  assert datasets.parse_tfds(spec) == parts


@pytest.mark.parametrize('spec', ['tfds:', 'tfds::train', 'tfds:x:train[:3'])
def test_a_spec_that_is_none_is_refused(spec):
  assert refused(spec).startswith(f'{spec}: expected tfds:NAME')


@pytest.mark.parametrize('form', ['array_record', 'parquet', 'tfrecord'])
def test_every_format_gives_the_same_documents(root, form, monkeypatch):
  folder = root / form / 'prose' / '1.0.0'
  paths = datasets.shards(f'tfds:{folder}')
  assert len(paths) == 3 and all(path.parent == folder and path.is_file() for path in paths)
  assert [text for text, _ in read(f'tfds:{folder}')] == TEXTS
  inside = list(datasets.read_shard(paths[1], None, print))
  assert [where for _, where in inside] == [f'{paths[1]}:{i + 1}' for i in range(len(inside))]
  monkeypatch.setenv('TFDS_DATA_DIR', str(root / form))
  for name in ('prose', 'prose:1.0.0', 'prose:1.*.*'):  # by name: found where TFDS keeps its sets
    assert datasets.shards(f'tfds:{name}') == paths


def test_a_parquet_file_in_which_tfds_lost_records_is_refused(tmp_path):
  """TFDS 4.9.10 writes the records 0-99, 200-299, ... of a longer file; a version that writes all of them is read."""
  Prose(data_dir=tmp_path, file_format='parquet').download_and_prepare()
  folder = tmp_path / 'prose' / '1.0.0'
  if len(list(datasets._parquet_records(datasets.shards(f'tfds:{folder}')[0], 64))) < len(TEXTS):
    assert "dataset_info.json says 257: cut short, or of another version; TFDS's own Parquet" in refused(
      f'tfds:{folder}'
    )
  else:
    assert [text for text, _ in read(f'tfds:{folder}')] == TEXTS


@pytest.mark.parametrize('form', ['array_record', 'parquet', 'tfrecord'])
def test_the_column_is_the_one_named(root, form):
  spec = f'tfds:{root / form / "prose" / "1.0.0"}:train'
  assert [text for text, _ in read(f'{spec}:title')] == [f't{i}' for i in range(257)]
  assert [text for text, _ in read(f'{spec}:about/place')] == [f'p{i}' for i in range(257)]
  assert f'{spec}:body: no string feature' in refused(f'{spec}:body')
  assert "no string feature 'number'; its string features are " in refused(f'{spec}:number')


def test_without_a_name_the_only_string_is_the_text_and_two_are_refused(tmp_path):
  one = tfds.features.FeaturesDict({'body': tfds.features.Text(), 'n': np.int64})
  folder = write_array_record(tmp_path / '1' / '1.0.0', ['a', 'b'], one, lambda i, text: {'body': text, 'n': i})
  assert [text for text, _ in read(f'tfds:{folder}')] == ['a', 'b']
  two = tfds.features.FeaturesDict({'body': tfds.features.Text(), 'head': tfds.features.Text()})
  folder = write_array_record(tmp_path / '2' / '1.0.0', ['a'], two, lambda i, text: {'body': text, 'head': text})
  message = refused(f'tfds:{folder}')
  assert 'which feature is the text?' in message and message.endswith('body, head')
  none = tfds.features.FeaturesDict({'n': np.int64})
  folder = write_array_record(tmp_path / '3' / '1.0.0', ['a'], none, lambda i, text: {'n': i})
  assert 'none (its features are n)' in refused(f'tfds:{folder}')


def test_a_slice_is_of_whole_files(root):
  spec = f'tfds:{root / "tfrecord" / "prose" / "1.0.0"}'
  assert [text for text, _ in read(f'{spec}:train[:2shard]')] == TEXTS[: 2 * PER_FILE]
  assert [text for text, _ in read(f'{spec}:train[1shard:]')] == TEXTS[PER_FILE:]
  assert [text for text, _ in read(f'{spec}:train[{PER_FILE}:{2 * PER_FILE}]')] == TEXTS[PER_FILE : 2 * PER_FILE]
  for part in ('train[:10%]', 'train[5:]', 'train[:98]'):
    assert 'the slice ends inside prose-train.tfrecord-0000' in refused(f'{spec}:{part}')
    assert 'train[:2shard]' in refused(f'{spec}:{part}')


def test_an_unknown_split_and_an_empty_one_are_refused(root):
  spec = f'tfds:{root / "array_record" / "prose" / "1.0.0"}'
  for part in ('test', 'test[:1shard]', 'train[:x]', 'train+test'):
    assert f'no split {part!r}; its splits are train (3 files), empty (0 files)' in refused(f'{spec}:{part}')
  assert refused(f'{spec}:empty').endswith("no records in 'empty'")


@pytest.fixture
def folder(tmp_path):
  """A small set in TFRecord, of two files of 7 and 5 records."""
  records = [FEATURES.serialize_example(FEATURES.encode_example(example(i, f'text {i}'))) for i in range(12)]
  return write_tfrecord(tmp_path / 'prose' / '1.0.0', [records[:7], records[7:]])


@pytest.mark.slow
def test_every_flipped_byte_of_a_tfrecord_is_seen(folder):
  path = folder / 'prose-train.tfrecord-00000-of-00002'
  whole = path.read_bytes()
  starts, at = [], 0
  while at < len(whole):
    starts.append(at)
    at += 16 + struct.unpack_from('<Q', whole, at)[0]
  for at in range(0, len(whole), 3):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
    record = sum(start <= at for start in starts)
    assert refused(f'tfds:{folder}').startswith(f'{path}:{record}: damaged or cut short')


def test_every_cut_of_a_tfrecord_is_seen(folder):
  path = folder / 'prose-train.tfrecord-00001-of-00002'
  whole = path.read_bytes()
  for size in range(0, len(whole), 5):
    path.write_bytes(whole[:size])
    assert str(path) in refused(f'tfds:{folder}')
  path.write_bytes(whole[: 16 + struct.unpack_from('<Q', whole)[0]])  # between two records: the format cannot tell
  assert f'{path}: 1 records, but dataset_info.json says 5' in refused(f'tfds:{folder}')


@pytest.mark.parametrize('form', ['array_record', 'parquet'])
def test_damage_of_the_other_formats_is_seen(root, tmp_path, form):
  source = root / form / 'prose' / '1.0.0'
  target = tmp_path / '1.0.0'
  target.mkdir()
  for path in source.iterdir():
    (target / path.name).write_bytes(path.read_bytes())
  path = Path(datasets.shards(f'tfds:{target}')[0])
  whole = path.read_bytes()
  for size in (0, 11, len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:size])
    assert refused(f'tfds:{target}').startswith(f'{path}:1: damaged or cut short')
  path.write_bytes(whole)


def test_a_flipped_byte_of_an_array_record_is_seen_at_its_record(tmp_path):
  folder = write_array_record(tmp_path / '1.0.0', TEXTS[:89])
  [path] = datasets.shards(f'tfds:{folder}')
  whole = path.read_bytes()
  for at in (70, 4001, 9001, 15013):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
    records, read_well = datasets.read_shard(path, None, print), []
    with pytest.raises(InputError, match='damaged or cut short') as info:
      read_well.extend(text for text, _ in records)
    assert read_well == TEXTS[: len(read_well)]
    assert str(info.value).startswith(f'{path}:{len(read_well) + 1}: ')


def test_a_record_without_good_text_is_bad_and_the_rest_is_read(tmp_path):
  good = FEATURES.serialize_example(FEATURES.encode_example(example(1, 'good')))
  other = tfds.features.FeaturesDict({'text': np.int64})
  records = [
    good,
    good.replace(b'good', b'g\xff\xfed'),
    tfds.features.FeaturesDict({'title': tfds.features.Text()}).serialize_example({'title': 'x'}),
    other.serialize_example(other.encode_example({'text': 3})),
    b'\xff\xff\xff',
    good,
  ]
  folder = write_tfrecord(tmp_path / '1.0.0', [records])
  bad = []
  texts = read(f'tfds:{folder}', bad.append)
  path = folder / 'prose-train.tfrecord-00000-of-00001'
  assert texts == [('good', f'{path}:1'), ('good', f'{path}:6')]
  assert [str(error).split(': ')[0] for error in bad] == [f'{path}:{i}' for i in (2, 3, 4, 5)]
  assert "'text' is not UTF-8: byte 2 is 0xff" in str(bad[0])
  assert all("no string 'text' in this record" in str(error) and '\n' not in str(error) for error in bad[1:])


def test_a_missing_file_and_a_folder_of_something_else_are_refused(folder, tmp_path):
  path = folder / 'prose-train.tfrecord-00001-of-00002'
  path.unlink()
  assert f'{path}: this file of tfds:{folder} is missing' in refused(f'tfds:{folder}')
  assert 'no dataset_info.json in there: give the folder of one version' in refused(f'tfds:{folder.parent}')
  assert 'no dataset_info.json in there' in refused(f'tfds:{tmp_path}/nothing')
  (folder / 'dataset_info.json').write_text('{')
  assert 'not a data set that TFDS can open' in refused(f'tfds:{folder}')


def test_memory_does_not_grow_with_the_file(tmp_path):
  """300 MB of records in one file, read in a process that holds 60 MB more than it needs to start."""
  one = tfds.features.FeaturesDict({'text': tfds.features.Text()})
  record = framed(one.serialize_example({'text': 'y' * 99_991}))
  folder = write_tfrecord(tmp_path / '1.0.0', [[b'']], one)
  with (folder / 'prose-train.tfrecord-00000-of-00001').open('wb') as file:
    for _ in range(3001):
      file.write(record)
  description = folder / 'dataset_info.json'
  description.write_text(
    json.dumps(
      json.loads(description.read_text()) | {'splits': [{'name': 'train', 'shardLengths': ['3001'], 'numBytes': '0'}]}
    )
  )
  code = (
    'import resource, sys; from jaxlm.data import datasets\n'
    'peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
    '[path] = datasets.shards(sys.argv[1]); records = datasets.read_shard(path, None, print); next(records)\n'
    'before = peak(); print(sum(1 for _ in records), (peak() - before) / 1024)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, f'tfds:{folder}'], capture_output=True, text=True, check=True, env=environment()
  )
  count, grown = done.stdout.split()
  assert int(count) == 3000 and float(grown) < 30


def environment(**extra):
  return {**os.environ, 'PYTHONPATH': str(Path(jaxlm.__file__).parents[1]), **extra}


@pytest.mark.parametrize('name', ['no_such_set', 'no_such_set/en:1.0.0', 'not a name', 'wikipedia/no_such_config'])
def test_an_unknown_name_is_one_line(tmp_path, monkeypatch, name):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  start = time.monotonic()
  assert refused(f'tfds:{name}').startswith(f'tfds:{name}: ')
  assert time.monotonic() - start < 20


def test_without_a_network_a_set_that_is_not_there_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  try:
    socket.getaddrinfo('storage.googleapis.com', 443)
  except OSError:
    start = time.monotonic()
    assert f'not in {tmp_path}, and there is no network to download it' in refused('tfds:tiny_shakespeare')
    assert time.monotonic() - start < 20
  else:
    pytest.skip('there is a network: TFDS would download the set')


def hub_cache(root, repo, files, complete=True):
  """A data set in the cache as the hub's library lays it out: blobs, snapshots of links, refs, the tree's listing."""
  folder = root / f'datasets--{repo.replace("/", "--")}'
  commit = '0123456789abcdef0123456789abcdef01234567'
  for name, content in files.items():
    blob = folder / 'blobs' / f'{google_crc32c.value(name.encode()):040x}'
    link = folder / 'snapshots' / commit / name
    for path in (blob, link):
      path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(os.path.relpath(blob, link.parent))
  for ref in ('main', 'refs/convert/parquet'):
    (folder / 'refs' / ref).parent.mkdir(parents=True, exist_ok=True)
    (folder / 'refs' / ref).write_text(commit)
  return folder / 'snapshots' / commit


HUB_CODE = """
import json, sys
from jaxlm.data import datasets, sources
from jaxlm.errors import InputError
said = {}
for spec in sys.argv[1:]:
  try:
    said[spec] = [str(path) for path in datasets.hub_files(spec)]
  except InputError as error:
    said[spec] = str(error)
print(json.dumps(said))
"""


def hub(cache, *specs):
  """{spec: files or the refusal}, from a process that may only use the cache."""
  pytest.importorskip('huggingface_hub', reason='huggingface_hub is not installed')
  env = environment(HF_HUB_OFFLINE='1', HF_HUB_CACHE=str(cache), HF_HUB_DISABLE_TELEMETRY='1')
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', HUB_CODE, *specs], capture_output=True, text=True, check=True, env=env
  )
  return json.loads(done.stdout.splitlines()[-1])


def test_files_of_the_hub_come_from_its_cache(tmp_path):
  names = [
    'README.md', 'LICENSE', 'LICENSE.txt', 'en/README.txt', '.gitattributes', 'dataset_infos.json', 'picture.png',
    'data/train.parquet', 'en/a.jsonl', 'en/b.jsonl.gz', 'en/deep/c.jsonl.zst', 'fr/a.jsonl', 'notes.txt', 'x.md',
  ]  # fmt: skip
  snapshot = hub_cache(tmp_path, 'org/set', {name: name.encode() for name in names})
  default = ['data/train.parquet', 'en/a.jsonl', 'en/b.jsonl.gz', 'en/deep/c.jsonl.zst', 'fr/a.jsonl', 'notes.txt']
  wanted = {
    'hf://datasets/org/set': default,
    'hf://org/set': default,
    'hf://datasets/org/set@main': default,
    'hf://datasets/org/set@0123456789abcdef0123456789abcdef01234567/': default,
    'hf://datasets/org/set@refs/convert/parquet/data': ['data/train.parquet'],
    'hf://datasets/org/set@refs%2Fconvert%2Fparquet/fr': ['fr/a.jsonl'],
    'hf://datasets/org/set/en': ['en/a.jsonl', 'en/b.jsonl.gz', 'en/deep/c.jsonl.zst'],
    'hf://datasets/org/set/*/a.jsonl': ['en/a.jsonl', 'fr/a.jsonl'],
    'hf://datasets/org/set/*.md': ['x.md'],
    'hf://datasets/org/set/README.md': ['README.md'],
  }
  said = hub(tmp_path, *wanted)
  assert said == {spec: [str(snapshot / name) for name in names] for spec, names in wanted.items()}
  assert Path(said['hf://org/set'][1]).read_text() == 'en/a.jsonl'


def test_what_the_cache_does_not_hold_is_one_line(tmp_path):
  hub_cache(tmp_path, 'org/set', {'README.md': b'', 'picture.png': b''})
  specs = ['hf://org/set', 'hf://datasets/org/other', 'hf://org/set@v2', 'hf://org', 'hf://org/set/*.csv', 'hf://o/-.-']
  said = hub(tmp_path, *specs)
  for spec, message in said.items():
    assert isinstance(message, str) and message.startswith(f'{spec}: ') and '\n' not in message
  assert 'no file matches; there are README.md, picture.png' in said['hf://org/set']
  assert 'not to be had' in said['hf://datasets/org/other'] and 'not to be had' in said['hf://org/set@v2']
  assert 'expected hf://datasets/ORG/NAME' in said['hf://org']


def test_without_the_library_the_hub_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(InputError, match=r"pip install -e '\.\[hub\]'"):
    datasets.hub_files('hf://datasets/org/set')


def test_data_sets_are_sources_among_others(root, tmp_path):
  (tmp_path / 'more.jsonl').write_text('{"text": "more"}\n')
  for form in ('array_record', 'parquet', 'tfrecord'):
    spec = f'tfds:{root}/{form}/prose/1.0.0'
    found = list(sources.documents([f'{spec}*0.5 + {tmp_path}/more.jsonl*0.5']))
    assert sorted(d.text for d in found[:-1]) == sorted(TEXTS) and found[-1].text == 'more'
    assert {d.kind for d in found} == {'prose', 'more'}
    assert sources.weights([f'{spec}*0.5 + {tmp_path}/more.jsonl*0.5']) == {'prose': 0.5, 'more': 0.5}
    assert {d.kind for d in sources.documents([f'wiki={spec}:train'])} == {'wiki'}
