"""What a reward model gets right on held-out pairs, with intervals, beside what the lengths of answers alone would."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxlm import models, objectives
from jaxlm.config import Pretrain
from jaxlm.data import batches, prepare
from jaxlm.data.pairs import PairRows, completions
from jaxlm.errors import InputError
from jaxlm.files import read_json, write_whole
from jaxlm.loops import corpus, pairing, pretrain, reference, scoring

Z = 1.959963984540054  # of 95 %
RESAMPLES = 10_000
BINS = 4


class Judged(NamedTuple):
  """Held-out pairs, one place each: scores, tokens of answers, margins of rows, and the chance by length alone."""

  chosen: np.ndarray
  rejected: np.ndarray
  chosen_length: np.ndarray
  rejected_length: np.ndarray
  margins: np.ndarray  # as rows say them; all 0 where they say none
  by_length: np.ndarray  # what a logistic regression on lengths, fitted on the training pairs, gives the chosen one
  left_out: int  # longer than a row


def is_reward(run: str) -> bool:
  """Whether a run's folder is that of a reward model."""
  path = epath.Path(run) / 'config.json'
  return path.exists() and read_json(path).get('preference', {}).get('stage') == 'reward'


def of_fold(config: Pretrain, fold: int) -> Pretrain:
  """The run that trains without a part of the pairs, in the folder of the whole one."""
  shared = config.preference.features and f'../../{config.preference.features}'
  how, watch = (
    dataclasses.replace(config.preference, fold=fold, features=shared),
    dataclasses.replace(config.watch, keep_last=1),
  )
  return dataclasses.replace(config, run=f'{config.run}/folds/{fold}', preference=how, watch=watch)


def judge(
  run: str, data: Sequence[str] = (), *, batch: int = 8, seq_len: int | None = None, kept: bool = False
) -> Judged | None:
  """Scores the held-out pairs of `data` (default: what the run was trained on); None where there are none.

  `kept` takes what a frozen trunk made of them from the run's folder, where it is there, and does not read them again.

  Of a run that is a fold these are the pairs of its part. Raises InputError for a run that is no reward model, and for
  data of another tokenizer or without pairs.
  """
  model = scoring.open_model(run)
  config = dataclasses.replace(model.config, run=run)
  if seq_len:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=seq_len))
  own = corpus.load(config.data.path, config.data.mix, config.data.phases)
  folders = {path: prepare.load(path) for path in data} or own.folders
  for path, one in folders.items():
    if not model.tokenizer.extends(one.tokenizer) or one.tokenizer.digest != model.tokenizer.digest:
      raise InputError(f'{path}: was prepared with another tokenizer than that of {run}: prepare it with that one')
  held_out = list(pairing.leaves(batches.Joined([pairing.rows(config, f, held_out=True) for f in folders.values()])))
  if not held_out:
    return None
  seen = pairing.leaves(batches.Joined([pairing.rows(config, f, held_out=False) for f in own.folders.values()]))
  fitted = _fit(*np.concatenate([_lengths(stream) for stream in seen]).T)
  units = _scores(config, model.params, held_out, batch, kept)
  chosen, rejected = np.concatenate(units).T.astype(np.float64)
  lengths = np.concatenate([_lengths(stream) for stream in held_out]).T
  margins = np.concatenate([stream.tokens.answers()[1][::2][stream.units] for stream in held_out])
  by_length = 1.0 / (1.0 + np.exp(-_features(*lengths) @ fitted))
  return Judged(chosen, rejected, *lengths, margins, by_length, sum(stream.dropped for stream in held_out))


def _scores(config: Pretrain, params: Any, held_out: list[PairRows], batch: int, kept: bool) -> list[np.ndarray]:
  """[pairs, 2] of each stream: the scores of both answers."""
  features = reference.kept(config, [stream.whole() for stream in held_out]) if kept else None
  if features is not None:
    value = np.asarray(params['value'])
    return [x[stream.units] @ value for x, stream in zip(features, held_out, strict=True)]
  fn = jax.jit(objectives.answers(config.model, models.Run(), scored=True))
  place = lambda make: {name: jnp.asarray(x) for name, x in make(slice(None)).items()}
  return [pairing.of_units(fn, params, stream, batch, place)[stream.units] for stream in held_out]


def pooled(parts: Sequence[Judged | None]) -> Judged | None:
  """The pairs of several folds as one: each was scored by a model that had not seen it."""
  there = [part for part in parts if part]
  if not there:
    return None
  *arrays, left_out = zip(*there, strict=True)
  return Judged(*map(np.concatenate, arrays), sum(left_out))


def _lengths(stream: PairRows) -> np.ndarray:
  """[pairs, 2]: tokens of the chosen and of the rejected answer."""
  return completions(stream.tokens)[:, 1].reshape(-1, 2)[stream.units].astype(np.float64)


