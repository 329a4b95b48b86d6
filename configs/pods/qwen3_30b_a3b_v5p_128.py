"""Qwen 3 30B-A3B on a v5p-128 (64 chips): 64 rows of 4,096 tokens a step, experts over 8 chips, FSDP over the rest.

jaxlm plan configs/pods/qwen3_30b_a3b_v5p_128.py --topology v5p-128 (libtpu 0.0.42.1): peak 11.77 of 95.74 GiB a chip;
63 GiB of collectives waited for (36 of tokens that travel to their experts); at best 49 % MFU and 511,000 tokens/s.
Compiled for, not run on.

  jaxlm pretrain configs/pods/qwen3_30b_a3b_v5p_128.py --run gs://BUCKET/runs/moe --data.path gs://BUCKET/data
"""

from jaxlm.config import Compute, Data, Mesh, Optim, Pretrain, Watch
from jaxlm.models import presets

config = Pretrain(
  run='runs/qwen3-30b-a3b',
  model=presets.get('qwen3-30b-a3b'),
  data=Data(seq_len=4096, global_batch=64),
  optim=Optim(lr=3e-4, warmup_steps=2000),
  mesh=Mesh(expert=8),
  compute=Compute(remat='full', loss_chunks=8),
  watch=Watch(save_every=1000, eval_every=1000, sample_every=0),
  steps=1_000_000,
)
