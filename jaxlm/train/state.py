"""The state of a training run: everything a restart needs, as one tree."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int

from jaxlm import tree


@struct.dataclass
class State:
  """`step` and `cursor` advance together; a rewind after a spike sets `step` back and leaves `cursor`."""

  step: Int[Array, '']  # optimizer steps tried
  cursor: Int[Array, '']  # batches consumed
  skipped: Int[Array, '']  # steps whose gradient was not finite, or that had nothing to learn from
  key: Array
  params: Any
  opt_state: Any


def create(
  params: Any, optimizer: optax.GradientTransformation, key: Array, *, trainable: tree.Where = tree.everything
) -> State:
  """A fresh state; only the parameters that `trainable` picks get optimizer state."""
  picked, _ = tree.split(params, trainable)
  zero = lambda: jnp.zeros((), jnp.int32)  # one buffer each: a shared one could not be donated
  return State(zero(), zero(), zero(), key, params, optimizer.init(picked))


def abstract(make: Any, named_params: Any) -> State:
  """The shapes of the state that `make()` returns, parameters and moments boxed with their axis names."""
  from jaxlm import sharding

  return sharding.with_names(jax.eval_shape(make), named_params)