def _features(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
  """Differences of lengths and of their logarithms: swapped answers have the opposite ones."""
  return np.stack([(chosen - rejected) / 100.0, np.log(chosen) - np.log(rejected)], 1)


def _fit(chosen: np.ndarray, rejected: np.ndarray, ridge: float = 1.0) -> np.ndarray:
  """The weights of a logistic regression without intercept that tells the chosen answer, by Newton's method."""
  x, w = _features(chosen, rejected), np.zeros(2)
  for _ in range(25):
    p = 1.0 / (1.0 + np.exp(-x @ w))
    hessian = (x * (p * (1.0 - p))[:, None]).T @ x + ridge * np.eye(2)
    w += np.linalg.solve(hessian, x.T @ (1.0 - p) - ridge * w)
  return w


def right(better: np.ndarray) -> np.ndarray:
  """1.0 where a difference is above 0, 0.5 where there is none."""
  return 0.5 * (1.0 + np.sign(better))


def wilson(share: float, count: int) -> tuple[float, float]:
  """The 95 % interval of a share of `count` (Wilson 1927)."""
  middle, spread = share + Z**2 / (2 * count), Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
  return (middle - spread) / (1 + Z**2 / count), (middle + spread) / (1 + Z**2 / count)


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
  """The 95 % interval of a mean over pairs, which are drawn again (percentiles)."""
  rng = np.random.default_rng(seed)
  means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
  low, high = np.percentile(means, [2.5, 97.5])
  return float(low), float(high)


def baselines(found: Judged) -> dict[str, np.ndarray]:
  """Which pairs the lengths alone get right: by the longer answer, and by the regression."""
  longer = right(found.chosen_length - found.rejected_length)
  return {'the longer answer': longer, 'regression on length': right(found.by_length - 0.5)}


def rows(found: Judged) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
  """Header and rows of a table: the model and the baselines, then the model by margin and by which answer is longer."""
  hits, longer = right(found.chosen - found.rejected), found.chosen_length > found.rejected_length
  parts = {'reward model': hits} | baselines(found)
  parts |= {f'- {name}': hits[there] for name, there in _bins(found).items()}
  parts |= {'- chosen is longer': hits[longer], '- chosen is not longer': hits[~longer]}
  lines = [(name, len(x), float(x.mean()), *wilson(float(x.mean()), len(x))) for name, x in parts.items() if len(x)]
  return ('', 'pairs', 'right', 'from', 'to (95 %)'), lines


def _bins(found: Judged) -> dict[str, np.ndarray]:
  """Quarters of the pairs: by the rows' margins, or where rows say none by how far apart the scores are."""
  said = bool(np.any(found.margins))
  values = found.margins if said else np.abs(found.chosen - found.rejected)
  edges = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1)))
  bins = np.clip(np.searchsorted(edges, values, 'right') - 1, 0, max(0, len(edges) - 2))
  what = 'margin' if said else 'scores apart by'
  named = lambda i: f'{what} {edges[i]:.2f} to {edges[min(i + 1, len(edges) - 1)]:.2f}'
  return {named(i): bins == i for i in range(max(1, len(edges) - 1))}


def lines(found: Judged) -> list[str]:
  """In words: how much better than the better baseline, how scores go with length, and what was left out."""
  hits = right(found.chosen - found.rejected)
  name, best = max(baselines(found).items(), key=lambda item: float(item[1].mean()))
  low, high = bootstrap(hits - best)
  told = [f'above {name}: {(hits - best).mean():+.3f} ({low:+.3f} to {high:+.3f}, paired bootstrap)']
  apart = found.chosen - found.rejected, found.chosen_length - found.rejected_length
  if all(np.std(x) > 0 for x in apart):
    told.append(f'differences of scores and of lengths: correlation {np.corrcoef(*apart)[0, 1]:+.3f}')
  if found.left_out:
    told.append(f'{found.left_out} pairs longer than a row are left out')
  return told


def write(run: str, found: Judged, name: str, out: str | None = None) -> epath.Path:
  """Adds the table to the run's facts, which its report shows, and to `rewards.json` (or `out`); returns its path."""
  header, table = rows(found)
  shown = {line[0]: f'{line[2]:.3f} ({line[3]:.3f} to {line[4]:.3f}), {line[1]} pairs' for line in table}
  shown |= {f'{i}.': line for i, line in enumerate(lines(found), 1)}
  if out is None:
    pretrain.add_facts(epath.Path(run), {f'pairs told right, {name.replace("_", "-")}': shown})
  path = epath.Path(out or f'{run}/rewards.json')
  old = read_json(path) if path.exists() else {}
  figures = [dict(zip(('what', *header[1:4], 'to'), line, strict=True)) for line in table]
  write_whole(path, json.dumps(old | {name: {'table': figures, 'said': lines(found)}}, indent=1))
  return path
