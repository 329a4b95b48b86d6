"""PPO against a reward model, held near the model that it begins with.

jaxlm rl configs/rl/judge.py --init runs/sft --data.path prompts.jsonl --reward run:runs/judge --run runs/ppo
"""

import dataclasses

from jaxlm.config import RL, Data, Rl

config = dataclasses.replace(
  RL,
  data=Data(seq_len=512, global_batch=32),
  rl=Rl(algo='ppo', prompts=64, samples=1, epochs=2, kl_coef=0.05, kl_target=0.1, max_new_tokens=128),
)
