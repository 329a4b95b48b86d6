"""Losses: arrays in, `Sum(total, weight)` out. No model, no state; a mesh only in `sharded`."""

from jaxlm.losses import lm as lm
