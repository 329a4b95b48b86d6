"""GPT-2 of 124 M parameters on 10 B tokens of web text, half a million a step, for one accelerator or several.

With GPT-2's own tokenizer and a sample of FineWeb (any prepared text and tokenizer will do):

  jaxlm import hf://openai-community/gpt2 --run runs/openai
  jaxlm prepare 'hf://datasets/HuggingFaceFW/fineweb/sample/10BT/*.parquet' \
    --tokenizer runs/openai/tokenizer.json --out data/fineweb
  jaxlm pretrain configs/gpt2/124m.py --data.path data/fineweb --mesh.fsdp 8
  jaxlm export runs/gpt2-124m gpt2-124m
"""

import dataclasses

from jaxlm.config import Compute, Data, Optim, Pretrain
from jaxlm.models import presets

config = Pretrain(
  run='runs/gpt2-124m',
  model=dataclasses.replace(presets.get('gpt2-124m'), vocab_size=0),  # the tokenizer's: 50,257 with GPT-2's
  data=Data(seq_len=1024, global_batch=512),
  optim=Optim(lr=6e-4, warmup_steps=700),
  compute=Compute(remat='full', loss_chunks=8, accum=4),
  steps=19000,
)
