"""A conversation with a model: its template, its stop tokens, answers as they come."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm import interop, models, sample
from jaxlm.data import chat
from jaxlm.errors import InputError
from jaxlm.loops import foreign
from jaxlm.sample import Sampling

PIECE = 8  # tokens between two looks at what was written
BROKEN = '\ufffd'  # what a character of which a token is still missing decodes to


def open_model(source: str, dtype: Any = jnp.float32) -> interop.Model:
  """A run's newest weights, or a foreign model, for a `Run` of that dtype.

  Raises InputError if it has no tokenizer or no chat template.
  """
  model = foreign.open_model(source)
  if not model.chat_template:
    raise InputError(
      f'{source}: has no chat template: it continues texts (`jaxlm generate`), and has not learnt to chat'
    )
  return model._replace(params=sample.readied(model.cfg, model.params, dtype))


def sampling_of(generation: Mapping[str, Any], **asked: float | int | None) -> Sampling:
  """What a model's generation_config.json says, where nothing else was asked for; greedy if it says not to sample."""
  names = {'temperature': 'temperature', 'top_k': 'top_k', 'top_p': 'top_p', 'min_p': 'min_p'}
  names['repetition'] = 'repetition_penalty'
  found = {ours: generation.get(theirs) if asked.get(ours) is None else asked[ours] for ours, theirs in names.items()}
  if generation.get('do_sample') is False and asked.get('temperature') is None:
    found['temperature'] = 0.0
  found = {ours: None if ours == 'repetition' and value == 1.0 else value for ours, value in found.items()}
  found['temperature'] = 1.0 if found['temperature'] is None else found['temperature']
  return Sampling(**{f'{name}_B': value for name, value in found.items()})


def stop_ids(model: interop.Model) -> list[int]:
  """The ids that end an answer: the tokenizer's end of text and those of the generation config."""
  more = model.generation.get('eos_token_id') or []
  return sorted({model.tokenizer.eos_id, *([more] if isinstance(more, int) else more)})  # ty: ignore


def answer(
  model: interop.Model,
  messages: Sequence[chat.Message],
  key: Any,
  *,
  sampling: Sampling,
  max_new_tokens: int,
  run: models.Run = models.Run(),
  draft: sample.Lookup | sample.Draft | None = None,
) -> Iterator[str]:
  """The pieces of the assistant's next message, as soon as they are whole characters; some are empty."""
  tokenizer: Any = model.tokenizer
  ids = chat.encode(model.chat_template or '', messages, tokenizer, generation=True)
  stop = stop_ids(model)
  how: dict[str, Any] = {
    'max_new_tokens': max_new_tokens,
    'sampling': sampling,
    'stop_ids': stop,
    'run': run,
    'draft': draft,
  }
  state = sample.begin(model.cfg, model.params, [ids], key, **how)
  told = ''
  yield told  # after the compilation, a first look at whether somebody wants the rest
  while True:
    state = sample.advance(model.cfg, run, PIECE, model.params, state, sampling, jnp.asarray(stop, jnp.int32), draft)
    length, stopped = int(state.out.lengths_B[0]), bool(state.out.stopped_B[0])
    text = tokenizer.decode(np.asarray(state.out.tokens_BN)[0, : length - stopped].tolist())
    done = stopped or length >= max_new_tokens
    whole = text if done else text.rstrip(BROKEN)
    yield whole[len(told) :]
    told = max(told, whole, key=len)
    if done:
      return
