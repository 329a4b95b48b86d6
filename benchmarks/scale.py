"""Does one dial do? The coordinate check and the transfer of a learning rate, on the shipped text, in Markdown tables.

python benchmarks/scale.py coordinates [--optimizer muon] [--seeds 3] [--axis depth] [--rule dial] [--outputs 0.1]
python benchmarks/scale.py transfer [--optimizer muon] [--steps 150] [--rates 1e-3 2e-3] [--widths 4] [--rule dial]

`--outputs 0.1` starts the output matrices of attention and MLP at a tenth of what they start at otherwise.

B batch, T sequence, D model, L layers.
"""

import argparse
import dataclasses
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import models, program, quickstart, scale, sharding, train, tree
from jaxlm.config import Data, Optim, Pretrain
from jaxlm.data import batches, packing, prepare, sources, tokenizer
from jaxlm.models import ModelConfig, Run
from jaxlm.models.transformer import Block, _context, branch_scale

BOUND = 0.05  # of a slope
SIZES = {'width': (1, 2, 4, 8), 'depth': (1, 2, 4)}  # multiples of the base
PEAK = {'adamw': 1e-3, 'muon': 1e-2}  # learning rates of the coordinate check
Rule = Callable[[Pretrain, ModelConfig], Pretrain]


def base(optimizer: str, **model: Any) -> Pretrain:
  """A small run; embeddings enter with a root mean square of 2, well above what the layers add at the start."""
  sizes = {'vocab_size': 1024, 'd_model': 64, 'n_layers': 4, 'n_heads': 4, 'n_kv_heads': 2, 'd_ff': 192}
  return Pretrain(
    model=ModelConfig(**sizes | {'embedding_multiplier': 100.0} | model),
    data=Data(seq_len=128, global_batch=8),
    optim=Optim(name=optimizer, lr=PEAK[optimizer], schedule='constant', warmup_steps=0),  # pyright: ignore
  )


def resized(model: ModelConfig, *, width: int = 1, depth: int = 1) -> ModelConfig:
  """The model, so many times as wide and as deep."""
  return dataclasses.replace(
    model,
    n_layers=model.n_layers * depth,
    d_model=model.d_model * width,
    n_heads=model.n_heads * width,
    n_kv_heads=model.kv_heads * width,
    d_ff=model.d_ff * width,
  )


def standard(config: Pretrain, model: ModelConfig) -> Pretrain:
  """Standard parametrisation: another shape and nothing else."""
  return dataclasses.replace(config, model=model)


def half(config: Pretrain, model: ModelConfig) -> Pretrain:
  """Depth-muP (Yang et al. 2023, arXiv:2310.02244, alpha = 1/2), its multiplier moved into start and learning rate."""
  root = math.sqrt(config.model.n_layers / model.n_layers)
  inner = tuple(f'layers/{name}={root:.9g}' for name in ('attn/[qkv]', 'mlp/gate', 'mlp/up'))
  outer = tuple(f'layers/{name}={root**2:.9g}' for name in ('attn/o', 'mlp/down'))
  return dataclasses.replace(config, model=model, optim=dataclasses.replace(config.optim, group_lr=inner + outer))


RULES: dict[str, Rule] = {'dial': scale.transfer, 'standard': standard, 'alpha 1/2': half}


def coordinates(cfg: ModelConfig, params: Any, tokens_BT: Any) -> dict[str, jax.Array]:
  """Root mean squares: of what attention and MLP give before the residual multiplier, and of the stream at the end.

  The former in units of the scale at which they start, so that only what learning does to them is compared.
  """
  ctx = _context(cfg, 'global', jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], None)
  x_BTD = jnp.take(params['embed'], tokens_BT, axis=0) * cfg.embedding_multiplier
  seen: dict[str, list[Any]] = {'attn': [], 'mlp': []}
  for weights in models.unstack(params['layers'], cfg.n_layers):
    run = {'capture_intermediates': lambda module, _: module.name in seen, 'mutable': 'intermediates'}
    (x_BTD, _, _), found = Block(cfg, Run()).apply({'params': weights}, x_BTD, ctx, None, None, **run)
    for name, values in seen.items():
      out = found['intermediates'][name]['__call__'][0]
      values.append(jnp.mean(jnp.square(out[0] / branch_scale(cfg))))
  squares = {name: jnp.mean(jnp.stack(values)) for name, values in seen.items()}
  return jax.tree.map(jnp.sqrt, squares | {'stream': jnp.mean(jnp.square(x_BTD))})


