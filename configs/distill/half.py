"""A student of half the width and depth of the quickstart's model, on the text that its teacher was raised on.

jaxlm quickstart
jaxlm distill configs/distill/half.py
"""

from jaxlm.config import Data, Distill, Optim, Pretrain, Watch
from jaxlm.models.config import ModelConfig

config = Pretrain(
  run='runs/half',
  model=ModelConfig(d_model=128, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=320),
  data=Data(path='runs/quickstart/data', seq_len=256, global_batch=8),
  optim=Optim(name='muon', lr=5e-3, schedule='wsd', warmup_steps=20, decay_fraction=0.5, final_ratio=0.02),
  watch=Watch(log_every=10, eval_every=100, eval_batches=64, sample_every=0, save_every=100),
  steps=300,
  distill=Distill(teacher='runs/quickstart', loss='forward_kl', alpha=0.5),
)
