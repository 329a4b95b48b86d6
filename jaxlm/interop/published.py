"""Folders as they are published: a text model inside one of several senses, tensors without their model's prefix."""

import re

from jaxlm.errors import InputError
from jaxlm.interop.families import FAMILIES, HARMLESS
from jaxlm.interop.foreign import Foreign

BUFFERS = ('rotary_emb.inv_freq', '.attn.bias', '.attn.masked_bias')  # tensors in old files that are no weights
INSIDE = {'gemma3': 'gemma3_text'}  # model_type of the whole -> that of its text model
SENSES = re.compile(r'(model\.)?(vision_tower|multi_modal_projector)\.')
OF_IMAGES = {'vision_config', 'mm_tokens_per_image', 'boi_token_index', 'eoi_token_index', 'image_token_index'}


def text_model(foreign: Foreign) -> Foreign:
  """The text model of a folder that holds more, under the names and keys that it has alone; others as they are.

  `left_out` says what was not taken. Raises InputError for a key or a tensor that belongs to neither.
  """
  kind = INSIDE.get(str(foreign.config.get('model_type')))
  return _prefixed(foreign if kind is None else _inside(foreign, kind))


def _inside(foreign: Foreign, kind: str) -> Foreign:
  where, whole, text = foreign.where, foreign.config, foreign.config.get('text_config')
  if not isinstance(text, dict) or text.get('model_type', kind) != kind:
    raise InputError(f'{where}: its text_config is none of a {kind}')
  for key, value in whole.items():
    if key not in {'text_config', 'tie_word_embeddings', *OF_IMAGES, *HARMLESS}:
      raise InputError(f'{where}: {key}={value!r} is not known to leave the numbers of {kind} as they are')
  if text.get('final_logit_softcapping') is not None:  # which transformers leaves out of the whole
    raise InputError(f'{where}: final_logit_softcapping is not supported for {whole["model_type"]}')
  tied = [config['tie_word_embeddings'] for config in (whole, text) if 'tie_word_embeddings' in config]
  if len(set(map(bool, tied))) > 1:
    raise InputError(f'{where}: tie_word_embeddings of the whole and of its text_config differ')
  names: dict[str, str] = {}
  for name in foreign.shapes:
    if SENSES.match(name) or name.endswith(BUFFERS):
      continue
    ours = name.removeprefix('language_model.').replace('model.language_model.', 'model.', 1)
    if (ours == name and not name.startswith('lm_head.')) or ours in names:
      raise InputError(f'{where}: tensors that this architecture does not have: {name}')
    names[ours] = name
  skipped = sum(bool(SENSES.match(name)) for name in foreign.shapes)
  ids = {key: whole[key] for key in ('bos_token_id', 'eos_token_id', 'pad_token_id') if key in whole}
  config = {**ids, **text, 'model_type': kind, **({'tie_word_embeddings': tied[0]} if tied else {})}
  left_out = f'the text model alone: {skipped} tensors of its vision tower and projector are left out'
  return _renamed(foreign._replace(config=config, left_out=left_out), names)


def _prefixed(foreign: Foreign) -> Foreign:
  """Some models (GPT-2's own) were published without the first part of every name but the head's."""
  family = FAMILIES.get(str(foreign.config.get('model_type')))
  prefix = family.names['embed'].name.partition('.')[0] + '.' if family else ''
  if not prefix or any(name.startswith(prefix) for name in foreign.shapes):
    return foreign
  return _renamed(foreign, {(n if n.startswith('lm_head.') else prefix + n): n for n in foreign.shapes})


def _renamed(foreign: Foreign, names: dict[str, str]) -> Foreign:
  """The same with the tensors of `names` (ours -> theirs), and no others."""
  shapes = {ours: foreign.shapes[theirs] for ours, theirs in names.items()}
  return foreign._replace(shapes=shapes, read=lambda name: foreign.read(names[name]))
