"""DPO of Llama 3.1 8B on a v5e-256: all weights learn, the reference reads every pair once before the first step; FSDP.

jaxlm plan configs/pods/llama3_8b_dpo_v5e_256.py --topology v5e-256 (libtpu 0.0.42.1): peak 1.73 of 15.75 GiB a
chip in the step, 0.66 in the reference's pass; 7.7 GiB of collectives waited for and 38 beside work; at best 69 % MFU
and 719,000 tokens/s. Compiled for, not run on.

  jaxlm preference configs/pods/llama3_8b_dpo_v5e_256.py --run gs://BUCKET/runs/dpo --init gs://BUCKET/runs/8b-sft \
    --data.path gs://BUCKET/preferences
"""

import dataclasses

from jaxlm.config import PREFERENCE, Compute, Data, Lora, Optim
from jaxlm.models import presets

config = dataclasses.replace(
  PREFERENCE,
  run='runs/llama3-8b-dpo',
  init='runs/llama3-8b-sft',
  model=presets.get('llama3.1-8b'),
  data=Data(seq_len=2048, packing='best_fit', global_batch=256),
  optim=Optim(lr=5e-7, warmup_steps=50, weight_decay=0.0, final_ratio=0.0),
  lora=Lora(),
  compute=Compute(remat='full', loss_chunks=8),
)
