"""A reward model: adapters and a value head on a small chat model, cross-validated over five parts of the pairs first.

jaxlm import hf://HuggingFaceTB/SmolLM2-135M-Instruct --run runs/smol
jaxlm reward configs/preference/reward.py --init runs/smol --data.path dpo.jsonl
jaxlm plan configs/preference/reward.py --init runs/smol --topology v5e-1
"""

import dataclasses

from jaxlm.config import REWARD, Preference

config = dataclasses.replace(
  REWARD,
  run='runs/judge',
  preference=Preference(stage='reward', center=0.01, folds=5),
)
