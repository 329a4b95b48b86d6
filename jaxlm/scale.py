"""One dial: from a run tuned at one depth to the run at another, by muP in width and CompleteP in depth.

What changes with the width m = D / D0 and the depth r = L / L0, the base's own numbers being those at m = r = 1:

| | start | multiplier | learning rate | weight decay |
|---|---|---|---|---|
| matrices of the layers | fan_in^-1/2 | residual / r | / m (Muon: / m^1/2) | x m (Muon: x m^1/2) |
| embeddings, norms, biases | as they are | | | |
| head, its own or the embedding's | as it is at D0 | logits / m | | |
| queries and keys, where the head size N is named | | q k^T x N0^1/2 / N | | |

Width: Yang et al. 2022, arXiv:2203.03466, table 8, heads growing in number and not in size. Depth: Dey et al. 2025,
arXiv:2505.01618, alpha = 1. Muon's update has all singular values alike, of a size that grows as m^1/2 at a constant
root mean square (Liu et al. 2025, arXiv:2502.16982), where Adam's grows as m: hence its root.
"""

import dataclasses
import math
import operator
from collections.abc import Collection, Mapping
from typing import Any

from jaxlm.config import Pretrain
from jaxlm.errors import InputError, at_least, within
from jaxlm.models.config import ModelConfig

BATCH_EXPONENT = 0.4  # the best batch grows as tokens^0.4 (Bergsma et al. 2025, arXiv:2505.13738)
DIALLED = {  # what the dial sets
  'model': (
    *('n_layers', 'd_model', 'n_heads', 'n_kv_heads', 'd_ff', 'shared_d_ff'),
    *('attention_multiplier', 'residual_multiplier', 'logits_scaling'),
  ),
  'data': ('global_batch', 'batch_warmup'),
  'optim': ('lr', 'weight_decay', 'eps', 'warmup_steps', 'group_lr', 'group_decay'),
}
GROUPS = ('optim.group_lr', 'optim.group_decay')
Named = Mapping[str, Any]  # 'model.d_model' -> 512


@dataclasses.dataclass(frozen=True)
class Dialled(Pretrain):
  """A pre-training run, and the dial that sets its size and all that depends on it; other flags win over the dial."""

  depth: int | None = None  # layers: width, batch, learning rates, weight decay and steps follow from the config's own
  tokens_per_parameter: float | None = None  # of the layers, embeddings not counted; None: as the config has it


class Unchecked(ModelConfig):
  """An architecture whose numbers need not fit each other: some are named, the others are still to follow."""

  def __post_init__(self):
    pass


def at_depth(
  base: Pretrain, depth: int, *, tokens_per_parameter: float | None = None, named: Named | None = None
) -> Pretrain:
  """The run at another depth, `base` being the run at the depth at which its numbers were tuned; there, the identity.

  Heads and width keep their ratio to the depth, kv heads and d_ff theirs to the width, as nearly as they divide. Tokens
  keep their ratio to the parameters of the layers, or have the one given (Chinchilla's, arXiv:2203.15556, is 20).
  What is `named` among what the dial sets is kept, and followed by what depends on it: by the width the learning rates
  of its groups, by the batch the steps, by both the learning rate and the decay. Named groups come before the dial's.
  Raises InputError for a depth or a ratio that is not positive, and for numbers that do not go together.
  """
  at_least(1, depth=depth)
  within('(0, inf)', tokens_per_parameter=tokens_per_parameter)
  named = named or {}
  model = shape(base.model, depth, named)
  return _keep(with_horizon(base, transfer(base, model), tokens_per_parameter, named), named)


