"""What a run learns from: the next batch of a state, and what is held out. Prepared folders; rollouts elsewhere."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from jaxlm import hosts
from jaxlm.config import Pretrain
from jaxlm.data import batches as data_batches
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.loops import bases, corpus, pairing, reference, train
from jaxlm.program import Program
from jaxlm.train import metrics

Say = Callable[[str], None]
Writer = metrics.Writer | metrics.Unwritten
Evaluated = tuple[dict[str, float], float, str]  # metrics, the loss in them (less is better), both in words


class Feed(Protocol):
  """The data of a run, of whatever stage."""

  config: Pretrain
  tokenizer: Tokenizer
  contents: str  # what a saved run must find again
  groups: int  # that held-out text is counted in
  segments: int = 2  # a row may have, of preferences
  places: int = 0  # of a row that have logits, of preferences; 0: all
  unit: int = 1  # a run is left after a multiple of so many batches: what is in between is not in its state
  names: list[str]  # of the sources that are mixed
  watches: bool  # whether something is held out

  def attach(self, built: Program, state: Any, say: Say) -> None:
    """Once, before the first step."""
    ...

  def stream(self, state: Any, steps: int, writer: Writer) -> Callable[[Any], Any]:
    """`next(state)`: the batches from the state's cursor on; `writer` takes down what is told of them."""
    ...

  def told(self) -> dict[str, float]:
    """Metrics of the newest batches, for who looks on."""
    return {}

  def warnings(self, step: int, row: Mapping[str, float]) -> list[str]:
    """What is wrong by a step's metrics, each thing once."""
    return []

  def evaluate(self, params: Any, step: int, writer: Writer) -> Evaluated:
    """What a model makes of what is held out."""
    ...

  def size(self, cursor: int) -> int:
    """Rows of a batch."""
    ...

  def tokens(self, cursor: int) -> int:
    """Places of a batch."""
    return self.size(cursor) * self.config.data.seq_len

  def epochs(self, cursor: int) -> list[float]:
    """How often each source was read before a batch."""
    ...

  def files(self, config: Pretrain) -> dict[str, str]:
    """Further files of the run's folder, by which it can be talked with."""
    ...

  def facts(self) -> dict[str, Any]:
    """What the report says of the data."""
    ...

  def composition(self) -> dict[str, int]:
    """Tokens to train on by their kind, or by the source that is mixed."""
    return {}


