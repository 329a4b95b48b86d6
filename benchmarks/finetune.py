"""A step of full fine-tuning and one of LoRA, beside transformers and peft on the same rows, interleaved.

python benchmarks/finetune.py [--rows 4] [--seq-len 256] [--remat none] [--loss-chunks 1] [--rounds 3]: the sizes of
--preset (SmolLM2-135M), random weights in float32, AdamW, rank 16 on every matrix of a layer. On a CPU all is float32;
on a GPU both compute in bfloat16 (`torch.autocast`, a fused AdamW, with --compile `torch.compile`). Only ratios mean
something on a shared machine. torch's rows are there where torch, transformers and peft are (pip install -e
'.[parity]').
For both on one GPU set XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from jaxlm import program, sharding
from jaxlm.config import Compute, Data, Lora, Optim, Pretrain
from jaxlm.console import table
from jaxlm.models import presets

RANK = 16


def batch_of(args: argparse.Namespace) -> dict[str, np.ndarray]:
  rows, length = args.rows, args.seq_len
  ids = np.random.default_rng(0).integers(10, presets.get(args.preset).vocab_size, (rows, length + 1))
  ones = np.ones((rows, length), np.int32)
  found = {'tokens': ids[:, :-1], 'targets': ids[:, 1:], 'segment_ids': ones, 'target_bytes': ones}
  found['positions'] = np.broadcast_to(np.arange(length), ones.shape)
  return {name: x.astype(np.int32) for name, x in found.items()} | {'loss_mask': ones.astype(np.float32)}


def ours(args: argparse.Namespace, rank: int) -> tuple[Callable[[], None], float]:
  """(one step, the MiB that its program holds) of our own."""
  compute = Compute(remat=args.remat, loss_chunks=args.loss_chunks, attention=args.attention)
  data, optim = Data(seq_len=args.seq_len, global_batch=args.rows), Optim(lr=1e-4, warmup_steps=0)
  run = Pretrain(model=presets.get(args.preset), data=data, compute=compute, optim=optim, lora=Lora(rank=rank))
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  built = program.build(run, mesh)
  batch, held = program.put(batch_of(args), built.batch), {'state': built.create()}
  memory = built.step.lower(built.abstract, built.batch).compile().memory_analysis()  # ty: ignore
  size = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

  def step() -> None:
    held['state'], metrics = built.step(held['state'], batch)
    metrics['loss'].block_until_ready()

  return step, (size - memory.alias_size_in_bytes) / 2**20


def theirs(args: argparse.Namespace, rank: int) -> Callable[[], None]:
  """One step of transformers, with peft if there is a rank."""
  import torch
  import transformers

  cfg, on = presets.get(args.preset), 'cuda' if torch.cuda.is_available() else 'cpu'
  sizes = {'hidden_size': cfg.d_model, 'intermediate_size': cfg.d_ff, 'num_hidden_layers': cfg.n_layers}
  heads = {'num_attention_heads': cfg.n_heads, 'num_key_value_heads': cfg.kv_heads, 'vocab_size': cfg.vocab_size}
  heads |= {'head_dim': cfg.head_size, 'tie_word_embeddings': cfg.tie_embeddings}
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).train().to(on)
  if args.remat != 'none':
    model.gradient_checkpointing_enable()
  if rank:
    import peft

    model.enable_input_require_grads()
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules='all-linear', task_type='CAUSAL_LM'))
  optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=on == 'cuda')
  batch = batch_of(args)
  ids = torch.tensor(np.concatenate([batch['tokens'], batch['targets'][:, -1:]], 1).astype(np.int64), device=on)
  called = torch.compile(model) if args.compile else model

  def step() -> None:
    with torch.autocast(on, torch.bfloat16, enabled=on == 'cuda'):
      loss = called(ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()  # waits

  return step


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rows', type=int, default=4)
  parser.add_argument('--seq-len', type=int, default=256)
  parser.add_argument('--remat', default='none')
  parser.add_argument('--loss-chunks', type=int, default=1, help='slices of the vocabulary; of ours only')
  parser.add_argument('--preset', default='smollm2-135m')
  parser.add_argument('--attention', default='auto', help='of ours only')
  parser.add_argument('--compile', action='store_true', help='`torch.compile` of theirs')
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  (full, full_mib), (low, low_mib) = (ours(args, rank) for rank in (0, RANK))
  steps = {'jaxlm, full': full, 'jaxlm, LoRA': low}
  if all(importlib.util.find_spec(name) for name in ('torch', 'transformers', 'peft')):
    steps |= {'transformers, full': theirs(args, 0), 'transformers + peft, LoRA': theirs(args, RANK)}
  times: dict[str, list[float]] = {name: [] for name in steps}
  for round_ in range(args.rounds + 1):
    for name, step in steps.items():
      began = time.perf_counter()
      step()
      if round_:  # the first compiles
        times[name].append(time.perf_counter() - began)
  medians = {name: statistics.median(some) for name, some in times.items()}
  sizes = {'jaxlm, full': full_mib, 'jaxlm, LoRA': low_mib}
  base, tokens = medians['jaxlm, full'], args.rows * args.seq_len
  lines = [(n, t, tokens / t, t / base, round(sizes[n]) if n in sizes else '') for n, t in medians.items()]
  print(table(('step', 'seconds', 'tokens/s', 'of jaxlm, full', 'MiB of the program'), lines))


if __name__ == '__main__':
  main()
