"""Files that grow, on disks that are full for a while."""

import contextlib
import json
import resource

import pytest

from jaxlm.data.datasets import _tf_records
from jaxlm.files import Appended
from jaxlm.train import board, metrics


@contextlib.contextmanager
def room(size):
  """No file may grow beyond so many bytes: writes fail half way, as on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_does_not_fit_is_told_once_and_written_when_it_fits(tmp_path):
  said = []
  file = Appended(tmp_path / 'a', said.append)
  file.add(b'0123456\n')
  with room(20):
    for letter in b'abcde':
      file.add(bytes([letter]) * 7 + b'\n')
    with pytest.raises(OSError, match='large'):
      file.flush()
    assert (tmp_path / 'a').stat().st_size == 20
  assert len(said) == 1 and 'kept in memory' in said[0] and str(tmp_path / 'a') in said[0]
  file.flush()
  whole = b'0123456\n' + b''.join(bytes([letter]) * 7 + b'\n' for letter in b'abcde')
  assert (tmp_path / 'a').read_bytes() == whole
  with room(len(whole)):
    file.add(b'lost\n')
    assert len(said) == 2  # the outage after is another one
    file.close()
  assert (tmp_path / 'a').read_bytes() == whole
  again = Appended(tmp_path / 'a')
  again.add(b'more\n')
  again.close()
  assert (tmp_path / 'a').read_bytes() == whole + b'more\n'


def test_no_row_is_lost_and_no_line_torn_by_a_full_disk(tmp_path):
  said = []
  writer = metrics.Writer(tmp_path, say=said.append)
  with room(1000):
    for step in range(1, 101):
      writer.row(step, {'train/loss': 1.0 / step})
      writer.sample(step, 'p', 'नमस्ते')
    with pytest.raises(OSError, match='large'):
      writer.flush()
    assert 0 < len(metrics.read_rows(tmp_path / 'metrics.jsonl')) < 100
  writer.row(101, {'train/loss': 0.0})
  writer.close()
  assert [row['step'] for row in metrics.read_rows(tmp_path / 'metrics.jsonl')] == list(range(1, 102))
  assert all(json.loads(line) for line in (tmp_path / 'samples.jsonl').read_text().splitlines())
  assert sorted(line.split(':')[0].split('/')[-1].split('.')[0] for line in said) == ['events', 'metrics', 'samples']


def test_tensorboard_reads_the_events(tmp_path):
  writer = metrics.Writer(tmp_path)
  writer.row(3, {'train/loss': 2.5, 'eval/legal gov/loss': 1.0})
  writer.close()
  metrics.Writer(tmp_path, 3).close()
  first, second = sorted(tmp_path.glob('events.out.tfevents.*'))
  head, scalars = (board._events.Event.FromString(record) for record in _tf_records(first, 1))
  assert head.file_version == 'brain.Event:2' and scalars.step == 3
  assert {v.tag: v.simple_value for v in scalars.summary.value} == {'train/loss': 2.5, 'eval/legal_gov/loss': 1.0}
  _, purge = (board._events.Event.FromString(record) for record in _tf_records(second, 1))
  assert (purge.step, purge.session_log.status) == (4, board._events.SessionLog.START)
