"""What every reader of foreign models gives, whatever the format they came in."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A stored array, read when it is asked for and not kept: a part of it by `part`, the whole as any numpy array."""

  shape: tuple[int, ...]
  dtype: Any  # a numpy float type: quantized ones are float32; or None, one that is not read
  part: Callable[[int, int], np.ndarray]  # (start, stop) along `axis`, whole along the others
  axis: int = 0  # the one that is cheap to read in parts

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return self.part(0, self.shape[self.axis] if self.shape else 1).astype(dtype or self.dtype, copy=False)

  def __getitem__(self, key: Any) -> Any:
    return np.asarray(self)[key]

  def __getattr__(self, name: str) -> Any:
    if name.startswith('__'):
      raise AttributeError(name)
    return getattr(np.asarray(self), name)


class Foreign(NamedTuple):
  """A model as others store it, under the names and config keys of Hugging Face; tensors are read part by part."""

  where: str  # the file or folder, for messages
  config: dict[str, Any]  # as in config.json, 'model_type' included
  shapes: dict[str, tuple[int, ...]]  # of every tensor, by its Hugging Face name
  read: Callable[[str], Tensor]  # by its name; float32 (dequantized) or its stored float type
  tokenizer: Tokenizer | None
  chat_template: str | None
  generation: dict[str, Any]  # as in generation_config.json
  left_out: str = ''  # what of the source is not taken, in words
