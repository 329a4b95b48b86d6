"""The one train step of every stage: a pure function from (state, batch) to (state, metrics)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxlm import masked, tree
from jaxlm.masked import Sum
from jaxlm.train.state import State

Metrics = dict[str, Any]
LossFn = Callable[[Any, Any, Array], tuple[Sum, Metrics]]


def make_train_step(
  loss_fn: LossFn, optimizer: optax.GradientTransformation, *, trainable: tree.Where = tree.everything, accum: int = 1
) -> Callable[[State, Any], tuple[State, dict[str, Array]]]:
  """Builds `step(state, batch) -> (state, metrics)`, pure and ready for `jax.jit` on any mesh.

  `loss_fn(params, batch, key)` returns a `Sum` and a dict of `Sum | Max | Min`. The batch (any tree of arrays whose
  first axis is the batch) is cut into `accum` micro-batches; totals, weights and gradients are added over them and
  over devices and divided once, so accumulation never changes the gradient. A gradient that is not finite, or a batch
  of weight 0, leaves parameters, moments and schedule as they were and is counted in `state.skipped`.

  Metrics: those of the loss, `loss`, `weight`, `grad_norm` (before any clipping), `update_norm`, `skipped` (steps so
  far), `empty` (1 when this batch had weight 0; its loss is then NaN).
  Raises ValueError, when traced, if the batch does not divide by `accum`.
  """

  def grads_of(state: State, batch: Any) -> tuple[Any, Sum, Metrics]:
    picked, rest = tree.split(state.params, trainable)
    step_key = jax.random.fold_in(state.key, state.step)

    def total(picked: Any, micro: Any, index: Any) -> tuple[Array, tuple[Sum, Metrics]]:
      loss, metrics = loss_fn(tree.combine(picked, rest), micro, jax.random.fold_in(step_key, index))
      return loss.total, (loss, metrics)

    def visit(grads: Any, xs: tuple) -> tuple[Any, tuple[Sum, Metrics]]:
      new, aux = jax.grad(total, has_aux=True)(picked, *xs)
      return jax.tree.map(jnp.add, grads, new), aux

    if accum == 1:
      grads, (loss, metrics) = jax.grad(total, has_aux=True)(picked, batch, 0)
      return grads, loss, metrics
    micros = jax.tree.map(lambda x: _cut(x, accum), batch)
    grads, aux = jax.lax.scan(visit, jax.tree.map(jnp.zeros_like, picked), (micros, jnp.arange(accum)))
    loss, metrics = masked.reduce_stacked(aux)
    return grads, loss, metrics

  def step(state: State, batch: Any) -> tuple[State, dict[str, Array]]:
    grads, loss, metrics = grads_of(state, batch)
    inverse = jnp.where(loss.weight > 0, 1.0 / jnp.where(loss.weight > 0, loss.weight, 1.0), 0.0)
    grads = jax.tree.map(lambda g: g * inverse.astype(g.dtype), grads)
    grad_norm = optax.tree.norm(grads)
    good = jnp.isfinite(grad_norm) & (loss.weight > 0)

    picked, rest = tree.split(state.params, trainable)
    updates, opt_state = optimizer.update(grads, state.opt_state, picked)
    keep = lambda new, old: jnp.where(good, new, old)  # select, never multiply: 0 * NaN is NaN
    picked = jax.tree.map(keep, optax.apply_updates(picked, updates), picked)
    opt_state = jax.tree.map(keep, opt_state, state.opt_state)

    skipped = state.skipped + (~good).astype(jnp.int32)
    report = masked.values(metrics) | {
      'loss': masked.value(loss),
      'weight': loss.weight,
      'grad_norm': grad_norm,
      'update_norm': jnp.where(good, optax.tree.norm(updates), 0.0),
      'skipped': skipped,
      'empty': (loss.weight == 0).astype(jnp.float32),
    }
    return dataclasses.replace(
      state,
      step=state.step + 1,
      cursor=state.cursor + 1,
      skipped=skipped,
      params=tree.combine(picked, rest),
      opt_state=opt_state,
    ), report

  return step


def _cut(x: Array, accum: int) -> Array:
  """[accum * B, ...] as [accum, B, ...], taking every accum-th row so that rows stay on the devices that hold them."""
  if x.shape[0] % accum:
    raise ValueError(f'a batch of {x.shape[0]} rows does not divide into {accum} micro-batches')
  return jnp.swapaxes(x.reshape(x.shape[0] // accum, accum, *x.shape[1:]), 0, 1)