def shape(base: ModelConfig, depth: int, named: Named | None = None) -> ModelConfig:
  """The architecture at another depth: aspect ratio, head size, share of kv heads and d_ff / d_model are the base's.

  Heads follow a named width, the width named heads. Raises InputError where what is named leaves no whole numbers.
  """
  named = {path.removeprefix('model.'): x for path, x in (named or {}).items() if path.startswith('model.')}
  at_least(1, **{f'model.{name}': x for name, x in named.items() if isinstance(x, int)})
  wanted = base.n_heads * (named['d_model'] / base.d_model if 'd_model' in named else depth / base.n_layers)
  even = 2 if base.positions == 'rope' else 1

  def fits(heads: int, kv: int) -> bool:
    whole = 'd_model' not in named or base.head_dim is not None or named['d_model'] % (even * heads) == 0
    kept = named.get('n_heads', heads) == heads and (named.get('n_kv_heads', kv) or heads) == kv
    return whole and kept and heads % kv == 0

  def misfit(pair: tuple[int, int]) -> float:
    heads, kv = pair
    return abs(math.log(heads / wanted)) + abs(math.log(heads * base.kv_heads / (kv * base.n_heads)))

  most = max(math.ceil(2 * wanted), named.get('n_heads', 1), named.get('n_kv_heads') or 1)
  pairs = [(h, kv) for h in range(1, most + 1) for kv in range(1, h + 1) if fits(h, kv)]
  nearest = named.get('n_heads', max(1, round(wanted)))
  heads, kv = min(pairs, key=misfit, default=(nearest, named.get('n_kv_heads') or nearest))
  width = heads * base.head_size if base.head_dim is None else round(base.d_model * heads / base.n_heads)
  width = named.get('d_model', width)

  def ffn(name: str) -> int:
    was = getattr(base, name)
    tile = math.gcd(was, 128)  # what divided a matmul's tiles or a mesh still does
    return named.get(name, max(tile, tile * round(was * width / base.d_model / tile)) if was else 0)

  return dataclasses.replace(
    base,
    n_layers=named.get('n_layers', depth),
    d_model=width,
    n_heads=heads,
    n_kv_heads=named.get('n_kv_heads', None if base.n_kv_heads is None else kv),
    d_ff=ffn('d_ff'),
    shared_d_ff=ffn('shared_d_ff'),
  )


def transfer(base: Pretrain, model: ModelConfig) -> Pretrain:
  """`base` with a model of the shape of `model`, its multipliers and learning rates by the table above."""
  from jaxlm.train.optim import group_factor, read_groups

  wider, deeper = model.d_model / base.model.d_model, model.n_layers / base.model.n_layers
  power = 0.5 if base.optim.name == 'muon' else 1.0
  old = _fan_ins(base.model)
  slower = {path: (old[path] / n) ** power for path, n in _fan_ins(model).items()}

  attention = base.model.attention_multiplier
  if model.head_size != base.model.head_size:  # named so; what queries and keys have in common grows with it
    attention = (attention or base.model.head_size**-0.5) * base.model.head_size / model.head_size

  def groups(field: str, factors: dict[str, float]) -> tuple[str, ...]:
    given = getattr(base.optim, field)
    table = read_groups(given, f'optim.{field}')
    return tuple(f'{p}={x * group_factor(table, p):.9g}' for p, x in factors.items() if x != 1.0) + given

  return dataclasses.replace(
    base,
    model=dataclasses.replace(
      model,
      attention_multiplier=attention,
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


def with_horizon(
  base: Pretrain, config: Pretrain, tokens_per_parameter: float | None = None, named: Named | None = None
) -> Pretrain:
  """`config` with the batch, the steps and what depends on them, for its size as `base` has them for its own.

  The learning rate grows as the root of the batch (Malladi et al. 2022, arXiv:2205.10287); learning rate x weight
  decay x steps stays (Wang and Aitchison 2024, arXiv:2405.13698), as do the shares of the warm-ups.
  """
  named = named or {}
  batch, steps = _batch_and_steps(base, parameters(config.model), tokens_per_parameter, named)
  more, longer = batch / base.data.global_batch, steps / base.steps
  lr = named.get('optim.lr', base.optim.lr * math.sqrt(more))
  within('(0, inf)', 'optim', lr=min(lr, base.optim.lr))
  return dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, global_batch=batch, batch_warmup=_ramp(base, rows=more, steps=longer)),
    optim=dataclasses.replace(
      config.optim,
      lr=lr,
      weight_decay=base.optim.weight_decay / (lr / base.optim.lr * longer),
      warmup_steps=int(base.optim.warmup_steps * longer),
    ),
    steps=steps,
  )


