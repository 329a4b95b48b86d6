"""`lm.logprobs` on a mesh, the vocabulary cut over devices: none holds the whole head or its gradient.

Each keeps its own rows, while the parts of the head go round. Many devices make groups, which first gather their part.

B batch, T sequence, D model, V vocabulary, P columns of a part, R rows of a device.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlm.losses import slices
from jaxlm.sharding import Rules, cut_over, rows_divide, spec

RING = 16  # parts that go round, at most, where there are over twice as many devices


class Layout(NamedTuple):
  """Which axes of the mesh hold what."""

  x: PartitionSpec
  rows: PartitionSpec  # of what is [B, T]
  stored: PartitionSpec  # of the head as it is kept
  head: PartitionSpec  # and as it is multiplied by
  around: tuple[str, ...]  # rows and vocabulary are cut over these: parts go round them
  across: tuple[str, ...]  # the vocabulary alone is cut over these: sums go over them
  beside: tuple[str, ...]  # rows alone


def layout(shape: tuple[int, int], rules: Rules | None) -> Layout | None:
  """How rows of this shape [B, T] and the head are laid out; None without a mesh to cut or where they do not divide."""
  if rules is None or jax.sharding.get_abstract_mesh().empty or not rows_divide(shape, rules):
    return None
  batch, seq = cut_over('batch', rules), cut_over('seq', rules)
  around = tuple(a for a in cut_over('embed', rules) if a in batch)
  across = tuple(a for a in cut_over('vocab', rules) if a not in batch + seq)
  if not around + across:
    return None
  beside = tuple(a for a in batch + seq if a not in around)
  return Layout(
    spec(('batch', 'seq', None), rules),
    spec(('batch', 'seq'), rules),
    spec(('embed', 'vocab'), rules),
    PartitionSpec(None, across + around),
    around,
    across,
    beside,
  )


def logprobs(
  x_BTD: Float[Array, 'B T D'],
  head_DV: Float[Array, 'D V'],
  targets_BT: Int[Array, 'B T'],
  laid: Layout,
  *,
  softcap: float | None = None,
  temperature: float = 1.0,
  chunks: int = 1,
  vocab: int | None = None,
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T'], Float[Array, 'B T']]:
  """`(logp_BT, lse_BT, entropy_BT)` as `lm.logprobs` has them; `chunks` counts slices of the whole vocabulary."""
  mesh = jax.sharding.get_abstract_mesh()
  n = math.prod(mesh.shape[a] for a in laid.around + laid.across)
  own = -(-chunks // math.prod(mesh.shape[a] for a in laid.across) // _turns(mesh, laid))
  V = head_DV.shape[1]
  head_DV = jax.lax.with_sharding_constraint(head_DV, laid.stored)  # the gradient's: not every moment's moves, but its
  head_DV = jnp.pad(head_DV.astype(x_BTD.dtype), ((0, 0), (0, -V % (n * own))))
  head_DV = jax.lax.with_sharding_constraint(head_DV, laid.head)
  return _logprobs(slices.How(softcap, temperature, vocab or V, own), laid, x_BTD, head_DV, targets_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logprobs(
  how: slices.How, laid: Layout, x_BTD: Array, head_DV: Array, targets_BT: Array
) -> tuple[Array, Array, Array]:
  turns = _turns(jax.sharding.get_abstract_mesh(), laid)

  def own(x_BtD: Array, w_DP: Array, targets_Bt: Array) -> tuple[Array, ...]:
    x_RD, targets_R = x_BtD.reshape(-1, x_BtD.shape[-1]), targets_Bt.reshape(-1)
    w_DP = _gathered(w_DP, laid.around, turns)

    def visit(carry: tuple, turn: Any) -> tuple[tuple, None]:
      seen, w_DP = carry
      onward = _pass_on(w_DP, laid.around, turns)
      return (slices.look(how, seen, x_RD, w_DP, targets_R, _first(w_DP, turn, turns, laid)), onward), None

    (seen, _), _ = jax.lax.scan(visit, (slices.start(x_RD), w_DP), jnp.arange(turns))
    return tuple(y.reshape(targets_Bt.shape) for y in slices.ended(_over(seen, laid.across)))

  return _mapped(own, (laid.x, laid.head, laid.rows), (laid.rows,) * 3)(x_BTD, head_DV, targets_BT)


def _forward(how: slices.How, laid: Layout, x_BTD: Any, head_DV: Any, targets_BT: Any) -> tuple[tuple, tuple]:
  out = _logprobs(how, laid, x_BTD.value, head_DV.value, targets_BT.value)
  learns = () if head_DV.perturbed else None
  return out, (x_BTD.value, head_DV.value, targets_BT.value, out[1], out[2], learns)


def _backward(how: slices.How, laid: Layout, saved: tuple, cotangents: tuple) -> tuple[Array, Array | None, None]:
  """The gradient of a part goes round with it, so that it comes home summed over those that it passed."""
  turns = _turns(jax.sharding.get_abstract_mesh(), laid)
  x_BTD, head_DV, *rows, learns = saved
  learns = learns is not None

  def own(x_BtD: Array, w_DP: Array, *rows: Any) -> tuple[Array, Array | None]:
    x_RD = x_BtD.reshape(-1, x_BtD.shape[-1])
    targets_R, lse_R, entropy_R, *given = jax.tree.map(lambda y: y.reshape(-1), rows)

    def visit(carry: tuple, turn: Any) -> tuple[tuple, None]:
      dx_RD, w_DP, dw_DP = carry
      onward, dw_DP = jax.tree.map(lambda w: _pass_on(w, laid.around, turns), (w_DP, dw_DP))
      first = _first(w_DP, turn + 1, turns, laid)
      more = slices.pull(how, x_RD, w_DP, targets_R, lse_R, entropy_R, tuple(given), first, learns=learns)
      dx_RD, dw_DP = jax.tree.map(jnp.add, (dx_RD, dw_DP), more)
      return (dx_RD, onward, dw_DP), None

    w_DP = _gathered(w_DP, laid.around, turns)
    zeros = jnp.zeros(w_DP.shape, jnp.float32) if learns else None
    begin = jnp.zeros(x_RD.shape, jnp.float32), _pass_on(w_DP, laid.around, turns), zeros
    (dx_RD, _, dw_DP), _ = jax.lax.scan(visit, begin, jnp.arange(turns))
    dx_RD = jax.lax.psum(dx_RD, laid.across) if laid.across else dx_RD
    dx_BtD = dx_RD.reshape(x_BtD.shape).astype(x_BtD.dtype)
    if dw_DP is None:
      return dx_BtD, None
    dw_DP = jax.lax.psum(dw_DP, laid.beside) if laid.beside else dw_DP
    return dx_BtD, _scattered(dw_DP, laid.around, turns).astype(w_DP.dtype)

  rows = (*rows, *slices.given(cotangents))
  dx_BTD, dhead_DV = _mapped(own, (laid.x, laid.head, *(laid.rows,) * 6), (laid.x, laid.head))(x_BTD, head_DV, *rows)
  return dx_BTD, dhead_DV, None


_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)


def _mapped(fn: Any, in_specs: Any, out_specs: Any) -> Any:
  return jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _turns(mesh: Any, laid: Layout) -> int:
  """How many parts go round."""
  n = math.prod(mesh.shape[a] for a in laid.around)
  return n if n <= 2 * RING else math.gcd(n, RING)


def _groups(axes: tuple[str, ...], turns: int) -> list[list[int]] | None:
  """Neighbours that hold one part together; None where each has one."""
  g = math.prod(jax.lax.axis_size(a) for a in axes) // turns
  return [list(range(i * g, (i + 1) * g)) for i in range(turns)] if g > 1 else None


def _gathered(w: Array, axes: tuple[str, ...], turns: int) -> Array:
  groups = _groups(axes, turns)
  return jax.lax.all_gather(w, axes, axis=1, tiled=True, axis_index_groups=groups) if groups else w


def _scattered(w: Array, axes: tuple[str, ...], turns: int) -> Array:
  groups = _groups(axes, turns)
  how = {'scatter_dimension': 1, 'tiled': True, 'axis_index_groups': groups}
  return jax.lax.psum_scatter(w, axes, **how) if groups else w


def _pass_on(x: Array, axes: tuple[str, ...], turns: int) -> Array:
  n = math.prod(jax.lax.axis_size(a) for a in axes)
  return jax.lax.ppermute(x, axes, [(i, (i + n // turns) % n) for i in range(n)]) if n > 1 else x


def _first(w_DP: Array, turn: Any, turns: int, laid: Layout) -> Any:
  """The first token of the part in hand after `turn` turns."""
  n = math.prod(jax.lax.axis_size(a) for a in laid.around)
  part = (jax.lax.axis_index(laid.around) // (n // turns) - turn) % turns if laid.around else 0
  row = jax.lax.axis_index(laid.across) if laid.across else 0
  return (row * turns + part) * w_DP.shape[1]


def _over(seen: slices.Seen, axes: tuple[str, ...]) -> slices.Seen:
  """What the devices along `axes` have seen, together."""
  if not axes:
    return seen
  top_R = jax.lax.pmax(seen.top, axes)
  shrink_R = jnp.exp(seen.top - top_R)
  total, dot, picked = jax.lax.psum((seen.total * shrink_R, seen.dot * shrink_R, seen.picked), axes)
  return slices.Seen(top_R, total, dot, picked)
