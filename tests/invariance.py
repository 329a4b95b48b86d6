"""What padding, garbage under the mask, rows without a token and repeated rows may not change: values, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

CHANGES = ('garbage', 'left', 'right', 'both', 'rows', 'twice')
PADS = {'left': (3, 0), 'right': (0, 5), 'both': (2, 1)}
BAD = (np.nan, np.inf, -np.inf)


def changed(x, change, fill):
  """`x` [B] or [B, T, ...] after a change, new entries being `fill`."""
  if change == 'twice':
    return np.concatenate([x, x])
  width = [(0, 0)] * x.ndim
  if change == 'rows':
    width[0] = (1, 2)
  elif change in PADS and x.ndim > 1:
    width[1] = PADS[change]
  return np.pad(x, width, constant_values=fill)


def kept(x, change, shape, folded=np.add):
  """What of a changed array stands where that of `shape` was; both copies `folded` into one."""
  if change == 'twice':
    return folded(x[: shape[0]], x[shape[0] :])
  if change == 'rows':
    return x[1:-2]
  return x[:, PADS[change][0] : PADS[change][0] + shape[1]] if change in PADS and len(shape) > 1 else x


def assert_unchanged(fn, data, masks, change, *, on=None, atol=2e-6):
  """`fn(*data, *masks)`, a scalar (total / weight), is the same after `change`, with every gradient.

  `on` gives for each of `data` the mask that rules it (its index in `masks`, 0 by default); [B] goes by rows.
  """
  on = on or [0] * len(data)
  ruled = [_over(masks[i], x) for x, i in zip(data, on, strict=True)]
  clean = [np.where(m > 0, x, 0.0).astype(np.float32) for x, m in zip(data, ruled, strict=True)]
  want, want_grads = _both(fn, clean, masks)
  assert np.isfinite(want) and any(np.abs(g).max() > 1e-3 for g in want_grads)
  for bad in BAD:
    filled = [np.where(m > 0, x, bad).astype(np.float32) for x, m in zip(data, ruled, strict=True)]
    got, grads = _both(fn, [changed(x, change, bad) for x in filled], [changed(m, change, 0.0) for m in masks])
    np.testing.assert_allclose(got, want, atol=atol)
    for x, grad, expected, m in zip(clean, grads, want_grads, ruled, strict=True):
      np.testing.assert_allclose(kept(grad, change, x.shape), expected, atol=atol)
      assert not np.any(grad[changed(np.asarray(m) + np.zeros_like(x), change, 0.0) == 0])  # and no NaN


def _over(mask, x):
  if x.ndim < mask.ndim:
    mask = mask.max(axis=tuple(range(x.ndim, mask.ndim)))
  return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


@functools.cache
def _compiled(fn):
  """Once for every function and shape, if the caller keeps the function."""
  return jax.jit(jax.value_and_grad(lambda data, masks: fn(*data, *masks)))


def _both(fn, data, masks):
  value, grads = _compiled(fn)([jnp.asarray(x) for x in data], [jnp.asarray(m) for m in masks])
  return float(value), [np.asarray(g) for g in grads]
