"""Tuning: conversations or preferences in any format made ready for the model that a run begins with."""

import dataclasses
from collections.abc import Callable

from etils import epath

from jaxlm import hosts, interop
from jaxlm.config import Pretrain
from jaxlm.data import prepare
from jaxlm.data.prepared import MARKER, Summary
from jaxlm.errors import InputError

DATA = 'data'  # where in the run's folder the conversations go


def prepared(
  config: Pretrain, say: Callable[[str], None], on_progress: prepare.Progress | None = None
) -> tuple[Pretrain, Summary | None]:
  """The run on a prepared folder: `data.path` itself, or that of its rows, made in the run's own folder.

  Raises InputError without `init` or data, and as `prepare.prepare` does.
  """
  stage = config.preference.stage
  source = config.distill.teacher or config.init  # who knows the vocabulary and the template
  verb, rows = (
    ('distill' if config.distill.teacher else 'sft', 'conversations') if stage == 'none' else (stage, 'preferences')
  )
  option = 'chat' if stage == 'none' else 'preference'
  if not source:
    raise InputError(f'{verb}: begins with a model: set --init to a run, a Hugging Face folder or a .gguf file')
  if not config.data.path:
    raise InputError(f'{verb}: needs --data.path: rows of {rows}, or a folder of `jaxlm prepare --{option}`')
  if (epath.Path(config.data.path) / MARKER).exists():
    return config, None
  tokenizer, own = interop.vocabulary(source)
  how = {'learn': config.chat.learn, 'max_len': config.data.seq_len, 'preference': stage != 'none'}
  name, tokenizer, chat = prepare.chat_of(config.chat.template or None, own, tokenizer, config.chat.columns, **how)
  folder = epath.Path(config.run) / DATA
  given = [config.data.path], tokenizer, folder
  fraction, most = config.chat.val_fraction, config.chat.max_bad

  def make() -> None:
    prepare.prepare(*given, chat=chat, val_fraction=fraction, max_bad=most, on_progress=on_progress)

  hosts.from_first(make)
  summary = prepare.load(folder).summary
  say(f'template: {name}; learned: {chat.learn}')
  for kind, form in (summary.chat or {}).get('formats', {}).items():
    say(f'{kind}: {form}')
  return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(folder))), summary
