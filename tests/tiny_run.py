"""A tiny run as processes: its data, a config where everything has its own rhythm, starting it, and what it leaves."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from jaxlm import config as configs
from jaxlm.config import Data, Optim, Pretrain, Watch
from jaxlm.data import prepare, sources, tokenizer
from jaxlm.models import ModelConfig
from jaxlm.quickstart import SAMPLE
from jaxlm.train.checkpoint import DIGEST, Checkpoints
from jaxlm.train.metrics import read_rows

SOURCE = str(SAMPLE / 'play.jsonl')
CONFIG = """
from jaxlm import config
from pathlib import Path
config = config.from_json(config.Pretrain, (Path(__file__).parent / 'settings.json').read_text())
"""
BASE = Pretrain(
  model=ModelConfig(d_model=96, n_layers=3, n_heads=3, d_ff=177),
  data=Data(seq_len=29, global_batch=5),
  optim=Optim(name='muon', lr=3e-3, warmup_steps=3),
  watch=Watch(log_every=2, eval_every=5, eval_batches=3, sample_every=7, sample_tokens=5, save_every=4, keep_last=100),
  steps=24,
)


def furnish(home: Path, config: Pretrain = BASE) -> Path:
  """Puts prepared data in `data`, its tokenizer and `tiny.py`, the config, into a folder, and returns it."""
  vocabulary = tokenizer.train((d.text for d in sources.documents((SOURCE,))), 307)
  vocabulary.save(home / 'tokenizer.json')
  prepare.prepare((SOURCE,), vocabulary, home / 'data', val_fraction=0.1)
  data = dataclasses.replace(config.data, path=str(home / 'data'))
  (home / 'settings.json').write_text(configs.to_json(dataclasses.replace(config, data=data)))
  (home / 'tiny.py').write_text(CONFIG)
  return home


def start(home: Path, run: Path, *flags: str, **env: str) -> subprocess.Popen:
  """`jaxlm pretrain` of the config in `home`, as a process whose output is one pipe; compiled programs stay there."""
  command = [sys.executable, '-m', 'jaxlm', 'pretrain', str(home / 'tiny.py'), '--run', str(run), *flags]
  env = os.environ | quick(home) | env
  return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def quick(home: Path) -> dict[str, str]:
  """The environment of processes on one device that compile in half the time, and each program once."""
  flags = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
  cache = {'JAX_COMPILATION_CACHE_DIR': str(home / 'cache'), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  return cache | {'XLA_FLAGS': flags}


def finish(process: subprocess.Popen, code: int = 0) -> str:
  """Waits for the end of a process, which must come with this exit code; returns what it printed."""
  out, _ = process.communicate(timeout=300)
  assert process.returncode == code, f'exit code {process.returncode}: {out}'
  return out


def logged(run: Path) -> int:
  """The last step that metrics.jsonl holds."""
  lines = (run / 'metrics.jsonl').read_text().split('\n')[:-1] if (run / 'metrics.jsonl').exists() else []
  return json.loads(lines[-1])['step'] if lines else 0


def unfinished(run: Path) -> list[str]:
  """Checkpoint folders without their acknowledgement."""
  folder = run / 'checkpoints'
  return [p.name for p in folder.iterdir() if not (p / DIGEST).exists()] if folder.exists() else []


def rows_and_samples(run: Path):
  """The rows without times and rates, and the samples."""
  rows = [
    {k: v for k, v in row.items() if k != 'time' and not k.startswith('perf/')}
    for row in read_rows(run / 'metrics.jsonl')
  ]
  return rows, read_rows(run / 'samples.jsonl')


def saved_state(run: Path, step: int):
  """All arrays of a saved step, on the host: parameters, optimizer, step, cursor and key."""
  from orbax.checkpoint import v1 as ocp

  path, here = Checkpoints(run / 'checkpoints').path(step), jax.sharding.SingleDeviceSharding(jax.devices()[0])
  there = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), ocp.metadata(path).metadata)
  return jax.tree.map(np.asarray, ocp.load(path, there))
