"""A run's perplexity and bits per byte on held-out text: by kind, by source, beside compressors and other models."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
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
from jaxlm.evals import compression, questions
from jaxlm.evals.questions import Measure, Table
from jaxlm.files import write_whole
from jaxlm.loops import bases, corpus, foreign, pretrain, train, writing
from jaxlm.loops.corpus import Group, Score

ORDER = 5  # of the byte n-gram
WHOLE = ''  # the name of all texts together: no kind has it


class Evaluation(NamedTuple):
  """What a run's newest checkpoint makes of all held-out documents of some prepared folders."""

  run: str
  step: int
  data: tuple[str, ...]
  seq_len: int
  whole: Score
  kinds: dict[str, Score]
  sources: dict[tuple[str, str], Score]
  baselines: dict[str, dict[str, float]]  # kind -> name of a compressor -> bits per byte
  measures: dict[str, dict[str, Measure]]  # kind, KIND/SOURCE of those of several, WHOLE -> metric -> by document


def evaluate(
  run: str, data: Sequence[str] = (), *, batch: int = 16, seq_len: int | None = None, baselines: bool = False
) -> Evaluation:
  """Scores every held-out token of `data` (default: what the run was trained on) once, on one device, in float32.

  With x_i nats, t_i tokens and b_i bytes of document i: perplexity = exp(sum x_i / sum t_i), bits per byte =
  sum x_i / (ln 2 sum b_i). Both are ratios of sums over documents, which are what was drawn: tokens of one go
  together. Their 95 % intervals are percentiles of draws of documents (Efron 1979, as in `questions.interval`).
  `run` may be any model that `foreign.open_model` opens, with `data` then. Raises InputError for a run without a
  checkpoint, data of another tokenizer, and data without held-out documents.
  """
  config, params, tokenizer, step = _opened(run, data)
  folders = _folders(config, data)
  for path, one in folders.items():
    if one.tokenizer.digest != tokenizer.digest:
      raise InputError(f'{path}: was prepared with another tokenizer than that of {run}: prepare it with that one')
  seq_len = seq_len or config.data.seq_len
  rows, groups = corpus.held_out(list(folders.values()), seq_len, by_document=True)
  if not len(rows):
    raise InputError(f'{", ".join(folders)}: no held-out documents: prepare with a val_fraction above 0')
  fn = jax.jit(objectives.by_group(config.model, models.Run(), groups=len(groups), chunks=config.compute.loss_chunks))
  totals = train.evaluate(fn, params, batches.in_order(rows, batch))
  order = dict.fromkeys(group for one in folders.values() for group in one.summary.groups)
  sources = corpus.scores(totals, groups)
  sources = {group: sources[group] for group in order if group in sources}
  kinds = corpus.scores(totals, [kind for kind, _ in groups])
  kinds = {kind: kinds[kind] for kind, _ in sources}
  compared = _baselines(list(folders.values()), list(kinds)) if baselines else {}
  whole, measures = corpus.scores(totals, [''] * len(groups))[''], _measures(totals, groups, sources)
  return Evaluation(run, step, tuple(folders), seq_len, whole, kinds, sources, compared, measures)


def _measures(totals: Any, groups: Sequence[Group], sources: Mapping[Group, Score]) -> dict[str, dict[str, Measure]]:
  """Of each text its metrics, document by document; `groups` says what kind and source each document is of."""
  nll, bits = totals['nll'], totals['bits_per_byte']
  nats, tokens, size = (np.asarray(x, np.float64) for x in (nll.total, nll.weight, bits.weight))
  number = {group: i for i, group in enumerate(sources)}
  group_of = np.array([number.get(group, -1) for group in groups])  # -1: without a token
  counts, texts, found = Counter(kind for kind, _ in sources), {}, {}
  for (kind, source), i in number.items():
    texts.setdefault(kind, []).append(i)
    if counts[kind] > 1:
      texts[f'{kind}/{source}'] = [i]
  for text, picked in [*texts.items(), (WHOLE, list(number.values()))]:
    there = np.isin(group_of, picked) & (tokens > 0)
    of = lambda weights, form, there=there: Measure(nats[there], weights[there], form)
    found[text] = {'perplexity': of(tokens, 'perplexity'), 'bits_per_byte': of(size, 'bits')}
  return found