def trained(
  config: Pretrain, data: Callable[[int], Any], steps: int, seeds: Sequence[int] = (0,), outputs: float = 1.0
) -> Iterator[Iterator[tuple[Any, dict[str, Any]]]]:
  """For every seed: (parameters before the step, metrics of the step) of every step, on one device, compiled once."""
  mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    built = program.build(dataclasses.replace(config, steps=steps), mesh)
    optimizer = program.make_optimizer(dataclasses.replace(config, steps=steps))
    begun = lambda path, x: x * outputs if path in ('layers/attn/o', 'layers/mlp/down') else x
    init = lambda key: tree.path_map(begun, models.init(config.model, key))
    start = lambda key: train.create_state(init(key), optimizer, jax.random.key(1))
    create = jax.jit(start, out_shardings=jax.tree.map(lambda x: x.sharding, built.abstract))

  def one(seed: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    with jax.set_mesh(mesh):
      state = create(jax.random.key(seed))
      for step in range(steps):
        params = state.params
        new, metrics = built.step(
          jax.tree.map(jnp.copy, state), program.put(data(seed * (steps + 1) + step), built.batch)
        )
        yield params, metrics
        state = new

  return (one(seed) for seed in seeds)


def history(
  config: Pretrain, data: Callable[[int], Any], steps: int, seeds: Sequence[int], outputs: float = 1.0
) -> dict[str, np.ndarray]:
  """Log of each coordinate at the beginning of steps 1 to `steps`, [seeds, steps], on a batch that is not learnt from.

  A seed is of the start and of the batches.
  """
  measure = jax.jit(lambda params, tokens: coordinates(config.model, params, tokens))
  probes = [jnp.asarray(data(seed * (steps + 1) + steps)['tokens']) for seed in seeds]
  runs = trained(config, data, steps, seeds, outputs)
  rows = [
    [jax.device_get(measure(params, probe)) for params, _ in run] for probe, run in zip(probes, runs, strict=True)
  ]
  return {name: np.log([[row[name] for row in run] for run in rows]) for name in rows[0][0]}


def slopes(
  config: Pretrain,
  rule: Rule,
  data: Callable[[int], Any],
  *,
  axis: str,
  sizes: Sequence[int],
  seeds: Sequence[int] = (0,),
  steps: int = 10,
  outputs: float = 1.0,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Each coordinate's log-log slope by the size along `axis` ('width', 'depth') at each step, and its standard error.

  The slope is that of the mean over the seeds; the error is taken from the slopes of the single seeds.
  """
  runs = [history(rule(config, resized(config.model, **{axis: n})), data, steps, seeds, outputs) for n in sizes]
  found = {}
  for name in runs[0]:
    logs = np.stack([run[name] for run in runs])  # [sizes, seeds, steps]
    fit = lambda values: np.polyfit(np.log(sizes), values.reshape(len(sizes), -1), 1)[0]
    each = fit(logs).reshape(len(seeds), steps)
    error = each.std(axis=0, ddof=1) / math.sqrt(len(seeds)) if len(seeds) > 1 else np.full(steps, np.nan)
    found[name] = fit(logs.mean(axis=1)), error
  return found


def shipped_text(vocab_size: int, seq_len: int, rows: int) -> Callable[[int], Any]:
  """Batches of the text that ships with the package."""
  specs = (f'{quickstart.SAMPLE}/*.jsonl',)
  vocabulary = tokenizer.train((d.text for d in sources.documents(specs)), vocab_size)
  with tempfile.TemporaryDirectory() as folder:
    prepare.prepare(specs, vocabulary, folder, val_fraction=0.05)
    packed = packing.Rows(prepare.load(folder).split('train'), seq_len, vocabulary)
    kept = [packed[i] for i in range(len(packed))]
  return batches.Batches(kept, rows, seed=0)


def check(
  optimizer: str,
  data: Callable[[int], Any],
  seeds: Sequence[int],
  *,
  axes: Sequence[str] = tuple(SIZES),
  rules: Sequence[str] = tuple(RULES),
  outputs: float = 1.0,
) -> bool:
  """Prints the slopes as a table; whether the dial's are within the bound and the standard ones are not."""
  head = '| optimizer | grows | rule | coordinate | slope at step 1 | 2 | 5 | 10 | largest | its error | |'
  print(f'\n{head}\n' + '|---' * 11 + '|', flush=True)
  passed, config = True, base(optimizer)
  for axis, name in itertools.product(axes, rules):
    if axis == 'width' and name == 'alpha 1/2':
      continue
    found = slopes(config, RULES[name], data, axis=axis, sizes=SIZES[axis], seeds=seeds, outputs=outputs)
    inside = True
    for k, (slope, error) in found.items():
      worst = int(np.argmax(np.abs(slope)))
      cells = ' | '.join(f'{x:+.3f}' for x in slope[[0, 1, 4, 9, worst]])
      flat = bool(abs(slope[worst]) < BOUND)
      inside &= flat
      verdict = 'flat' if flat else 'not flat'
      line = f'| {optimizer} | {axis} x{SIZES[axis][-1]} | {name} | {k} | {cells} | {error[worst]:.3f} | {verdict} |'
      print(line, flush=True)
    passed &= name == 'alpha 1/2' or inside == (name == 'dial')
  return passed


def transfer(
  optimizer: str,
  data: Callable[[int], Any],
  steps: int,
  rates: Sequence[float],
  *,
  widths: Sequence[int] = (1, 2, 4),
  rules: Sequence[str] = ('dial', 'standard'),
) -> None:
  """Prints the loss by learning rate, width and rule: the mean of the last tenth of the steps, each text seen once."""
  print('\n| optimizer | rule | width | ' + ' | '.join(f'{x:.1e}' for x in rates) + ' | best | seconds |')
  print('|---' * (len(rates) + 5) + '|', flush=True)
  start = base(optimizer, n_layers=2)
  start = dataclasses.replace(
    start, optim=dataclasses.replace(start.optim, schedule='linear', warmup_steps=steps // 10)
  )
  for name, width in itertools.product(rules, widths):
    began, losses = time.monotonic(), []
    for lr in rates:
      tuned = dataclasses.replace(start, optim=dataclasses.replace(start.optim, lr=lr))
      config = RULES[name](tuned, resized(start.model, width=width))
      (run,) = trained(config, data, steps)
      last = [metrics['nll'] for _, metrics in run][-max(1, steps // 10) :]
      losses.append(float(np.mean(jax.device_get(last))))
    best = rates[int(np.nanargmin(losses))]
    cells = ' | '.join(f'{x:.3f}' for x in losses)
    seconds = time.monotonic() - began
    print(f'| {optimizer} | {name} | {config.model.d_model} | {cells} | {best:.1e} | {seconds:.0f} |', flush=True)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('what', choices=('coordinates', 'transfer'))
  parser.add_argument('--optimizer', choices=tuple(PEAK), default='adamw')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--axis', choices=tuple(SIZES), nargs='*', default=tuple(SIZES))
  parser.add_argument('--rule', choices=tuple(RULES), nargs='*', default=tuple(RULES))
  parser.add_argument('--outputs', type=float, default=1.0)
  parser.add_argument('--steps', type=int, default=150)
  parser.add_argument('--widths', type=int, nargs='*', default=[1, 2, 4])
  parser.add_argument('--rates', type=float, nargs='*', default=[2.0**-k for k in range(10, 3, -1)])
  args = parser.parse_args()
  config = base(args.optimizer)
  data = shipped_text(config.model.vocab_size, config.data.seq_len, config.data.global_batch)
  if args.what == 'transfer':
    rules = [rule for rule in args.rule if rule != 'alpha 1/2']  # it is one of depth
    transfer(args.optimizer, data, args.steps, args.rates, widths=args.widths, rules=rules)
    return 0
  seeds = range(args.seeds)
  passed = check(args.optimizer, data, seeds, axes=args.axis, rules=args.rule, outputs=args.outputs)
  return 0 if passed else 1


if __name__ == '__main__':
  sys.exit(main())
