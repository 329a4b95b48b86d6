"""A profile of some steps of a run, for TensorBoard's profiler or Perfetto."""

import tempfile
from typing import Any

import jax
from etils import epath

from jaxlm import files


class Trace:
  """Traces the steps of `span` (from one step to another; None: never) into the run's `profile/`.

  Called with the number of steps done and the state before each step and after the last, so that a trace has the whole
  computation of its steps and nothing of others; `close` ends a trace that is still going.
  """

  def __init__(self, run: Any, span: tuple[int, int] | None):
    self._target, self._span = epath.Path(run) / 'profile', span
    self._folder: epath.Path | None = None

  def __call__(self, done: int, state: Any) -> None:
    if not self._span:
      return
    first, last = self._span
    if first <= done < last and not self._folder:
      local = not files.remote(self._target)  # the profiler itself writes to disks only
      jax.block_until_ready(state)
      self._folder = self._target if local else epath.Path(tempfile.mkdtemp(prefix='jaxlm-profile-'))
      jax.profiler.start_trace(str(self._folder))
    elif done >= last and self._folder:
      jax.block_until_ready(state)
      self.close()

  def close(self) -> None:
    """Writes the trace down, if there is one."""
    folder, self._folder = self._folder, None
    if folder:
      jax.profiler.stop_trace()
      if folder != self._target:
        files.copy(folder, self._target, files.digests(folder))
        folder.rmtree()
