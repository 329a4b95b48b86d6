"""Completions of many prompts: so many rows decode together, and a finished one makes room for a prompt that waits.

M prompts, B rows that decode at once, k of them that are replaced, N new tokens at most.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import hosts, lora, models, sample, sharding
from jaxlm.models import ModelConfig, Run
from jaxlm.sample import PROMPT_MULTIPLE, Sampling

# Weights whole on every device but for `tensor`: with those of training each would be gathered for every token.
DECODE: sharding.Rules = FrozenDict(
  {**sharding.RULES, **dict.fromkeys(('embed', 'experts', 'expert_embed', 'seq', 'stream'))}
)


class Completions(NamedTuple):
  """What was made of M prompts, on the host; entries at or past `lengths_M` are padding."""

  tokens_MN: np.ndarray
  lengths_M: np.ndarray  # the stop id included
  logp_MN: np.ndarray  # at the temperature, before truncation: what training compares with
  sampled_logp_MN: np.ndarray  # after truncation and penalties: what was really drawn from
  stopped_M: np.ndarray  # by a stop id; else the answer is truncated


# (params, prompts, a seed for each) -> Completions: what another engine has to be to take this one's place
Engine = Callable[[Any, Sequence[Sequence[int]], np.ndarray], Completions]


def readied(cfg: ModelConfig, run: Run, mesh: Mesh, rules: sharding.Rules = DECODE) -> Callable[[Any], Any]:
  """`fn(params)`: what training holds as decoding reads it, in one program, once for a whole phase.

  Adapters are folded in, a value head is left out, layers stand apart, and matrices are in the dtype of matmuls, laid
  out by `rules`, or on one CPU turned.
  """
  turn = sample.on_one_cpu(mesh.devices.flat)

  def fn(params: Any) -> Any:
    merged = lora.merge({name: x for name, x in params.items() if name != 'value'})
    apart = sample.unstacked(cfg, models.cast(merged, dataclasses.replace(run, float8=False)))
    return models.turned(cfg, apart) if turn else apart

  if mesh.size == 1:
    return jax.jit(fn)
  return jax.jit(fn, out_shardings=layout(cfg, mesh, rules))


def layout(cfg: ModelConfig, mesh: Mesh, rules: sharding.Rules) -> Any:
  """The shardings of what `readied` gives."""
  if sample.on_one_cpu(mesh.devices.flat):
    there = jax.eval_shape(lambda: models.turned(cfg, sample.unstacked(cfg, models.init(cfg, jax.random.key(0)))))
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), there)
  whole = sharding.state_shardings(models.abstract(cfg), mesh, rules)
  apart = jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(*s.spec[1:])), whole['layers'])
  return whole | {'layers': (apart,) * cfg.n_layers}


def replaced_at_once(rows: int) -> int:
  """How many of the rows that decode are replaced at once."""
  return max(1, rows // 4)


def engine(
  cfg: ModelConfig,
  *,
  max_new_tokens: int,
  sampling: Sampling = Sampling(),
  stop_ids: Sequence[int] = (),
  rows: int = 64,
  run: Run = Run(),
  mesh: Mesh | None = None,
) -> Engine:
  """An `Engine` on the devices that train, with the very parameters that train, `rows` prompts at a time.

  A completion depends on its prompt and its seed, not on its row or on the others. Raises InputError as
  `sample.begin` does.
  """
  run = run if mesh is None else dataclasses.replace(run, rules=DECODE)
  how: dict[str, Any] = {'max_new_tokens': max_new_tokens, 'stop_ids': tuple(stop_ids), 'run': run}

  def complete(params: Any, prompts: Sequence[Sequence[int]], seeds: np.ndarray) -> Completions:
    params = sample.readied(cfg, params, run.dtype)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    width = -(-len(prompts[order[-1]]) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE

    def begin(some: Sequence[int]) -> sample.Decoding:
      seeded: Any = sampling.replace(seed_B=np.asarray(seeds)[list(some)])  # ty: ignore
      batch = [prompts[i] for i in some]
      return sample.begin(cfg, params, batch, jax.random.key(0), sampling=seeded, slots=width + max_new_tokens, **how)

    return _complete(cfg, params, order, begin, min(rows, len(order)), sampling, how, len(prompts))

  return complete


def _complete(
  cfg: ModelConfig,
  params: Any,
  order: list[int],
  begin: Callable[[Sequence[int]], sample.Decoding],
  rows: int,
  sampling: Sampling,
  how: dict[str, Any],
  count: int,
) -> Completions:
  new, stop = how['max_new_tokens'], jnp.asarray(how['stop_ids'], jnp.int32)
  blank = lambda kind: np.zeros((count, new), kind)
  found = Completions(
    blank(np.int32), np.zeros(count, np.int32), blank(np.float32), blank(np.float32), np.zeros(count, np.bool_)
  )
  at, waiting = np.array(order[:rows]), order[rows:]  # which prompt each row is of; -1: of none any more
  joining, state = replaced_at_once(rows), begin(at.tolist())
  while True:
    steps = sample.PIECE if waiting else new
    state = sample.advance(cfg, how['run'], steps, params, state, sampling, stop)
    over = hosts.read(state.out.stopped_B) | (hosts.read(state.out.lengths_B) >= new)
    done = np.flatnonzero(over & (at >= 0))
    if not waiting and not over.all():
      continue
    if len(done) >= min(joining, len(waiting) or len(done)):
      _collect(found, state.out, done, at[done])
      at[done] = -1
      if not waiting:
        return found
      for some in np.split(done, range(joining, len(done), joining)):
        taken, waiting = waiting[: len(some)], waiting[len(some) :]
        at[some[: len(taken)]] = taken
        if taken:
          filled = taken + [taken[-1]] * (joining - len(taken))  # one compiled shape for a width
          places = np.full(joining, rows)
          places[: len(taken)] = some[: len(taken)]
          state = sample.replaced(state, jnp.asarray(places), begin(filled))


def _collect(found: Completions, out: sample.Rollout, rows: np.ndarray, prompts: np.ndarray) -> None:
  lengths = hosts.read(out.lengths_B)[rows]
  kept = np.arange(found.tokens_MN.shape[1]) < lengths[:, None]
  found.lengths_M[prompts], found.stopped_M[prompts] = lengths, hosts.read(out.stopped_B)[rows]
  found.tokens_MN[prompts] = np.where(kept, hosts.read(out.tokens_BN)[rows], 0)
  found.logp_MN[prompts] = np.where(kept, hosts.read(out.logp_BN)[rows], 0)
  found.sampled_logp_MN[prompts] = np.where(kept, hosts.read(out.sampled_logp_BN)[rows], 0)
