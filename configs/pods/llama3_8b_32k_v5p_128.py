"""Llama 3.1 8B from 4k to 32k tokens on a v5p-128 (64 chips): YaRN, the sequence over 4 chips (ring attention).

jaxlm plan configs/pods/llama3_8b_32k_v5p_128.py --topology v5p-128 (libtpu 0.0.42.1): peak 12.00 of 95.74 GiB a
chip; 14.5 GiB of collectives waited for and 44.5 beside work; at best 71 % MFU and 215,000 tokens/s.
Compiled for, not run on.

  jaxlm pretrain configs/pods/llama3_8b_32k_v5p_128.py --run gs://BUCKET/runs/8b-32k --init gs://BUCKET/runs/8b \
    --data.path gs://BUCKET/long
"""

import dataclasses

from jaxlm.config import Compute, Data, Mesh, Optim, Pretrain, Watch
from jaxlm.models import presets

base = presets.get('llama3.1-8b')
model = dataclasses.replace(
  base,
  max_seq_len=32768,
  rope_scaling='yarn',
  rope_factor=8.0,
  rope_original_len=4096,
  rope_low=1.0,
  rope_high=32.0,
  rope_amplitude=1.2079,
)

config = Pretrain(
  run='runs/llama3-8b-32k',
  init='runs/llama3-8b',
  model=model,
  data=Data(seq_len=32768, global_batch=16, packing='best_fit'),
  optim=Optim(lr=2e-5, warmup_steps=20, schedule='constant'),
  mesh=Mesh(sequence=4),
  compute=Compute(remat='full', loss_chunks=8),
  watch=Watch(save_every=100, eval_every=100, sample_every=0),
  steps=1000,
)
