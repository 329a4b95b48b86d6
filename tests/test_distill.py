"""Distillation against the definitions in float64, and what it may not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from invariance import CHANGES, assert_unchanged
from slopes import slopes

from jaxlm import masked
from jaxlm.losses import distill

pytestmark = pytest.mark.usefixtures('strict')
B, T, V = 3, 5, 7
RNG = np.random.default_rng(53)
STUDENT, TEACHER = (2.0 * RNG.normal(size=(2, B, T, V))).astype(np.float32)
MASK = (RNG.random((B, T)) < 0.6).astype(np.float32)
MASK[0, 0] = 1.0


def softmax(x):
  return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def kl(p, q):
  return np.sum(p * np.log(p / q), axis=-1)


def oracle(name, student, beta, temperature):
  s, t = softmax(student / temperature), softmax(np.float64(TEACHER) / temperature)
  if name == 'jensen_shannon':
    m = beta * t + (1 - beta) * s
    return np.sum(MASK * (beta * kl(t, m) + (1 - beta) * kl(s, m)))
  return np.sum(MASK * (kl(t, s) if name == 'forward_kl' else kl(s, t)))


def arrays(*xs):
  return [jnp.asarray(x) for x in xs]


@pytest.mark.parametrize('temperature', [1.0, 2.5])
@pytest.mark.parametrize(
  'name, beta', [('forward_kl', None), ('reverse_kl', None), ('jensen_shannon', 0.5), ('jensen_shannon', 0.1)]
)
def test_value_and_gradient_against_the_definition(name, beta, temperature):
  how = {'temperature': temperature} | ({} if beta is None else {'beta': beta})
  loss = lambda s: getattr(distill, name)(s, *arrays(TEACHER, MASK), **how)
  got, grad = jax.jit(loss)(jnp.asarray(STUDENT)), jax.grad(lambda s: loss(s).total)(jnp.asarray(STUDENT))
  assert float(got.weight) == MASK.sum()
  assert float(got.total) == pytest.approx(oracle(name, np.float64(STUDENT), beta, temperature), rel=2e-6)
  want = slopes(lambda s: oracle(name, s, beta, temperature), STUDENT)
  np.testing.assert_allclose(grad, want, rtol=1e-4, atol=2e-6)


def test_the_ends_of_jensen_shannon():
  """JSD / beta tends to the forward KL, JSD / (1 - beta) to the reverse one; at the ends it is these."""
  args = arrays(0.3 * STUDENT, 0.3 * TEACHER, MASK)
  for end, near, scale, same in ((0.0, 1e-4, 1e4, distill.forward_kl), (1.0, 1.0 - 1e-4, 1e4, distill.reverse_kl)):
    want = same(*args).total
    assert distill.jensen_shannon(*args, beta=end).total == want
    assert float(scale * distill.jensen_shannon(*args, beta=near).total) == pytest.approx(float(want), rel=0.02)
  assert float(distill.jensen_shannon(*args).total) == pytest.approx(
    float(distill.jensen_shannon(args[1], args[0], args[2]).total), rel=1e-6
  )
  with pytest.raises(ValueError, match=r'\[0, 1\], not 1.5'):
    distill.jensen_shannon(*args, beta=1.5)


LOSSES = {
  'forward_kl': distill.forward_kl,
  'reverse_kl': distill.reverse_kl,
  'jensen_shannon': lambda *a, **how: distill.jensen_shannon(*a, beta=0.3, **how),
}


@pytest.mark.parametrize('name', LOSSES)
def test_equal_distributions_have_no_loss(name):
  shifted = jnp.asarray(STUDENT) + 5.0
  loss = lambda s: LOSSES[name](s, shifted, jnp.asarray(MASK)).total
  value, grad = jax.value_and_grad(loss)(jnp.asarray(STUDENT))
  assert float(value) == pytest.approx(0.0, abs=1e-5) and np.abs(grad).max() < 1e-5


@pytest.mark.parametrize('name', LOSSES)
def test_the_teacher_gets_no_gradient(name):
  loss = lambda t: LOSSES[name](*arrays(STUDENT), t, *arrays(MASK)).total
  assert not np.any(jax.grad(loss)(jnp.asarray(TEACHER)))


@pytest.mark.parametrize('name', LOSSES)
def test_tokens_that_nobody_may_say(name):
  """Columns of -inf in both change nothing; a tail of -inf in the student's alone is finite."""
  cut = [np.concatenate([x, np.full((B, T, 2), -np.inf, np.float32)], -1) for x in (STUDENT, TEACHER)]
  loss = lambda s, t: LOSSES[name](s, t, jnp.asarray(MASK)).total
  value, grad = jax.value_and_grad(loss)(*arrays(*cut))
  assert float(value) == pytest.approx(float(loss(*arrays(STUDENT, TEACHER))), rel=1e-6)
  np.testing.assert_allclose(grad[..., :V], jax.grad(loss)(*arrays(STUDENT, TEACHER)), atol=1e-6)
  assert not np.any(grad[..., V:])
  lone = STUDENT.copy()
  lone[0, 0, 3] = -np.inf
  assert np.isfinite(jax.grad(loss)(*arrays(lone, TEACHER))).all() and np.isfinite(loss(*arrays(lone, TEACHER)))


def test_far_logits_stay_finite():
  for name in LOSSES:
    loss = lambda s, name=name: LOSSES[name](100 * s, *arrays(100 * TEACHER, MASK)).total
    value, grad = jax.value_and_grad(loss)(jnp.asarray(STUDENT))
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_float32_inside():
  half = [x.astype(jnp.bfloat16) for x in arrays(STUDENT, TEACHER)]
  for name in LOSSES:
    got = LOSSES[name](*half, jnp.asarray(MASK)).total
    want = LOSSES[name](*(x.astype(jnp.float32) for x in half), jnp.asarray(MASK)).total
    assert got.dtype == jnp.float32 and got == want


@functools.cache
def of_mean(name):
  return lambda *args: masked.value(LOSSES[name](*args))


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('name', LOSSES)
def test_padding_garbage_and_repeated_rows_change_nothing(name, change):
  assert_unchanged(of_mean(name), [STUDENT, TEACHER], [MASK], change)
