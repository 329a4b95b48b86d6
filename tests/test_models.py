"""The transformer against its papers in float64, and what must not change when it is computed in another way.

B batch, T sequence, D model, H heads, K kv heads, N head width, V vocabulary.
"""

import dataclasses
import math
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2, LLAMA, randomized

from jaxlm import models, objectives
from jaxlm.errors import InputError
from jaxlm.models import LowRank, ModelConfig, Run
from jaxlm.models.attention import attend, causal_mask, rope_angles, rope_frequencies, rotate
from jaxlm.models.linear import dense
from jaxlm.models.transformer import Block, Norm, _context

pytestmark = pytest.mark.usefixtures('strict')
B, T = 2, 7
STYLES = {'llama': LLAMA, 'gpt2': GPT2}
SHALLOW = dataclasses.replace(LLAMA, n_layers=2)


def tokens(cfg, shape=(B, T), seed=1):
  return jnp.asarray(np.random.default_rng(seed).integers(0, cfg.vocab_size, shape), jnp.int32)


@cache
def jitted(cfg, **how):
  return jax.jit(lambda params, tokens, **kw: models.forward(cfg, params, tokens, run=Run(**how), **kw)[0])


# --- the forward pass, written from the papers in NumPy, float64, one position and one head at a time


def norm64(cfg, p, x):
  if cfg.norm == 'layernorm':
    return (x - x.mean()) / math.sqrt(x.var() + cfg.norm_eps) * p['scale'] + p['bias']
  return x / math.sqrt(np.mean(x**2) + cfg.norm_eps) * p['scale']


def rotate64(x, position, theta):
  """Each pair (i, i + N/2) as a complex number, turned."""
  half = len(x) // 2
  turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * theta ** (-np.arange(half) / half))
  return np.concatenate([turned.real, turned.imag])


