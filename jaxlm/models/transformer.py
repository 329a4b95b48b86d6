"""A decoder-only transformer as pure functions over one plain dict of arrays, its layers stacked on a leading axis.

B batch, T sequence, D model, F ffn, H heads, K kv heads, N head width, V vocabulary, L layers.
"""

import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlm import tree
from jaxlm.errors import InputError
from jaxlm.models import kernels, ring
from jaxlm.models.attention import (
  Cache,
  attend,
  attend_back,
  attend_reached,
  causal_mask,
  rope_angles,
  rope_frequencies,
  rope_scaled,
  rotate,
)
from jaxlm.models.config import ModelConfig, Run
from jaxlm.models.linear import Turned, as_computed, by_columns, is_weight, linear, turn
from jaxlm.models.linear import shape as shape_of
from jaxlm.models.lookup import lookup
from jaxlm.models.moe import MoE
from jaxlm.sharding import constrain

Params = Any
ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
}
REMAT = {
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
SAVEABLE = {'attn_values', 'attn_out', 'mlp_up', 'mlp_gate', 'mlp_out'}  # what a remat policy may keep by name
MATMUL = re.compile(r'(^|/)(attn/[qkvo]|(mlp|shared)/(up|gate|down))$')
STREAM = ('batch', 'stream', None)  # the logical axes of the residual stream


class Hidden(NamedTuple):
  """What the trunk returns: normed activations, the cache with this call's keys and values, and auxiliary sums."""

  x_BTD: Array
  cache: Any
  aux: dict[str, Array]


class Context(NamedTuple):
  """What every layer of a kind reads beside its input: computed once, outside of the scan."""

  angles: Array | None
  mask: Array
  positions: Array
  own: bool = True  # the mask is for this call's keys, whatever a cache holds
  segments: Array | None = None
  window: int | None = None
  amplitude: float = 1.0  # of rotated queries and keys

  @property
  def real(self) -> Array | None:
    """[B, T]: not padding; None: all."""
    return None if self.segments is None else self.segments > 0


def declare(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Any) -> Any:
  """The one declaration of a weight: its shape, its logical axes and how it starts."""
  given = module.get_variable('params', name)
  if is_weight(given):  # Linen would look at the shape of its first array
    if shape_of(given) != shape:
      raise ValueError(f'{"/".join((*module.path, name))}: {shape_of(given)}, not {shape}')
    return given
  return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


def fan_in(scale: float = 1.0) -> Any:
  """Normal initialisation with standard deviation scale / sqrt(last axis but one)."""
  return lambda key, shape, dtype: jax.random.normal(key, shape, dtype) * (scale / shape[-2] ** 0.5)


def branch_scale(cfg: ModelConfig) -> float:
  """How small a sub-layer's output starts: (2L)^-0.5 (GPT-2), of which a residual multiplier has already done its part.

  Under the depth rule (`jaxlm.scale`) the multiplier falls as 1/L: the start is then the one of the base depth.
  """
  return (2 * cfg.n_layers * cfg.residual_multiplier) ** -0.5


class Norm(nn.Module):
  """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) or LayerNorm (Ba et al. 2016, arXiv:1607.06450), in float32."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: Array) -> Array:
    cfg = self.cfg
    scale_D = declare(self, 'scale', (x_BTD.shape[-1],), ('norm',), nn.initializers.ones)
    x = x_BTD.astype(jnp.float32)
    if cfg.norm == 'layernorm':
      x -= jnp.mean(x, axis=-1, keepdims=True)
    y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + cfg.norm_eps) * scale_D
    if cfg.norm == 'layernorm':
      y += declare(self, 'bias', (x_BTD.shape[-1],), ('norm',), nn.initializers.zeros)
    return y.astype(x_BTD.dtype)


class Attention(nn.Module):
  """Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)."""

  cfg: ModelConfig
  run: Run

  @nn.compact
  def __call__(self, x_BTD: Array, ctx: Context, cache: Cache | None) -> tuple[Array, Cache | None]:
    cfg, rules = self.cfg, self.run.rules
    B, T, D = x_BTD.shape
    H, K, N = cfg.n_heads, cfg.kv_heads, cfg.head_size

    def project(name: str, x: Array, i: int, o: int, axes: tuple[str, str], scale: float = 1.0) -> Array:
      w = declare(self, name, (i, o), axes, fan_in(scale))
      biased = cfg.bias or (cfg.qkv_bias and name != 'o')
      bias = declare(self, f'{name}_bias', (o,), (axes[1],), nn.initializers.zeros) if biased else None
      return linear(x, w, bias)

    def heads(name: str, n: int, axis: str) -> Array:
      x = project(name, x_BTD, D, n * N, ('embed', axis))
      if name == 'v' or cfg.qk_norm == 'none':
        return x.reshape(B, T, n, N)
      norm = Norm(cfg, name=f'{name}_norm')
      return norm(x).reshape(B, T, n, N) if cfg.qk_norm == 'whole' else norm(x.reshape(B, T, n, N))

    q_BTHN, k_BTKN, v_BTKN = heads('q', H, 'heads'), heads('k', K, 'kv_heads'), heads('v', K, 'kv_heads')
    if ctx.angles is not None:
      q_BTHN, k_BTKN = (rotate(x, ctx.angles, ctx.amplitude) for x in (q_BTHN, k_BTKN))
    if cache is not None:
      cache = cache.write(k_BTKN, v_BTKN, ctx.positions)
      if not ctx.own:
        k_BTKN, v_BTKN = cache.k.swapaxes(1, 2), cache.v.swapaxes(1, 2)
    q_BTHN = constrain(q_BTHN, ('batch', 'seq', 'act_heads', None), rules)
    scale, softcap = cfg.attention_multiplier, cfg.attention_softcap
    if self.run.attention == 'splash' and cache is None:
      how = kernels.Splash(ctx.window, scale, softcap)
      out_BTHN = kernels.splash(q_BTHN, k_BTKN, v_BTKN, ctx.segments, how, rules)
    elif self.run.attention == 'cudnn' and cache is None:
      out_BTHN = kernels.cudnn(q_BTHN, k_BTKN, v_BTKN, ctx.segments, window=ctx.window, scale=scale, rules=rules)
    elif self.run.attention == 'ring' and cache is None:
      around = {'window': ctx.window, 'scale': scale, 'softcap': softcap, 'rules': rules}
      out_BTHN = ring.ring(q_BTHN, k_BTKN, v_BTKN, ctx.segments, **around)
    elif self.run.attention == 'reached' and cache is not None and not ctx.own and not cache.ring:
      out_BTHN = attend_reached(q_BTHN, cache.k, cache.v, ctx.mask, ctx.positions.max(), scale, softcap)
    else:
      fn = attend_back if ctx.own and rules is None else attend
      out_BTHN = fn(q_BTHN, k_BTKN, v_BTKN, ctx.mask, scale, softcap)
    out_BTE = checkpoint_name(out_BTHN, 'attn_values').reshape(B, T, H * N)
    return project('o', out_BTE, H * N, D, ('heads', 'embed'), branch_scale(cfg)), cache


class MLP(nn.Module):
  """A feed-forward layer, gated (SwiGLU, Shazeer 2020, arXiv:2002.05202) or plain."""

  cfg: ModelConfig
  run: Run
  width: int

  @nn.compact
  def __call__(self, x_BTD: Array) -> Array:
    cfg, D, F = self.cfg, self.cfg.d_model, self.width

    def project(name: str, x: Array, shape: tuple[int, int], axes: tuple[str, str], scale: float = 1.0) -> Array:
      w = declare(self, name, shape, axes, fan_in(scale))
      bias = declare(self, f'{name}_bias', shape[1:], axes[1:], nn.initializers.zeros) if cfg.bias else None
      return linear(x, w, bias)

    h_BTF = checkpoint_name(project('up', x_BTD, (D, F), ('embed', 'mlp')), 'mlp_up')
    act = ACTIVATIONS[cfg.activation]
    if cfg.gated_mlp:
      h_BTF = act(checkpoint_name(project('gate', x_BTD, (D, F), ('embed', 'mlp')), 'mlp_gate')) * h_BTF
    else:
      h_BTF = act(h_BTF)
    h_BTF = constrain(h_BTF, ('batch', 'seq', 'act_mlp'), self.run.rules)
    return project('down', h_BTF, (F, D), ('mlp', 'embed'), branch_scale(cfg))


class Block(nn.Module):
  """One layer: x += attention(norm(x)); x += mlp(norm(x)), or with norms elsewhere (`norm_at`)."""

  cfg: ModelConfig
  run: Run

  @nn.compact
  def __call__(
    self, x_BTD: Array, ctx: Context, cache: Cache | None, key: Array | None
  ) -> tuple[Array, Cache | None, dict[str, Array]]:

    def add(x: Array, y: Array, site: int) -> Array:
      rate = self.run.dropout
      if rate and key is not None:
        keep = jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, y.shape)
        y = jnp.where(keep, y / (1.0 - rate), 0.0).astype(y.dtype)
      return constrain(x + y * self.cfg.residual_multiplier, STREAM, self.run.rules)

    def norm(x: Array, name: str, at: str) -> Array:
      return Norm(self.cfg, name=name)(x) if self.cfg.norm_at in (at, 'both') else x

    attn, cache = Attention(self.cfg, self.run, name='attn')(norm(x_BTD, 'attn_norm', 'pre'), ctx, cache)
    x_BTD = add(x_BTD, checkpoint_name(norm(attn, 'attn_post_norm', 'post'), 'attn_out'), 0)
    mlp, aux = self.feed_forward(norm(x_BTD, 'mlp_norm', 'pre'), ctx.real)
    return add(x_BTD, checkpoint_name(norm(mlp, 'mlp_post_norm', 'post'), 'mlp_out'), 1), cache, aux

  def feed_forward(self, x_BTD: Array, real_BT: Array | None) -> tuple[Array, dict[str, Array]]:
    """A plain one, or one of experts with what its router adds to the loss."""
    cfg, run = self.cfg, self.run
    if not cfg.n_experts:
      return MLP(cfg, run, cfg.d_ff, name='mlp')(x_BTD), {}
    declared = lambda module, name, shape, axes, scale: declare(module, name, shape, axes, fan_in(scale))
    shared = lambda: MLP(cfg, run, cfg.shared_d_ff, name='shared')
    how = shared, run.rules, run.ragged
    return MoE(cfg, ACTIVATIONS[cfg.activation], declared, branch_scale(cfg), *how, name='mlp')(x_BTD, real_BT)


class Outside(nn.Module):
  """The weights that are not in a layer, declared in one place; applied by the functions below."""

  cfg: ModelConfig

  @nn.compact
  def __call__(self) -> None:
    cfg, normal = self.cfg, nn.initializers.normal(0.02)
    declare(self, 'embed', (cfg.padded_vocab, cfg.d_model), ('vocab', 'embed'), normal)
    if cfg.positions == 'learned':
      declare(self, 'positions', (cfg.max_seq_len, cfg.d_model), ('positions', 'embed'), normal)
    if not cfg.tie_embeddings:
      declare(self, 'head', (cfg.d_model, cfg.padded_vocab), ('embed', 'vocab'), fan_in(cfg.logits_scaling**0.5))
    Norm(cfg, name='final_norm')(jnp.zeros((1, 1, cfg.d_model)))


def init_named(cfg: ModelConfig, key: Array) -> Params:
  """`init`, with every array boxed with its logical axis names (`flax.linen.LogicallyPartitioned`)."""
  outside_key, layers_key = jax.random.split(key)
  x, one = jnp.zeros((1, 1, cfg.d_model)), jnp.zeros((1, 1), jnp.int32)
  ctx = _context(cfg, 'global', one, None)

  def layer(key: Array) -> Params:
    return Block(cfg, Run()).init(key, x, ctx, None, None)['params']

  layers = jax.vmap(layer)(jax.random.split(layers_key, cfg.n_layers))
  layers = nn.meta.add_axis(layers, 0, {nn.PARTITION_NAME: 'layers'})
  return {**Outside(cfg).init(outside_key)['params'], 'layers': layers}


def init(cfg: ModelConfig, key: Array) -> Params:
  """Fresh float32 parameters: a plain nested dict, the leaves under 'layers' stacked [L, ...]."""
  return nn.meta.unbox(init_named(cfg, key))


def abstract(cfg: ModelConfig) -> Params:
  """The parameters as shapes boxed with their logical axis names; nothing is computed."""
  return jax.eval_shape(lambda: init_named(cfg, jax.random.key(0)))


def axes(cfg: ModelConfig) -> Params:
  """The logical axis names of every parameter, as a tree of tuples."""
  return jax.tree.map(lambda box: box.names, abstract(cfg), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def init_cache(cfg: ModelConfig, batch: int, length: int, dtype: Any = jnp.float32, *, ahead: int = 1) -> Any:
  """An empty cache of `length` positions for every layer; local layers keep their window, if that is less.

  A tuple of one a layer, [B, K, S, N]. `ahead` is the most tokens that a call after the first will have.
  """

  def empty(kind: str) -> Cache:
    kept = cfg.window + ahead - 1
    ring = kind == 'local' and kept < length
    shape = (batch, cfg.kv_heads, kept if ring else length, cfg.head_size)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), ring)

  return tuple(map(empty, cfg.kinds))


def unstack(tree_: Any, n_layers: int) -> tuple[Any, ...]:
  """A stack of layers as a tuple of them; `hidden` loops over such a tuple instead of scanning (faster to decode)."""
  return tuple(jax.tree.map(lambda x, i=i: x[i], tree_) for i in range(n_layers))


def remat(fn: Any, policy: str, *, in_loop: bool, static: tuple[int, ...] = ()) -> Any:
  """Applies a rematerialisation policy by name: 'none', 'full', 'dots', or the names of what is kept.

  Only inside of a loop is XLA free to share subexpressions: elsewhere it would share what is to be computed again.
  """
  if policy == 'none':
    return fn
  if policy not in REMAT and not SAVEABLE.issuperset(policy.split(',')):
    raise InputError(
      f'remat {policy!r}: none, {", ".join(REMAT)}, or some of {", ".join(sorted(SAVEABLE))} with commas'
    )
  saved = REMAT.get(policy) or jax.checkpoint_policies.save_only_these_names(*policy.split(','))
  return jax.checkpoint(fn, policy=saved, prevent_cse=not in_loop, static_argnums=static)


def hidden(
  cfg: ModelConfig,
  params: Params,
  tokens_BT: Int[Array, 'B T'],
  *,
  run: Run = Run(),
  positions_BT: Int[Array, 'R T'] | None = None,
  segment_ids_BT: Int[Array, 'B T'] | None = None,
  cache: Any = None,
  first: bool = False,
  key: Array | None = None,
) -> Hidden:
  """The activations after the last norm, x_BTD in `run.dtype`.

  `positions_BT` counts from 0 within a segment (default: along the row); tokens see only their own segment, and those
  of segment 0 are padding, left out of `aux`. With a cache (see `init_cache`), keys and values are written at their
  positions, those of negative ones are dropped, and the cache is what is attended to, or at the `first` call, while it
  is empty, these tokens themselves. `params['layers']` is a stack (scanned, a unit of `cfg.pattern` at a time) or a
  tuple of layers (looped over, as with a cache any is). `key` turns dropout on.
  """
  B, T = tokens_BT.shape
  if positions_BT is None:
    positions_BT = jnp.arange(T, dtype=jnp.int32)[None]
  embed_VD = params['embed']
  table_VD = embed_VD.w if isinstance(embed_VD, Turned) else embed_VD
  x_BTD = lookup(table_VD, tokens_BT, run.dtype, run.rules)
  if cfg.positions == 'learned':
    x_BTD += jnp.take(params['positions'], positions_BT, axis=0, mode='clip').astype(run.dtype)
  if run.embed_noise and key is not None:  # Jain et al. 2023, arXiv:2310.05914
    within = run.embed_noise / (T * cfg.d_model) ** 0.5
    x_BTD += jax.random.uniform(jax.random.fold_in(key, cfg.n_layers), x_BTD.shape, x_BTD.dtype, -within, within)
  x_BTD = constrain(x_BTD * cfg.embedding_multiplier, STREAM, run.rules)
  layers, block = params['layers'], Block(cfg, run)
  if cache is not None and not isinstance(layers, tuple):
    layers = unstack(layers, cfg.n_layers)
  looped = isinstance(layers, tuple)
  keys = None if key is None else jax.random.split(key, cfg.n_layers)
  real_B1T = (positions_BT >= 0)[:, None]
  contexts = {kind: _context(cfg, kind, positions_BT, segment_ids_BT) for kind in dict.fromkeys(cfg.kinds)}

  def one(x: Array, layer: tuple, kind: str, layer_cache: Cache | None, index: int | None) -> Any:
    if index is not None:  # of a unit; here, so that a scan keeps its slices for the backward pass and not copies
      layer = jax.tree.map(lambda leaf: leaf[index], layer)
    weights, layer_key = layer
    ctx = contexts[kind]
    if layer_cache is not None:
      ctx = ctx._replace(mask=ctx.mask & real_B1T) if first else _cached(cfg, kind, ctx, layer_cache)
    return block.apply({'params': weights}, x, ctx, layer_cache, layer_key)

  one = remat(one, run.remat, in_loop=not looped and run.unroll < cfg.n_layers, static=(2, 4))
  if looped:
    caches, auxes = [], []
    for i, (weights, kind) in enumerate(zip(layers, cfg.kinds, strict=True)):
      layer = weights, None if keys is None else keys[i]
      x_BTD, new, aux = one(x_BTD, layer, kind, None if cache is None else cache[i], None)
      caches.append(new)
      auxes.append(aux)
    cache = None if cache is None else tuple(caches)
  else:
    x_BTD, auxes = _scanned(one, x_BTD, (cast(layers, run), keys), cfg.kinds, len(cfg.pattern), run.unroll)
  normed_BTD: Any = Norm(cfg).apply({'params': params['final_norm']}, x_BTD)
  return Hidden(normed_BTD, cache, jax.tree.map(lambda *xs: sum(map(jnp.sum, xs)) / cfg.n_layers, *auxes))


def cast(params: Params, run: Run) -> Params:
  """Parameters, or layers alone, as matmuls and lookups read them: no value that these make is another.

  Cast before they are gathered less is sent, and a stacked gradient is as small.
  """
  exact = re.compile(r'(^|/)(\w*norm|router)(/|$)')

  def one(path: str, leaf: Any) -> Any:
    if exact.search(path):
      return leaf
    whole = jax.tree.leaves(leaf)[0].ndim == 3  # not experts
    return as_computed(leaf, run.dtype, bool(run.float8 and whole and MATMUL.search(path)))

  return tree.path_map(one, params, is_leaf=is_weight)


def turned(cfg: ModelConfig, params: Params) -> Params:
  """A tree whose layers stand apart, for a CPU to decode with: each matrix `linear.Turned`, an output matrix too.

  An embedding that is the output's transpose lies right as it is. Experts stay.
  """

  def one(path: str, leaf: Any) -> Any:
    matrix = MATMUL.search(path) and jax.tree.leaves(leaf)[0].ndim == 2
    return turn(leaf) if matrix or path == 'head' else leaf

  over = tree.path_map(one, params, is_leaf=is_weight)
  return {**over, 'embed': Turned(over['embed'])} if cfg.tie_embeddings else over


def head(cfg: ModelConfig, params: Params) -> Float[Array, 'D V']:
  """The output matrix, padded vocabulary included: its own, or the embedding's transpose."""
  return params['embed'].T if cfg.tie_embeddings else params['head']


