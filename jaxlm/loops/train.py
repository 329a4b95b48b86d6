"""The host loop: batches through the step, and what happens between steps (log, evaluate, sample, save)."""

import time
from collections.abc import Callable
from typing import Any

import jax

from jaxlm import masked

Hook = tuple[int, Callable[[int, Any], None]]  # (every how many steps, what to do with (step, state))


def fit(
  step: Callable[[Any, Any], tuple[Any, dict[str, Any]]],
  state: Any,
  batch_after: Callable[[Any], Any],
  *,
  steps: int,
  log: Callable[[int, dict[str, float]], None],
  log_every: int = 1,
  hooks: tuple[Hook, ...] = (),
  stop: Callable[[], bool] = lambda: False,
  profile: Callable[[int, Any], None] = lambda done, state: None,
  check: Callable[[int, float], None] | None = None,
) -> Any:
  """Runs `step` until `state.step` is `steps` and returns the last state; `batch_after(state)` is its next batch.

  `log(step, metrics)` gets the metrics of every `log_every`-th step and of the last, read one step late so that the
  device never waits for the host, with `step_time` and `data_wait`: seconds a step took, and of these waited for its
  batch, on average since the row before. Hooks run in order at their multiples (0: never) and at the end, after all up
  to that step was logged; their time is not the steps'. `stop()` is asked after every step and ends the loop early,
  hooks at their multiples being done. `profile(done, state)` is called before each step and at the end.
  `check(step, loss)`, if there is one, gets every step's loss, before its row and its hooks.
  """
  done = int(state.step)
  since, waited, unread, unchecked = (time.perf_counter(), done), 0.0, None, None

  def read() -> None:
    nonlocal since, waited, unread, unchecked
    if check and unchecked:
      check(unchecked[0], float(unchecked[1]['loss']))
      unchecked = None
    if unread is None:
      return
    number, metrics = unread
    values = {name: float(x) for name, x in jax.device_get(metrics).items()}
    now, steps_taken = time.perf_counter(), number - since[1]
    log(number, values | {'step_time': (now - since[0]) / steps_taken, 'data_wait': waited / steps_taken})
    since, waited, unread = (now, number), 0.0, None

  while done < steps:
    profile(done, state)
    with jax.profiler.StepTraceAnnotation('train', step_num=done):
      asked = time.perf_counter()
      batch = batch_after(state)
      waited += time.perf_counter() - asked
      state, metrics = step(state, batch)
    read()
    done += 1
    unchecked = done, metrics
    if done % log_every == 0 or done == steps:
      unread = done, metrics
    due = [act for every, act in hooks if (every and done % every == 0) or done == steps]
    if due:
      read()
      for act in due:
        act(done, state)
      since, waited = (time.perf_counter(), done), 0.0
    if stop():
      break
  read()
  profile(done, state)
  return state


def evaluate(fn: Callable[[Any, Any], dict[str, masked.Metric]], params: Any, batches: Any) -> dict[str, masked.Metric]:
  """`fn(params, batch)` merged over all batches, still undivided, on the host; {} without a batch."""
  merged: Any = None
  for batch in batches:
    metrics = fn(params, batch)
    merged = metrics if merged is None else masked.merge(merged, metrics)
  return jax.device_get(merged) if merged else {}