def activation64(name, x):
  if name == 'silu':
    return x / (1 + np.exp(-x))
  if name == 'gelu':
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention64(cfg, p, xs, positions, segments):
  bias = lambda name: p.get(f'{name}_bias', 0.0)
  N, share = cfg.head_size, cfg.n_heads // cfg.kv_heads
  split = lambda x, name, heads: (x @ p[name] + bias(name)).reshape(heads, N)
  q = [split(x, 'q', cfg.n_heads) for x in xs]
  k = [split(x, 'k', cfg.kv_heads) for x in xs]
  v = [split(x, 'v', cfg.kv_heads) for x in xs]
  if cfg.positions == 'rope':
    turn = lambda x, i: np.stack([rotate64(h, i, cfg.rope_theta) for h in x])
    q, k = ([turn(x, i) for x, i in zip(z, positions, strict=True)] for z in (q, k))
  out = []
  for t in range(len(xs)):
    seen = [s for s in range(t + 1) if segments[s] == segments[t]]
    heads = []
    for h in range(cfg.n_heads):
      scores = np.array([q[t][h] @ k[s][h // share] for s in seen]) * (cfg.attention_multiplier or 1 / math.sqrt(N))
      weights = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
      heads.append(sum(w * v[s][h // share] for w, s in zip(weights, seen, strict=True)))
    out.append(np.concatenate(heads) @ p['o'] + bias('o'))
  return out


def mlp64(cfg, p, x):
  up = x @ p['up'] + p.get('up_bias', 0.0)
  up = activation64(cfg.activation, x @ p['gate']) * up if cfg.gated_mlp else activation64(cfg.activation, up)
  return up @ p['down'] + p.get('down_bias', 0.0)


def forward64(cfg, params, row, positions=None, segments=None):
  """Logits [T, V] of one row."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  positions = range(len(row)) if positions is None else positions
  segments = [0] * len(row) if segments is None else segments
  xs = [p['embed'][t] for t in row]
  if cfg.positions == 'learned':
    xs = [x + p['positions'][i] for x, i in zip(xs, positions, strict=True)]
  xs, add = [x * cfg.embedding_multiplier for x in xs], cfg.residual_multiplier
  for n in range(cfg.n_layers):
    layer = jax.tree.map(lambda x, n=n: x[n], p['layers'])
    normed = [norm64(cfg, layer['attn_norm'], x) for x in xs]
    added = attention64(cfg, layer['attn'], normed, positions, segments)
    xs = [x + add * y for x, y in zip(xs, added, strict=True)]
    xs = [x + add * mlp64(cfg, layer['mlp'], norm64(cfg, layer['mlp_norm'], x)) for x in xs]
  head = p['embed'].T if cfg.tie_embeddings else p['head']
  return np.stack([norm64(cfg, p['final_norm'], x) @ head for x in xs])[:, : cfg.vocab_size] / cfg.logits_scaling


MULTIPLIERS = {
  'embedding_multiplier': 2.3,
  'residual_multiplier': 0.37,
  'attention_multiplier': 0.19,
  'logits_scaling': 1.7,
}
VARIANTS = {
  'llama': LLAMA,
  'gpt2': GPT2,
  'llama, tied, as many kv heads, another theta': dataclasses.replace(
    LLAMA, tie_embeddings=True, n_kv_heads=None, n_heads=3, head_dim=14, rope_theta=113.0
  ),
  'gpt2, untied, exact gelu, one kv head': dataclasses.replace(
    GPT2, tie_embeddings=False, activation='gelu', n_kv_heads=1, norm_eps=0.03
  ),
  'llama with multipliers': dataclasses.replace(LLAMA, **MULTIPLIERS),
  'gpt2 with multipliers': dataclasses.replace(GPT2, **MULTIPLIERS),
}


PLAIN = pytest.mark.parametrize('cfg', ['llama', 'gpt2'], indirect=True)  # what the reference here knows
DENSE = pytest.mark.parametrize('cfg', ['llama', 'gpt2', 'mixed'], indirect=True)


@pytest.mark.parametrize('variant', VARIANTS)
def test_forward_against_float64(variant):
  cfg = VARIANTS[variant]
  params, ids = randomized(cfg), tokens(cfg)
  logits = jitted(cfg)(params, ids)
  assert (logits.shape, logits.dtype) == ((B, T, cfg.vocab_size), jnp.float32)
  for row, got in zip(np.asarray(ids), logits, strict=True):
    np.testing.assert_allclose(got, forward64(cfg, params, row), atol=1e-4)


@PLAIN
def test_forward_with_segments_and_positions_against_float64(cfg, params):
  ids, positions, segments = tokens(cfg), [0, 1, 2, 0, 1, 0, 1], [1, 1, 1, 2, 2, 3, 3]
  many = lambda x: jnp.tile(jnp.asarray(x, jnp.int32), (B, 1))
  logits = jitted(cfg)(params, ids, positions_BT=many(positions), segment_ids_BT=many(segments))
  for row, got in zip(np.asarray(ids), logits, strict=True):
    np.testing.assert_allclose(got, forward64(cfg, params, row, positions, segments), atol=1e-4)


@DENSE  # a rounding sends tokens to other experts
def test_bfloat16_stays_near_and_keeps_float32_logits(cfg, params):
  ids = tokens(cfg)
  exact, rounded = jitted(cfg)(params, ids), jitted(cfg, dtype=jnp.bfloat16)(params, ids)
  assert rounded.dtype == jnp.float32
  error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
  assert 1e-4 < error < 3e-2  # nearer than rounding allows would mean that it was float32 after all


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'d_model': 10, 'n_heads': 3}, 'd_model=10 is not a multiple of n_heads=3'),
    ({'n_heads': 4, 'n_kv_heads': 3}, 'n_heads=4 is not a multiple of n_kv_heads=3'),
    ({'head_dim': 5}, 'head_dim=5 must be even'),
    ({'logits_scaling': 0.0}, 'logits_scaling=0.0 must be in \\(0, inf\\)'),
    ({'attention_multiplier': float('nan')}, 'attention_multiplier=nan must be in \\(0, inf\\)'),
  ],
)
def test_an_architecture_that_cannot_be_is_refused(fields, message):
  with pytest.raises(InputError, match=message):
    ModelConfig(**fields)


def test_every_weight_is_declared_with_its_axes(cfg):
  shapes = jax.eval_shape(lambda: models.init(cfg, jax.random.key(0)))
  axes = models.axes(cfg)
  is_names = lambda x: isinstance(x, tuple)
  assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=is_names)
  for shape, names in zip(jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=is_names), strict=True):
    assert shape.ndim == len(names)
    assert shape.dtype == jnp.float32


def test_layers_start_apart_and_at_the_right_scale():
  cfg = dataclasses.replace(LLAMA, d_model=101, d_ff=103, n_heads=2, n_kv_heads=2, head_dim=50)
  params = jax.jit(models.init, static_argnums=0)(cfg, jax.random.key(0))
  std = lambda x: float(jnp.std(x))
  layers = params['layers']
  assert std(params['embed']) == pytest.approx(0.02, rel=0.05)
  assert std(layers['attn']['q']) == pytest.approx(101**-0.5, rel=0.05)
  assert std(layers['attn']['o']) == pytest.approx((100 * 2 * cfg.n_layers) ** -0.5, rel=0.05)
  assert std(layers['mlp']['down']) == pytest.approx((103 * 2 * cfg.n_layers) ** -0.5, rel=0.05)
  assert np.all(np.asarray(layers['attn_norm']['scale']) == 1)
  for n in range(1, cfg.n_layers):
    assert not np.any(np.asarray(layers['attn']['q'][0] == layers['attn']['q'][n]))


@PLAIN
def test_without_multipliers_nothing_is_multiplied(cfg, params):
  """Bitwise, operation by operation: the stream is the embedding plus what the sub-layers give, logits a product."""
  ids, ctx = tokens(cfg), _context(cfg, 'global', jnp.arange(T, dtype=jnp.int32)[None], None)
  x = params['embed'][ids] + (params['positions'][None, :T] if cfg.positions == 'learned' else 0.0)
  looped = {**params, 'layers': models.unstack(params['layers'], cfg.n_layers)}
  for weights in looped['layers']:
    keep = {'capture_intermediates': True, 'mutable': 'intermediates'}
    _, found = Block(cfg, Run()).apply({'params': weights}, x, ctx, None, None, **keep)
    x = x + found['intermediates']['attn']['__call__'][0][0]
    x = x + found['intermediates']['mlp']['__call__'][0]
  normed = Norm(cfg).apply({'params': params['final_norm']}, x)
  np.testing.assert_array_equal(models.hidden(cfg, looped, ids).x_BTD, normed)
  product = jnp.matmul(normed, models.head(cfg, params))[..., : cfg.vocab_size]
  np.testing.assert_array_equal(models.unembed(cfg, params, normed), product)
  explicit = dataclasses.replace(cfg, attention_multiplier=cfg.head_size**-0.5)
  np.testing.assert_array_equal(jitted(explicit)(params, ids), jitted(cfg)(params, ids))


def test_the_start_keeps_what_the_layers_add_in_all():
  """A residual multiplier of 1/9 starts outputs 3 times as large: (2L)^-1/2 of nine layers is that of one."""
  cfg = dataclasses.replace(LLAMA, d_model=101, d_ff=103, n_heads=2, n_kv_heads=2, head_dim=50, logits_scaling=4.0)
  params = jax.jit(models.init, static_argnums=0)(
    dataclasses.replace(cfg, residual_multiplier=1 / 9), jax.random.key(0)
  )
  std = lambda x: float(jnp.std(x))
  assert std(params['layers']['attn']['o']) == pytest.approx(3 * (100 * 2 * cfg.n_layers) ** -0.5, rel=0.05)
  assert std(params['layers']['mlp']['down']) == pytest.approx(3 * (103 * 2 * cfg.n_layers) ** -0.5, rel=0.05)
  assert std(params['layers']['mlp']['up']) == pytest.approx(101**-0.5, rel=0.05)
  assert std(params['head']) == pytest.approx((4 / 101) ** 0.5, rel=0.05)


# --- trap 2: packing


def packed(cfg, params, a, b):
  """Logits of B inside the pack [A, B]."""
  both = jnp.concatenate([a, b], axis=1)
  lengths = a.shape[1], b.shape[1]
  positions = jnp.concatenate([jnp.arange(n, dtype=jnp.int32) for n in lengths])[None]
  segments = jnp.tile(jnp.repeat(jnp.array([1, 2], jnp.int32), jnp.array(lengths)), (a.shape[0], 1))
  logits = jitted(cfg)(params, both, positions_BT=positions, segment_ids_BT=segments)
  return np.asarray(logits[:, a.shape[1] :])


def test_a_packed_document_reads_as_if_alone(cfg, params):
  a, b = tokens(cfg, (B, 5), seed=2), tokens(cfg, (B, 7), seed=3)
  np.testing.assert_allclose(packed(cfg, params, a, b), jitted(cfg)(params, b), atol=1e-5)


def test_another_neighbour_changes_no_bit(cfg, params):
  a, other, b = (tokens(cfg, (B, n), seed=s) for n, s in ((5, 2), (5, 4), (7, 3)))
  assert np.any(a != other)
  np.testing.assert_array_equal(packed(cfg, params, a, b), packed(cfg, params, other, b))


def test_the_row_decides_what_is_earlier(cfg, params):
  """Positions that start again, without segments, show nobody the future."""
  positions = jnp.array([[0, 1, 2, 0, 1, 2, 3]], jnp.int32)
  ids = tokens(cfg)
  other = ids.at[:, 3:].set((ids[:, 3:] + 1) % cfg.vocab_size)
  first, second = (jitted(cfg)(params, x, positions_BT=positions) for x in (ids, other))
  np.testing.assert_array_equal(first[:, :3], second[:, :3])
  assert np.any(first[:, 3] != second[:, 3])


def test_without_segments_the_neighbour_would_be_seen(cfg, params):
  a, other, b = (tokens(cfg, (B, n), seed=s) for n, s in ((5, 2), (5, 4), (7, 3)))
  first, second = (jitted(cfg)(params, jnp.concatenate([x, b], axis=1))[:, 5:] for x in (a, other))
  assert np.abs(first - second).max() > 1e-3


# --- trap 5: precision of RoPE and softmax with bfloat16 activations

FAR = np.array([4095, 32768 + 7, 131071], np.int32)


def wide(x):
  return np.asarray(x.astype(jnp.float32), np.float64)


def angles_of(positions):
  return rope_angles(positions, jnp.asarray(rope_frequencies(ModelConfig(head_dim=26), 'global')))


def turned64(x_THN):
  return np.stack([[rotate64(head, i, 10000.0) for head in row] for row, i in zip(x_THN, FAR, strict=True)])


def test_rotation_far_out_with_bfloat16_activations():
  N = 26
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 5, N)), jnp.bfloat16)
  angles = angles_of(jnp.asarray(FAR)[None])
  assert angles.dtype == jnp.float32
  expected = turned64(wide(x)[0])
  error = lambda angles: np.abs(wide(rotate(x, angles))[0] - expected).max(axis=(1, 2))
  assert np.all(error(angles) < 0.03)  # one rounding of values up to 4 to bfloat16 is 0.008
  rounded = angles.astype(jnp.bfloat16).astype(jnp.float32)
  assert np.all(error(rounded) > 0.5)  # what angles in bfloat16 would do
  assert rotate(x, angles).dtype == jnp.bfloat16


@pytest.mark.parametrize('start', FAR)
def test_scores_depend_on_distance_alone_far_out(start):
  """Turned by float32 angles, q at p + 13 and k at p make the score that they make at 13 and 0."""
  N, rng = 26, np.random.default_rng(0)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 5, N)), jnp.float32) for _ in range(2))
  at = lambda x, p: rotate(x, angles_of(jnp.array([[p]], jnp.int32)))
  score = lambda p: jnp.sum(at(q, p + 13) * at(k, p), axis=-1)
  np.testing.assert_allclose(score(int(start)), score(0), atol=0.05)


def attend64(q, k, v):
  q, k, v = q[0], k[0], v[0]
  share, out = q.shape[1] // k.shape[1], np.zeros(q.shape)
  for h in range(q.shape[1]):
    scores = q[:, h] @ k[:, h // share].T / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    out[:, h] = weights / weights.sum(axis=1, keepdims=True) @ v[:, h // share]
  return out


def attention_inputs(S):
  rng = np.random.default_rng(1)
  H, K, N = 6, 2, 26
  q = jnp.asarray(12 * rng.normal(size=(1, 3, H, N)), jnp.bfloat16)
  k = jnp.asarray(rng.normal(size=(1, S, K, N)), jnp.bfloat16)
  v = jnp.asarray(1 + rng.normal(size=(1, S, K, N)), jnp.bfloat16)
  return q, k, v, jnp.ones((1, 3, S), bool)


def test_softmax_over_thousands_of_keys_with_bfloat16_activations():
  q, k, v, mask = attention_inputs(4099)
  expected = attend64(wide(q), wide(k), wide(v))
  off = lambda got: np.linalg.norm(wide(got)[0] - expected) / np.linalg.norm(expected)
  got = attend(q, k, v, mask)
  assert got.dtype == jnp.bfloat16

  def low(q, k, v):
    """The same with scores and softmax in bfloat16."""
    k, v = (jnp.repeat(x, 3, axis=2) for x in (k, v))
    scores = jnp.einsum('BTHN,BSHN->BHTS', q, k) * jnp.bfloat16(26**-0.5)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return jnp.einsum('BHTS,BSHN->BTHN', weights / weights.sum(-1, keepdims=True), v)

  assert off(got) < 0.006
  assert off(low(q, k, v)) > 0.012


def test_attention_at_far_positions_with_bfloat16_activations():
  q, k, v, _ = attention_inputs(3)
  angles = angles_of(jnp.asarray(FAR)[None])
  positions = jnp.asarray(FAR)[None]
  mask = causal_mask(positions, positions)
  q64, k64, v64 = turned64(wide(q)[0])[None], turned64(wide(k)[0])[None], wide(v)
  expected = [attend64(q64[:, t : t + 1], k64[:, : t + 1], v64[:, : t + 1])[0] for t in range(3)]
  off = lambda angles: np.abs(wide(attend(rotate(q, angles), rotate(k, angles), v, mask))[0] - expected).max()
  assert off(angles) < 0.1
  assert off(angles.astype(jnp.bfloat16).astype(jnp.float32)) > 0.5


# --- trap 11: what may not change what is computed


def test_a_later_token_changes_nothing_before_it(cfg, params):
  ids = tokens(cfg)
  for at in (3, T - 1):
    other = jitted(cfg)(params, ids.at[:, at].set((ids[:, at] + 1) % cfg.vocab_size))
    same = np.asarray(other == jitted(cfg)(params, ids)).all(axis=(0, 2))
    assert same[:at].all() and not same[at:].any()


@pytest.mark.slow(but='llama')
@DENSE  # a grouped matmul has no Jacobian by rows
def test_causality_by_gradient(cfg, params):
  """d x[t] / d input[s] is exactly zero for s > t and is not for s <= t."""
  ids = jnp.arange(2, 2 + T, dtype=jnp.int32)[None]  # all distinct: a row of the embedding is one position's input
  probe = jnp.asarray(np.random.default_rng(0).normal(size=(cfg.d_model,)), jnp.float32)
  outputs = lambda embed: models.hidden(cfg, {**params, 'embed': embed}, ids).x_BTD[0] @ probe
  jacobian = np.abs(jax.jit(jax.jacrev(outputs))(params['embed'])).max(axis=-1)[:, 2 : 2 + T]
  np.testing.assert_array_equal(jacobian > 0, np.tri(T, dtype=bool))


MODES = {'scan': {}, 'unroll 2': {'unroll': 2}, 'unroll all': {'unroll': 5}, 'loop': {}}


class Computed(NamedTuple):
  value: Any  # (a number that depends on all activations, its gradient by the parameters)
  matmuls: int  # in the compiled program
  temporary: int  # bytes


@cache
def computed(cfg, mode='scan', remat='none'):
  ids = tokens(cfg)
  probe = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, cfg.d_model)), jnp.float32)

  def fn(params):
    if mode == 'loop':
      params = {**params, 'layers': models.unstack(params['layers'], cfg.n_layers)}
    return jnp.sum(models.hidden(cfg, params, ids, run=Run(remat=remat, **MODES[mode])).x_BTD * probe)

  compiled = jax.jit(jax.value_and_grad(fn)).lower(randomized(cfg)).compile()
  value = jax.device_get(compiled(randomized(cfg)))
  return Computed(value, compiled.as_text().count(' dot('), compiled.memory_analysis().temp_size_in_bytes)


def assert_alike(got, expected, rtol=1e-5):
  largest = max(
    np.abs(x).max() for x in jax.tree.leaves(expected)
  )  # some gradients (a key's bias) are nothing but noise
  for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=rtol * max(np.abs(theirs).max(), 0.01 * largest))


def test_jit_is_no_jit():
  cfg = SHALLOW
  with jax.disable_jit():
    plain = models.forward(cfg, randomized(cfg), tokens(cfg))[0]
  np.testing.assert_allclose(plain, jitted(cfg)(randomized(cfg), tokens(cfg)), atol=1e-5)


@pytest.mark.slow(but='llama-loop')
@pytest.mark.parametrize(
  'style, mode', [('llama', 'unroll 2'), ('llama', 'unroll all'), ('llama', 'loop'), ('gpt2', 'loop')]
)
def test_scan_is_a_loop(style, mode):
  assert_alike(computed(STYLES[style], mode).value, computed(STYLES[style]).value)


REMATS = ('none', 'dots', 'attn_out,mlp_out', 'full')  # from the least to the most that is computed again


@pytest.mark.parametrize(
  'mode, policy', [*(('scan', policy) for policy in REMATS[1:]), ('loop', 'dots'), ('loop', 'full')]
)
def test_remat_changes_nothing(mode, policy):
  assert_alike(computed(SHALLOW, mode, policy).value, computed(SHALLOW, mode).value, rtol=1e-6)


@pytest.mark.parametrize(
  'mode, policies', [('scan', REMATS), ('unroll all', ('none', 'dots')), ('loop', ('none', 'dots', 'full'))]
)
def test_remat_is_really_toggled(mode, policies):
  """Each policy computes more matmuls again than the one before, in the program that is left after XLA's sharing."""
  counts = {policy: computed(SHALLOW, mode, policy).matmuls for policy in policies}
  assert list(counts.values()) == sorted(set(counts.values())), counts


def test_remat_saves_memory():
  """Read from the compiled programs of a longer row; nothing is run."""
  cfg = dataclasses.replace(LLAMA, n_layers=7)
  ids, params = tokens(cfg, (B, 64)), jax.eval_shape(lambda: models.init(cfg, jax.random.key(0)))

  def temporary(remat):
    fn = lambda params: jnp.sum(models.hidden(cfg, params, ids, run=Run(remat=remat)).x_BTD)
    return jax.jit(jax.grad(fn)).lower(params).compile().memory_analysis().temp_size_in_bytes

  none, dots, full = (temporary(remat) for remat in ('none', 'dots', 'full'))
  assert full < dots < none / 2


@pytest.mark.slow(but='llama')
def test_dropout_needs_a_key(cfg, params):
  ids, drop = tokens(cfg), jitted(cfg, dropout=0.5)
  one, again, other = (drop(params, ids, key=jax.random.key(seed)) for seed in (3, 3, 4))
  without = jitted(cfg)(params, ids)
  np.testing.assert_array_equal(drop(params, ids), without)
  np.testing.assert_array_equal(jitted(cfg)(params, ids, key=jax.random.key(3)), without)  # a key alone drops nothing
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - without).max() > 0.1 and np.abs(one - other).max() > 0.1


@pytest.mark.slow(but='llama')
def test_dropout_drops_and_scales(cfg, params):
  """What a sub-layer adds is nothing or 1 / (1 - rate) of what it was; here the MLP adds nothing."""
  layer = jax.tree.map(lambda x: x[0], params['layers'])
  layer['mlp'] = jax.tree.map(jnp.zeros_like, layer['mlp'])
  x = jnp.asarray(np.random.default_rng(0).normal(size=(B, 29, cfg.d_model)), jnp.float32)
  ctx = _context(cfg, 'global', jnp.arange(29, dtype=jnp.int32)[None], None)
  block = lambda run, key: np.asarray(Block(cfg, run).apply({'params': layer}, x, ctx, None, key)[0]) - x
  whole, dropped = block(Run(), None), block(Run(dropout=0.2), jax.random.key(0))
  kept = dropped != 0
  assert kept.mean() == pytest.approx(0.8, abs=0.04)
  np.testing.assert_allclose(dropped[kept], whole[kept] / 0.8, atol=1e-5)


# --- leaf types


def adapted(cfg, b):
  """Parameters with low-rank leaves of rank 3 on one matrix of attention and one of the MLP; `b` is its scale."""
  rng = np.random.default_rng(17)

  def low_rank(w):
    *stack, i, o = w.shape
    draw = lambda *shape: jnp.asarray(rng.normal(0.0, 0.3, (*stack, *shape)), jnp.float32)
    scale = np.linspace(0.5, 2.0, np.prod(stack)).reshape(stack)
    return LowRank(w, draw(i, 3), b * draw(3, o), jnp.asarray(scale, jnp.float32))

  params = randomized(cfg)
  layers = params['layers']
  attn = {**layers['attn'], 'q': low_rank(layers['attn']['q'])}
  mlp = {**layers['mlp'], 'down': low_rank(layers['mlp']['down'])}
  return {**params, 'layers': {**layers, 'attn': attn, 'mlp': mlp}}


def merged(params):
  is_low_rank = lambda x: isinstance(x, LowRank)
  return jax.tree.map(lambda x: dense(x) if is_low_rank(x) else x, params, is_leaf=is_low_rank)


def test_a_low_rank_leaf_starts_as_the_identity(cfg, params):
  np.testing.assert_array_equal(jitted(cfg)(adapted(cfg, 0.0), tokens(cfg)), jitted(cfg)(params, tokens(cfg)))


def test_a_low_rank_leaf_is_its_dense_weight(cfg, params):
  low = adapted(cfg, 1.0)
  w = low['layers']['attn']['q']
  expected = [
    np.asarray(w.w[n]) + float(w.scale_L[n]) * np.asarray(w.a[n]) @ np.asarray(w.b[n]) for n in range(cfg.n_layers)
  ]
  np.testing.assert_allclose(dense(w), expected, atol=1e-5)
  logits = jitted(cfg)(low, tokens(cfg))
  np.testing.assert_allclose(logits, jitted(cfg)(merged(low), tokens(cfg)), atol=1e-4)
  assert np.abs(logits - jitted(cfg)(params, tokens(cfg))).max() > 0.1
  looped = {**low, 'layers': models.unstack(low['layers'], cfg.n_layers)}
  np.testing.assert_allclose(jitted(cfg)(looped, tokens(cfg)), logits, atol=1e-5)


def test_gradients_reach_both_factors():
  cfg = SHALLOW
  fn = lambda params: jnp.sum(models.forward(cfg, params, tokens(cfg))[0] ** 2)
  grads = jax.jit(jax.grad(fn))(adapted(cfg, 1.0))
  plain = jax.jit(jax.grad(fn))(merged(adapted(cfg, 1.0)))
  for low, full, leaf in (
    (grads['layers']['attn']['q'], plain['layers']['attn']['q'], adapted(cfg, 1.0)['layers']['attn']['q']),
    (grads['layers']['mlp']['down'], plain['layers']['mlp']['down'], adapted(cfg, 1.0)['layers']['mlp']['down']),
  ):
    scale = leaf.scale_L[:, None, None]
    da, db = scale * full @ jnp.swapaxes(leaf.b, 1, 2), scale * jnp.swapaxes(leaf.a, 1, 2) @ full
    for mine, theirs in ((low.w, full), (low.a, da), (low.b, db)):  # the chain rule by hand
      assert np.abs(theirs).max() > 0
      np.testing.assert_allclose(mine, theirs, atol=2e-5 * np.abs(theirs).max())


# --- the padded vocabulary


def with_padding(cfg, value):
  """Parameters whose padded rows of the embedding, or columns of the head, hold `value`."""
  params = randomized(cfg)
  params = {**params, 'embed': params['embed'].at[cfg.vocab_size :].set(value)}
  return params if cfg.tie_embeddings else {**params, 'head': params['head'].at[:, cfg.vocab_size :].set(value)}


def test_the_padded_vocabulary_is_never_predicted(cfg):
  assert cfg.padded_vocab == 256 > cfg.vocab_size
  usual, huge = (jitted(cfg)(with_padding(cfg, value), tokens(cfg)) for value in (0.0, 1e3))
  assert usual.shape[-1] == cfg.vocab_size
  np.testing.assert_array_equal(usual, huge)


@pytest.mark.parametrize('style, chunks', [('llama', 1), ('llama', 2), ('gpt2', 2)])
@pytest.mark.parametrize('multipliers', [{}, MULTIPLIERS], ids=['plain', 'multipliers'])
def test_the_padded_vocabulary_is_never_trained(style, chunks, multipliers):
  cfg = dataclasses.replace(STYLES[style], **multipliers)
  ids = tokens(cfg)
  batch = {
    'tokens': ids,
    'targets': ids,
    'loss_mask': jnp.ones((B, T)),
    'segment_ids': jnp.ones((B, T), jnp.int32),
    'positions': jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1)),
    'target_bytes': jnp.ones((B, T), jnp.int32),
  }
  loss_fn = objectives.next_token(cfg, Run(), chunks=chunks)
  run = jax.jit(jax.value_and_grad(lambda params: loss_fn(params, batch, jax.random.key(0))[0].total))
  (usual, grads), (huge, _) = run(with_padding(cfg, 0.0)), run(with_padding(cfg, 1e3))
  assert usual == huge
  logits = jitted(cfg)(with_padding(cfg, 0.0), ids)
  logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))
  expected = -np.take_along_axis(logp, np.asarray(ids)[..., None], -1).sum()
  assert usual == pytest.approx(expected, rel=1e-5)
  assert not np.any(grads['embed'][cfg.vocab_size :])
  if not cfg.tie_embeddings:
    assert not np.any(grads['head'][:, cfg.vocab_size :])
    assert np.any(grads['head'][:, cfg.vocab_size - 1])


@pytest.mark.slow
def test_noise_on_embeddings_is_uniform_within_its_bound():
  """NEFTune: alpha / sqrt(T * D), on what enters the first layer, another for each key, none without one."""
  cfg = dataclasses.replace(SHALLOW, n_layers=1)
  params = models.init(cfg, jax.random.key(0))
  still = {**params, 'layers': jax.tree.map(jnp.zeros_like, params['layers'])}  # the first layer adds nothing
  still['final_norm'] = jax.tree.map(jnp.ones_like, params['final_norm'])
  t = jnp.arange(12).reshape(2, 6)
  run = Run(embed_noise=7.0)
  x = lambda key, run=run: models.hidden(cfg, still, t, run=run, key=key).x_BTD
  np.testing.assert_array_equal(x(None), x(jax.random.key(1), Run()))
  assert np.abs(x(jax.random.key(1)) - x(jax.random.key(2))).max() > 0.01
  noise = jax.random.uniform(
    jax.random.fold_in(jax.random.key(1), cfg.n_layers), (2, 6, cfg.d_model), jnp.float32, -1, 1
  )
  entered = jnp.take(params['embed'], t, axis=0) + noise * 7.0 / (6 * cfg.d_model) ** 0.5
  scale = jax.lax.rsqrt(jnp.mean(entered**2, -1, keepdims=True) + cfg.norm_eps)
  np.testing.assert_allclose(x(jax.random.key(1)), entered * scale, rtol=1e-4, atol=1e-5)
