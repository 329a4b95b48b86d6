"""The host loop: batches through the step, and what happens between steps (log, evaluate, sample, save)."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxlm import masked

Hook = tuple[int, Callable[[int, Any], None]]  # (every how many steps, what to do with (step, state))


def fit(
  step: Callable[[Any, Any], tuple[Any, dict[str, Any]]],
  state: Any,
  batches: Iterator[Any],
  *,
  steps: int,
  log: Callable[[int, dict[str, float]], None],
  log_every: int = 1,
  hooks: tuple[Hook, ...] = (),
) -> Any:
  """Runs `step` until `state.step` is `steps` and returns the last state.

  `log(step, metrics)` gets the metrics of every `log_every`-th step and of the last, one step late so that the device
  is never waited for, with `data_wait` (seconds spent waiting for the batch) and `step_time` (seconds since the step
  before). Hooks run in order at their multiples (0: never) and at the end, after all up to that step was logged.
  """
  done, pending = int(state.step), None
  before = time.perf_counter()

  def flush() -> None:
    nonlocal pending
    if pending is not None:
      number, metrics, clock = pending
      log(number, {name: float(x) for name, x in jax.device_get(metrics).items()} | clock)
      pending = None

  while done < steps:
    asked = time.perf_counter()
    batch = next(batches)
    got = time.perf_counter()
    state, metrics = step(state, batch)
    flush()
    done += 1
    now = time.perf_counter()
    if done % log_every == 0 or done == steps:
      pending = done, metrics, {'data_wait': got - asked, 'step_time': now - before}
    before = now
    due = [act for every, act in hooks if (every and done % every == 0) or done == steps]
    if due:
      flush()
      for act in due:
        act(done, state)
      before = time.perf_counter()
  return state


def evaluate(fn: Callable[[Any, Any], dict[str, masked.Metric]], params: Any, batches: Any) -> dict[str, float]:
  """`fn(params, batch)` merged over all batches and divided once."""
  merged: Any = None
  for batch in batches:
    metrics = fn(params, batch)
    merged = metrics if merged is None else masked.merge(merged, metrics)
  return {name: float(x) for name, x in masked.values(merged).items()} if merged else {}
