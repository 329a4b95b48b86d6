"""The one thread that computes: answers are asked for from anywhere, and told piece by piece as they are made.

A prompt is read in pieces of READ tokens between decoding steps, into a cache apart (a lobby), and takes a free slot
with its first token. Lobbies keep what they read, so that a prompt that begins like an earlier one is read from where
they part: always at a multiple of READ, so that what is computed does not depend on who asked before.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlm import sample
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.models import ModelConfig, Run
from jaxlm.rl import rollout
from jaxlm.serve import slots
from jaxlm.serve.line import Line
from jaxlm.serve.lobby import READ, Lobby, choose
from jaxlm.serve.metrics import Metrics
from jaxlm.serve.text import Text

SHORT = 32  # or these, where no more are left of it: the first token comes in half the time
READING = 2.0  # steps that may be read for between two of those that are answered: a burst fills the slots first
PIECE = 4  # tokens between two looks at what was made, at most
UNFELT = 0.02  # seconds that these may take


class Full(Exception):
  """So many wait already that another one would wait for too long."""


class Closed(Exception):
  """The engine takes no more: it ends, or has failed."""


class Matcher(Protocol):
  """What an answer has to obey."""

  def mask(self) -> np.ndarray:
    """uint32 [w]: the tokens that may come next."""
    ...

  def accept(self, token: int) -> bool:
    """Takes the next token; whether the answer is complete."""
    ...


class Token(NamedTuple):
  """A token with the model's log-probability of it, None where nothing is before it, and the likeliest ones."""

  id: int
  logp: float | None
  top: list[tuple[int, float]]
  offset: int = 0  # characters of the answer before it


class Piece(NamedTuple):
  """What is new of an answer. The last one says why it ended: 'stop', 'length', or 'error'."""

  text: str = ''
  tokens: Sequence[Token] = ()
  finish: str | None = None
  made: int = 0  # tokens so far
  prompt: Sequence[Token] = ()  # scores of the prompt, in the first piece where they were asked for
  cached: int = 0  # tokens of the prompt that were known


@dataclasses.dataclass(frozen=True)
class Settings:
  """How tokens are drawn; what is left out changes nothing."""

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float = 1.0
  min_p: float = 0.0
  repetition: float = 1.0
  presence: float = 0.0
  frequency: float = 0.0


@dataclasses.dataclass
class Ask:
  """One answer that is wanted."""

  prompt: Sequence[int]
  most: int  # new tokens
  deliver: Callable[[Piece], None]  # called by the engine's thread, and must return at once
  settings: Settings = Settings()
  seed: int = 0
  index: int = 0  # which of several answers to a prompt
  stop: Sequence[str] = ()
  stop_ids: frozenset[int] = frozenset()
  told: int | None = None  # alternatives to tell of each token; None: no log-probabilities at all
  scored: bool = False  # also of the prompt
  bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
  matcher: Matcher | None = None
  cancelled: bool = False  # set by whoever does not want it any more
  asked: float = dataclasses.field(default_factory=time.monotonic)


class _Arriving:
  """A prompt that is being read."""

  def __init__(self, ask: Ask, lobby: Lobby, start: int):
    self.ask, self.lobby, self.at, self.cached = ask, lobby, start, start
    self.scores: list[Token] = []


class _Row:
  """An answer in its slot."""

  def __init__(self, ask: Ask, tokenizer: Tokenizer):
    self.ask, self.text, self.made = ask, Text(tokenizer, ask.stop), 0
    self.waiting: list[Token] = []  # tokens whose text was not told yet


