"""Training: the state, the step, optimizers, checkpoints and metrics."""

from jaxlm.train.state import State as State
from jaxlm.train.state import create as create_state
from jaxlm.train.step import make_train_step as make_train_step

__all__ = ['State', 'create_state', 'make_train_step']
