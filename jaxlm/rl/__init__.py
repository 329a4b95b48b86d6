"""Learning from rewards: what advantages are made of. Arrays in, arrays out."""

from jaxlm.rl import advantages as advantages
