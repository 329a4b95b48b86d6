"""What every reader of foreign models gives, whatever the format they came in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.tokenizer import Tokenizer


class Foreign(NamedTuple):
  """A model as others store it, under the names and config keys of Hugging Face; tensors are read one at a time."""

  where: str  # the file or folder, for messages
  config: dict[str, Any]  # as in config.json, 'model_type' included
  shapes: dict[str, tuple[int, ...]]  # of every tensor, by its Hugging Face name
  read: Callable[[str], np.ndarray]  # one tensor, float32 (dequantized) or its stored float type; nothing is kept
  tokenizer: Tokenizer | None
  chat_template: str | None
  generation: dict[str, Any]  # as in generation_config.json
  left_out: str = ''  # what of the source is not taken, in words
