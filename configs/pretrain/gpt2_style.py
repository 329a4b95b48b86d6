"""A GPT-2-style model (learned positions, LayerNorm, GELU, biases) of 124 M parameters, for one accelerator or several.

jaxlm pretrain configs/pretrain/gpt2_style.py --run runs/gpt2 --data.path data/mine --mesh.fsdp 8
"""

from jaxlm.config import Compute, Data, Optim, Pretrain
from jaxlm.models.config import ModelConfig

config = Pretrain(
  run='runs/gpt2',
  model=ModelConfig(
    d_model=768,
    n_layers=12,
    n_heads=12,
    d_ff=3072,
    max_seq_len=1024,
    norm='layernorm',
    activation='gelu_tanh',
    gated_mlp=False,
    positions='learned',
    bias=True,
  ),
  data=Data(seq_len=1024, global_batch=512),
  optim=Optim(lr=6e-4, warmup_steps=700),
  compute=Compute(remat='full', loss_chunks=8, accum=4),
  steps=19000,
)
