"""Sums by GRPO, from a chat model; the last number of an answer is judged.

jaxlm import model.gguf --run runs/smol
jaxlm rl configs/rl/arithmetic.py --init runs/smol --run runs/arithmetic
"""

import dataclasses

from jaxlm.config import RL, Data, Optim, Rl

config = dataclasses.replace(
  RL,
  data=Data(path='gym:chain_sum,max_terms=2,max_digits=2', seq_len=64, global_batch=64),
  optim=Optim(lr=3e-4, schedule='constant', warmup_steps=5, weight_decay=0.0, b2=0.99),
  rl=Rl(algo='grpo', reward='number:answer', prompts=8, samples=8, held_out=128, max_new_tokens=16),
  steps=60,
)
