"""Cross entropy and log-probabilities, whole and in slices of the vocabulary, against NumPy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxlm.losses import lm

pytestmark = pytest.mark.usefixtures('strict')
B, T, D, V, PADDED = 3, 5, 7, 19, 21  # PADDED divides by 1, 3, 7 and 21
RNG = np.random.default_rng(11)
X = (2.0 * RNG.normal(size=(B, T, D))).astype(np.float32)
HEAD = RNG.normal(size=(D, PADDED)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, T)).astype(np.int32)
COTANGENTS = RNG.normal(size=(3, B, T)).astype(np.float32)
DIRECTION = RNG.normal(size=X.shape)
MASK = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], np.float32)
SETTINGS = {
  'plain': {},
  'softcap': {'softcap': 3.0},
  'temperature': {'temperature': 0.7},
  'both': {'softcap': 2.5, 'temperature': 1.7},
}


def oracle(x, head, softcap=None, temperature=1.0, vocab=V):
  """(logp, lse, entropy) in float64 from their definitions, the probabilities written out."""
  logits = (x.astype(np.float64) @ head.astype(np.float64))[..., :vocab]
  if softcap:
    logits = softcap * np.tanh(logits / softcap)
  logits = logits / temperature
  lse = np.log(np.sum(np.exp(logits), axis=-1))
  p = np.exp(logits) / np.sum(np.exp(logits), axis=-1, keepdims=True)
  return np.log(np.take_along_axis(p, TARGETS[..., None], -1)[..., 0]), lse, -np.sum(p * np.log(p), axis=-1)


def plain(x, head, softcap=None, temperature=1.0, vocab=V):
  """The same in JAX without slices, for its derivatives in float64."""
  logits = (x @ head)[..., :vocab]
  if softcap:
    logits = softcap * jnp.tanh(logits / softcap)
  logp = jax.nn.log_softmax(logits / temperature, axis=-1)
  lse = jax.nn.logsumexp(logits / temperature, axis=-1)
  return jnp.take_along_axis(logp, TARGETS[..., None], -1)[..., 0], lse, -jnp.sum(jnp.exp(logp) * logp, axis=-1)


@pytest.mark.parametrize('chunks', [1, 3, 7, 21])
@pytest.mark.parametrize('setting', SETTINGS)
def test_logprobs_against_float64(setting, chunks):
  how = SETTINGS[setting]
  got = lm.logprobs(jnp.asarray(X), jnp.asarray(HEAD), jnp.asarray(TARGETS), chunks=chunks, vocab=V, **how)
  for mine, theirs in zip(got, oracle(X, HEAD, **how), strict=True):
    assert mine.dtype == jnp.float32
    np.testing.assert_allclose(mine, theirs, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize('setting', SETTINGS)
@pytest.mark.parametrize('outputs, chunks', [((0,), 3), ((1,), 3), ((2,), 3), ((0, 1, 2), 1), ((0, 1, 2), 7)])
def test_gradients_of_logprobs(setting, outputs, chunks):
  def pulled(fn, x, head):
    out = fn(x, head)
    return sum(jnp.sum(COTANGENTS[i].astype(x.dtype) * out[i]) for i in outputs)

  chunked = lambda x, head: lm.logprobs(x, head, jnp.asarray(TARGETS), chunks=chunks, vocab=V, **SETTINGS[setting])
  got = jax.grad(partial(pulled, chunked), (0, 1))(jnp.asarray(X), jnp.asarray(HEAD))
  with jax.enable_x64(True):
    wide = jnp.asarray(X, jnp.float64), jnp.asarray(HEAD, jnp.float64)
    expected = jax.grad(partial(pulled, partial(plain, **SETTINGS[setting])), (0, 1))(*wide)
  for mine, theirs in zip(got, expected, strict=True):
    assert (mine.dtype, theirs.dtype) == (jnp.float32, jnp.float64)
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
  assert not np.any(got[1][:, V:])  # nothing pulls on what is padding


def test_gradient_by_central_differences():
  """One direction in float64, independent of any autodiff."""
  eps = 1e-6
  total = lambda x: sum(np.sum(w * y) for w, y in zip((1.0, 0.3, -0.7), oracle(x, HEAD, 2.5, 1.7), strict=True))
  x = X.astype(np.float64)
  slope = (total(x + eps * DIRECTION) - total(x - eps * DIRECTION)) / (2 * eps)

  def mine(x):
    logp, lse, entropy = lm.logprobs(
      x, jnp.asarray(HEAD), jnp.asarray(TARGETS), chunks=3, vocab=V, softcap=2.5, temperature=1.7
    )
    return jnp.sum(logp) + 0.3 * jnp.sum(lse) - 0.7 * jnp.sum(entropy)

  assert np.sum(np.asarray(jax.grad(mine)(jnp.asarray(X))) * DIRECTION) == pytest.approx(slope, rel=1e-5)


def test_large_logits_neither_overflow_nor_vanish():
  x = jnp.asarray(X * 300)
  logp, lse, entropy = lm.logprobs(x, jnp.asarray(HEAD), jnp.asarray(TARGETS), chunks=3, vocab=V)
  whole = jax.nn.log_softmax((x @ HEAD)[..., :V], axis=-1)
  np.testing.assert_allclose(logp, np.take_along_axis(np.asarray(whole), TARGETS[..., None], -1)[..., 0], rtol=1e-5)
  assert np.isfinite(lse).all() and (np.asarray(entropy) > -1e-3).all()


def test_a_huge_padded_column_is_never_predicted():
  head = HEAD.copy()
  head[:, V:] = 100.0
  args = jnp.asarray(X), jnp.asarray(TARGETS)
  got = lm.logprobs(args[0], jnp.asarray(head), args[1], chunks=3, vocab=V)
  for mine, theirs in zip(got, lm.logprobs(args[0], jnp.asarray(HEAD), args[1], chunks=3, vocab=V), strict=True):
    np.testing.assert_array_equal(mine, theirs)


def test_shapes_are_checked_in_tests():
  with pytest.raises(jaxtyping.TypeCheckError, match='targets_BT'):
    lm.from_logits(jnp.zeros((B, T, V)), jnp.zeros((T, B), jnp.int32))


def test_chunks_must_divide_the_vocabulary():
  with pytest.raises(ValueError, match='21 does not divide into 4 chunks'):
    lm.logprobs(jnp.asarray(X), jnp.asarray(HEAD), jnp.asarray(TARGETS), chunks=4)


def test_bfloat16_activations_accumulate_in_float32():
  x, head = jnp.asarray(X, jnp.bfloat16), jnp.asarray(HEAD)
  logp, lse, _ = lm.logprobs(x, head, jnp.asarray(TARGETS), chunks=3, vocab=V)
  rounded = np.asarray(x.astype(jnp.float32)), np.asarray(head.astype(jnp.bfloat16).astype(jnp.float32))
  expected = oracle(*rounded)
  np.testing.assert_allclose(logp, expected[0], atol=5e-6)
  np.testing.assert_allclose(lse, expected[1], atol=5e-6)
  gradient = jax.grad(lambda x, h: jnp.sum(lm.logprobs(x, h, jnp.asarray(TARGETS), chunks=3)[0]), (0, 1))
  assert [g.dtype for g in gradient(x, head)] == [jnp.bfloat16, jnp.float32]
  traced = str(jax.make_jaxpr(gradient)(x, head))  # a CPU keeps excess precision: what is asked for shows only here
  assert traced.count('preferred_element_type=float32') == traced.count('dot_general[') == 4


@pytest.mark.parametrize('z_loss', [0.0, 0.01])
def test_next_token_whole_and_chunked(z_loss):
  logp, lse, _ = oracle(X, HEAD)
  expected = np.sum(MASK * (z_loss * lse**2 - logp))
  targets, mask = jnp.asarray(TARGETS), jnp.asarray(MASK)
  whole = lm.next_token(jnp.asarray((X @ HEAD)[..., :V]), targets, mask, z_loss=z_loss)
  sliced = lm.next_token_chunked(jnp.asarray(X), jnp.asarray(HEAD), targets, mask, z_loss=z_loss, chunks=7, vocab=V)
  for got in (whole, sliced):
    assert got.total == pytest.approx(expected, rel=1e-5)
    assert got.weight == 7


def test_from_logits():
  logp, lse = lm.from_logits(jnp.asarray((X @ HEAD)[..., :V]), jnp.asarray(TARGETS))
  for mine, theirs in zip((logp, lse), oracle(X, HEAD)[:2], strict=True):
    np.testing.assert_allclose(mine, theirs, atol=5e-6)


def test_the_gradient_by_logits_is_at_exactly_the_masks_positions():
  logits = jnp.asarray((X @ HEAD)[..., :V])
  grad = jax.grad(lambda l: lm.next_token(l, jnp.asarray(TARGETS), jnp.asarray(MASK), z_loss=0.01).total)(logits)
  touched = [(b, t) for b in range(B) for t in range(T) if np.any(grad[b, t])]
  assert touched == [(0, 0), (0, 1), (0, 3), (2, 1), (2, 2), (2, 3), (2, 4)]
  p = np.exp(np.asarray(jax.nn.log_softmax(logits, axis=-1)))
  plain_grad = jax.grad(lambda l: lm.next_token(l, jnp.asarray(TARGETS), jnp.asarray(MASK)).total)(logits)
  onehot = np.eye(V, dtype=np.float32)[TARGETS]
  np.testing.assert_allclose(plain_grad, MASK[..., None] * (p - onehot), atol=1e-6)


def test_the_gradient_by_activations_is_at_exactly_the_masks_positions():
  fn = lambda x: (
    lm.next_token_chunked(x, jnp.asarray(HEAD), jnp.asarray(TARGETS), jnp.asarray(MASK), chunks=3, vocab=V).total
  )
  touched = np.any(np.asarray(jax.grad(fn)(jnp.asarray(X))) != 0, axis=-1)
  np.testing.assert_array_equal(touched, MASK > 0)


def test_a_nan_at_a_masked_position_does_not_spread():
  x = np.where(MASK[..., None] > 0, X, np.nan)
  targets, mask = jnp.asarray(TARGETS), jnp.asarray(MASK)
  whole = lambda x: lm.next_token((x @ HEAD)[..., :V], targets, mask, z_loss=0.01).total
  sliced = lambda x: lm.next_token_chunked(x, jnp.asarray(HEAD), targets, mask, z_loss=0.01, chunks=3, vocab=V).total
  for fn in (whole, sliced):
    assert fn(jnp.asarray(x)) == pytest.approx(float(fn(jnp.asarray(X))), rel=1e-6)


def test_memory_at_a_vocabulary_of_128k():
  """Read from the compiled programs; nothing is run. Float32 logits alone would be 256 MiB."""
  rows, vocab, width = (8, 64), 2**17, 16
  shapes = (
    jax.ShapeDtypeStruct((*rows, width), jnp.float32),
    jax.ShapeDtypeStruct((width, vocab), jnp.float32),
    jax.ShapeDtypeStruct(rows, jnp.int32),
    jax.ShapeDtypeStruct(rows, jnp.float32),
  )

  def temporary(loss):
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return step.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

  sliced = temporary(lambda x, head, t, m: lm.next_token_chunked(x, head, t, m, z_loss=1e-4, chunks=32).total)
  whole = temporary(lambda x, head, t, m: lm.next_token(x @ head, t, m, z_loss=1e-4).total)
  logits = 4 * rows[0] * rows[1] * vocab
  assert whole >= logits
  assert sliced < logits / 4
  assert sliced < whole / 8
  print(f'temporaries: {sliced / 2**20:.0f} MiB in 32 slices, {whole / 2**20:.0f} MiB whole')
