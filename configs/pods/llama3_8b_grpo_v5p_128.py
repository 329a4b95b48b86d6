"""GRPO of Llama 3.1 8B on a v5p-128 (64 chips): 512 answers of up to 1,024 tokens a rollout, all at once, FSDP.

jaxlm plan configs/pods/llama3_8b_grpo_v5p_128.py --topology v5p-128 (libtpu 0.0.42.1): peak 26.31 of 95.74 GiB a
chip, while weights are laid out for decoding; 20.34 in decoding (weights 14.96, cache 2.00), 6.12 in the step. A token
sends 4 bytes, with the layout of training 14 GiB. At best 1.13 s a step and 7.0 s to write a rollout.
Compiled for, not run on.

  jaxlm rl configs/pods/llama3_8b_grpo_v5p_128.py --run gs://BUCKET/runs/grpo --init gs://BUCKET/runs/8b-sft \
    --data.path gs://BUCKET/math.jsonl
"""

import dataclasses

from jaxlm.config import RL, Compute, Data, Lora, Optim, Rl
from jaxlm.models import presets

config = dataclasses.replace(
  RL,
  run='runs/llama3-8b-grpo',
  init='runs/llama3-8b-sft',
  model=presets.get('llama3.1-8b'),
  data=Data(seq_len=2048, global_batch=256),
  optim=Optim(lr=1e-6, schedule='constant', warmup_steps=10, weight_decay=0.0, b2=0.99),
  lora=Lora(),  # all weights learn, and the reference is a second tree
  compute=Compute(remat='full', loss_chunks=8),
  rl=Rl(algo='grpo', reward='math:answer', prompts=64, samples=8, decode_rows=512, max_new_tokens=1024, kl_coef=0.001),
  steps=1000,
)
