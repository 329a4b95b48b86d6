"""PPO of Llama 3.1 8B on a v5e-256: 512 answers of up to 512 tokens a rollout, tensor 8 (a chip could not hold whole
weights to decode with) and FSDP over the rest, a value head and a reference as a second tree.

jaxlm plan configs/pods/llama3_8b_ppo_v5e_256.py --topology v5e-256 (libtpu 0.0.42.1): peak 4.21 of 15.75 GiB a
chip, while weights are laid out for decoding; 2.72 in decoding (weights 1.87, cache 0.25), 0.91 in the step. A token
sends 0.008 GiB (activations, over 8 chips), with the layout of training 1.76. At best 0.21 s a step and 1.6 s to write
a rollout. Compiled for, not run on.

  jaxlm rl configs/pods/llama3_8b_ppo_v5e_256.py --run gs://BUCKET/runs/ppo --init gs://BUCKET/runs/8b-sft \
    --data.path gs://BUCKET/math.jsonl
"""

import dataclasses

from jaxlm.config import RL, Compute, Data, Lora, Mesh, Optim, Rl
from jaxlm.models import presets

config = dataclasses.replace(
  RL,
  run='runs/llama3-8b-ppo',
  init='runs/llama3-8b-sft',
  model=presets.get('llama3.1-8b'),
  data=Data(seq_len=1024, global_batch=128),
  optim=Optim(lr=1e-6, schedule='constant', warmup_steps=10, weight_decay=0.0, b2=0.99),
  lora=Lora(),
  mesh=Mesh(tensor=8),
  compute=Compute(remat='full', loss_chunks=8),
  rl=Rl(algo='ppo', reward='math:answer', prompts=512, samples=1, decode_rows=512, max_new_tokens=512, kl_coef=0.05),
  steps=1000,
)
