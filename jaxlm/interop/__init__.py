"""Models of others, in and out: a Hugging Face folder, the name of one on the hub, or a GGUF file."""

import re
from typing import Any

import jax.numpy as jnp
from etils import epath

from jaxlm import sharding
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.interop import hf, peft
from jaxlm.interop.foreign import Foreign as Foreign
from jaxlm.interop.hf import Model as Model
from jaxlm.interop.hf import export as export

HUB = 'hf://'
FILES = ['*.json', '*.safetensors', '*.jinja']
OTHERS = ['*/*', 'consolidated*']  # the same weights once more, in other formats
COMMIT = re.compile('[0-9a-f]{40}')


def open_source(source: str) -> Foreign:
  """What a source holds, its tensors unread: a folder, `hf://ORG/NAME[@REVISION]`, or a `.gguf` file.

  Raises InputError for what is none of these, or not whole.
  """
  if str(source).startswith(HUB):
    return hf.open_directory(_from_hub(str(source)))
  path = epath.Path(source).expanduser()
  if path.is_dir():
    return hf.open_directory(path)
  if path.suffix == '.gguf' and path.exists():
    from jaxlm.interop import gguf

    return gguf.open_file(path)
  raise InputError(f'{source}: no folder with config.json, no .gguf file and no hf://ORG/NAME')


def vocabulary(source: str) -> tuple[Tokenizer, str | None]:
  """The tokenizer and the chat template, if any, of a tokenizer.json, a folder with one, or any `open_source`."""
  path = epath.Path(source).expanduser()
  if str(source).startswith(HUB) or path.suffix == '.gguf':
    found = open_source(source)
    if found.tokenizer is None:
      raise InputError(f'{source}: has no tokenizer')
    return found.tokenizer, found.chat_template
  return tokenizers.load(path), hf.chat_template(path if path.is_dir() else path.parent)


def load(
  source: str,
  *,
  mesh: Any = None,
  rules: Any = sharding.RULES,
  dtype: Any = jnp.float32,
  adapter: epath.PathLike | None = None,
) -> Model:
  """The model of a source (see `open_source`): `Model(cfg, params, tokenizer, chat_template, generation)`.

  Weights are read a tensor at a time onto the devices, with a mesh laid out as training has them. Then
  `models.forward(model.cfg, model.params, tokens_BT)` gives the logits that transformers gives. `adapter`: a folder of
  peft's, put on the model and not folded in (`lora.merge` does that). Raises InputError for an architecture, a config
  key, a tensor or a shape that is not understood: nothing is guessed.
  """
  foreign = open_source(source)
  model = hf.load(foreign, mesh=mesh, rules=rules, dtype=dtype)
  if adapter is None:
    return model
  family = str(foreign.config['model_type'])
  return model._replace(params=peft.load(adapter, model.cfg, model.params, family=family))


def _from_hub(source: str) -> str:
  try:
    import huggingface_hub
  except ImportError as error:
    raise InputError(f"{source}: reading from the hub needs huggingface_hub: pip install -e '.[hub]'") from error
  repo, _, revision = source.removeprefix(HUB).removeprefix('models/').partition('@')
  how: dict[str, Any] = {'allow_patterns': FILES, 'ignore_patterns': OTHERS}
  if COMMIT.fullmatch(revision):
    try:  # without a network the download itself would try for half a minute before it looks into the cache
      huggingface_hub.HfApi().repo_info(repo, revision=revision)
    except Exception:  # as below
      how['local_files_only'] = True
  try:
    return huggingface_hub.snapshot_download(repo, revision=revision or None, **how)
  except Exception as error:  # of the hub, of its HTTP library, of the file system
    said = str(error).strip().splitlines()
    raise InputError(
      f'{source}: not to be had: {said[0] if said else type(error).__name__}: check name, revision, access and network '
      '(HF_HUB_OFFLINE=1: only the cache)'
    ) from error
