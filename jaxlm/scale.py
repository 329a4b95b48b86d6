"""One dial: from a run tuned at one depth to the run at another, by muP in width and CompleteP in depth.

What changes with the width m = D / D0 and the depth r = L / L0, the base's own numbers being those at m = r = 1:

| | start | multiplier | learning rate | weight decay |
|---|---|---|---|---|
| matrices of the layers | fan_in^-1/2 | residual / r | / m (Muon: / m^1/2) | x m (Muon: x m^1/2) |
| embeddings, norms, biases | as they are | | | |
| head, its own or the embedding's | as it is at D0 | logits / m | | |

Width: Yang et al. 2022, arXiv:2203.03466, table 8, heads growing in number and not in size. Depth: Dey et al. 2025,
arXiv:2505.01618, alpha = 1. Muon's update has all singular values alike, of a size that grows as m^1/2 at a constant
root mean square (Liu et al. 2025, arXiv:2502.16982), where Adam's grows as m: hence its root.
"""

import dataclasses
import math
from typing import Any

from jaxlm.config import Pretrain, at_least
from jaxlm.errors import InputError
from jaxlm.models.config import ModelConfig

BATCH_EXPONENT = 0.4  # the best batch grows as tokens^0.4 (Bergsma et al. 2025, arXiv:2505.13738)
DIALLED = {  # what the dial sets
  'model': ('n_layers', 'd_model', 'n_heads', 'n_kv_heads', 'd_ff', 'residual_multiplier', 'logits_scaling'),
  'data': ('global_batch',),
  'optim': ('lr', 'weight_decay', 'eps', 'warmup_steps', 'group_lr', 'group_decay'),
}


@dataclasses.dataclass(frozen=True)
class Dialled(Pretrain):
  """A pre-training run, and the dial that sets its size and all that depends on it; other flags win over the dial."""

  depth: int | None = None  # layers: width, batch, learning rates, weight decay and steps follow from the config's own
  tokens_per_parameter: float | None = None  # of the layers, embeddings not counted; None: as the config has it


def at_depth(config: Pretrain, depth: int, *, tokens_per_parameter: float | None = None) -> Pretrain:
  """The run at another depth, `config` being the run at the depth at which its numbers were tuned; there, the identity.

  Heads and width keep their ratio to the depth, kv heads and d_ff theirs to the width, as nearly as they divide. Tokens
  keep their ratio to the parameters of the layers, or have the one given (Chinchilla's, arXiv:2203.15556, is 20).
  Raises InputError for a depth or a ratio that is not positive.
  """
  at_least(1, depth=depth)
  if tokens_per_parameter is not None and not 0 < tokens_per_parameter < float('inf'):
    raise InputError(f'tokens_per_parameter={tokens_per_parameter} must be above 0 and finite')
  return with_horizon(config, transfer(config, shape(config.model, depth)), tokens_per_parameter)


def shape(base: ModelConfig, depth: int) -> ModelConfig:
  """The architecture at another depth: aspect ratio, head size, share of kv heads and d_ff / d_model are the base's."""
  wanted = base.n_heads * depth / base.n_layers

  def misfit(pair: tuple[int, int]) -> float:
    heads, kv = pair
    return abs(math.log(heads / wanted)) + abs(math.log(heads * base.kv_heads / (kv * base.n_heads)))

  pairs = [(h, kv) for h in range(1, math.ceil(2 * wanted) + 1) for kv in range(1, h + 1) if h % kv == 0]
  heads, kv = min(pairs, key=misfit)
  width = heads * base.head_size if base.head_dim is None else round(base.d_model * heads / base.n_heads)
  tile = math.gcd(base.d_ff, 128)  # what divided a matmul's tiles or a mesh still does
  return dataclasses.replace(
    base,
    n_layers=depth,
    d_model=width,
    n_heads=heads,
    n_kv_heads=None if base.n_kv_heads is None else kv,
    d_ff=max(tile, tile * round(base.d_ff * width / base.d_model / tile)),
  )


