"""Short answers: rows of `question` and `answer`, scored by exact match and F1.

jaxlm import SmolLM2-135M-Instruct.Q4_1.gguf --run runs/smol
jaxlm prepare qa=qa.jsonl --tokenizer runs/smol --out data/qa --chat --max-len 256
jaxlm sft configs/tasks/qa.py
jaxlm eval runs/qa --tasks 50 --against runs/smol --max-new-tokens 48
"""

import dataclasses

from jaxlm.config import SFT

config = dataclasses.replace(
  SFT,
  run='runs/qa',
  init='runs/smol',
  data=dataclasses.replace(SFT.data, path='data/qa', seq_len=256, global_batch=8),
  optim=dataclasses.replace(SFT.optim, lr=1e-3),
  watch=dataclasses.replace(SFT.watch, patience=5),
)
