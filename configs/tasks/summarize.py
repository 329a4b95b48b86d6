"""Summaries: rows of `document` and `summary`, scored by ROUGE-L.

jaxlm import SmolLM2-135M-Instruct.Q4_1.gguf --run runs/smol
jaxlm prepare summaries=summaries.jsonl --tokenizer runs/smol --out data/summarize --chat --max-len 512
jaxlm sft configs/tasks/summarize.py
jaxlm eval runs/summarize --tasks 50 --against runs/smol
"""

import dataclasses

from jaxlm.config import SFT

config = dataclasses.replace(
  SFT,
  run='runs/summarize',
  init='runs/smol',
  data=dataclasses.replace(SFT.data, path='data/summarize', seq_len=512, global_batch=8),
  optim=dataclasses.replace(SFT.optim, lr=1e-3),
  watch=dataclasses.replace(SFT.watch, patience=5),
)
