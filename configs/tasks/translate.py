"""Translation by a small chat model: pairs of texts in two languages, scored by chrF.

jaxlm import SmolLM2-135M-Instruct.Q4_1.gguf --run runs/smol
jaxlm prepare spanish=es.jsonl hindi=hi.jsonl --tokenizer runs/smol --out data/translate --chat --max-len 256
jaxlm sft configs/tasks/translate.py
jaxlm eval runs/translate --tasks 50 --against runs/smol
"""

import dataclasses

from jaxlm.config import SFT

config = dataclasses.replace(
  SFT,
  run='runs/translate',
  init='runs/smol',
  data=dataclasses.replace(SFT.data, path='data/translate', seq_len=256, global_batch=8),
  optim=dataclasses.replace(SFT.optim, lr=1e-3),
  watch=dataclasses.replace(SFT.watch, patience=5),
)
