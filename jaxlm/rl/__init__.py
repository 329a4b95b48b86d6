"""Learning from rewards: what advantages are made of (arrays in, arrays out), rollouts, and rewards by name."""

from jaxlm.rl import advantages as advantages
