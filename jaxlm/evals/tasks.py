"""What a model answers on held-out conversations, and what the answers are worth: by kind, beside the references."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxlm import models, sample
from jaxlm.data.prepared import Prepared
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.evals import scores
from jaxlm.files import write_whole
from jaxlm.loops import foreign

TITLES = {'rouge_l': 'ROUGE-L', 'chrf': 'chrF', 'exact_match': 'exact match', 'f1': 'F1'}
GREEDY = sample.Sampling(temperature_B=0.0)


class Example(NamedTuple):
  """The ids up to where the last turn of the assistant begins, and what that turn says."""

  kind: str
  prompt: list[int]
  reference: str


class Answers(NamedTuple):
  """Of every example its answer; of every kind its scores (see `scores.score`)."""

  examples: list[Example]
  texts: list[str]
  scores: dict[str, dict[str, float]]


def examples(folder: Prepared, limit: int, *, longest: int | None = None) -> list[Example]:
  """Up to `limit` held-out conversations of each kind, evenly from the first to the last.

  Those whose prompt has more than `longest` tokens are passed over. Raises InputError where the folder holds no
  conversations.
  """
  chat = folder.summary.chat
  if not chat:
    raise InputError(f'{folder.path}: holds no conversations: prepare them with `jaxlm prepare --chat`')
  found = []
  for kind in folder.summary.kinds('validation'):
    tokens = folder.split('validation', kind)
    starts = tokens.document_starts()
    wanted = tokens.answers()[0] if folder.summary.preference else np.ones(len(starts) - 1, np.bool_)
    places = np.stack([starts[:-1], starts[1:]], 1)[wanted].tolist()  # of preferences the good answers
    one = (_example(kind, tokens, a, b, folder.tokenizer, chat) for a, b in places)
    fitting = [e for e in one if e and (longest is None or len(e.prompt) <= longest)]
    picked = np.arange(min(limit, len(fitting))) * len(fitting) // max(1, min(limit, len(fitting)))
    found += [fitting[i] for i in picked]
  return found


def _example(kind: str, tokens: Any, start: int, stop: int, tokenizer: Tokenizer, chat: Any) -> Example | None:
  ids, _ = tokens.read(start, stop)
  learned = tokens.learned(start, stop)
  on = np.flatnonzero(learned)
  if not len(on):
    return None
  breaks = np.flatnonzero(np.diff(on) > 1)
  first = int(on[breaks[-1] + 1] if len(breaks) else on[0])
  said = [int(i) for i in ids[first : on[-1] + 1] if int(i) not in {*chat['end'], tokenizer.eos_id}]
  return Example(kind, [int(i) for i in ids[:first]], tokenizer.decode(said).strip()) if first else None


def answer(
  cfg: models.ModelConfig,
  params: Any,
  tokenizer: Tokenizer,
  asked: Sequence[Example],
  stop_ids: Sequence[int],
  *,
  new: int = 128,
  batch: int = 16,
  run: models.Run = models.Run(),
  names: Sequence[str] = scores.NAMES,
  sampling: sample.Sampling = GREEDY,
  on_progress: Callable[[int, int], None] | None = None,
) -> Answers:
  """The likeliest answer to each example, `new` tokens at most, `batch` at a time (those of like length together).

  `names` are the scores that are taken.
  """
  order = sorted(range(len(asked)), key=lambda i: len(asked[i].prompt))
  texts = [''] * len(asked)
  layers = sample.readied(cfg, params)
  for at in range(0, len(order), batch):
    some = order[at : at + batch]
    prompts = [asked[i].prompt for i in some]
    prompts += [prompts[-1]] * (batch - len(some))  # one compiled shape
    how: dict[str, Any] = {'max_new_tokens': new, 'sampling': sampling, 'stop_ids': tuple(stop_ids), 'run': run}
    out = sample.generate(cfg, layers, prompts, jax.random.key(at), **how)
    tokens_BN, lengths_B = np.asarray(out.tokens_BN), np.asarray(out.lengths_B)
    for i, row, n in zip(some, tokens_BN, lengths_B, strict=False):
      said = [int(token) for token in row[:n] if int(token) not in stop_ids]
      texts[i] = tokenizer.decode(said).strip()
    if on_progress:
      on_progress(min(at + batch, len(order)), len(order))
  by_kind: dict[str, list[int]] = {}
  for i, one in enumerate(asked):
    by_kind.setdefault(one.kind, []).append(i)
  figures = {
    kind: scores.score([texts[i] for i in some], [asked[i].reference for i in some], names)
    for kind, some in by_kind.items()
  }
  return Answers(list(asked), texts, figures)


def rows(found: dict[str, Answers]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
  """Header and rows of a table of several models on the same examples: `found` by their name."""
  kinds = list(next(iter(found.values())).scores)
  names = list(next(iter(next(iter(found.values())).scores.values()), {}))
  count = {kind: sum(e.kind == kind for e in next(iter(found.values())).examples) for kind in kinds}
  lines = [(kind, count[kind], name, *one.scores[kind].values()) for kind in kinds for name, one in found.items()]
  return ('task', 'examples', 'model', *(TITLES[name] for name in names)), lines


def compare(
  sources: Sequence[str],
  folder: Prepared,
  limit: int,
  *,
  new: int = 128,
  batch: int = 16,
  names: Sequence[str] = scores.NAMES,
  on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Answers]:
  """`answer` by several models, runs or foreign ones, to the same examples of a folder of conversations.

  Raises InputError for a model whose tokens are others.
  """
  asked, found = examples(folder, limit), {}
  tokenizer, ends = folder.tokenizer, [*(folder.summary.chat or {})['end'], folder.tokenizer.eos_id]
  for number, source in enumerate(sources):
    model = foreign.open_model(source)
    if not tokenizer.extends(model.tokenizer):  # ty: ignore
      raise InputError(f'{source}: has another tokenizer than {folder.path}')
    unknown = {i for e in asked for i in e.prompt if i >= model.cfg.vocab_size}
    if unknown:
      raise InputError(
        f'{source}: does not know the tokens {sorted(unknown)} of {folder.path}: its template is not theirs'
      )
    told = on_progress and (lambda done, total, n=number: on_progress(n * total + done, len(sources) * total))
    how: dict[str, Any] = {'new': new, 'batch': batch, 'names': names, 'on_progress': told}
    found[source] = answer(model.cfg, model.params, tokenizer, asked, ends, **how)
  return found


def write(found: dict[str, Answers], folder: Prepared, path: str) -> epath.Path:
  """Every example as a line of JSON: prompt, reference, the answer of each model. Returns the path."""
  first = next(iter(found.values()))
  lines = [
    json.dumps(
      {
        'kind': example.kind,
        'prompt': folder.tokenizer.decode(example.prompt),
        'reference': example.reference,
        'answers': {name: one.texts[i] for name, one in found.items()},
      },
      ensure_ascii=False,
    )
    for i, example in enumerate(first.examples)
  ]
  write_whole(path, '\n'.join(lines) + '\n')
  return epath.Path(path)
