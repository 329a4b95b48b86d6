"""Tokens to the devices that hold their experts, and back; no token is dropped.

n devices along the axis, each with e = E / n experts; A assignments of a device's own tokens, C the most of them that
one device can be sent, R = n * C rows that it has room for, D model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

WORST_CASE = '{}_of_{}_rows'  # the name of a part of the program: so many of its rows are there, on average


class Exchange(NamedTuple):
  """How rows travel along a mesh axis: `ragged` sends what there is, otherwise rows are padded to the worst case."""

  axis: str
  ragged: bool  # what XLA has for accelerators alone


def exchanged(
  fn: Callable[[Array, Array], Array],
  x_AD: Float[Array, 'A D'],
  sizes_E: Int[Array, ' E'],
  how: Exchange,
  most: int,
) -> Float[Array, 'A D']:
  """`fn(x_RD, sizes_e)`, a device's experts applied to rows sorted by expert, for this device's rows `x_AD`.

  They are sorted by expert too, `sizes_E` of each, and at most `most` of them are for one device. Within `shard_map`
  over the axis.
  """
  n, me, D = jax.lax.axis_size(how.axis), jax.lax.axis_index(how.axis), x_AD.shape[1]
  sizes_nne = jax.lax.all_gather(sizes_E, how.axis).reshape(n, n, -1)  # [from, to, expert]
  counts_nn = jnp.sum(sizes_nne, axis=-1)
  send, back = (_ragged if how.ragged else _padded)(counts_nn, me, how.axis, most)
  came_ne = sizes_nne[:, me]
  experts_R = _experts(came_ne, n * most, how.ragged)
  order_R = jnp.argsort(experts_R, stable=True)
  x_RD = send(x_AD).at[order_R].get(unique_indices=True)
  sizes_e = jnp.sum(came_ne, axis=0)
  y_RD = _worst_case(fn, len(x_AD), len(x_RD))(x_RD, sizes_e)
  y_RD = jnp.where(jnp.arange(len(y_RD))[:, None] < jnp.sum(sizes_e), y_RD, 0)  # what is past the groups is not defined
  return back(jnp.zeros_like(y_RD).at[order_R].set(y_RD, unique_indices=True), (len(x_AD), D))


def _worst_case(fn: Any, there: int, room: int) -> Any:
  """`fn`, named for those who count work."""

  def rows(x: Array, sizes: Array) -> Array:
    return fn(x, sizes)

  rows.__name__ = WORST_CASE.format(there, room)
  return jax.jit(rows)


def _before(counts: Array, axis: int = 0) -> Array:
  """Exclusive cumulative sums: where each part begins."""
  return jnp.cumsum(counts, axis=axis) - counts


def _experts(came_ne: Array, R: int, ragged: bool) -> Array:
  """The expert of each row received, e for one that is only padding."""
  n, e = came_ne.shape

  def of(sizes: Array, rows: int) -> Array:
    ids = jnp.repeat(jnp.arange(len(sizes)) % e, sizes, total_repeat_length=rows)
    return jnp.where(jnp.arange(rows) < jnp.sum(sizes), ids, e)

  return of(came_ne.reshape(-1), R) if ragged else jax.vmap(lambda sizes: of(sizes, R // n))(came_ne).reshape(-1)


def _ragged(counts_nn: Array, me: Array, axis: str, most: int) -> tuple[Any, Any]:
  """Rows go to where the rows of the devices before this one end."""
  sent_n, came_n = counts_nn[me], counts_nn[:, me]
  n = len(sent_n)

  def move(x: Array, shape: tuple[int, ...], starts: Array, sizes: Array, there: Array, coming: Array) -> Array:
    into = jnp.broadcast_to(jnp.zeros_like(x[:1]), shape)  # from x, so that it is known to differ between devices
    return jax.lax.ragged_all_to_all(x, into, starts, sizes, there, coming, axis_name=axis)

  def send(x_AD: Array) -> Array:
    return move(x_AD, (n * most, x_AD.shape[1]), _before(sent_n), sent_n, _before(counts_nn)[me], came_n)

  def back(y_RD: Array, shape: tuple[int, int]) -> Array:
    return move(y_RD, shape, _before(came_n), came_n, _before(counts_nn, 1)[:, me], sent_n)

  return send, back


def _padded(counts_nn: Array, me: Array, axis: str, most: int) -> tuple[Any, Any]:
  """Every device gets C rows of every other, of which the first are meant."""
  sent_n = counts_nn[me]
  n, starts_n = len(sent_n), _before(sent_n)
  whole = lambda x_nCD: jax.lax.all_to_all(x_nCD, axis, 0, 0)

  def send(x_AD: Array) -> Array:
    slots_nC = starts_n[:, None] + jnp.arange(most)
    slots_nC = jnp.where(jnp.arange(most) < sent_n[:, None], slots_nC, len(x_AD))
    return whole(x_AD.at[slots_nC].get(mode='fill', fill_value=0)).reshape(-1, x_AD.shape[1])

  def back(y_RD: Array, shape: tuple[int, int]) -> Array:
    to_A = jnp.repeat(jnp.arange(n), sent_n, total_repeat_length=shape[0])
    y_RD = whole(y_RD.reshape(n, most, -1)).reshape(y_RD.shape)
    return y_RD.at[to_A * most + jnp.arange(shape[0]) - starts_n[to_A]].get(unique_indices=True)

  return send, back