class Prepared(Feed):
  """Rows of prepared folders, text or preferences, made ahead in the background."""

  def __init__(self, config: Pretrain, opened: corpus.Corpus):
    """`config.steps` has to be counted already. Raises InputError as `corpus.training` does."""
    self.config, self.corpus = config, opened
    self.tokenizer, self.contents = opened.tokenizer, opened.contents
    self.text = config.preference.stage == 'none'
    self.training = corpus.training(opened, config)
    self.names = self.training.names
    self._rows, self._groups = self._held_out()
    self.groups, self.watches = len(self._groups), len(self._rows) > 0
    found = [*pairing.leaves(self.training.batches.rows), *pairing.leaves(self._rows)]
    self.segments = max((stream.most for stream in found), default=2)
    self.places = 0 if config.preference.stage == 'reward' else pairing.placed(found)

  def _held_out(self) -> tuple[data_batches.Joined, list[corpus.Group]]:
    if self.text:
      return corpus.held_out(self.corpus.watched, self.config.data.seq_len)
    rows = [pairing.rows(self.config, one, held_out=True) for one in self.corpus.watched]
    return data_batches.Joined(rows), [('', '')]

  def attach(self, built: Program, state: Any, say: Say) -> None:
    """The reference's figures, where a loss wants them; what is held out goes to the devices."""
    self._built, self._say = built, say
    read = {'train': self.training.batches.rows, 'held_out': self._rows}
    hosts.mark('the reference', slow=True)
    reference.attach(self.config, built, state, read, self.contents, say)
    size = self.config.data.global_batch
    fixed = data_batches.in_order(self._rows, size, self.config.watch.eval_batches * size)
    self._fixed = [hosts.place(size, functools.partial(fixed.part, i), built.held_out) for i in range(len(fixed))]
    if not self.watches:
      say(f'{self.config.data.path} has no held-out documents: nothing is evaluated')

  def stream(self, state: Any, steps: int, writer: Writer) -> Callable[[Any], Any]:
    """Batches on the devices; they know of no state but where it begins."""
    packed = self.config.data.packing if self.text else pairing.described(self.training.batches.rows)
    self._say(f'{packed}: {self.training.rows:,} rows, {self.training.fill:.1%} full')
    start = int(state.cursor)
    ahead = data_batches.prefetch(self.rows_of, start, start + max(0, steps - int(state.step)))

    def after(state: Any) -> Any:
      cursor, rows = next(ahead)
      hosts.mark(f'batch {cursor}', slow=cursor < start + 2)  # the first step compiles, its row too
      # not by the thread that reads: a GPU's graph of a step, which is made when it first runs, must be alone with it
      return rows and hosts.place(self.size(cursor), lambda at: rows[at.start, at.stop], self._built.batch)

    return after

  def rows_of(self, cursor: int) -> dict[tuple[int, int], data_batches.Batch]:
    """What devices of this process hold of a batch, by their runs of rows, on the host."""
    batches = self.training.batches
    held = hosts.held(batches.size(cursor), self._built.batch)
    return {(rows.start, rows.stop): batches(cursor, rows) for rows in held}

  def evaluate(self, params: Any, step: int, writer: Writer) -> Evaluated:
    totals = train.evaluate(self._built.evaluate, params, self._fixed)
    return corpus.evaluated(totals, self._groups) if self.text else pairing.evaluated(totals)

  def size(self, cursor: int) -> int:
    return self.training.batches.size(cursor)

  def epochs(self, cursor: int) -> list[float]:
    return self.training.batches.epochs(cursor)

  def files(self, config: Pretrain) -> dict[str, str]:
    return bases.talk(config, self.corpus)

  def facts(self) -> dict[str, Any]:
    summaries = [one.summary for one in self.corpus.folders.values()]
    return {s: sum(summary.splits[s].tokens for summary in summaries) for s in ('train', 'validation')}

  def composition(self) -> dict[str, int]:
    first, names = next(iter(self.corpus.folders.values())), self.names
    kinds = {kind: count.tokens for kind, count in first.summary.kinds('train').items() if count.tokens}
    if not any(names):
      return kinds
    others = {name: one.summary.splits['train'].tokens for name, one in self.corpus.folders.items()}
    return {name: others.get(name, kinds.get(name, 0)) for name in names}


def open_feed(config: Pretrain) -> tuple[Pretrain, Feed]:
  """The run with its steps counted and its model known, and what it learns from."""
  if config.rl.algo:
    from jaxlm.loops import rollouts

    feed = rollouts.Rollouts(config)
    feed.config = resolved(config, feed.tokenizer)
    return feed.config, feed
  data = config.data
  opened = corpus.load(data.path, data.mix, data.phases, data.held_out)
  config = counted(resolved(config, opened.tokenizer), opened)
  if config.distill.teacher:
    from jaxlm.loops import teaching

    return config, teaching.Taught(config, opened)
  return config, Prepared(config, opened)


def counted(config: Pretrain, opened: corpus.Corpus | None = None) -> Pretrain:
  """The config with the steps that its epochs are, if it counts in epochs."""
  if not config.epochs:
    return config
  data = config.data
  opened = opened or corpus.load(data.path, data.mix, data.phases, data.held_out)
  if config.distill.teacher and config.distill.on_policy:
    from jaxlm.loops import teaching

    rows = len(teaching.prompts(config, opened))
  else:
    rows = corpus.training(opened, config).rows
  return dataclasses.replace(config, steps=max(1, math.ceil(config.epochs * rows / data.global_batch)))


def resolved(config: Pretrain, tokenizer: Tokenizer) -> Pretrain:
  """The config with the model of `init`, where it names none, and the tokenizer's vocabulary.

  Raises InputError if it names fewer tokens, or asks for adapters of no base.
  """
  if config.lora.rank and not config.init:
    raise InputError(f'lora.rank={config.lora.rank}: adapters need a base: set init to a run or a foreign model')
  config, size = bases.with_model(config), tokenizer.vocab_size
  named = config.model.vocab_size
  if 0 < named < size and not config.init:
    raise InputError(f"model.vocab_size={named} is less than the {size} of the data's tokenizer; leave it 0")
  return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=max(named, size)))