def transfer(base: Pretrain, model: ModelConfig) -> Pretrain:
  """`base` with a model of the shape of `model`, its multipliers and learning rates by the table above."""
  from jaxlm.train.optim import group_factor, read_groups

  wider, deeper = model.d_model / base.model.d_model, model.n_layers / base.model.n_layers
  power = 0.5 if base.optim.name == 'muon' else 1.0
  old = _fan_ins(base.model)
  slower = {path: (old[path] / n) ** power for path, n in _fan_ins(model).items()}

  def groups(field: str, factors: dict[str, float]) -> tuple[str, ...]:
    given = getattr(base.optim, field)
    table = read_groups(given, field)
    return tuple(f'{p}={x * group_factor(table, p):.9g}' for p, x in factors.items() if x != 1.0) + given

  return dataclasses.replace(
    base,
    model=dataclasses.replace(
      model,
      residual_multiplier=base.model.residual_multiplier / deeper,
      logits_scaling=base.model.logits_scaling * wider,
    ),
    optim=dataclasses.replace(
      base.optim,
      eps=base.optim.eps / (wider * deeper),  # as the gradients of the layers
      group_lr=groups('group_lr', slower),
      group_decay=groups('group_decay', {path: 1.0 / x for path, x in slower.items()}),
    ),
  )


def with_horizon(base: Pretrain, config: Pretrain, tokens_per_parameter: float | None = None) -> Pretrain:
  """`config` with the batch, the steps and what depends on them, for its size as `base` has them for its own.

  The learning rate grows as the root of the batch (Malladi et al. 2022, arXiv:2205.10287); learning rate x weight
  decay x steps stays (Wang and Aitchison 2024, arXiv:2405.13698), as does the warm-up's share of the steps.
  """
  old, seq_len = base.data.global_batch, base.data.seq_len
  had, size = base.steps * old * seq_len, parameters(config.model)
  tokens = had * size / parameters(base.model) if tokens_per_parameter is None else tokens_per_parameter * size
  doublings = round(BATCH_EXPONENT * math.log2(tokens / had))
  while doublings < 0 and old % 2**-doublings:
    doublings += 1
  batch = old * 2**doublings if doublings >= 0 else old // 2**-doublings
  steps = max(1, round(tokens / (batch * seq_len)))
  faster, longer = math.sqrt(batch / old), steps / base.steps
  return dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, global_batch=batch),
    optim=dataclasses.replace(
      config.optim,
      lr=base.optim.lr * faster,
      weight_decay=base.optim.weight_decay / (faster * longer),
      warmup_steps=int(base.optim.warmup_steps * longer),
    ),
    steps=steps,
  )


def parameters(model: ModelConfig) -> int:
  """Parameters of the layers: all but embeddings, head and last norm, whatever the vocabulary."""
  from jaxlm import tree

  return tree.size(_shapes(model)['layers'])


def dialled(config: Pretrain) -> Dialled:
  """The config with a dial that is not set."""
  return Dialled(**_fields(config))


def undialled(config: Dialled) -> Pretrain:
  """The config without its dial."""
  values = _fields(config)
  return Pretrain(**{field.name: values[field.name] for field in dataclasses.fields(Pretrain)})


def base_of(flagged: Pretrain, tuned: Pretrain) -> Pretrain:
  """`flagged`, but `tuned` in all that the dial sets: where the dial starts."""
  parts = {
    part: dataclasses.replace(getattr(flagged, part), **{name: getattr(getattr(tuned, part), name) for name in names})
    for part, names in DIALLED.items()
  }
  return dataclasses.replace(flagged, **parts, steps=tuned.steps)


def describe(config: Pretrain, base: Pretrain) -> str:
  """One line: what the dial set."""
  model, o = config.model, config.optim
  tokens, size = config.steps * config.data.global_batch * config.data.seq_len, parameters(model)
  wider = model.d_model / base.model.d_model
  return (
    f'depth {model.n_layers} from {base.model.n_layers}: width {model.d_model} (x{wider:.3g}), {model.n_heads} heads, '
    f'{model.kv_heads} of keys and values, d_ff {model.d_ff}, {size:,} parameters in the layers; '
    f'residual_multiplier {model.residual_multiplier:.3g}, logits_scaling {model.logits_scaling:.3g}; '
    f'batch {config.data.global_batch}, lr {o.lr:.3g}, weight decay {o.weight_decay:.3g}; '
    f'{config.steps} steps, {o.warmup_steps} of warm-up, {tokens:,} tokens, {tokens / size:.3g} a parameter'
  )


def _fields(config: Any) -> dict[str, Any]:
  return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _shapes(model: ModelConfig) -> Any:
  import jax

  from jaxlm import models

  return jax.eval_shape(lambda: models.init(model, jax.random.key(0)))


def _fan_ins(model: ModelConfig) -> dict[str, int]:
  """Path -> fan-in of every matrix."""
  from jaxlm import models, tree
  from jaxlm.train import optim

  shapes = _shapes(model)
  kinds = dict(tree.items(optim.kinds(shapes, models.axes(model))))
  return {path: x.shape[-2] for path, x in tree.items(shapes) if kinds[path] == 'matrix'}
