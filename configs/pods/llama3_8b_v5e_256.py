"""Llama 3.1 8B on a v5e-256: 256 rows of 4,096 tokens a step, FSDP over all chips.

jaxlm plan configs/pods/llama3_8b_v5e_256.py --topology v5e-256 (libtpu 0.0.42.1): peak 2.99 of 15.75 GiB a chip;
5.8 GiB of collectives waited for and 34.7 beside work; at best 72 % MFU and 710,000 tokens/s. Compiled for, not run on.

  jaxlm pretrain configs/pods/llama3_8b_v5e_256.py --run gs://BUCKET/runs/8b --data.path gs://BUCKET/data
"""

from jaxlm.config import Compute, Data, Optim, Pretrain, Watch
from jaxlm.models import presets

config = Pretrain(
  run='runs/llama3-8b',
  model=presets.get('llama3.1-8b'),
  data=Data(seq_len=4096, global_batch=256),
  optim=Optim(lr=3e-4, warmup_steps=2000),
  compute=Compute(remat='full', loss_chunks=8, unroll=2),
  watch=Watch(save_every=1000, eval_every=1000, sample_every=0),
  steps=1_000_000,
)
