"""What a run writes down: metrics.jsonl is the truth, trackers and the progress line are views of it."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from jaxlm.errors import InputError
from jaxlm.files import Appended, write_whole
from jaxlm.models import ModelConfig
from jaxlm.train import trackers

COMPOSITION = 'training tokens by kind'  # a section of a run's facts

# Peak dense bfloat16 FLOP/s of a device, by the start of its `device_kind` (vendors' data sheets).
PEAK_FLOPS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5p': 459e12,
  'TPU v5': 459e12,
  'TPU v6 lite': 918e12,
  'TPU7x': 1154e12,
  'NVIDIA A100': 312e12,
  'NVIDIA H100': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA B200': 2250e12,
}


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
  """Training FLOPs a token: 6 for every weight it is multiplied by, 12 * width of the heads for every key of a layer.

  The convention of PaLM (arXiv:2204.02311, appendix B): no recomputation counted, the causal mask not halved. Of the
  experts those that a token goes through are counted, with their router; keys are seq_len, or a local layer's window.
  """
  H, K, N = cfg.n_heads, cfg.kv_heads, cfg.head_size
  attention = cfg.d_model * N * (2 * H + 2 * K)
  width, router = cfg.d_ff, 0
  if cfg.n_experts:
    width = cfg.experts_per_token * cfg.d_ff + cfg.shared_d_ff
    router = cfg.d_model * (cfg.n_experts + bool(cfg.shared_d_ff))
  mlp = cfg.d_model * width * (3 if cfg.gated_mlp else 2) + router
  matmuls = cfg.n_layers * (attention + mlp) + cfg.d_model * cfg.vocab_size
  keys = sum(min(seq_len, cfg.window) if kind == 'local' else seq_len for kind in cfg.kinds)
  return 6.0 * matmuls + 12.0 * keys * H * N


def peak_flops(devices: Any) -> float | None:
  """FLOP/s of all devices together: from the table, measured on a CPU, None for a device that is in neither."""
  kind = devices[0].device_kind
  if devices[0].platform == 'cpu':
    return matmul_rate()
  known = next((rate for name, rate in PEAK_FLOPS.items() if kind.startswith(name)), None)
  return None if known is None else known * len(devices)


def matmul_rate(size: int = 1024, tries: int = 5) -> float:
  """The best float32 matmul rate of the default device in FLOP/s, measured in well under a second."""
  x = jnp.ones((size, size))
  matmul = jax.jit(jnp.matmul)
  matmul(x, x).block_until_ready()
  times = []
  for _ in range(tries):
    start = time.perf_counter()
    matmul(x, x).block_until_ready()
    times.append(time.perf_counter() - start)
  return 2.0 * size**3 / min(times)


def memory() -> dict[str, float]:
  """GiB: the most that one of this process's devices held so far, where they tell, and what the process holds now."""
  peaks = [(one.memory_stats() or {}).get('peak_bytes_in_use', 0) for one in jax.local_devices()]
  found = {'perf/device_gib': max(peaks) / 2**30} if max(peaks, default=0) else {}
  pages = Path('/proc/self/statm')  # of Linux alone
  if pages.exists():
    found['perf/host_gib'] = int(pages.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**30
  return found


class Writer:
  """Appends rows to `metrics.jsonl` in the run's folder, and gives them to its tracker.

  Opening it at a step cuts the rows after that step, so that a restored run continues as if it had never stopped.
  `timeline.jsonl` says what happened when, and how long it took, and is never cut: lost work took its time too.
  What cannot be written, `say` is told; nothing here ends a run but `flush`.
  """

  def __init__(
    self,
    run: Any,
    step: int = 0,
    say: Callable[[str], None] = lambda line: None,
    *,
    tracker: trackers.Kind = 'tensorboard',
    config: Mapping[str, Any] = {},
  ):
    run = epath.Path(run)
    run.mkdir(parents=True, exist_ok=True)
    self._rows, self._samples = (_continued(run / name, step or -1, say) for name in ('metrics.jsonl', 'samples.jsonl'))
    self._timeline = _continued(run / 'timeline.jsonl', math.inf, say)
    self._tracker = trackers.open_tracker(tracker, run, step, say, config)
    self.happened(step, 'start')

  def row(self, step: int, values: dict[str, float]) -> None:
    """One line of metrics; a value that is not finite is written as null."""
    clean = {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
    self._rows.add(_line({'step': step, 'time': round(time.time(), 3), **clean}))
    self._tracker.row(step, {name: value for name, value in clean.items() if value is not None})

  def sample(self, step: int, prompt: str, text: str, **scores: float) -> None:
    """One generated text, and what it is worth by name."""
    self._samples.add(_line({'step': step, 'prompt': prompt, 'text': text, **scores}))
    self._tracker.sample(step, prompt, text)

  def happened(self, step: int, what: str, seconds: float = 0.0) -> None:
    """A start, an evaluation, samples or a save, which ended now and took so long."""
    line = {'step': step, 'time': round(time.time(), 3), 'what': what, 'seconds': round(seconds, 3)}
    self._timeline.add(_line(line))

  def flush(self) -> None:
    """Returns once all rows are on disk, or in the store. Raises OSError if they cannot be."""
    for file in (self._rows, self._samples, self._timeline, self._tracker):
      file.flush()

  def close(self) -> None:
    """Closes the files."""
    for file in (self._rows, self._samples, self._timeline, self._tracker):
      file.close()


class Unwritten:
  """In place of a Writer in all processes but the first."""

  def row(self, step: int, values: dict[str, float]) -> None:
    """Nothing."""

  def sample(self, step: int, prompt: str, text: str, **scores: float) -> None:
    """Nothing."""

  def happened(self, step: int, what: str, seconds: float = 0.0) -> None:
    """Nothing."""

  def flush(self) -> None:
    """Nothing."""

  def close(self) -> None:
    """Nothing."""


def _continued(path: epath.Path, step: float, say: Callable[[str], None]) -> Appended:
  """The file with its rows up to that step, to be appended to."""
  kept = b''.join(_line(row) for row in read_rows(path) if row['step'] <= step)
  write_whole(path, kept.decode())
  return Appended(path, say)


def _line(row: dict[str, Any]) -> bytes:
  return json.dumps(row, ensure_ascii=False).encode() + b'\n'


def read_rows(path: Any) -> list[dict[str, Any]]:
  """The rows of a `.jsonl` that a run writes; a last line that a kill cut short is left out.

  Raises InputError, naming the line, where another is no row.
  """
  path, rows = epath.Path(path), []
  lines = path.read_bytes().split(b'\n') if path.exists() else []
  for number, line in enumerate(lines[:-1], 1):
    try:
      row = json.loads(line)
    except ValueError:
      row = None
    if not isinstance(row, dict) or not isinstance(row.get('step'), int):
      raise InputError(f'{path}:{number}: damaged: no row with a step: mend the line, or remove it')
    rows.append(row)
  return rows
