"""Llama 3.1 8B on two v5e-256 slices: 512 rows of 4,096 tokens a step, FSDP inside of a slice, `data` across.

jaxlm plan configs/pods/llama3_8b_two_v5e_256.py --topology v5e-256 --slices 2 (libtpu 0.0.42.1): peak 2.97 of 15.75 GiB
a chip; 13 GiB of collectives waited for, 30 beside work, 0.07 received from the other slice; at best 69 % MFU and
1,350,000 tokens/s. Compiled for, not run on.

  jaxlm pretrain configs/pods/llama3_8b_two_v5e_256.py --run gs://BUCKET/runs/8b-two --data.path gs://BUCKET/data
"""

from jaxlm.config import Compute, Data, Mesh, Optim, Pretrain, Watch
from jaxlm.models import presets

config = Pretrain(
  run='runs/llama3-8b-two-slices',
  model=presets.get('llama3.1-8b'),
  data=Data(seq_len=4096, global_batch=512),
  optim=Optim(lr=3e-4, warmup_steps=2000),
  mesh=Mesh(data=2),
  compute=Compute(remat='full', loss_chunks=8, unroll=2),
  watch=Watch(save_every=1000, eval_every=1000, sample_every=0),
  steps=500_000,
)
