"""Trackers get what metrics.jsonl gets, go on where a run does, and never end one."""

import importlib.util
import json
import sys

import pytest
from test_cli import SIZES, one_line

from jaxlm import cli
from jaxlm.train import metrics, trackers

CONFIG = {'optim': {'lr': 1e-3}, 'steps': 4}


def interrupted(run, kind, said):
  """Three steps, and again from the second on; one value of them is no number."""
  writer = metrics.Writer(run, 0, said.append, tracker=kind, config=CONFIG)
  for step in (1, 2, 3):
    writer.row(step, {'train/loss': 1.0 / step, 'eval/loss': float('nan') if step == 2 else 2.0})
    writer.sample(step, 'p', 't')
  writer.flush()
  writer.close()
  writer = metrics.Writer(run, 2, said.append, tracker=kind, config=CONFIG)
  for step in (3, 4):
    writer.row(step, {'train/loss': 9.0 / step})
  writer.close()
  assert [row['step'] for row in metrics.read_rows(run / 'metrics.jsonl')] == [1, 2, 3, 4]


@pytest.mark.parametrize('kind', trackers.EXTRA)
def test_a_package_that_is_not_there_is_one_line_before_the_run(kind, tmp_path, capsys):
  if importlib.util.find_spec(kind):
    pytest.skip(f'{kind} is installed')
  flags = ['--run', str(tmp_path / 'run'), '--data.path', str(tmp_path / 'nowhere'), '--watch.tracker', kind, *SIZES]
  assert f"pip install -e '.[{kind}]'" in one_line(capsys, 'pretrain', *flags)
  assert not (tmp_path / 'run').exists()


def test_none_and_tensorboard(tmp_path):
  for kind, count in (('none', 0), ('tensorboard', 2)):
    said = []
    interrupted(tmp_path / kind, kind, said)
    assert len(list((tmp_path / kind).glob('events.out.*'))) == count and not said
    assert not (tmp_path / kind / trackers.NAMED).exists()


def test_an_unknown_one_is_refused(capsys):
  with pytest.raises(SystemExit):
    cli.main(['pretrain', '--watch.tracker', 'tensorbored'])
  assert 'tensorboard' in capsys.readouterr().err


@pytest.mark.parametrize(
  'source, said',
  [
    (
      'def init(**what):\n  raise RuntimeError("no key")\nfinish = None',
      'wandb: RuntimeError: no key; the run goes on',
    ),
    (
      'class Run:\n  def define_metric(self, *a, **k): ...\n  def log(self, values): raise OSError("disk full")\n'
      'def init(**what): return Run()\ndef finish(): ...',
      'wandb: OSError: disk full; metrics.jsonl has all',
    ),
  ],
)
def test_one_that_fails_is_told_once_and_ends_nothing(tmp_path, monkeypatch, source, said):
  (tmp_path / 'wandb.py').write_text(source)  # stands in for the package with a failure that it has
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, 'wandb', raising=False)
  told = []
  try:
    interrupted(tmp_path / 'run', 'wandb', told)
  finally:
    sys.modules.pop('wandb', None)
  assert len(told) == 2 and all(line.startswith(said) for line in told), told  # once each time that it was opened


@pytest.mark.filterwarnings('ignore')  # of packages that are not ours
def test_trackio(tmp_path, monkeypatch):
  monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'kept'))
  pytest.importorskip('trackio', reason="needs pip install -e '.[trackio]'")
  from trackio.sqlite_storage import SQLiteStorage

  said = []
  interrupted(tmp_path / 'run', 'trackio', said)
  name = json.loads((tmp_path / 'run' / trackers.NAMED).read_text())['name']
  logs = SQLiteStorage.get_logs(trackers.PROJECT, name)
  assert [(row['step'], row['train/loss']) for row in logs] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 3.0), (4, 2.25)]
  assert [row.get('eval/loss') for row in logs] == [2.0, None, 2.0, None, None]
  assert SQLiteStorage.get_run_config(trackers.PROJECT, name)['steps'] == 4 and not said


@pytest.mark.filterwarnings('ignore')  # of packages that are not ours
def test_wandb_offline(tmp_path, monkeypatch):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  pytest.importorskip('wandb', reason="needs pip install -e '.[wandb]'")
  said = []
  interrupted(tmp_path / 'run', 'wandb', said)
  name = json.loads((tmp_path / 'run' / trackers.NAMED).read_text())['name']
  found = sorted((tmp_path / 'run' / 'wandb').glob(f'offline-run-*/run-{name}.wandb'))
  assert len(found) == 2 and not said
  assert all(b'train/loss' in file.read_bytes() and b'optim' in file.read_bytes() for file in found)
