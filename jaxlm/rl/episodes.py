"""Prompts with their completions as a batch that trains: one answer a row.

M answers, N new tokens at most, T sequence.
"""

from collections.abc import Sequence

import numpy as np

from jaxlm.rl.rollout import Completions

LEAST = 16  # what widths are multiples of at least


def width_of(longest: int, multiple: int = LEAST) -> int:
  """Places for rows of so many tokens: an eighth too many at most, few widths mean few compilations.

  Always a multiple of `multiple`.
  """
  step = multiple * max(1, (1 << longest.bit_length()) // (16 * multiple))
  return -(-longest // step) * step


def batch_of(
  prompts: Sequence[Sequence[int]], made: Completions, *, limit: int, pad_id: int, multiple: int = LEAST
) -> dict[str, np.ndarray]:
  """Arrays [M, T], T the `width_of` the longest answer with its prompt, but not beyond `limit`.

  `tokens` and `targets` as in `data.packing`, `loss_mask` 1 at the targets that were sampled, `segment_ids` 1 but 0 on
  padding, `positions`; `sampled_logp` what the sampler said of each target at the temperature, before truncation.
  """
  lengths = [len(prompt) + int(n) for prompt, n in zip(prompts, made.lengths_M, strict=True)]
  width = min(width_of(max(lengths) - 1, multiple), limit)
  shape = len(prompts), width
  ints = lambda fill=0: np.full(shape, fill, np.int32)
  found: dict[str, np.ndarray] = {
    'tokens': ints(pad_id),
    'targets': ints(pad_id),
    'segment_ids': ints(),
    'positions': ints(),
  }
  found |= {'loss_mask': np.zeros(shape, np.float32), 'sampled_logp': np.zeros(shape, np.float32)}
  for m, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
    n, start = int(made.lengths_M[m]), len(prompt) - 1
    ids = np.concatenate([np.asarray(prompt, np.int32), made.tokens_MN[m, :n]])
    found['tokens'][m, : length - 1], found['targets'][m, : length - 1] = ids[:-1], ids[1:]
    found['segment_ids'][m, : length - 1] = 1
    found['positions'][m, : length - 1] = np.arange(length - 1)
    found['loss_mask'][m, start : start + n] = 1.0
    found['sampled_logp'][m, start : start + n] = made.logp_MN[m, :n]
  return found
