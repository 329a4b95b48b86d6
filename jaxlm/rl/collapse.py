"""The usual ways in which learning from rewards breaks, told from the metrics of the last steps."""

from collections.abc import Mapping, Sequence

import numpy as np

Rows = Sequence[Mapping[str, float | int | None]]  # steps are whole

RECENT = 5  # values that are looked at together: one alone is noise
KL = 1.0  # nats a token where no target is set
ENTROPY = 0.05  # nats a token, and half of what it was; or a tenth of that, whatever it is
EQUAL = 0.9  # of the groups
GROWTH, TRUNCATED, MUCH = 2.0, 0.5, 4.0  # so many times as long where so many are cut, or so many times anyhow
GAP = 0.05  # nats a token between the sampler and the training program


def warnings(rows: Rows, *, kl_target: float = 0.0) -> dict[str, str]:
  """{name: one line: what is wrong, and what helps} of metrics by step, oldest first; {} where all looks well.

  `kl_target` (nats a token; 0: none set) is what the distance to the reference should stay below.
  """
  first, last = _ends(rows)
  found: dict[str, str] = {}
  limit = kl_target or KL
  if (kl := last('policy/kl')) > limit:
    found['kl'] = f'policy/kl is {kl:.3f} nats a token, above {limit:g}: raise rl.kl_coef or lower optim.lr'
  left, began = last('train/policy/entropy'), first('train/policy/entropy')
  if left < max(0.1 * began, min(ENTROPY, 0.5 * began)):
    found['entropy'] = f'the entropy is gone, {left:.4f} nats a token: lower optim.lr, or raise rl.entropy_coef'
  if (share := last('reward/equal_groups')) > EQUAL:
    found['equal'] = f'{share:.0%} of the groups have one score for all answers: nothing is learnt from these'
  grown = last('answers/length') / first('answers/length')
  cut = last('answers/truncated')
  if grown > MUCH or (grown > GROWTH and cut > TRUNCATED):
    found['length'] = f'answers are {grown:.1f} times as long as at first ({cut:.0%} cut): does the reward pay length?'
  gaps = [gap for row in rows if (gap := row.get('train/policy/sampler_gap')) is not None]
  if gaps and (gap := gaps[-1]) > GAP:
    found['gap'] = f'the sampler is {gap:.3f} nats a token from the training program: one of them computes otherwise'
  return found


def _ends(rows: Rows):
  """Of a metric the mean of its first and of its last values; NaN, which no comparison holds for, with too few."""

  def mean(name: str, part: slice) -> float:
    values = [value for row in rows if (value := row.get(name)) is not None]
    return float(np.mean(values[part])) if len(values) >= RECENT else float('nan')

  return lambda name: mean(name, slice(RECENT)), lambda name: mean(name, slice(-RECENT, None))
