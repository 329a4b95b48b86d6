"""Losses: arrays in, `Sum(total, weight)` out. No model, no state; a mesh only in `sharded`."""

from jaxlm.losses import distill as distill
from jaxlm.losses import lm as lm
from jaxlm.losses import policy as policy
from jaxlm.losses import preference as preference
