"""Loss spikes: seen against the recent median, answered by the last save and the data after the spike."""

import json
import statistics
from collections import deque
from typing import Any

from etils import epath

from jaxlm import hosts
from jaxlm.errors import InputError
from jaxlm.files import read_json, write_whole
from jaxlm.train.metrics import read_rows

FILE = 'rewinds.json'
RECENT, FEWEST = 32, 8  # rows that the median is of, at most and at least


class Spike(Exception):
  """The loss of `step` was a spike; training is to go on behind the batch of that step."""

  def __init__(self, step: int, loss: float, median: float):
    super().__init__(f'step {step}: loss {loss:.3f} against a recent median of {median:.3f}')
    self.step = step


class Rewinds:
  """The rewinds of a run, kept in `rewinds.json`, so that a run killed after one resumes behind the skipped data.

  An entry holds the `step` gone back to, the `spike` that was seen and the `cursor` training went on from.
  """

  def __init__(self, run: Any, factor: float, most: int):
    self._run, self._factor, self._most = epath.Path(run), factor, most
    path = self._run / FILE
    self.entries: list[dict[str, int]] = hosts.from_first(lambda: read_json(path, list) if path.exists() else [])
    self._losses: deque[float] = deque(maxlen=RECENT)

  def begin(self, step: int) -> int | None:
    """To be called where training starts at a saved `step`; the cursor to use, if that step was rewound to."""
    self._losses = deque(hosts.from_first(lambda: self._recent(step)), RECENT)
    return next((entry['cursor'] for entry in reversed(self.entries) if entry['step'] == step), None)

  def _recent(self, step: int) -> list[float]:
    rows = [row for row in read_rows(self._run / 'metrics.jsonl') if row['step'] <= step]
    return [row['train/loss'] for row in rows if row.get('train/loss') is not None][-RECENT:]

  def check(self, step: int, loss: float) -> None:
    """Raises Spike if the loss exceeds `factor` times the median of the rows before it; for every step."""
    median = statistics.median(self._losses) if len(self._losses) >= FEWEST else None
    if median is not None and loss > self._factor * median:
      raise Spike(step, loss, median)

  def row(self, loss: float) -> None:
    """To be told the loss of every row, once it was checked."""
    if loss == loss:
      self._losses.append(loss)

  def add(self, step: int, spike: int, cursor: int) -> None:
    """Writes a rewind down. Raises InputError if there were too many."""
    if len(self.entries) >= self._most:
      raise InputError(
        f'{self._run}: the loss spiked again at step {spike} after {self._most} rewinds: lower optim.lr, '
        'or raise watch.spike or watch.most_rewinds'
      )
    self.entries.append({'step': step, 'spike': spike, 'cursor': cursor})
    hosts.from_first(lambda: write_whole(self._run / FILE, json.dumps(self.entries, indent=1)))
