"""A model as examiners ask it: log-likelihoods of continuations and of whole texts, and what it goes on with.

Texts become tokens as in lm-eval's `hf` backend, so that figures are its. B rows, T tokens of a row, R places that are
scored, P of them at a time, D model, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jaxlm import interop, lora, models, sample
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.loops import chatting, foreign
from jaxlm.losses import lm

Told = Callable[[int, int], None] | None
Pair = tuple[list[int], list[int]]  # the ids of a context and of what follows it, neither of them empty

PIECE = 64  # places whose logits are there at the same time
AREA = 1 << 26  # rows x tokens^2 at most: what attention holds for a head
EXACT = partial(jax.default_matmul_precision, 'float32')  # accelerators would else round what they multiply
GREEDY = sample.Sampling(temperature_B=0.0)


class Likelihood(NamedTuple):
  """Of a continuation: its log-probability in nats, and whether each of its tokens is the likeliest one."""

  logp: float
  greedy: bool


class Subject(NamedTuple):
  """A model with its adapters folded in, the tokens that it reads at most, and how many rows it reads at a time."""

  name: str
  model: interop.Model
  tokenizer: Tokenizer
  longest: int
  batch: int = 16

  @property
  def first(self) -> int:
    """The id that stands before a text that nothing stands before: BOS where the tokenizer names one, else EOS."""
    named = self.tokenizer.bos_id is not None and 'bos' not in self.tokenizer.unnamed
    return self.tokenizer.bos_id if named else self.tokenizer.eos_id


def opened(source: str, *, batch: int = 16, seq_len: int | None = None) -> Subject:
  """Of anything that `foreign.open_model` opens; `seq_len`: tokens of a row, by default the model's own."""
  model = foreign.open_model(source)
  longest = seq_len or model.cfg.max_seq_len
  if model.cfg.positions == 'learned' and longest > model.cfg.max_seq_len:
    raise InputError(f'{source}: has {model.cfg.max_seq_len} positions, fewer than {longest}')
  return Subject(source, model._replace(params=lora.merge(model.params)), model.tokenizer, longest, batch)  # ty: ignore


def encoded(subject: Subject, text: str, *, bare: bool = False) -> list[int]:
  """The ids of a text, control tokens in it as such; first what the tokenizer puts before a text, unless `bare`."""
  tokenizer = subject.tokenizer
  ids = tokenizer.encode(text, controls=True)
  return ids if bare or ids[:1] == [subject.first] else [*tokenizer.prefix_ids, *ids]


def pair(subject: Subject, context: str, continuation: str) -> Pair:
  """The two parts as they are in the ids of the whole; white space at the end of the context goes to the continuation.

  Raises InputError where nothing is to be scored.
  """
  kept = context.rstrip()
  context, continuation = kept, context[len(kept) :] + continuation
  before = encoded(subject, context) if context else []
  whole = encoded(subject, context + continuation, bare=not before)
  if not before:
    before = [subject.first]
    whole = whole if whole[:1] == before else before + whole
  at = min(len(before), len(whole) - 1)  # a token may go over the border
  if at < 1:
    raise InputError(f'{subject.name}: nothing is to be scored in {context + continuation!r:.60}')
  return before[:at], whole[at:]


def windows(ids: Sequence[int], first: int, longest: int) -> Iterator[Pair]:
  """A text in parts of up to `longest` tokens, each token once, the last part with all the context that fits.

  `first` stands before it.
  """
  ids = [first, *ids]
  for start in range(1, len(ids), longest):
    stop = min(start + longest, len(ids))
    yield ids[0 if start == 1 else stop - longest - 1 : start], ids[start:stop]


@partial(jax.jit, static_argnums=0)
def _scored(cfg: models.ModelConfig, params: Any, tokens_BT: Any, rows_R: Any, at_R: Any, targets_R: Any) -> Any:
  """Log-probabilities of the targets after the places `at_R` of `rows_R`, and whether they are the likeliest tokens."""
  x_RD = models.hidden(cfg, params, tokens_BT).x_BTD[rows_R, at_R]

  def some(piece: tuple[Array, Array]) -> tuple[Array, Array]:
    x_PD, targets_P = piece
    logits_1PV = models.unembed(cfg, params, x_PD[None])
    return lm.from_logits(logits_1PV, targets_P[None])[0][0], logits_1PV[0].argmax(-1) == targets_P

  pieces = x_RD.reshape(-1, PIECE, x_RD.shape[-1]), targets_R.reshape(-1, PIECE)
  return jax.tree.map(lambda x: x.reshape(-1), jax.lax.map(some, pieces))


