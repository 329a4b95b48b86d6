"""TensorBoard's event file."""

import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from etils import epath
from tensorboardX import summary
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from jaxlm.files import Appended
from jaxlm.train.trackers import Tracker, Values

_events: Any = event_pb2  # generated modules: no type checker sees what is in them
_summaries: Any = summary_pb2


class Board(Tracker):
  """TensorBoard's event file in the run's folder."""

  def __init__(self, run: epath.Path, step: int, say: Callable[[str], None]):
    self._file = Appended(run / f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}', say)
    self._file.add(_event(file_version='brain.Event:2'))
    if step:  # hides what an interrupted run showed after it
      self._file.add(_event(step=step + 1, session_log=_events.SessionLog(status=_events.SessionLog.START)))

  def row(self, step: int, values: Values) -> None:
    scalars = [summary.scalar(name, value).value[0] for name, value in values.items()]
    self._file.add(_event(step=step, summary=_summaries.Summary(value=scalars)))

  def sample(self, step: int, prompt: str, text: str) -> None:
    self._file.add(_event(step=step, summary=summary.text('sample', f'**{prompt}** {text}')))

  def flush(self) -> None:
    self._file.flush()

  def close(self) -> None:
    self._file.close()


def _event(**fields: Any) -> bytes:
  """One record of an event file: its length, the event, and a checksum of each."""
  data = _events.Event(wall_time=time.time(), **fields).SerializeToString()
  length = struct.pack('<Q', len(data))
  return b''.join((length, _checksum(length), data, _checksum(data)))


def _checksum(data: bytes) -> bytes:
  return struct.pack('<I', masked_crc32c(data))
