"""Distillation as a run: batches with the teacher beside them, of prepared rows or of the student's own answers."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxlm import hosts, interop, masked
from jaxlm.config import Pretrain
from jaxlm.data import batches, faults
from jaxlm.data.prepared import Tokens
from jaxlm.errors import InputError
from jaxlm.files import read_json
from jaxlm.loops import answers, bases, corpus, train
from jaxlm.loops.feeds import Evaluated, Prepared, Say, Writer
from jaxlm.program import Program
from jaxlm.rl import episodes

FACTS = 'teacher.json'
ASKED = 0x6D0  # what is folded into a run's key for answers
BESIDE = ('teacher', 'data_mask')  # what of a batch is not in its rows


class Prompts:
  """The prompts of a split of conversations: each up to its last learned turn, where an answer has room in a row."""

  def __init__(self, tokens: Tokens, room: int):
    """`room`: tokens that a prompt may have."""
    ends = ((start, _answered(learned)) for start, _, learned in faults.documents(tokens) if learned is not None)
    found = [(start, start + n) for start, n in ends if n]
    self.spans = [(start, stop) for start, stop in found if stop - start <= room]
    self.tokens, self.longer = tokens, len(found) - len(self.spans)

  def __len__(self) -> int:
    return len(self.spans)

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    return {'ids': self.tokens.read(*self.spans[row])[0]}


def _answered(learned: np.ndarray) -> int:
  """Where the last turn that is learned begins; 0: there is none."""
  begins = np.flatnonzero(np.diff(learned.astype(np.int8)) == 1)
  return int(begins[-1]) + 1 if len(begins) else 0


def prompts(config: Pretrain, opened: corpus.Corpus) -> Prompts:
  """Those that a student answers. Raises InputError for data without any, and for mixtures."""
  if opened.weights:
    raise InputError('distill.on_policy: answers the prompts of one folder as they come: leave data.mix')
  room = config.data.seq_len + 1 - config.rl.max_new_tokens
  found = Prompts(next(iter(opened.folders.values())).split('train'), room)
  if len(found):
    return found
  if found.longer:
    new = f'data.seq_len={config.data.seq_len} has no room for rl.max_new_tokens={config.rl.max_new_tokens}'
    raise InputError(f'distill.on_policy: {new} after any prompt: raise the one or lower the other')
  raise InputError(f'distill.on_policy: {config.data.path} has no prompts: it wants conversations (`prepare --chat`)')


class Taught(Prepared):
  """Prepared rows with a teacher; a share of the batches are answers of the student of the moment.

  Which batches is drawn from the seed and the cursor, an answer depends on these and on the parameters: a saved run
  goes on bitwise.
  """

  def __init__(self, config: Pretrain, opened: corpus.Corpus):
    """Raises InputError for a teacher of another vocabulary, and as `prompts` does."""
    super().__init__(config, opened)
    self.how = config.distill
    known, _ = interop.vocabulary(self.how.teacher)
    if known.digest != self.tokenizer.digest:
      sizes = f'{known.vocab_size:,} tokens, not the {self.tokenizer.vocab_size:,} of {config.data.path}'
      raise InputError(f'{self.how.teacher}: has another vocabulary ({sizes}): prepare the data with the teacher')
    if self.how.on_policy:
      self.prompts = prompts(config, opened)
      ramp = batches.parse_ramp(config.data.batch_warmup, config.data.global_batch)
      self.order = batches.Batches(self.prompts, config.data.global_batch, config.seed, ramp=ramp)
      self._places: dict[int, int] = {}  # of batches of answers

  def attach(self, built: Program, state: Any, say: Say) -> None:
    bare = lambda batch: {name: spec for name, spec in batch.items() if name not in BESIDE}
    super().attach(built._replace(batch=bare(built.batch), held_out=bare(built.held_out)), state, say)
    self._specs, self._digest = built.batch, self._same(int(state.step))
    self._mesh = jax.tree.leaves(built.abstract)[0].sharding.mesh
    base = bases.open_base(self.how.teacher, self._mesh)
    layout = jax.tree.map(lambda x: x.sharding, built.batch['teacher'])
    self._teacher = jax.device_put({name: base.params[name] for name in layout}, layout)
    say(f'learns from {base.said}')
    if self.how.on_policy:
      folder = next(iter(self.corpus.folders.values()))
      ends = sorted({*folder.summary.chat['end'], self.tokenizer.eos_id})  # ty: ignore
      self._readied = answers.readied(self.config, built.run, self._mesh)
      self._engine = answers.engine(self.config, built.run, self._mesh, ends, answers.drawing(self.config.rl))
      left = f'; {self.prompts.longer} longer ones are left out' if self.prompts.longer else ''
      say(f'{self.how.on_policy:.0%} of the batches are own answers, to {len(self.prompts):,} prompts{left}')

  def _same(self, step: int) -> str:
    """The digest of the teacher. Raises InputError if the run began with another one."""
    path, digest = epath.Path(self.config.run) / FACTS, hosts.from_first(lambda: bases.digest_of(self.how.teacher))
    began = hosts.from_first(lambda: read_json(path)['sha256'] if step and path.exists() else digest)
    if began != digest:
      shown = f'sha256 {digest[:12]}, not {began[:12]}'
      raise InputError(f'{self.how.teacher}: is not the teacher that the run began with ({shown}): put that one back')
    return digest

  def own(self, cursor: int) -> bool:
    """Whether a batch is one of the student's own answers."""
    return np.random.default_rng([self.config.seed % 2**32, cursor]).random() < self.how.on_policy

  def rows_of(self, cursor: int) -> dict[tuple[int, int], batches.Batch]:
    return {} if self.own(cursor) else super().rows_of(cursor)

  def stream(self, state: Any, steps: int, writer: Writer) -> Callable[[Any], Any]:
    read = super().stream(state, steps, writer)

    def after(state: Any) -> Any:
      batch = read(state)
      if self.how.on_policy:
        batch = batch | {'data_mask': batch['loss_mask']} if batch else self._answers(state, writer)
      return batch | {'teacher': self._teacher}

    return after

  def _answers(self, state: Any, writer: Writer) -> Any:
    """A batch of answers to the prompts of the state's cursor; what is told of them."""
    cursor = int(state.cursor)
    hosts.mark(f'answers of batch {cursor}', slow=True)
    asked = [self.prompts[int(row)]['ids'].tolist() for row in self.order.row_ids(cursor)]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.config.seed), ASKED), cursor)
    params = self._readied(state.params)
    made = self._engine(params, asked, answers.seeds(key, len(asked)))
    found = episodes.batch_of(asked, made, limit=self.config.data.seq_len, pad_id=self.tokenizer.pad_id)
    self._places[cursor] = found['tokens'].size
    found['target_bytes'], found['data_mask'] = np.zeros_like(found['tokens']), np.zeros_like(found['loss_mask'])
    told = {'answers/length': made.lengths_M.mean(), 'answers/truncated': 1.0 - made.stopped_M.mean()}
    writer.row(int(state.step) + 1, {name: float(x) for name, x in told.items()})
    rows = {name: spec for name, spec in self._specs.items() if name != 'teacher'}
    return answers.placed(rows, {name: found[name] for name in rows})

  def evaluate(self, params: Any, step: int, writer: Writer) -> Evaluated:
    """As of text, with the divergence; less is better of what training weighs."""
    totals = train.evaluate(self._built.evaluate, params, (one | {'teacher': self._teacher} for one in self._fixed))
    apart = float(masked.value(totals.pop('divergence')))
    row, nll, said = corpus.evaluated(totals, self._groups)
    score = self.how.alpha * apart + (1.0 - self.how.alpha) * nll
    return row | {'eval/distill/divergence': apart}, score, f'{said}, {apart:.4f} nats from the teacher'

  def tokens(self, cursor: int) -> int:
    return self._places.get(cursor) or super().tokens(cursor) if self.how.on_policy else super().tokens(cursor)

  def epochs(self, cursor: int) -> list[float]:
    return self.order.epochs(cursor) if self.how.on_policy else super().epochs(cursor)

  def files(self, config: Pretrain) -> dict[str, str]:
    return super().files(config) | {FACTS: json.dumps({'sha256': self._digest})}

  def facts(self) -> dict[str, Any]:
    return super().facts() | {'teacher': self.how.teacher}
