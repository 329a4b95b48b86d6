"""What a run writes down: metrics.jsonl is the truth, TensorBoard and the progress line are views of it."""

import json
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from jaxlm.files import write_whole
from jaxlm.models import ModelConfig

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
  """Training FLOPs a token: 6 for every weight of a matmul, 12 * seq_len * width of the heads a layer for attention.

  The convention of PaLM (arXiv:2204.02311, appendix B): no recomputation counted, the causal mask not halved.
  """
  H, K, N = cfg.n_heads, cfg.kv_heads, cfg.head_size
  attention = cfg.d_model * N * (2 * H + 2 * K)
  mlp = cfg.d_model * cfg.d_ff * (3 if cfg.gated_mlp else 2)
  matmuls = cfg.n_layers * (attention + mlp) + cfg.d_model * cfg.vocab_size
  return 6.0 * matmuls + 12.0 * cfg.n_layers * seq_len * H * N


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


class Writer:
  """Appends rows to `metrics.jsonl` and scalars to TensorBoard's event file in the run's folder.

  Opening it at a step cuts the rows after that step, so that a restored run continues as if it had never stopped.
  """

  def __init__(self, run: Any, step: int = 0):
    from tensorboardX import SummaryWriter

    self.run = epath.Path(run)
    self.run.mkdir(parents=True, exist_ok=True)
    for name in ('metrics.jsonl', 'samples.jsonl'):
      kept = [row for row in read_rows(self.run / name) if row['step'] <= step]
      write_whole(self.run / name, ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in kept))
    self._metrics = (self.run / 'metrics.jsonl').open('a')
    self._samples = (self.run / 'samples.jsonl').open('a')
    self._board = SummaryWriter(str(self.run), purge_step=step + 1 if step else None)

  def row(self, step: int, values: dict[str, float]) -> None:
    """One line of metrics; a value that is not finite is written as null."""
    clean = {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
    self._append(self._metrics, {'step': step, 'time': round(time.time(), 3), **clean})
    for name, value in clean.items():
      if value is not None:
        self._board.add_scalar(name, value, step)

  def sample(self, step: int, prompt: str, text: str) -> None:
    """One generated text."""
    self._append(self._samples, {'step': step, 'prompt': prompt, 'text': text})
    self._board.add_text('sample', f'**{prompt}** {text}', step)

  def close(self) -> None:
    """Closes the files."""
    for file in (self._metrics, self._samples, self._board):
      file.close()

  def _append(self, file: Any, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + '\n')
    file.flush()


def read_rows(path: Any) -> list[dict[str, Any]]:
  """The rows of a `.jsonl` that a run writes; a last line that a kill cut short is left out."""
  path = epath.Path(path)
  lines = path.read_bytes().split(b'\n') if path.exists() else []
  return [json.loads(line) for line in lines[:-1]]