def unembed(cfg: ModelConfig, params: Params, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
  """Float32 logits over the true vocabulary."""
  given = params['embed' if cfg.tie_embeddings else 'head']
  if isinstance(given, Turned):
    logits_BTV = by_columns(x_BTD, given, jnp.float32)
  else:
    logits_BTV = jnp.matmul(x_BTD, head(cfg, params).astype(x_BTD.dtype), preferred_element_type=jnp.float32)
  logits_BTV = logits_BTV[..., : cfg.vocab_size] / cfg.logits_scaling
  cap = cfg.logits_softcap
  return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)


def with_value(cfg: ModelConfig, params: Params) -> Params:
  """The tree with a value head, unless it has one.

  It begins at 0: every value is then 0 whatever the seed, and a loss begins where it knows nothing (log 2 for pairs).
  The head itself has a gradient at once, the trunk as soon as the head is another.
  """
  return params if 'value' in params else {**params, 'value': jnp.zeros((cfg.d_model,), jnp.float32)}


def value(params: Params, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T']:
  """Float32: one number a token, of trees that `with_value` has made."""
  return x_BTD.astype(jnp.float32) @ params['value']


def forward(cfg: ModelConfig, params: Params, tokens_BT: Int[Array, 'B T'], **as_hidden: Any) -> tuple[Array, Any]:
  """`(logits_BTV, cache)`: `hidden` and `unembed` composed."""
  out = hidden(cfg, params, tokens_BT, **as_hidden)
  return unembed(cfg, params, out.x_BTD), out.cache


def _scanned(
  one: Any, x_BTD: Array, layers: Any, kinds: tuple[str, ...], period: int, unroll: int
) -> tuple[Array, list[dict[str, Array]]]:
  """`x_BTD` through a stack of layers: a scan over units of `period` layers, and a loop over those that are left.

  The auxiliary values of layers come stacked or alone.
  """
  units = len(kinds) // period
  whole, auxes = units * period, []

  def unit(x: Array, stacked: Any) -> tuple[Array, list[dict[str, Array]]]:
    found = []
    for i in range(period):
      x, _, aux = one(x, stacked, kinds[i], None, i if period > 1 else None)
      found.append(aux)
    return x, found

  if units:
    folded = jax.tree.map(lambda leaf: leaf[:whole].reshape(units, period, *leaf.shape[1:]), layers)
    x_BTD, auxes = jax.lax.scan(unit, x_BTD, folded if period > 1 else layers, length=units, unroll=min(unroll, units))
  for i in range(whole, len(kinds)):
    x_BTD, _, aux = one(x_BTD, jax.tree.map(lambda leaf, i=i: leaf[i], layers), kinds[i], None, None)
    auxes.append(aux)
  return x_BTD, auxes


def _context(cfg: ModelConfig, kind: str, positions: Array, segments: Array | None) -> Context:
  """Angles and mask of a call against its own tokens."""
  angles = rope_angles(positions, jnp.asarray(rope_frequencies(cfg, kind))) if cfg.positions == 'rope' else None
  order = jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
  # within a row a later token is one further right: position alone would let segments see each other's future
  window = cfg.window if kind == 'local' else None
  mask = causal_mask(order, order, segments, segments, window)
  amplitude = cfg.rope_amplitude if rope_scaled(cfg, kind) else 1.0
  return Context(angles, mask, positions, segments=segments, window=window, amplitude=amplitude)


def _cached(cfg: ModelConfig, kind: str, ctx: Context, cache: Cache) -> Context:
  """The same against what a cache holds once these tokens are in it."""
  T = ctx.positions.shape[1]
  room = cache.slots - cfg.window + 1
  if cache.ring and room < T:
    raise ValueError(
      f'a ring of {cache.slots} positions for a window of {cfg.window} takes {room} tokens at once, not {T}'
    )
  there = cache.positions(ctx.positions.max(axis=1, keepdims=True))
  mask = causal_mask(ctx.positions, there, window=cfg.window if kind == 'local' else None)
  return ctx._replace(mask=mask, own=False)
