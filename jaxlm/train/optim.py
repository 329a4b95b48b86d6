"""Optimizers and schedules, all from optax; what is ours is which parameter gets which."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers, muon

from jaxlm import tree
from jaxlm.errors import InputError

STACK_AXES = ('layers', 'experts')  # axes along which a leaf is several weights
TABLE_AXES = ('vocab', 'positions')  # a lookup table or a head: not a matrix to orthogonalise
VALUE_AXES = ('values',)  # a head of one column, kept as a vector

Kind = Literal['matrix', 'table', 'vector']
Name = Literal['adamw', 'muon', 'lion', 'adafactor', 'schedule_free']
Schedule = Literal['cosine', 'linear', 'wsd', 'constant', 'restarts']


def kinds(params: Any, axes: Any = None) -> Any:
  """Each leaf's kind, from its declared axis names: 'matrix', 'table' (embedding, head) or 'vector' (norm, bias).

  Without names (someone else's model) a leaf of two or more axes is a matrix, any other a vector.
  """
  is_names = lambda x: isinstance(x, tuple)
  table = sorted(tree.items(axes, is_leaf=is_names), key=lambda item: -len(item[0])) if axes is not None else []

  def one(path: str, leaf: Any) -> Kind:
    names = next((n for p, n in table if f'/{p}/' in f'/{path}/'), None)
    if names == VALUE_AXES:
      return 'table'
    if leaf.ndim - sum(name in STACK_AXES for name in names or ()) < 2:
      return 'vector'
    return 'table' if names is not None and any(name in TABLE_AXES for name in names) else 'matrix'

  return tree.path_map(one, params)


def schedule(
  name: Schedule,
  *,
  lr: float,
  steps: int,
  warmup_steps: int = 0,
  decay_fraction: float = 0.2,
  final_ratio: float = 0.1,
  cycles: int = 4,
) -> optax.Schedule:
  """The learning rate by step: linear warm-up from lr / warmup_steps, then one of

  - cosine: to `final_ratio * lr` at `steps` (Loshchilov and Hutter 2016, arXiv:1608.03983);
  - restarts: that `cycles` times, each from `lr` again (the same paper's SGDR, cycles of one length);
  - linear: straight down to `final_ratio * lr` at `steps`;
  - wsd: constant, and over the last `decay_fraction` of `steps` linearly down (Hu et al. 2024, arXiv:2404.06395);
  - constant.

  Raises InputError when the warm-up and the decay do not fit into `steps`.
  """
  decay_steps = {'wsd': max(1, round(steps * decay_fraction)), 'constant': 1}.get(name, steps - warmup_steps)
  if warmup_steps + decay_steps > steps or decay_steps < 1:
    raise InputError(f'optim: warmup_steps={warmup_steps} and the decay do not fit into steps={steps}')

  def at(count: Any) -> jax.Array:
    count = jnp.asarray(count, jnp.float32)
    warm = jnp.minimum(1.0, (count + 1.0) / max(1, warmup_steps))
    done = jnp.clip((count - (steps - decay_steps)) / decay_steps, 0.0, 1.0)
    cycle = jnp.where(done < 1.0, done * cycles % 1.0, 1.0) if name == 'restarts' else done
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * cycle))
    fall = {'cosine': cosine, 'restarts': cosine, 'constant': 1.0}.get(name, 1.0 - done)
    return lr * warm * (final_ratio + (1.0 - final_ratio) * fall)

  return at


def make(
  name: Name,
  learning_rate: float | optax.Schedule,
  *,
  axes: Any = None,
  weight_decay: float = 0.1,
  b1: float = 0.9,
  b2: float = 0.95,
  eps: float = 1e-8,
  muon_momentum: float = 0.95,
  clip_norm: float | None = 1.0,
  group_lr: Sequence[str] = (),
  ema_decay: float = 0.0,
  group_decay: Sequence[str] = (),
  only: Sequence[str] = (),
) -> optax.GradientTransformation:
  """An optimizer for a tree of parameters whose logical axis names are `axes` (see `kinds`).

  adamw: Loshchilov and Hutter 2017, arXiv:1711.05101, decay on matrices and tables, none on norms and biases.
  muon: Jordan et al. 2024 for matrices, each layer of a stack on its own, its update scaled to AdamW's size
  (0.2 * sqrt(max(fan_in, fan_out)), Liu et al. 2025, arXiv:2502.16982) so that one learning rate serves both; AdamW
  for the rest.
  lion: Chen et al. 2023, arXiv:2302.06675; a third to a tenth of AdamW's learning rate suits it.
  adafactor: Shazeer and Stern 2018, arXiv:1804.04235, without momentum, relative steps or parameter scaling: a row and
  a column of second moments for a matrix of at least 128 x 128, updates clipped to a root mean square of 1 a leaf.
  schedule_free: Defazio et al. 2024, arXiv:2405.15682, over AdamW, with b1 as its interpolation; it wants a warm-up and
  the constant schedule.
  All decay matrices and tables by learning rate x `weight_decay`, and neither norms nor biases. Gradients are first
  clipped to a global norm of `clip_norm` (None: not). `group_lr` are 'PATTERN=FACTOR': leaves whose path matches
  ('embed', 'layers/mlp/*') learn at that multiple of the learning rate, the first pattern that matches counting;
  `group_decay` multiplies `weight_decay` in the same way. A layer of the stack goes by its number: 'layers/3/*'.
  `only` are patterns of what learns at all: of a stack that a pattern means in part, the other layers stay as they are.
  Raises InputError for one that is not of this form and, at `init`, for one that matches no leaf.
  `ema_decay` above 0 keeps an average of the weights (see `averaged`), for `eval_params`.
  """

  def decayed(params: Any) -> Any:
    return jax.tree.map(lambda kind: kind != 'vector', kinds(params, axes))

  def labels(params: Any) -> Any:
    return jax.tree.map(lambda kind: 'matrix' if kind == 'matrix' else 'rest', kinds(params, axes))

  if name == 'lion':
    optimizer = optax.lion(learning_rate, b1, b2, weight_decay=weight_decay, mask=decayed)
  elif name == 'adafactor':
    factored: Any = {'matrix': optax.scale_by_factored_rms(), 'rest': optax.scale_by_factored_rms(factored=False)}
    optimizer = optax.chain(
      optax.partition(factored, labels),
      optax.clip_by_block_rms(1.0),
      optax.add_decayed_weights(weight_decay, decayed),
      optax.scale_by_learning_rate(learning_rate),
    )
  elif name == 'schedule_free':
    optimizer = optax.adamw(learning_rate, 0.0, b2, eps, weight_decay=weight_decay, mask=decayed)
  else:
    optimizer = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decayed)
  if name == 'muon':
    matrices = muon(
      learning_rate,
      beta=muon_momentum,
      weight_decay=weight_decay,
      consistent_rms=0.2,
      muon_weight_dimension_numbers=lambda params: jax.tree.map(_last_two_axes, params),
    )
    optimizer = optax.partition({'matrix': matrices, 'rest': optimizer}, labels)
  if group_decay:
    optimizer = decay_by_group(optimizer, group_decay)
  frozen = (scale_by_group([f'{pattern}=1' for pattern in only] + ['*=0'], 'trainable'),) if only else ()
  scaled = (*((scale_by_group(group_lr),) if group_lr else ()), *frozen)
  if name == 'schedule_free':  # around the groups: what it averages has moved by their multiples
    optimizer, scaled = optax.contrib.schedule_free(optax.chain(optimizer, *scaled), learning_rate, b1), ()
  first = () if clip_norm is None else (optax.clip_by_global_norm(clip_norm),)
  last = scaled + ((averaged(ema_decay),) if ema_decay else ())
  return optax.chain(*first, optimizer, *last) if first or last else optimizer


class Averaged(NamedTuple):
  """The state of `averaged`."""

  count: jax.Array
  mean: Any


def averaged(decay: float) -> optax.GradientTransformation:
  """Keeps mean <- d * mean + (1 - d) * weights, d = min(decay, (1 + t) / (10 + t)) at step t; put it last.

  Polyak averaging with TensorFlow's warm-up of the decay. It changes no update.
  """

  def init(params: Any) -> Averaged:
    return Averaged(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    t = state.count.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + t) / (10.0 + t))
    mean = lambda m, p: (d * m + (1.0 - d) * p).astype(m.dtype)
    moved = jax.tree.map(mean, state.mean, optax.apply_updates(params, updates))
    return updates, Averaged(state.count + 1, moved)

  return optax.GradientTransformation(init, update)


def eval_params(opt_state: Any, params: Any) -> Any:
  """The weights to evaluate, sample and export: the average, where the optimizer keeps one, else `params`."""
  kept = (Averaged, optax.contrib.ScheduleFreeState)
  for state in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kept)):
    if isinstance(state, Averaged):
      return state.mean
    if isinstance(state, optax.contrib.ScheduleFreeState):
      return optax.contrib.schedule_free_eval_params(state, params)
  return params


def scale_by_group(groups: Sequence[str], field: str = 'optim.group_lr') -> optax.GradientTransformation:
  """Multiplies the updates of the leaves whose path matches, see `group_lr` of `make`; put it near the end."""
  table = read_groups(groups, field)

  def init(params: Any) -> Any:
    _check_groups(table, params, field)
    return optax.EmptyState()

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    return tree.path_map(lambda path, update: update * group_factors(table, path, update), updates), state

  return optax.GradientTransformation(init, update)


def decay_by_group(optimizer: optax.GradientTransformation, groups: Sequence[str]) -> optax.GradientTransformation:
  """Multiplies the weight decay of the leaves whose path matches, see `group_decay` of `make`.

  For an optimizer that reads parameters for their decay alone: it is shown multiples of them.
  """
  table = read_groups(groups, 'optim.group_decay')

  def init(params: Any) -> Any:
    _check_groups(table, params, 'optim.group_decay')
    return optimizer.init(params)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    shown = tree.path_map(lambda path, x: x * group_factors(table, path, x), params)
    return optimizer.update(updates, state, shown)

  return optax.GradientTransformation(init, update)


def read_groups(groups: Sequence[str], field: str) -> list[tuple[str, float]]:
  """[(pattern, factor)] of 'PATTERN=FACTOR'. Raises InputError, naming the field, for one that is not of this form."""
  table = []
  for group in groups:
    pattern, _, factor = group.rpartition('=')
    try:
      table.append((pattern.strip(), float(factor)))
    except ValueError:
      pattern = ''
    if not pattern or not 0.0 <= table[-1][1] < float('inf'):
      raise InputError(f"{field}: {group!r} is not PATTERN=FACTOR, as 'embed=0.1' is")
  return table


def group_factor(table: Sequence[tuple[str, float]], path: str) -> float:
  """The factor of the first pattern that matches the path, or 1."""
  return next((factor for pattern, factor in table if fnmatchcase(path, pattern)), 1.0)


def group_factors(table: Sequence[tuple[str, float]], path: str, leaf: Any) -> Any:
  """`group_factor`; of a stack whose layers have several, as an array [L, 1, ...]."""
  found = [
    next((x for pattern, x in table if any(fnmatchcase(name, pattern) for name in names)), 1.0)
    for names in tree.names(path, leaf)
  ]
  if len(set(found)) == 1:
    return found[0]
  return jnp.asarray(found, leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1))


def _check_groups(table: Sequence[tuple[str, float]], params: Any, field: str) -> None:
  leaves = tree.items(params)
  for pattern, _ in table:
    if not any(fnmatchcase(name, pattern) for leaf in leaves for names in tree.names(*leaf) for name in names):
      raise InputError(f'{field}: {pattern!r} matches no parameter; there are {", ".join(p for p, _ in leaves)}')


def _last_two_axes(x: Any) -> MuonDimensionNumbers:
  return MuonDimensionNumbers(reduction_axis=x.ndim - 2, output_axis=x.ndim - 1)
