"""Llama 3.1 70B on a v5p-512 (256 chips): 256 rows of 4,096 tokens a step, FSDP over all chips.

jaxlm plan configs/pods/llama3_70b_v5p_512.py --topology v5p-512 (libtpu 0.0.42.1): peak 11.83 of 95.74 GiB a chip;
40 GiB of collectives waited for and 373 beside work; at best 76 % MFU and 198,000 tokens/s. Compiled for, not run on.

  jaxlm pretrain configs/pods/llama3_70b_v5p_512.py --run gs://BUCKET/runs/70b --data.path gs://BUCKET/data
"""

from jaxlm.config import Compute, Data, Optim, Pretrain, Watch
from jaxlm.models import presets

config = Pretrain(
  run='runs/llama3-70b',
  model=presets.get('llama3.1-70b'),
  data=Data(seq_len=4096, global_batch=256),
  optim=Optim(lr=1.5e-4, warmup_steps=2000),
  compute=Compute(remat='full', loss_chunks=8),
  watch=Watch(save_every=500, eval_every=1000, sample_every=0),
  steps=1_000_000,
)
