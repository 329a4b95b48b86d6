"""Prefill and decode beside transformers, on the same weights, interleaved: `python benchmarks/decode.py MODEL.gguf`.

A prompt of 512 tokens, then 128 greedy ones, at batch 1 and 8: float32 on the CPU, bfloat16 on a GPU (for both on one
set XLA_PYTHON_CLIENT_PREALLOCATE=false). The model is exported once for transformers. Times are medians of interleaved
rounds; only their ratios mean something on a shared machine.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import interop, sample
from jaxlm.console import table
from jaxlm.models import Run, computed_in

PROMPT, NEW = 512, 128


def ours(model: interop.Model, batch: int) -> tuple[Callable[[], None], Callable[[], None]]:
  """(prefill with the first token, decode of the others) of our own, compiled: each call runs one to its end."""
  run = Run(computed_in('auto', jax.default_backend()))
  params = sample.readied(model.cfg, model.params, run.dtype)
  prompts = np.random.default_rng(0).integers(10, model.cfg.vocab_size, (batch, PROMPT)).tolist()
  greedy, stop = sample.Sampling(0.0), jnp.zeros(0, jnp.int32)
  how = {'max_new_tokens': NEW + 1, 'sampling': greedy, 'run': run}
  begin = lambda: sample.begin(model.cfg, params, prompts, jax.random.key(0), **how)
  started = []

  def prefill() -> None:
    started[:] = [jax.block_until_ready(begin())]

  def decode() -> None:
    jax.block_until_ready(sample.advance(model.cfg, run, NEW, params, started.pop(), greedy, stop).out)

  return prefill, decode


def theirs(folder: str, batch: int, vocabulary: int) -> tuple[Callable[[], None], Callable[[], None]]:
  """The same of transformers: `generate` for one token, and for all of them less that time."""
  import torch
  import transformers

  on, dtype = ('cuda', torch.bfloat16) if torch.cuda.is_available() else ('cpu', torch.float32)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(on)
  ids = torch.tensor(np.random.default_rng(0).integers(10, vocabulary, (batch, PROMPT)), device=on)
  how = {'do_sample': False, 'pad_token_id': 0, 'eos_token_id': None, 'attention_mask': torch.ones_like(ids)}
  run = lambda new: model.generate(ids, max_new_tokens=new, min_new_tokens=new, **how).cpu()
  return lambda: run(1), lambda: run(NEW + 1)


def seconds(act: Callable[[], None]) -> float:
  began = time.perf_counter()
  act()
  return time.perf_counter() - began


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('model')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--batches', type=int, nargs='+', default=[1, 8])
  args = parser.parse_args()
  model, rows = interop.load(args.model), []
  with tempfile.TemporaryDirectory() as folder:
    interop.export(model, f'{folder}/hf')
    for batch in args.batches:
      mine, other = ours(model, batch), theirs(f'{folder}/hf', batch, model.cfg.vocab_size)
      for act in (*mine, *other):
        act()  # compiles, warms up
      times: dict[str, list[float]] = {name: [] for name in ('prefill', 'decode', 'their prefill', 'their decode')}
      for _ in range(args.rounds):
        times['prefill'].append(seconds(mine[0]))
        times['decode'].append(seconds(mine[1]))
        first = seconds(other[0])
        times['their prefill'].append(first)
        times['their decode'].append(seconds(other[1]) - first)
      for what, tokens in (('prefill', batch * PROMPT), ('decode', batch * NEW)):
        here, there = (statistics.median(times[name]) for name in (what, f'their {what}'))
        rows.append((what, batch, round(tokens / here), round(tokens / there), there / here))
  print(table(('what', 'batch', 'jaxlm tokens/s', 'transformers tokens/s', 'ratio'), rows))


if __name__ == '__main__':
  main()
