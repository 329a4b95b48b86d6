"""Runs, prepared data and checkpoints on gs://, against an emulator on this machine: nothing is renamed or locked."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import cli, files
from jaxlm.config import Data, Optim, Pretrain, Watch
from jaxlm.data import prepare, prepared, tokenizer
from jaxlm.errors import InputError, Stopped
from jaxlm.loops.pretrain import pretrain
from jaxlm.models import ModelConfig
from jaxlm.train import checkpoint, lock
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.metrics import read_rows

pytestmark = pytest.mark.slow


def test_a_file_is_created_once_and_listings_are_fresh(bucket):
  folder = bucket / 'files'
  assert files.children(folder) == []
  files.create(folder / 'a', 'one')
  with pytest.raises(FileExistsError):
    files.create(folder / 'a', 'two')
  assert (folder / 'a').read_text() == 'one'
  elsewhere = 'from etils import epath; epath.Path("gs://bucket/files/b").write_text("x")'
  assert [path.name for path in files.children(folder)] == ['a']
  subprocess.run([sys.executable, '-c', elsewhere], check=True)
  assert [path.name for path in files.children(folder)] == ['a', 'b']


def test_one_writer(bucket, monkeypatch):
  folder = bucket / 'locked'
  with lock.hold(folder):
    with pytest.raises(InputError, match=f'is being written by process {os.getpid()}'), lock.hold(folder):
      pass
    assert [path.name for path in files.children(folder)] == ['lock-000001']
  assert files.children(folder) == []
  dead = {'host': 'elsewhere', 'pid': 1, 'started': '1'}
  files.create(folder / 'lock-000001', json.dumps(dead))
  with pytest.raises(InputError, match='by process 1 on elsewhere'), lock.hold(folder):
    pass
  monkeypatch.setattr(lock, 'STALE', -10.0)
  with lock.hold(folder):
    assert [path.name for path in files.children(folder)] == ['lock-000002']


def test_checkpoints(bucket):
  checkpoints = Checkpoints(bucket / 'run' / 'checkpoints', keep_last=2)
  state = {'x': jnp.arange(7.0), 'y': {'z': jnp.ones((3, 5))}}
  for step in (1, 2, 3):
    checkpoints.save(step, jax.tree.map(lambda x, step=step: x + step, state), {})
  checkpoints.wait()
  assert checkpoints.steps() == [2, 3]
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  np.testing.assert_array_equal(checkpoints.restore(3, abstract)['x'], state['x'] + 3)
  (checkpoints.path(3) / checkpoint.META).write_text('{}')
  said: list[str] = []
  assert checkpoints.newest_sound(said.append) == 2
  assert 'meta.json has changed' in said[0]
  (checkpoints.path(4) / 'begun').write_text('a save that was interrupted')
  assert checkpoints.steps() == [2]
  checkpoints.save(3, state, {})
  checkpoints.close()
  assert checkpoints.steps() == [2, 3] and not checkpoints.path(4).exists()


@pytest.fixture(scope='module')
def data(bucket, tmp_path_factory):
  """A folder on the store, prepared from a file on the store."""
  texts = [f'{i}: the whale and the sea {i * i}\n' * 3 for i in range(60)]
  (bucket / 'text' / 'sea.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
  time.sleep(1.1)  # a file of this second may still change and is never taken as unchanged
  summary = prepare.prepare(
    ['gs://bucket/text/sea.jsonl'], tokenizer.train(texts, 300), bucket / 'data', val_fraction=0.2
  )
  assert summary.splits['train'].documents + summary.splits['validation'].documents == 60
  return bucket / 'data'


def test_prepared_data(data, tmp_path):
  ready = prepare.load(data)
  again = prepare.prepare(['gs://bucket/text/*.jsonl'], ready.tokenizer, data, val_fraction=0.2)
  assert again == ready.summary
  local = prepare.prepare(['gs://bucket/text/*.jsonl'], ready.tokenizer, tmp_path / 'local', val_fraction=0.2)
  assert local.contents == ready.summary.contents
  assert list(ready.texts('train')) == list(prepare.load(tmp_path / 'local').texts('train'))
  assert prepared.verify(data) == []
  (data / 'train.begins.npy').write_bytes(b'x')
  assert prepared.verify(data) == ['train.begins.npy has changed']
  assert prepare.load(data).path == ready.path  # the copy that was made is sound
  other = prepare.prepare(['gs://bucket/text/*.jsonl'], ready.tokenizer, data, val_fraction=0.3)
  assert other.contents != ready.summary.contents and prepared.verify(data) == []


@pytest.mark.filterwarnings('ignore:Sending a large body')  # aiohttp of gcsfs, ignored outside of tests
def test_a_run_lives_on_the_store(bucket, data, tmp_path, capsys):
  config = Pretrain(
    model=ModelConfig(d_model=16, n_layers=2, n_heads=2, d_ff=11),
    data=Data(path=str(data), seq_len=13, global_batch=8),
    optim=Optim(warmup_steps=2),
    watch=Watch(log_every=1, eval_every=3, eval_batches=2, sample_every=4, sample_tokens=3, save_every=2),
    steps=6,
    profile='2:4',
  )
  here, there = (dataclasses.replace(config, run=str(run)) for run in (tmp_path / 'run', bucket / 'whole'))
  state = pretrain(dataclasses.replace(here, profile=''))
  asked: list[int] = []
  with pytest.raises(Stopped, match='saved at step 3'):
    pretrain(there, stop=lambda: asked.append(0) or len(asked) == 3)
  again = pretrain(there)
  jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
  rows = [
    [{k: v for k, v in row.items() if k != 'time' and not k.startswith('perf/')} for row in read_rows(run / file)]
    for run in (tmp_path / 'run', bucket / 'whole')
    for file in ('metrics.jsonl', 'samples.jsonl')
  ]
  assert rows[:2] == rows[2:] and rows[0] and rows[1]
  assert list((bucket / 'whole' / 'profile').glob('plugins/profile/*/*.xplane.pb'))
  assert len(list((bucket / 'whole').glob('events.out.tfevents.*'))) == 2
  whole = str(bucket / 'whole')
  capsys.readouterr()
  for args in (['verify', whole], ['generate', whole, '--prompt', 'the', '--max-new-tokens', '3'], ['report', whole]):
    assert cli.main(args) == 0, args
  assert cli.main(['eval', whole, '--data', str(data)]) == 0
  assert cli.main(['verify', str(data)]) == 0
  assert (bucket / 'whole' / 'report.html').read_text().count('<svg') >= 4
  (bucket / 'whole' / 'checkpoints' / '00000006' / checkpoint.META).write_text('{}')
  assert cli.main(['verify', whole]) == 1
  assert '00000006: meta.json has changed' in capsys.readouterr().out
