"""Optimizers and schedules, all from optax; what is ours is which parameter gets which."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxlm import tree
from jaxlm.errors import InputError

STACK_AXES = ('layers', 'experts')  # axes along which a leaf is several weights
TABLE_AXES = ('vocab', 'positions')  # a lookup table or a head: not a matrix to orthogonalise

Kind = Literal['matrix', 'table', 'vector']


def kinds(params: Any, axes: Any = None) -> Any:
  """Each leaf's kind, from its declared axis names: 'matrix', 'table' (embedding, head) or 'vector' (norm, bias).

  Without names (someone else's model) a leaf of two or more axes is a matrix, any other a vector.
  """
  is_names = lambda x: isinstance(x, tuple)
  table = sorted(tree.items(axes, is_leaf=is_names), key=lambda item: -len(item[0])) if axes is not None else []

  def one(path: str, leaf: Any) -> Kind:
    names = next((n for p, n in table if f'/{p}/' in f'/{path}/'), None)
    rank = leaf.ndim if names is None else sum(name not in STACK_AXES for name in names)
    if rank < 2:
      return 'vector'
    return 'table' if names is not None and any(name in TABLE_AXES for name in names) else 'matrix'

  return tree.path_map(one, params)


def schedule(
  name: Literal['cosine', 'wsd', 'constant'],
  *,
  lr: float,
  steps: int,
  warmup_steps: int = 0,
  decay_fraction: float = 0.2,
  final_ratio: float = 0.1,
) -> optax.Schedule:
  """The learning rate by step: linear warm-up from lr / warmup_steps, then one of

  - cosine: to `final_ratio * lr` at `steps` (Loshchilov and Hutter 2016, arXiv:1608.03983);
  - wsd: constant, and over the last `decay_fraction` of `steps` linearly down (Hu et al. 2024, arXiv:2404.06395);
  - constant.

  Raises InputError when the warm-up and the decay do not fit into `steps`.
  """
  decay_steps = {'cosine': steps - warmup_steps, 'wsd': max(1, round(steps * decay_fraction)), 'constant': 1}[name]
  if warmup_steps + decay_steps > steps or decay_steps < 1:
    raise InputError(f'optim: warmup_steps={warmup_steps} and the decay do not fit into steps={steps}')

  def at(count: Any) -> jax.Array:
    count = jnp.asarray(count, jnp.float32)
    warm = jnp.minimum(1.0, (count + 1.0) / max(1, warmup_steps))
    done = jnp.clip((count - (steps - decay_steps)) / decay_steps, 0.0, 1.0)
    fall = {'cosine': 0.5 * (1.0 + jnp.cos(jnp.pi * done)), 'wsd': 1.0 - done, 'constant': 1.0}[name]
    return lr * warm * (final_ratio + (1.0 - final_ratio) * fall)

  return at


def make(
  name: Literal['adamw', 'muon'],
  learning_rate: float | optax.Schedule,
  *,
  axes: Any = None,
  weight_decay: float = 0.1,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  muon_momentum: float = 0.95,
  clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
  """An optimizer for a tree of parameters whose logical axis names are `axes` (see `kinds`).

  adamw: Loshchilov and Hutter 2017, arXiv:1711.05101, decay on matrices and tables, none on norms and biases.
  muon: Jordan et al. 2024 for matrices, each layer of a stack on its own, its update scaled to AdamW's size
  (0.2 * sqrt(max(fan_in, fan_out)), Liu et al. 2025, arXiv:2502.16982) so that one learning rate serves both; AdamW
  for the rest. Gradients are first clipped to a global norm of `clip_norm` (None: not).
  """

  def decayed(params: Any) -> Any:
    return jax.tree.map(lambda kind: kind != 'vector', kinds(params, axes))

  rest = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decayed)
  if name == 'muon':
    matrices = muon(
      learning_rate,
      beta=muon_momentum,
      weight_decay=weight_decay,
      consistent_rms=0.2,
      muon_weight_dimension_numbers=lambda params: jax.tree.map(_last_two_axes, params),
    )
    labels = lambda params: jax.tree.map(lambda k: 'muon' if k == 'matrix' else 'adamw', kinds(params, axes))
    rest = optax.partition({'muon': matrices, 'adamw': rest}, labels)
  return rest if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), rest)


def _last_two_axes(x: Any) -> MuonDimensionNumbers:
  return MuonDimensionNumbers(reduction_axis=x.ndim - 2, output_axis=x.ndim - 1)
