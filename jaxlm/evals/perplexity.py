"""A run's perplexity and bits per byte on held-out text: by kind, by source, and beside compressors."""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxlm import models, objectives
from jaxlm.config import Pretrain
from jaxlm.data import batches, prepare
from jaxlm.data.prepared import Prepared
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.evals import compression
from jaxlm.files import write_whole
from jaxlm.loops import bases, corpus, foreign, train, writing
from jaxlm.loops.corpus import Score

ORDER = 5  # of the byte n-gram


class Evaluation(NamedTuple):
  """What a run's newest checkpoint makes of all held-out documents of some prepared folders."""

  run: str
  step: int
  whole: Score
  kinds: dict[str, Score]
  sources: dict[tuple[str, str], Score]
  baselines: dict[str, dict[str, float]]  # kind -> name of a compressor -> bits per byte


def evaluate(
  run: str, data: Sequence[str] = (), *, batch: int = 16, seq_len: int | None = None, baselines: bool = False
) -> Evaluation:
  """Scores every held-out token of `data` (default: what the run was trained on) once, on one device, in float32.

  `run` may be any model that `foreign.open_model` opens, with `data` then. Raises InputError for a run without a
  checkpoint, data of another tokenizer, and data without held-out documents.
  """
  config, params, tokenizer, step = _opened(run, data)
  folders = _folders(config, data)
  for path, one in folders.items():
    if one.tokenizer.digest != tokenizer.digest:
      raise InputError(f'{path}: was prepared with another tokenizer than that of {run}: prepare it with that one')
  rows, groups = corpus.held_out(list(folders.values()), seq_len or config.data.seq_len)
  if not len(rows):
    raise InputError(f'{", ".join(folders)}: no held-out documents: prepare with a val_fraction above 0')
  fn = jax.jit(objectives.by_group(config.model, models.Run(), groups=len(groups), chunks=config.compute.loss_chunks))
  totals = train.evaluate(fn, params, batches.in_order(rows, batch))
  kinds = corpus.scores(totals, [kind for kind, _ in groups])
  compared = _baselines(list(folders.values()), list(kinds)) if baselines else {}
  return Evaluation(
    run, step, corpus.scores(totals, [''] * len(groups))[''], kinds, corpus.scores(totals, groups), compared
  )


def rows(found: Evaluation) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
  """Header and rows of a table: each kind, each source of kinds that have several, and the whole."""
  extra = list(next(iter(found.baselines.values()), {}))
  header = ('text', 'bytes', 'tokens', 'perplexity', 'bits per byte', *extra)

  def line(name: str, score: Score, compared: dict[str, float]) -> tuple[Any, ...]:
    figures = (score.bytes, score.tokens, math.exp(score.nll), score.bits_per_byte)
    return name, *figures, *(compared.get(column, '') for column in extra)

  lines = []
  for kind, score in found.kinds.items():
    lines.append(line(kind, score, found.baselines.get(kind, {})))
    inside = {source: one for (of, source), one in found.sources.items() if of == kind}
    if len(inside) > 1:
      lines += [line(f'- {source}', one, {}) for source, one in inside.items()]
  return header, [*lines, line('all', found.whole, {})]


def write(found: Evaluation, path: str) -> epath.Path:
  """The figures as JSON; returns the path."""
  named = lambda scores: {name: score._asdict() for name, score in scores.items()}
  sources = {f'{kind}/{source}': score._asdict() for (kind, source), score in found.sources.items()}
  values = {'run': found.run, 'step': found.step, 'all': found.whole._asdict(), 'kinds': named(found.kinds)}
  write_whole(path, json.dumps(values | {'sources': sources, 'baselines': found.baselines}, indent=1))
  return epath.Path(path)


def _opened(source: str, data: Sequence[str]) -> tuple[Pretrain, Any, Tokenizer, int]:
  """(config, parameters, tokenizer, step) of a run, or of a model that is none: then of step 0."""
  if bases.is_run(source):
    return writing.load(source)
  if not data:
    raise InputError(f'{source}: is no run, which would know its text: name prepared folders with --data')
  model = foreign.open_model(source)
  return Pretrain(model=model.cfg), model.params, model.tokenizer, 0  # ty: ignore


def _folders(config: Any, data: Sequence[str]) -> dict[str, Prepared]:
  if data:
    return {path: prepare.load(path) for path in data}
  return corpus.load(config.data.path, config.data.mix, config.data.phases).folders


def _baselines(folders: Sequence[Prepared], kinds: Sequence[str]) -> dict[str, dict[str, float]]:
  """Of each kind's held-out text: xz on it alone, and the n-gram after all training text, as the model saw it."""
  of = {kind: [one for one in folders if kind in one.summary.kinds('validation')] for kind in kinds}
  texts = {kind: b''.join(one.document_bytes('validation', kind) for one in of[kind]) for kind in kinds}
  learnt = b''.join(one.document_bytes('train') for one in folders)
  bits = -np.log2(compression.ngram_probs(learnt, b''.join(texts.values()), ORDER))
  found, start = {}, 0
  for kind, text in texts.items():
    mean = float(bits[start : start + len(text)].mean())
    found[kind] = {'xz -9': compression.xz_bits_per_byte(text), f'{ORDER}-gram': mean}
    start += len(text)
  return found
