"""A reward model of few pairs: the value head alone, on what a small chat model makes of the answers, over five folds.

The trunk reads all answers once; then an epoch is a matrix product. The figures are in `docs/log.md`.

jaxlm import hf://HuggingFaceTB/SmolLM2-135M-Instruct --run runs/smol
jaxlm reward configs/preference/head.py --init runs/smol --data.path dpo.jsonl
jaxlm plan configs/preference/head.py --init runs/smol --topology v5e-1
"""

import dataclasses

from jaxlm.config import REWARD, Lora, Optim, Preference

config = dataclasses.replace(
  REWARD,
  run='runs/head',
  trainable='value',
  lora=Lora(rank=0),
  optim=Optim(lr=1e-3, warmup_steps=10, weight_decay=1.0, final_ratio=0.0),
  preference=Preference(stage='reward', folds=5),
  epochs=10.0,
)