def likelihoods(subject: Subject, pairs: Sequence[Pair], on_progress: Told = None) -> list[Likelihood]:
  """Of each pair that of its second part, in float32; what is too long loses its beginning.

  Rows of like length are read together, the longest first; what differs in its last token alone is read once. Raises
  InputError for a continuation longer than a row.
  """
  if (most := max((len(said) for _, said in pairs), default=0)) > subject.longest:
    raise InputError(f'{subject.name}: a continuation of {most} tokens is longer than its {subject.longest}')
  if (last := max((max(part) for one in pairs for part in one), default=0)) >= subject.model.cfg.vocab_size:
    raise InputError(f'{subject.name}: a text has the id {last}, and the model {subject.model.cfg.vocab_size:,} tokens')
  asked: dict[tuple[int, ...], list[int]] = {}
  for i, (context, said) in enumerate(pairs):
    asked.setdefault(tuple([*context, *said][-(subject.longest + 1) : -1]), []).append(i)
  order = sorted(asked, key=len, reverse=True)
  found: list[Likelihood] = [Likelihood(0.0, True)] * len(pairs)
  at = 0
  while at < len(order):
    width = min(_rounded(len(order[at])), subject.longest)
    rows = max(1, min(subject.batch, len(order), AREA // width**2))
    some, at = order[at : at + rows], at + rows
    tokens_BT = np.zeros((rows, width), np.int32)
    for row, ids in zip(tokens_BT, some, strict=False):
      row[: len(ids)] = ids
    of = [(row, len(ids), i, pairs[i][1]) for row, ids in enumerate(some) for i in asked[ids]]
    places = [(row, end - len(said) + j, token) for row, end, _, said in of for j, token in enumerate(said)]
    padded = np.zeros((PIECE << max(0, (len(places) - 1) // PIECE).bit_length(), 3), np.int32)
    padded[: len(places)] = places
    with EXACT():
      logp_R, hit_R = map(np.asarray, _scored(subject.model.cfg, subject.model.params, tokens_BT, *padded.T))
    ends = np.cumsum([len(said) for *_, said in of])
    for (_, _, i, said), end in zip(of, ends, strict=True):
      part = slice(end - len(said), end)
      found[i] = Likelihood(float(logp_R[part].sum(dtype=np.float64)), bool(hit_R[part].all()))
    if on_progress:
      on_progress(min(at, len(order)), len(order))
  return found


def _rounded(length: int) -> int:
  """A multiple of 64, or of an eighth to a quarter of the length: few widths mean few compilations."""
  step = max(64, 1 << max(0, (length - 1).bit_length() - 3))
  return -(-length // step) * step


def rolling(subject: Subject, texts: Sequence[str], on_progress: Told = None) -> list[float]:
  """The log-probability of each whole text, in nats."""
  parts = [list(windows(encoded(subject, text), subject.first, subject.longest)) for text in texts]
  scored = iter(likelihoods(subject, [one for some in parts for one in some], on_progress))
  return [sum((next(scored).logp for _ in some), 0.0) for some in parts]


def continued(
  subject: Subject,
  prompts: Sequence[str],
  *,
  new: int,
  until: Sequence[str] = (),
  sampling: sample.Sampling = GREEDY,
  on_progress: Told = None,
) -> list[str]:
  """What the model goes on with after each prompt: `new` tokens at most, before the first of `until` or the end.

  Prompts lose their beginning where these would not fit. Raises InputError where no prompt would.
  """
  if new >= subject.longest:
    raise InputError(f'{subject.name}: {new} new tokens leave no room for a prompt in its {subject.longest}')
  model, tokenizer, until = subject.model, subject.tokenizer, [text for text in until if text]
  ids = [(encoded(subject, text) or [subject.first])[-(subject.longest - new) :] for text in prompts]
  order, texts = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True), [''] * len(ids)
  layers = sample.readied(model.cfg, model.params)
  how: dict[str, Any] = {'max_new_tokens': new, 'sampling': sampling, 'stop': until, 'tokenizer': tokenizer}
  rows = min(subject.batch, len(order))
  for at in range(0, len(order), max(1, rows)):
    some = order[at : at + rows]
    filled = some + some[-1:] * (rows - len(some))  # one compiled shape for a length
    key = jax.random.fold_in(jax.random.key(0), at)
    ends = tuple(chatting.stop_ids(model))
    with EXACT():
      out = sample.generate(model.cfg, layers, [ids[i] for i in filled], key, stop_ids=ends, **how)
    for i, row, n in zip(some, np.asarray(out.tokens_BN), np.asarray(out.lengths_B), strict=False):
      texts[i] = tokenizer.decode(row[:n].tolist())
      for text in until:
        texts[i] = texts[i].split(text)[0]
    if on_progress:
      on_progress(at + len(some), len(order))
  return texts
