"""Derivatives without autodiff."""

import numpy as np


def slopes(fn, x, eps=1e-6):
  """The gradient of `fn(x) -> float` by central differences in float64."""
  x = np.asarray(x, np.float64)
  out = np.zeros_like(x)
  for i in np.ndindex(x.shape):
    step = np.zeros_like(x)
    step[i] = eps
    out[i] = (fn(x + step) - fn(x - step)) / (2 * eps)
  return out
