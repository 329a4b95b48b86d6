"""The programs of a run beside its step, traced as the run calls them, and what lies on a device while each runs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import episodic, program, sample, sharding
from jaxlm.config import Pretrain
from jaxlm.loops.scoring import Judge
from jaxlm.rl import rollout
from jaxlm.sample import PIECE, PROMPT_MULTIPLE, Sampling

COMPARED = 'decode as in training'
STOP_IDS = 2  # of a chat: the end of a turn, and of a text


class Part(NamedTuple):
  """One program of a run, not compiled yet."""

  name: str
  traced: Any
  times: float  # in an optimizer step, of one round of answers; 0: for comparison, no run has it
  beside: int = 0  # bytes of a device that hold what is no argument of it
  rounds: int = 1  # of its loop, where that has no count


Compile = Callable[[Part], Any]  # -> the compiled program, or None where it is too large for a device


class Held(NamedTuple):
  """What a run holds on its devices beside its state and batch, as shapes with shardings; {} is nothing."""

  reference: Any = {}  # all the time, as the reward models
  judges: Any = ()
  weights: Any = {}  # that decode, while there is a rollout,
  cache: Any = {}  # and the keys and values of its rows


def visit(
  config: Pretrain,
  built: program.Program,
  mesh: Mesh,
  compile_: Compile,
  *,
  judges: Sequence[Judge] = (),
  compare: bool = False,
) -> Held:
  """Hands every program of the run to `compile_`, under the mesh, in the order of running; the step comes first.

  With `compare` the decoding of a rollout once more, with weights laid out as training has them. A rollout that is
  planned for has prompts of `data.seq_len - rl.max_new_tokens` and answers of full length. `judges` are its
  reward models.
  """
  held = Held(_reference(config, built.abstract.params), tuple(judge.params for judge in judges))
  step = built.step.trace(built.abstract, built.batch)  # ty: ignore
  compile_(Part('learn', step, 1.0, program.local_bytes(held)))
  if config.reference == 'cached' or program.frozen(config):
    bare = program.bare(built.batch)
    beside = program.local_bytes(built.abstract) - program.local_bytes(built.abstract.params)
    times = 1 / max(1.0, config.epochs)  # every row once, before the first step
    name = 'reference' if config.reference == 'cached' else 'features'
    compile_(Part(name, built.answers.trace(built.abstract.params, bare), times, beside))  # ty: ignore
  if program.algorithm(config):
    held = _rollout(config, built, mesh, compile_, held, judges, compare)
  return held


def _reference(config: Pretrain, params: Any) -> Any:
  """The parameters of a reference that is another tree than the policy."""
  return {name: x for name, x in params.items() if name != 'value'} if program.holds_reference(config) else {}


def _rollout(
  config: Pretrain,
  built: program.Program,
  mesh: Mesh,
  compile_: Compile,
  held: Held,
  judges: Sequence[Judge],
  compare: bool,
) -> Held:
  params, size = built.abstract.params, program.local_bytes
  reference, always = held.reference, size(built.abstract) + size(held)
  if not config.rl.engine:  # a server decodes elsewhere
    weights, cache = _decoded(config, built, mesh, compile_, always, compare)
    held = held._replace(weights=weights, cache=cache)
  for judge in judges:
    calls = -(-config.rl.prompts * config.rl.samples // judge.rows)
    compile_(Part('score', judge.traced, calls / program.updates(config), always - size(judge.params)))
  if program.reads(config):
    some = {name: built.batch[name] for name in episodic.READS}
    traced = built.read.trace(params, some, reference or None)  # ty: ignore
    compile_(Part('read', traced, 1 / config.rl.epochs, always - size(params) - size(reference)))
  return held


def _decoded(
  config: Pretrain, built: program.Program, mesh: Mesh, compile_: Compile, always: int, compare: bool
) -> tuple[Any, Any]:
  """The programs that write answers beside what is `always` there; their weights, and their cache."""
  rl, params, size = config.rl, built.abstract.params, program.local_bytes
  updates, count = program.updates(config), rl.prompts * rl.samples
  ready = rollout.readied(config.model, built.run, mesh)
  compile_(Part('reshard', ready.trace(params), 1 / updates, always - size(params)))  # ty: ignore
  weights = sharding.laid(jax.eval_shape(ready, params), rollout.layout(config.model, mesh, rollout.DECODE))
  decoding = Decoding(config, built, weights, min(rl.decode_rows, count))
  first = decoding.prefill(decoding.rows)
  compiled = compile_(Part('prefill', first, 1 / updates, always))
  if compiled is None:
    return weights, {}
  state, waiting = sharding.laid(first.out_info, compiled.output_shardings), count - decoding.rows
  if waiting:
    joining = rollout.replaced_at_once(decoding.rows)
    traced, times = decoding.prefill(joining), -(-waiting // joining) / updates
    compile_(Part('join', traced, times, always + size(state)))
  steps = PIECE if waiting else rl.max_new_tokens
  times = -(-count // decoding.rows) * rl.max_new_tokens / steps / updates
  compile_(Part('decode', decoding.advance(weights, state, steps), times, always, steps))
  if compare and mesh.size > 1:
    other = sharding.laid(weights, rollout.layout(config.model, mesh, sharding.RULES))
    traced = decoding.advance(other, state, steps, sharding.RULES)
    compile_(Part(COMPARED, traced, 0.0, always, steps))
  return weights, state.cache


@dataclasses.dataclass(frozen=True)
class Decoding:
  """The programs of `rollout.engine`, whose `rows` decode together."""

  config: Pretrain
  built: program.Program
  weights: Any
  rows: int

  def _run(self, rules: sharding.Rules) -> Any:
    return dataclasses.replace(self.built.run, rules=self.built.run.rules and rules)

  @property
  def _sampling(self) -> Sampling:
    rl = self.config.rl
    return Sampling(rl.temperature, rl.top_k, rl.top_p, rl.min_p)

  def _ints(self, *shape: int) -> jax.ShapeDtypeStruct:
    """What `jnp.asarray` makes under a mesh: whole on every device."""
    mesh = jax.tree.leaves(self.weights)[0].sharding.mesh
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))

  def prefill(self, rows: int) -> Any:
    """The prompts of so many rows read: `sample.begun`, traced."""
    cfg, new = self.config.model, self.config.rl.max_new_tokens
    width = -(-max(1, self.config.data.seq_len - new) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    read = min(width, cfg.max_seq_len) if cfg.positions == 'learned' else width
    prompts = self._ints(rows, read), self._ints(rows)
    sampling = self._sampling.replace(seed_B=jax.ShapeDtypeStruct((rows,), jnp.int32))  # ty: ignore
    key = jax.eval_shape(lambda: jax.random.key(0))
    how = cfg, self._run(rollout.DECODE), (new, width + new), self.weights
    return sample.begun.trace(*how, *prompts, self._ints(STOP_IDS), sampling, key, None, None)

  def advance(self, weights: Any, state: Any, steps: int, rules: sharding.Rules = rollout.DECODE) -> Any:
    """`sample.advance` by so many tokens, traced."""
    how = self.config.model, self._run(rules), steps, weights
    return sample.advance.trace(*how, state, self._sampling, self._ints(STOP_IDS))
