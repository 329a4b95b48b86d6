"""Sums with their weights: what losses and metrics return, so that any split of a batch adds up to the same value."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float


@struct.dataclass
class Sum:
  """A total and the weight it is to be divided by, once, after everything was added. value = total / weight.

  Both are scalars, or arrays of one shape where several values are kept side by side.
  """

  total: Float[Array, '*groups']
  weight: Float[Array, '*groups']


@struct.dataclass
class Max:
  """A metric reduced by its largest value."""

  value: Float[Array, '']


@struct.dataclass
class Min:
  """A metric reduced by its smallest value."""

  value: Float[Array, '']


Metric = Sum | Max | Min


def total(x: Float[Array, '...'], mask: Any) -> Sum:
  """The sum of `x` where `mask` (weights in [0, 1], broadcastable) with the sum of the mask, both float32.

  Masked entries are selected away and not multiplied, so that a NaN at a masked position does not spread.
  """
  weight = jnp.broadcast_to(jnp.asarray(mask, jnp.float32), x.shape)
  return Sum(jnp.sum(jnp.where(weight > 0, x.astype(jnp.float32) * weight, 0.0)), jnp.sum(weight))


def kept(x: Any, mask: Any, fill: float = 0.0) -> Array:
  """`x` in float32 where `mask` (broadcastable) is on, and `fill` elsewhere.

  For what is computed from `x` before it is summed: a NaN or inf at a masked position reaches neither value nor
  gradient.
  """
  return jnp.where(jnp.asarray(mask, jnp.float32) > 0, jnp.asarray(x, jnp.float32), fill)


def merge(a: Any, b: Any) -> Any:
  """Two trees of metrics of the same structure as one: sums add, maxima and minima keep the extreme."""

  def one(x: Metric, y: Metric) -> Metric:
    if isinstance(x, Sum):
      return jax.tree.map(jnp.add, x, y)
    return jax.tree.map(jnp.maximum if isinstance(x, Max) else jnp.minimum, x, y)

  return jax.tree.map(one, a, b, is_leaf=lambda x: isinstance(x, Metric))


def reduce_stacked(metrics: Any) -> Any:
  """Metrics stacked on a leading axis (as a scan returns them) reduced over that axis."""

  def one(x: Metric) -> Metric:
    reduce: Any = jnp.sum if isinstance(x, Sum) else jnp.max if isinstance(x, Max) else jnp.min
    return jax.tree.map(lambda leaf: reduce(leaf, axis=0), x)

  return jax.tree.map(one, metrics, is_leaf=lambda x: isinstance(x, Metric))


def value(metric: Metric) -> Float[Array, '*groups']:
  """The metric as one number; NaN for a Sum of weight zero, which has none."""
  if isinstance(metric, Sum):
    return jnp.where(metric.weight > 0, metric.total / jnp.where(metric.weight > 0, metric.weight, 1.0), jnp.nan)
  return metric.value


def values(metrics: dict[str, Metric]) -> dict[str, Float[Array, '*groups']]:
  """`value` for a dictionary of metrics."""
  return {name: value(m) for name, m in metrics.items()}
