"""Losses: arrays in, `Sum(total, weight)` out. No model, no state, no mesh."""

from jaxlm.losses import lm as lm
