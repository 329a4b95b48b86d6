"""Rows of an embedding whose columns, and maybe rows, are cut over devices: no device gathers the table.

B batch, T sequence, D model, V vocabulary; b, t and d, v are a device's parts of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlm.sharding import Rules, cut_over, rows_divide, spec


def lookup(
  table_VD: Float[Array, 'V D'], tokens_BT: Int[Array, 'B T'], dtype: Any, rules: Rules | None
) -> Float[Array, 'B T D']:
  """`table[tokens]` in `dtype`, its gradient added in the table's.

  Every device looks up its own columns for the tokens of those that it shares a table with, and sends each the columns
  of its tokens: what travels is as large as the result, whatever the vocabulary.
  """
  plain = lambda: jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)
  if rules is None or jax.sharding.get_abstract_mesh().empty or not rows_divide(tokens_BT.shape, rules):
    return plain()
  batch, seq, columns, vocab = (set(cut_over(name, rules)) for name in ('batch', 'seq', 'embed', 'vocab'))
  if not columns | vocab or not columns <= batch or vocab & (batch | seq):
    return plain()
  columns, vocab = cut_over('embed', rules), cut_over('vocab', rules)

  def own(table_vd: Array, tokens_bt: Array) -> Array:
    if columns:
      tokens_bt = jax.lax.all_gather(tokens_bt, columns, tiled=True)
    if vocab:
      here = tokens_bt - jax.lax.axis_index(vocab) * len(table_vd)
      rows = table_vd.at[jnp.where(here < 0, len(table_vd), here)].get(mode='fill', fill_value=0)
      rows = jax.lax.psum(rows.astype(dtype), vocab)
    else:
      rows = jnp.take(table_vd, tokens_bt, axis=0).astype(dtype)
    return jax.lax.all_to_all(rows, columns, 0, 2, tiled=True) if columns else rows

  table = PartitionSpec(vocab or None, columns or None)
  specs = (table, spec(('batch', 'seq'), rules))
  return jax.shard_map(own, in_specs=specs, out_specs=spec(('batch', 'seq', None), rules))(table_VD, tokens_BT)