class Bank:
  """The slots of one set of parameters."""

  def __init__(
    self,
    cfg: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    *,
    rows: int,
    context: int,
    lobbies: int,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
  ):
    """`rows` answers at once, `context` tokens of prompt and answer together. Raises InputError for impossible ones.

    On a mesh the parameters are laid out for decoding (`rollout.DECODE`), rows over its axes for a batch.
    """
    if rows < 2:
      raise InputError(f'slots={rows} must be at least 2: a single row is computed in another way')
    if context > cfg.max_seq_len and cfg.positions == 'learned':
      raise InputError(f"context={context} exceeds the model's {cfg.max_seq_len} positions")
    self.cfg, self.tokenizer, self.context, self.mesh = cfg, tokenizer, context, mesh
    # a GPU waits for the host at each turn of a loop of unknown length: reading the whole cache is faster there
    attention = 'xla' if jax.default_backend() == 'gpu' else 'reached'
    self.run = Run(dtype, attention, rules=None if mesh is None else rollout.DECODE)
    with self.within():
      self._allot(params, rows, lobbies)
    self.rows: list[_Row | None] = [None] * rows
    self.waiting: Line[Ask] = Line()
    self.kept = max(rows // 4, int(rows > 2))  # slots that long answers leave to short ones
    self.arriving: _Arriving | None = None
    self.clock = 0  # prompts that were read
    self.seconds = 0.0  # that a step takes
    full = lambda value, kind: np.full(rows, value, kind)
    self.chosen = slots.Chosen(
      full(False, bool),
      np.zeros((rows, 2), np.uint32),
      full(0, np.int32),
      *(full(1.0, np.float32), full(cfg.vocab_size, np.int32), full(1.0, np.float32), full(0.0, np.float32)),
      *(full(1.0, np.float32), full(0.0, np.float32), full(0.0, np.float32), full(False, bool)),
    )

  def within(self) -> contextlib.AbstractContextManager:
    """Everything of the device is done inside of it."""
    return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

  def _allot(self, params: Any, rows: int, lobbies: int) -> None:
    """What lies on the device."""
    cfg, run = self.cfg, self.run
    if not isinstance(params['layers'], tuple):
      laid = params if self.mesh is None else slots.resharded(cfg, params, self.mesh)
      params = sample.readied(cfg, laid, run.dtype)
    self.params, self.positions = params, -(-self.context // READ) * READ
    self.state = slots.vacant(cfg, run, rows, self.positions, READ)
    self.lobbies = [Lobby(slots.empty(cfg, run, 1, self.positions, READ)) for _ in range(max(1, lobbies))]
    self.rings = any(c.ring for c in self.lobbies[0].cache)
    self.all_Bw = jnp.full((rows, slots.words(cfg)), 0xFFFFFFFF, jnp.uint32)

  def warm(self) -> None:
    """Compiles everything, so that nobody waits for it; a step twice, to know what it takes."""
    lobby = self.lobbies[0]
    chosen_1, V = jax.tree.map(lambda x: x[:1].copy(), self.chosen), self.cfg.vocab_size
    blank = np.zeros(V, bool), np.zeros(V, np.float32), np.full((1, self.all_Bw.shape[1]), 0xFFFFFFFF, np.uint32)
    with self.within():
      for scored, size in ((True, READ), (False, READ), (False, SHORT)):
        tokens = np.zeros(size, np.int32)
        given = lobby.cache, tokens, tokens, 0, 1
        lobby.cache, logits_1V, _ = slots.read(self.cfg, self.run, scored, self.params, *given)
      lobby.cache = slots.copied(lobby.cache)
      self.state, _ = slots.enter(self.run, self.state, 0, lobby.cache, logits_1V, chosen_1, *blank, 1)
      for _ in range(2):
        self.advance(1)

  def advance(self, steps: int) -> slots.Made:
    """So many steps of all rows; [t, B] of them on the host."""
    began = time.monotonic()
    given = self.state, self.chosen, self.masks(), steps
    self.state, made = slots.advance(self.cfg, self.run, PIECE, self.params, *given)
    found = jax.device_get(made)
    self.seconds = (time.monotonic() - began) / steps
    return jax.tree.map(lambda x: x[:steps], found)

  def steps(self) -> int:
    """How many at once: one where somebody joins or has to obey, else as many as are not felt by who comes next."""
    if self.arriving or any(row is not None and row.ask.matcher for row in self.rows):
      return 1
    return min(PIECE, max(1, int(UNFELT / max(self.seconds, 1e-6))))

  @property
  def live(self) -> int:
    return sum(row is not None for row in self.rows)

  def busy(self) -> bool:
    return bool(self.waiting or self.arriving or self.live)

  def wanted(self) -> list[Ask]:
    """All that were not answered to the end."""
    rows = [row.ask for row in self.rows if row is not None]
    return rows + ([self.arriving.ask] if self.arriving else []) + list(self.waiting)

  def leave(self, row: int) -> None:
    self.rows[row] = None
    self.chosen.live_B[row] = self.chosen.told_B[row] = False
    self._quiet(row)

  def _quiet(self, row: int) -> None:
    """A dead row asks for nothing that costs the others time."""
    self.chosen.top_k_B[row], self.chosen.top_p_B[row], self.chosen.min_p_B[row] = self.cfg.vocab_size, 1.0, 0.0

  def choose(self, row: int, ask: Ask) -> slots.Chosen:
    """Writes down what a row was asked for; the same as an array of one row."""
    how, V = ask.settings, self.cfg.vocab_size
    values = (
      True,
      [ask.seed >> 32 & 0xFFFFFFFF, ask.seed & 0xFFFFFFFF],
      ask.index,
      *(how.temperature, min(how.top_k or V, V), how.top_p, how.min_p, how.repetition, how.presence, how.frequency),
      ask.told is not None,
    )
    arrays = jax.tree.leaves(self.chosen)
    for array, value in zip(arrays, values, strict=True):
      array[row] = value
    return jax.tree.map(lambda x: x[row : row + 1].copy(), self.chosen)

  def masks(self) -> Any:
    """[B, w], of the device where nobody has to obey anything."""
    matchers = {i: row.ask.matcher for i, row in enumerate(self.rows) if row is not None and row.ask.matcher}
    if not matchers:
      return self.all_Bw
    mask_Bw = np.full(self.all_Bw.shape, 0xFFFFFFFF, np.uint32)
    for i, matcher in matchers.items():
      mask_Bw[i] = matcher.mask()
    return mask_Bw


class Engine:
  """Answers asks with the banks that are there, by their names, in one thread, until it is closed."""

  def __init__(self, banks: Mapping[str, Bank], *, queue: int = 64, metrics: Metrics | None = None):
    self.banks, self.queue, self.metrics = dict(banks), queue, metrics or Metrics()
    self.failed: BaseException | None = None
    self._draining = self._ended = False
    self._changed = threading.Condition()
    self._thread = threading.Thread(target=self._run, name='engine', daemon=True)

  def start(self) -> None:
    self._thread.start()

  @property
  def closed(self) -> bool:
    return self._draining or self._ended or self.failed is not None

  def waiting(self) -> int:
    return sum(len(bank.waiting) for bank in self.banks.values())

  def live(self) -> int:
    return sum(bank.live for bank in self.banks.values())

  def submit(self, name: str, asks: Sequence[Ask]) -> None:
    """Takes all of them or none: raises Full or Closed."""
    with self._changed:
      if self.closed:
        raise Closed('the server is stopping' if self.failed is None else 'the engine has failed')
      waiting = self.waiting()
      room = self.queue - waiting
      if len(asks) > (room if len(asks) == 1 or not waiting else room // 2):  # many leave some of it to others
        raise Full(f'{waiting} requests wait already')
      self.banks[name].waiting.join(asks)
      self._changed.notify_all()

  def cancel(self, asks: Sequence[Ask]) -> None:
    """They are not wanted any more: their slots are free after the next step."""
    with self._changed:
      for ask in asks:
        ask.cancelled = True
      self._changed.notify_all()

  def drain(self) -> None:
    """No more are taken; those that were are answered."""
    self._draining = True

  def close(self, seconds: float = 10.0) -> None:
    """Ends the thread after its next step; what was not answered by then is told so."""
    self.drain()
    with self._changed:
      self._ended = True
      self._changed.notify_all()
    if self._thread.is_alive():
      self._thread.join(seconds)

  def _run(self) -> None:
    try:
      while self._wait():
        for bank in self.banks.values():
          with bank.within():
            self._turn(bank)
    except BaseException as error:  # of the device, most likely: its buffers are gone, and with them all answers
      self.failed = error
      raise
    finally:
      with self._changed:
        self._ended = True
        left = [ask for bank in self.banks.values() for ask in bank.wanted()]
      for ask in left:
        ask.deliver(Piece(finish='error'))

  def _wait(self) -> bool:
    with self._changed:
      self._changed.wait_for(lambda: self._ended or any(bank.busy() for bank in self.banks.values()))
      return not self._ended

  def _turn(self, bank: Bank) -> None:
    """Some of the prompts that arrive, and a step of those that are answered."""
    with self._changed:
      gone = bank.waiting.drop_cancelled()
    for i, row in enumerate(bank.rows):
      if row is not None and row.ask.cancelled:
        bank.leave(i)
        gone += 1
    if bank.arriving and bank.arriving.ask.cancelled:
      bank.arriving = None
      gone += 1
    self.metrics.add('cancelled', gone)
    until = time.monotonic() + READING * bank.seconds
    while self._read(bank) and time.monotonic() < until:
      pass
    if bank.live:
      self._step(bank)

  def _read(self, bank: Bank) -> bool:
    """A piece of the prompt that arrives; whether there was one."""
    if bank.arriving is None:
      with self._changed:
        free = bank.rows.count(None)
        ask = bank.waiting.take(brief=free <= bank.kept) if free else None
        if ask is None:
          return False
        lobby, start = choose(bank.lobbies, ask.prompt, scored=ask.scored, rings=bank.rings)
        bank.arriving = _Arriving(ask, lobby, start)
      bank.clock += 1
      lobby.used = bank.clock
      self.metrics.add('prompt_tokens', len(ask.prompt))
      self.metrics.add('cached_tokens', start)
    arriving = bank.arriving
    ask, lobby = arriving.ask, arriving.lobby
    if arriving.at < len(ask.prompt):
      _read_piece(bank, arriving)
    if arriving.at >= len(ask.prompt):
      self._enter(bank, arriving)
    return True

  def _enter(self, bank: Bank, arriving: _Arriving) -> None:
    ask, lobby = arriving.ask, arriving.lobby
    first = Piece(prompt=arriving.scores, cached=arriving.cached)
    if ask.most < 1:
      bank.arriving = None
      ask.deliver(first._replace(finish='length'))
      self.metrics.add('finished', 1)
      return
    place = bank.rows.index(None)
    row = bank.rows[place] = _Row(ask, bank.tokenizer)  # before anything can fail: who has a row is told so
    bank.arriving = None
    chosen_1, V = bank.choose(place, ask), bank.cfg.vocab_size
    seen_V, bias_V = np.zeros(V, bool), np.zeros(V, np.float32)
    seen_V[list(ask.prompt)] = True
    for i, value in ask.bias.items():
      bias_V[i] = value
    mask_1w = np.full((1, bank.all_Bw.shape[1]), 0xFFFFFFFF, np.uint32)
    if ask.matcher:
      mask_1w[0] = ask.matcher.mask()
    given = bank.state, place, lobby.cache, lobby.logits_1V, chosen_1, seen_V, bias_V, mask_1w, len(ask.prompt)
    bank.state, made = slots.enter(bank.run, *given)
    made = jax.device_get(made)
    self.metrics.observe('first_token_seconds', time.monotonic() - ask.asked)
    self._tell(bank, place, row, jax.tree.map(lambda x: x[:, 0], made), first)

  def _step(self, bank: Bank) -> None:
    made = bank.advance(bank.steps())
    self.metrics.add('steps', len(made.token_tB))
    for place, row in enumerate(bank.rows):
      if row is not None:
        self._tell(bank, place, row, jax.tree.map(lambda x, place=place: x[:, place], made), Piece())

  def _tell(self, bank: Bank, place: int, row: _Row, made: slots.Made, piece: Piece) -> None:
    """Takes a row's new tokens, delivers what can be told of them, and frees the slot after the last one."""
    ask, text, finish, before = row.ask, '', None, row.made
    for t in range(len(made.token_tB)):
      token = int(made.token_tB[t])
      row.made += 1
      done = ask.matcher is not None and ask.matcher.accept(token)
      if token in ask.stop_ids:
        finish = 'stop'
        break
      offset = len(row.text.said)
      text += row.text.add(token)
      if ask.told is not None:
        pairs = zip(made.top_tBk[t, : ask.told].tolist(), made.top_logp_tBk[t].tolist(), strict=False)
        row.waiting.append(Token(token, float(made.logp_tB[t]), list(pairs), offset))
      if row.text.stopped or done:
        finish = 'stop'
      elif row.made >= ask.most or len(ask.prompt) + row.made >= bank.context:
        finish = 'length'
      if finish:
        break
    self.metrics.add('generated_tokens', row.made - before)
    if finish:
      text += row.text.finish()
      finish = 'stop' if row.text.stopped else finish
      bank.leave(place)
      self.metrics.add('finished', 1)
      self.metrics.observe('request_seconds', time.monotonic() - ask.asked)
    ready = [t for t in row.waiting if finish or t.offset < row.text.told]
    row.waiting = row.waiting[len(ready) :]
    if row.text.stopped:
      ready = [t for t in ready if t.offset < len(row.text.said)]
    if text or finish or ready or piece.prompt or piece.cached:
      ask.deliver(piece._replace(text=text, tokens=ready, finish=finish, made=row.made))


def _read_piece(bank: Bank, arriving: _Arriving) -> None:
  """READ more tokens of a prompt, or as many as there are; how many its program has is this prompt's matter alone."""
  ask, lobby, at = arriving.ask, arriving.lobby, arriving.at
  tokens = list(ask.prompt[at : at + READ])
  following = list(ask.prompt[at + 1 : at + READ + 1])
  # scores have one program, so that a token's is the same whatever follows
  size = SHORT if len(tokens) <= SHORT and not ask.scored else READ
  padded = lambda ids: np.array(ids + [0] * (size - len(ids)), np.int32)
  lobby.tokens, lobby.logits_1V, lobby.scored = lobby.tokens[:at], None, ask.scored
  given = lobby.cache, padded(tokens), padded(following), at, len(tokens)
  lobby.cache, logits_1V, scores = slots.read(bank.cfg, bank.run, ask.scored, bank.params, *given)
  logits_1V.block_until_ready()  # else all of a long prompt would be under way before anybody is continued
  lobby.tokens += tokens
  arriving.at += len(tokens)
  if arriving.at >= len(ask.prompt):
    lobby.logits_1V = logits_1V
  if scores is not None:
    scores, told = jax.device_get(scores), ask.told or 0
    if not arriving.scores:
      arriving.scores.append(Token(int(ask.prompt[0]), None, []))
    for i, token in enumerate(following):
      pairs = zip(scores.top_Ck[i, :told].tolist(), scores.top_logp_Ck[i].tolist(), strict=False)
      arriving.scores.append(Token(int(token), float(scores.logp_C[i]), list(pairs)))
