"""On-policy distillation (GKD, arXiv:2306.13649): a small chat model answers, a larger one says what it would say.

jaxlm import hf://HuggingFaceTB/SmolLM2-360M-Instruct --run runs/teacher
jaxlm import hf://HuggingFaceTB/SmolLM2-135M-Instruct --run runs/smol
jaxlm distill configs/distill/gkd.py --init runs/smol --data.path rows.jsonl
"""

import dataclasses

from jaxlm.config import DISTILL, Distill, Optim, Rl

config = dataclasses.replace(
  DISTILL,
  run='runs/gkd',
  data=dataclasses.replace(DISTILL.data, seq_len=512, global_batch=32),
  optim=Optim(lr=1e-5, warmup_steps=10, weight_decay=0.0),
  distill=Distill(teacher='runs/teacher', loss='jensen_shannon', beta=0.5, on_policy=0.5),
  rl=Rl(max_new_tokens=128, temperature=0.9),
)
