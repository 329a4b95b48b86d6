"""Losses that bring a student's next-token distributions to a teacher's, on data or on the student's own answers.

In nats a token, float32 inside; the weight is the number of tokens. Logits of both are divided by `temperature`; the
loss is not multiplied by its square. No gradient goes into the teacher. A masked position may hold NaN or inf, and a
logit may be -inf. Values (total / weight) and gradients are unchanged by padding on either side, by rows without a
token, by repeating every row (each copy then has its share of the gradient), and by adding a constant to the logits of
a position.

B batch, T sequence, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm import masked
from jaxlm.masked import Sum

LEAST = -1e30  # a log-probability of nothing, without the NaN that inf - inf gives


def forward_kl(
  student_BTV: Float[Array, 'B T V'],
  teacher_BTV: Float[Array, 'B T V'],
  mask_BT: Float[Array, 'B T'],
  *,
  temperature: float = 1.0,
) -> Sum:
  """KL(teacher | student), which spreads over all that the teacher may say (Hinton et al. 2015, arXiv:1503.02531)."""
  s_BTV, t_BTV = _logps(student_BTV, teacher_BTV, mask_BT, temperature)
  return masked.total(_kl(t_BTV, s_BTV), mask_BT)


def reverse_kl(
  student_BTV: Float[Array, 'B T V'],
  teacher_BTV: Float[Array, 'B T V'],
  mask_BT: Float[Array, 'B T'],
  *,
  temperature: float = 1.0,
) -> Sum:
  """KL(student | teacher), which keeps to what the teacher finds likely (MiniLLM, Gu et al. 2023, arXiv:2306.08543)."""
  s_BTV, t_BTV = _logps(student_BTV, teacher_BTV, mask_BT, temperature)
  return masked.total(_kl(s_BTV, t_BTV), mask_BT)


def jensen_shannon(
  student_BTV: Float[Array, 'B T V'],
  teacher_BTV: Float[Array, 'B T V'],
  mask_BT: Float[Array, 'B T'],
  *,
  beta: float = 0.5,
  temperature: float = 1.0,
) -> Sum:
  """beta KL(teacher | m) + (1 - beta) KL(student | m), m = beta teacher + (1 - beta) student (GKD, arXiv:2306.13649).

  At the ends, where this is 0, it is what its gradient tends to: `forward_kl` at beta 0, `reverse_kl` at 1 (as in the
  paper's experiments and TRL). Raises ValueError for a beta outside of [0, 1].
  """
  if not 0.0 <= beta <= 1.0:
    raise ValueError(f'beta lies in [0, 1], not {beta}')
  if beta in (0.0, 1.0):
    return (reverse_kl if beta else forward_kl)(student_BTV, teacher_BTV, mask_BT, temperature=temperature)
  s_BTV, t_BTV = _logps(student_BTV, teacher_BTV, mask_BT, temperature)
  m_BTV = jnp.logaddexp(t_BTV + math.log(beta), s_BTV + math.log1p(-beta))
  return masked.total(beta * _kl(t_BTV, m_BTV) + (1.0 - beta) * _kl(s_BTV, m_BTV), mask_BT)


def _logps(student_BTV: Array, teacher_BTV: Array, mask_BT: Array, temperature: float) -> tuple[Array, Array]:
  """Log-probabilities of both."""
  logits = (masked.kept(x, mask_BT[..., None]) / temperature for x in (student_BTV, jax.lax.stop_gradient(teacher_BTV)))
  s_BTV, t_BTV = (jnp.maximum(jax.nn.log_softmax(x, axis=-1), LEAST) for x in logits)
  return s_BTV, t_BTV


def _kl(p_BTV: Array, q_BTV: Array) -> Array:
  return jnp.sum(jnp.exp(p_BTV) * (p_BTV - q_BTV), axis=-1)