def _batch_and_steps(base: Pretrain, size: int, per_parameter: float | None, named: Named) -> tuple[int, int]:
  """Batch and steps for so many parameters: what is not named of them follows what is. The batch moves by doublings."""
  old, seq_len = base.data.global_batch, base.data.seq_len
  batch, steps = named.get('data.global_batch'), named.get('steps')
  at_least(1, **{path: x for path, x in named.items() if path in ('data.global_batch', 'steps')})
  had = base.steps * old * seq_len
  tokens = had * size / parameters(base.model) if per_parameter is None else per_parameter * size
  if batch and steps:
    if per_parameter is not None:
      raise InputError('steps, data.global_batch and tokens_per_parameter: name two of them, the third follows')
    return batch, steps
  if batch is None:
    grown = (tokens / had) ** BATCH_EXPONENT
    if steps:  # tokens / steps, and where the tokens are not given, what that exponent makes of the steps
      by_steps = (steps / base.steps) ** (BATCH_EXPONENT / (1 - BATCH_EXPONENT))
      grown = by_steps if per_parameter is None else tokens / (steps * old * seq_len)
    doublings = round(math.log2(grown))
    while doublings < 0 and old % 2**-doublings:
      doublings += 1
    batch = old * 2**doublings if doublings >= 0 else old // 2**-doublings
  return batch, steps or max(1, round(tokens / (batch * seq_len)))


def _ramp(base: Pretrain, *, rows: float, steps: float) -> tuple[str, ...]:
  """The base's batch warm-up at multiples of its rows and steps, without what no longer grows by a whole one."""
  from jaxlm.data.batches import parse_ramp

  found, last = [], (0, 0)
  for step, n in parse_ramp(base.data.batch_warmup, base.data.global_batch):
    new = round(step * steps), round(n * rows)
    if new[0] > last[0] and last[1] < new[1] < round(base.data.global_batch * rows):
      found.append(f'{new[1]}={new[0]}')
      last = new
  return tuple(found)


def _keep(config: Pretrain, named: Named) -> Pretrain:
  """`config` with what is named as it is named; groups before the dial's, of which the first that matches counts."""
  for path, value in named.items():
    part, _, name = path.rpartition('.')
    if path in GROUPS:
      value = (*value, *getattr(config.optim, name))
    config = _with(config, part, _with(getattr(config, part), name, value)) if part else _with(config, name, value)
  return config


def parameters(model: ModelConfig) -> int:
  """Parameters of the layers: all but embeddings, head and last norm, whatever the vocabulary."""
  from jaxlm import tree

  return tree.size(_shapes(model)['layers'])


def dialled(config: Pretrain, *, checked: bool = True) -> Dialled:
  """The config with a dial that is not set; unchecked, for numbers named that do not fit before the dial is turned."""
  values = _fields(config)
  if not checked:
    values['model'] = Unchecked(**_fields(config.model))
  return Dialled(**values)


def undialled(config: Dialled) -> Pretrain:
  """The config without its dial."""
  values = _fields(config)
  return Pretrain(**{field.name: values[field.name] for field in dataclasses.fields(Pretrain)})


def turned(flagged: Dialled, tuned: Pretrain, named: Collection[str]) -> tuple[Pretrain, Pretrain]:
  """(the run at `flagged.depth`, its base): `flagged` has the flags, `named` their paths, `tuned` is the config's own.

  Flags that name nothing the dial sets belong to the base too: it is the tuned run with them.
  """
  if flagged.depth is None:
    raise InputError('depth needs a number of layers')
  values = _fields(_with(undialled(flagged), 'steps', tuned.steps))
  for part, names in DIALLED.items():
    own, kept = _fields(getattr(tuned, part)), _fields(values[part])
    values[part] = type(getattr(tuned, part))(**kept | {name: own[name] for name in names})
  base = Pretrain(**values)
  mine = ('steps', *(f'{part}.{name}' for part, names in DIALLED.items() for name in names))
  keep = {path: operator.attrgetter(path)(flagged) for path in mine if path in named}
  return at_depth(base, flagged.depth, tokens_per_parameter=flagged.tokens_per_parameter, named=keep), base


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


def _with(config: Any, name: str, value: Any) -> Any:
  return dataclasses.replace(config, **{name: value})


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
