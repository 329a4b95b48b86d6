"""DPO of adapters on a small chat model: which of two answers is better, one epoch, the base as the reference.

jaxlm import hf://HuggingFaceTB/SmolLM2-135M-Instruct --run runs/smol
jaxlm preference configs/preference/dpo.py --init runs/smol --data.path dpo.jsonl
jaxlm plan configs/preference/dpo.py --init runs/smol --topology v5e-1
"""

import dataclasses

from jaxlm.config import PREFERENCE, Preference

config = dataclasses.replace(
  PREFERENCE,
  run='runs/dpo',
  preference=Preference(stage='preference', loss='dpo', beta=0.1),
)
