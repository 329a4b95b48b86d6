"""Instructions of every kind: Alpaca's columns, ShareGPT or `messages`, read as they are.

jaxlm import SmolLM2-135M-Instruct.Q4_1.gguf --run runs/smol
jaxlm prepare chat=rows.jsonl --tokenizer runs/smol --out data/chat --chat --max-len 1024
jaxlm sft configs/tasks/chat.py
jaxlm eval runs/chat --tasks 50 --against runs/smol
"""

import dataclasses

from jaxlm.config import SFT

config = dataclasses.replace(
  SFT,
  run='runs/chat',
  init='runs/smol',
  data=dataclasses.replace(SFT.data, path='data/chat', seq_len=1024, global_batch=8),
  optim=dataclasses.replace(SFT.optim, lr=5e-4),
  watch=dataclasses.replace(SFT.watch, patience=5),
)
