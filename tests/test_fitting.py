"""A run whose step does not fit into its devices' memory is refused before anything is computed."""

import pytest
from tiny_run import furnish

from jaxlm import cli, fitting
from jaxlm.train import metrics


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  return furnish(tmp_path_factory.mktemp('fitting'))


def run(home, name, *args):
  return cli.main(
    [
      'pretrain',
      str(home / 'tiny.py'),
      '--mesh.fsdp',
      '1',
      '--mesh.data',
      '8',
      '--data.global-batch',
      '16',
      '--run',
      str(home / name),
      '--steps',
      '6',
      *args,
    ]
  )


def losses(home, name):
  return [row['train/loss'] for row in metrics.read_rows(home / name / 'metrics.jsonl') if 'train/loss' in row]


def test_a_step_that_does_not_fit_is_one_line_and_no_step(home, monkeypatch, capsys):
  monkeypatch.setattr(fitting, 'memory_limit', lambda mesh: 10_000)
  assert run(home, 'large') == 1
  line = capsys.readouterr().err.strip().splitlines()[-1]
  assert line.startswith('jaxlm: the step needs ') and 'of a device that has 0.00' in line and 'jaxlm plan' in line
  assert not (home / 'large' / 'metrics.jsonl').exists() and not list((home / 'large').glob('checkpoints/*'))


@pytest.mark.slow
def test_a_step_that_fits_is_the_same(home, monkeypatch):
  """Batches of another size, as in a warm-up, too."""
  ramp = ('--data.batch-warmup', '8=3')
  assert run(home, 'unknown', *ramp) == 0
  monkeypatch.setattr(fitting, 'memory_limit', lambda mesh: 10**12)
  assert run(home, 'known', *ramp) == 0
  assert losses(home, 'known') == losses(home, 'unknown') != []


def test_a_cpu_does_not_say_what_it_has():
  from jaxlm import sharding

  assert fitting.memory_limit(sharding.make_mesh()) is None
