"""A 16 M-parameter Llama-style model on text of your own: an evening on a laptop, minutes on an accelerator.

jaxlm tokenizer my_text/ --out data/tokenizer.json
jaxlm prepare my_text/ --tokenizer data/tokenizer.json --out data/mine
jaxlm pretrain configs/pretrain/small.py --run runs/small --data.path data/mine
"""

from jaxlm.config import Data, Optim, Pretrain, Watch
from jaxlm.models.config import ModelConfig

config = Pretrain(
  run='runs/small',
  model=ModelConfig(d_model=384, n_layers=6, n_heads=6, n_kv_heads=2, d_ff=1024),
  data=Data(seq_len=256, global_batch=16),
  optim=Optim(name='muon', lr=3e-3, schedule='wsd', warmup_steps=50, decay_fraction=0.3),
  watch=Watch(log_every=5, eval_every=250, sample_every=250, save_every=250),
  steps=2000,
)