def rows(found: Evaluation) -> Table:
  """Header and rows of a table: each kind, each source of kinds that have several, and the whole.

  Of a text of one document there is no interval.
  """
  extra = list(next(iter(found.baselines.values()), {}))
  scores = found.kinds | {f'{kind}/{source}': one for (kind, source), one in found.sources.items()}
  scores |= {WHOLE: found.whole}
  lines = []
  for text, (perplexity, bits) in ((text, of.values()) for text, of in found.measures.items()):
    score, count = scores[text], len(perplexity.values)
    sure = [questions.interval(one) if count > 1 else ('', '') for one in (perplexity, bits)]
    compared = (found.baselines.get(text, {}).get(column, '') for column in extra)
    shown = math.exp(score.nll), *sure[0], score.bits_per_byte, *sure[1]
    lines.append((text or 'all', count, score.bytes, score.tokens, *shown, *compared))
  header = 'text', 'documents', 'bytes', 'tokens', 'perplexity', 'from', 'to', 'bits per byte', 'from', 'to (95 %)'
  return (*header, *extra), lines


def compared(found: Sequence[Evaluation]) -> Table:
  """Header and rows of a table of models on the same documents, and the first less each other, paired by document."""
  _, lines = questions.rows({one.run: one.measures for one in found}, {})
  header = 'text', 'documents', 'metric', 'model', 'value', 'from', 'to (95 %)'
  return header, [(text or 'all', count, *rest) for text, count, _, *rest in lines if count > 1]


def write(
  found: Evaluation, figures: Table, others: Table | None, shown: str, path: str, report: str | None = None
) -> list[epath.Path]:
  """The figures of `rows` and of `compared` as JSON at `path`, as Markdown (`shown`) beside it, in a run's report."""
  to = {kind: str(epath.Path(path).with_suffix(f'.{kind}')) for kind in ('json', 'md')}
  named = lambda scores: {name: score._asdict() for name, score in scores.items()}
  sources = {f'{kind}/{source}': score for (kind, source), score in found.sources.items()}
  values: dict[str, Any] = {
    'run': found.run,
    'step': found.step,
    'all': found.whole._asdict(),
    'kinds': named(found.kinds),
  }
  values |= {'sources': named(sources), 'baselines': found.baselines}
  names = 'documents', 'perplexity_from', 'perplexity_to', 'bits_per_byte_from', 'bits_per_byte_to'
  sure = {line[0]: (line[1], *line[5:7], *line[8:10]) for line in figures[1]}
  values['intervals'] = {
    text: {name: None if x == '' else x for name, x in zip(names, some, strict=True)} for text, some in sure.items()
  }
  if others:
    values['compared'] = [dict(zip((*others[0][:-1], 'to'), line, strict=True)) for line in others[1]]
  write_whole(to['json'], json.dumps(values, indent=1))
  write_whole(to['md'], shown + '\n')
  if report is not None and bases.is_run(report):
    pretrain.add_facts(epath.Path(report), {f'perplexity, step {found.step}': dict(map(_fact, figures[1]))})
  return [epath.Path(one) for one in to.values()]


def _fact(line: Sequence[Any]) -> tuple[str, str]:
  """A line of `rows` as one of a report."""
  text, count, _, _, value, *sure = line[:10]
  between = lambda some, digits: f' ({some[0]:.{digits}f} to {some[1]:.{digits}f})' if count > 1 else ''
  bits = f'{sure[2]:.3f}{between(sure[3:], 3)} bits per byte'
  return text, f'{value:.2f}{between(sure, 2)}, {bits}, {count} documents'


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
