"""Two hundred damaged files, of checkpoints and of prepared data: each is seen and named, and a sound step is used."""

import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import cli
from jaxlm.data import prepare, prepared
from jaxlm.data import tokenizer as tok
from jaxlm.errors import InputError
from jaxlm.train.checkpoint import Checkpoints

EACH = 100


def state(step: int):
  return {'w': jnp.arange(step, step + 997, dtype=jnp.float32), 'step': jnp.int32(step)}


def abstract():
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state(0))


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('saved')
  checkpoints, vocabulary = Checkpoints(folder / 'checkpoints'), tok.train(['call me Ishmael'], 300)
  for step in (10, 20):
    checkpoints.save(step, state(step), {'step': step, 'tokenizer': vocabulary.digest})
  checkpoints.close()
  vocabulary.save(folder / 'tokenizer.json')
  return folder


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('data')
  texts = [f'document {i}: call me Ishmael {i * i}' for i in range(97)]
  for i, text in enumerate(texts):
    (folder / f'{i}.txt').write_text(text)
  prepare.prepare([str(folder)], tok.train(texts, 300), folder / 'out', val_fraction=0.2)
  return folder / 'out'


def corrupt(folder: Path, rng: random.Random) -> tuple[str, list[str]]:
  """Damages a random file in a random way; returns the way and the paths in the folder, two where they were swapped."""
  paths = sorted(p for p in folder.rglob('*') if p.is_file() and p.stat().st_size)
  path, way = rng.choice(paths), rng.choice(['flip', 'truncate', 'delete', 'swap'])
  raw = bytearray(path.read_bytes())
  if way == 'flip':
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
  elif way == 'truncate':
    path.write_bytes(raw[: rng.randrange(len(raw))])
  elif way == 'delete':
    path.unlink()
  else:
    other = rng.choice([p for p in paths if p.read_bytes() != raw])
    path.write_bytes(other.read_bytes())
    other.write_bytes(raw)
    return way, [str(p.relative_to(folder)) for p in (path, other)]
  return way, [str(path.relative_to(folder))]


@pytest.mark.parametrize('seed', range(EACH))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(saved, tmp_path, seed, capsys):
  run = tmp_path / 'run'
  shutil.copytree(saved, run)
  newest = run / 'checkpoints' / '00000020'
  way, names = corrupt(newest, random.Random(seed))
  named = lambda line: any(name in line for name in names)
  checkpoints, lines = Checkpoints(run / 'checkpoints'), []
  assert cli.main(['verify', str(run)]) == 1
  out, err = capsys.readouterr()
  sound, damaged, vocabulary = out.splitlines()
  assert sound == f'{newest.parent}/00000010: sound' and '1 of 3 damaged' in err and vocabulary.endswith(': sound')
  assert damaged.startswith(f'{newest}: ') and named(damaged)
  assert checkpoints.newest_sound(lines.append) == 10
  assert len(lines) == 1 and str(newest) in lines[0] and named(lines[0])
  restored = checkpoints.restore(10, abstract())
  jax.tree.map(np.testing.assert_array_equal, restored, state(10))


def test_two_steps_that_changed_places_are_both_named(saved, tmp_path, capsys):
  run = tmp_path / 'run'
  shutil.copytree(saved, run)
  older, newer = (run / 'checkpoints' / name for name in ('00000010', '00000020'))
  older.rename(tmp_path / 'kept')
  newer.rename(older)
  (tmp_path / 'kept').rename(newer)
  assert cli.main(['verify', str(run)]) == 1
  assert capsys.readouterr().out.splitlines()[:2] == [
    f'{older}: meta.json is of step 20',
    f'{newer}: meta.json is of step 10',
  ]


def read_all(folder: Path) -> str:
  """Everything that training would read; what it was refused with."""
  try:
    opened = prepared.load(folder)
    for split in ('train', 'validation'):
      opened.split(split).read(0, 1 << 20)
  except InputError as error:
    return str(error)
  return ''


@pytest.mark.parametrize('seed', range(EACH))
def test_a_damaged_prepared_folder_is_named(data, tmp_path, seed, capsys):
  folder = tmp_path / 'out'
  shutil.copytree(data, folder)
  whole = prepared.load(data)
  expected = [whole.split(s).read(0, 1 << 20)[0].tolist() for s in ('train', 'validation')]
  _, names = corrupt(folder, random.Random(1000 + seed))
  assert cli.main(['verify', str(folder)]) == 1
  out, err = capsys.readouterr()
  assert any(name in out + err for name in names)
  if refusal := read_all(folder):
    assert refusal.startswith(f'{folder}') and '\n' not in refusal and 'run `jaxlm prepare`' in refusal
    assert any(name in refusal for name in names)
  else:  # nothing damaged is ever read as if it were sound
    opened = prepared.load(folder)
    assert [opened.split(s).read(0, 1 << 20)[0].tolist() for s in ('train', 'validation')] == expected


def test_sound_ones_verify(saved, data, capsys):
  assert cli.main(['verify', str(saved)]) == 0 and cli.main(['verify', str(data)]) == 0
  assert capsys.readouterr().out.count(': sound\n') == 4
  assert cli.main(['verify', str(data.parent)]) == 1
  assert 'neither prepared data nor a run' in capsys.readouterr().err
