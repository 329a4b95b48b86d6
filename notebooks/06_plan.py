# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A plan for a pod, before it costs anything
#
# After this page you can say, for a model and a pod that you do not have, what a chip holds, what it sends, and how
# fast a step could be at best: first by hand from shapes and data sheets, for any number of chips in milliseconds,
# then from the very program of the run, compiled by the TPU's own compiler on this machine.
#
# Nothing here runs on a TPU, and **nothing of it is a measurement**: bounds say what cannot be beaten, not what is
# reached.

# %%
import dataclasses
import importlib.util
import math
import os
import time

os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing is computed: chips that this machine has stay free

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import AbstractMesh

from jaxlm import models, plan, program, sharding, topology, tree
from jaxlm.config import Compute, Data, Mesh, Optim, Pretrain
from jaxlm.console import table
from jaxlm.models import presets

COMPILER = importlib.util.find_spec('libtpu') is not None
GIB = 2.0**30
print('jax', jax.__version__, '- the TPU compiler is', 'here' if COMPILER else "not here: pip install -e '.[tpu]'")

# %% [markdown]
# ## A run
# Llama 3.1 8B, a batch of a million tokens, on slices of v5e, whose chips have 15.75 GiB each. A config says all of
# it.

# %%
config = Pretrain(
  run='runs/planned',
  model=presets.get('llama3.1-8b'),
  data=Data(seq_len=4096, global_batch=256),
  optim=Optim(lr=3e-4, warmup_steps=2000),
  compute=Compute(remat='full', loss_chunks=8),
  steps=100_000,
)
tokens = config.data.seq_len * config.data.global_batch
count = tree.size(models.abstract(config.model))
print(f'{count / 1e9:.2f} B parameters, {tokens:,} tokens a step')
print(f'{program.flops_per_token(config) / 1e9:.1f} GFLOP a token; 6 x parameters alone: {6 * count / 1e9:.1f}')

# %% [markdown]
# ## By hand: what a chip holds
# The shardings need no devices: a mesh may be abstract. From them and the shapes: parameters, AdamW's two moments and
# gradients, each four bytes; with full rematerialisation a layer keeps its input alone, in two bytes; and one layer's
# activations and one slice of logits are there while it is worked on.


# %%
def laid(config, chips):
  """The sizes of the mesh, its one -1 filled in, as an abstract mesh."""
  sizes = dataclasses.asdict(config.mesh)
  fixed = math.prod(n for n in sizes.values() if n > 0)
  sizes = {name: n if n > 0 else chips // fixed for name, n in sizes.items()}
  return AbstractMesh(tuple(sizes[a] for a in sharding.MESH_AXES), sharding.MESH_AXES)


def by_hand(config, on):
  """GiB of a chip by kind, and seconds of a step by what takes them, all at least."""
  cfg, mesh, named = config.model, laid(config, on.size), models.abstract(config.model)
  shards = jax.tree.leaves(sharding.state_shardings(named, mesh))
  shapes = [box.value.shape for box in jax.tree.leaves(named, is_leaf=sharding.is_named)]
  own = sum(math.prod(s.shard_shape(shape)) for s, shape in zip(shards, shapes, strict=True))
  rows, tensor = mesh.shape['data'] * mesh.shape['fsdp'], mesh.shape['tensor']
  here = config.data.seq_len * config.data.global_batch / rows  # tokens that a group of tensor chips works on
  stream = 2 * here * cfg.d_model  # bytes of the residual stream there
  wide = (3 * cfg.d_ff + 2 * cfg.d_model) / tensor
  memory = {
    'parameters': 4 * own,
    'moments': 8 * own,
    'gradients': 4 * own,
    'kept inputs of layers': cfg.n_layers * stream / tensor,
    'a layer at work': 2 * 2 * here * wide,
    'logits': 2 * 4 * here * cfg.padded_vocab / tensor / config.compute.loss_chunks,
  }
  once = 4 / 3 if config.compute.remat == 'full' else 1  # the forward pass is computed again
  flops = program.flops_per_token(config) * config.data.seq_len * config.data.global_batch / on.size
  fsdp = (
    3 * 2 * tree.size(named) / tensor * (1 - 1 / mesh.shape['fsdp'])
  )  # weights gathered twice, gradients scattered, bfloat16
  between = 2 * 6 * cfg.n_layers * stream * (1 - 1 / tensor)  # gathered before and scattered after each half of a layer
  seconds = {
    'matmuls': once * flops / on.chip.flops,
    'memory': (2 * sum(list(memory.values())[:3]) + 2 * fsdp) / on.chip.hbm,
    'sent for weights': fsdp / on.chip.ici,
    'sent for activations': between / on.chip.ici,
  }
  return {name: x / GIB for name, x in memory.items()}, seconds, flops / on.chip.flops


def bound(seconds, useful, *, overlapped):
  """MFU at best: with everything sent beside work, or with work waiting for all of it."""
  work, sent = max(seconds['matmuls'], seconds['memory']), seconds['sent for weights'] + seconds['sent for activations']
  return useful / (max(work, sent) if overlapped else work + sent)


# %% [markdown]
# ## Memory, by mesh and kind
# 64 chips, five meshes: FSDP cuts what is stored over all chips; `tensor` cuts what is worked on, too.

# %%
on = topology.parse('v5e-64')
MESHES = {f'fsdp {64 // n}' + f' x tensor {n}' * (n > 1): Mesh(fsdp=64 // n, tensor=n) for n in (1, 2, 4, 8)}
MESHES = {'data 8 x fsdp 8': Mesh(data=8, fsdp=8)} | MESHES
hands = {name: by_hand(dataclasses.replace(config, mesh=mesh), on) for name, mesh in MESHES.items()}
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.4), sharey=True)
start, spent = np.zeros(len(hands)), np.zeros(len(hands))
for kind in next(iter(hands.values()))[0]:
  size = np.array([memory[kind] for memory, _, _ in hands.values()])
  left.barh(list(hands), size, left=start, label=kind)
  start += size
left.axvline(on.limit_gib, color='black', ls=':')
left.set_xlabel(f'GiB a chip by hand (dotted: the {on.limit_gib} of a {on.platform})')
left.legend(fontsize=7)
left.invert_yaxis()
for kind in next(iter(hands.values()))[1]:
  size = np.array([seconds[kind] for _, seconds, _ in hands.values()])
  right.barh(list(hands), size, left=spent, label=kind)
  spent += size
right.set_xlabel('seconds a step, each at least (side by side at best)')
right.legend(fontsize=7)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## How many chips?
# The same batch on more chips is sooner done until what is sent does not shrink with the work. The band is between
# two bounds: all that is sent hidden beside work, and none of it.

# %%
figure, axis = plt.subplots(figsize=(8, 3.2))
chips = [16, 32, 64, 128, 256]
for colour, (name, n) in zip(('C0', 'C1', 'C2'), (('fsdp alone', 1), ('tensor 4', 4), ('tensor 8', 8)), strict=True):
  found = [by_hand(dataclasses.replace(config, mesh=Mesh(tensor=n)), topology.parse(f'v5e-{c}')) for c in chips]
  low = [100 * bound(seconds, useful, overlapped=False) for _, seconds, useful in found]
  high = [100 * bound(seconds, useful, overlapped=True) for _, seconds, useful in found]
  axis.fill_between(chips, low, high, color=colour, alpha=0.25, label=name)
  fits = [sum(memory.values()) <= on.limit_gib for memory, _, _ in found]
  axis.plot(*np.array([chips, high])[:, fits], 'o', color=colour)
axis.axhline(75, color='grey', ls=':')
axis.set_xscale('log', base=2)
axis.set_xticks(chips, [str(c) for c in chips])
axis.set(xlabel='v5e chips (a dot: fits, by hand)', ylabel='MFU at best, %', ylim=(0, 80))
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# The ceiling of full rematerialisation is 75 %: four passes are computed and three count. Tensor parallelism on a
# flat torus sends the stream of every layer, and costs more than it saves as long as FSDP alone fits.
#
# ## From the compiler
# A sketch on paper leaves out copies, padding and what the compiler decides. `jaxlm plan` compiles the run's own step
# for the chips and reads the program: its memory, every collective and whether anything waits for it. That takes
# minutes for a model of this size; what it said of this model and batch on 256 chips (two layers a turn) stands in
# the first lines of `configs/pods/llama3_8b_v5e_256.py`, and is put beside the sketch here.

# %%
pod = topology.parse('v5e-256')
RECORDED = {'GiB a chip': 2.99, 'GiB sent': 5.8 + 34.7, 'MFU at best': 0.72}  # libtpu 0.0.42.1
memory, seconds, useful = by_hand(config, pod)
low, high = (bound(seconds, useful, overlapped=x) for x in (False, True))
sent = (seconds['sent for weights'] + seconds['sent for activations']) * pod.chip.ici / GIB
hand = {'GiB a chip': sum(memory.values()), 'GiB sent': sent, 'MFU at best': high}
rows = [(name, hand[name], RECORDED[name]) for name in hand]
print(table(('llama3.1-8b on v5e-256, fsdp 256', 'by hand', 'as compiled'), rows))
print(f'\nwith everything waited for, by hand: {low:.0%} MFU')

# %% [markdown]
# Here, where the compiler is there, a small model on four chips, the step that `jaxlm plan` would compile.

# %%
small = Pretrain(
  run='runs/planned',
  model=models.ModelConfig(
    vocab_size=4096, d_model=256, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=512, max_seq_len=512
  ),
  data=Data(seq_len=512, global_batch=16),
  compute=Compute(remat='full'),
  mesh=Mesh(fsdp=4),
  steps=10_000,
)
four = topology.parse('v5e-4')
found = None
if COMPILER:
  began = time.monotonic()
  found = plan.plan(small, four, compare=False)
  print(f'compiled for {four.name} in {time.monotonic() - began:.0f} s\n')
  print('\n\n'.join(plan.lines(found, table)))
else:
  print('No TPU compiler here: this part is left out, and all of the above is as it was.')

# %%
if found is not None:
  memory, _, _ = by_hand(small, four)
  compiled = {kind: getattr(found, f'{kind}_gib') for kind in ('parameters', 'optimizer', 'batch', 'temporaries')}
  plt.figure(figsize=(8, 2))
  for y, some in enumerate((memory, compiled)):
    start = 0.0
    for kind, size in some.items():
      plt.barh(y, 1024 * size, left=start, color=f'C{list(some).index(kind) + 6 * y}')
      if size > 0.2 * sum(some.values()):
        plt.text(start + 512 * size, y, kind, ha='center', va='center', fontsize=7)
      start += 1024 * size
  plt.yticks([0, 1], ['by hand', 'as compiled'])
  plt.xlabel('MiB a chip, small model on four chips')
  plt.show()
  stored, kept = memory['parameters'] + memory['moments'], found.parameters_gib + found.optimizer_gib
  print(f'stored by hand {1024 * stored:.2f} MiB, as compiled {1024 * kept:.2f}')
  assert abs(stored / kept - 1) < 0.01, 'both read the same shardings'
  assert found.fits and 0 < found.mfu_bound <= 0.75 and found.collectives

# %%
alone, wide = hands['fsdp 64'], hands['fsdp 8 x tensor 8']
assert abs(program.flops_per_token(config) / (6 * tree.size(models.abstract(config.model))) - 1) < 0.3
assert sum(alone[0].values()) < on.limit_gib, '8 B parameters on 64 chips of v5e'
assert sum(hands['data 8 x fsdp 8'][0].values()) > on.limit_gib, 'eight copies of the state are too much'
assert wide[1]['sent for activations'] > alone[1]['sent for activations'] == 0
assert 0.7 < high <= 0.75 and low < high, 'FSDP over 256 chips can hide what it sends, at best'
assert abs(sent / RECORDED['GiB sent'] - 1) < 0.5, 'by hand what is sent is about what is compiled'

# %% [markdown]
# The whole of it for a run of your own, with a search for meshes that fit:
#
#     jaxlm plan configs/pods/llama3_8b_v5e_256.py --topology v5e-256
#     jaxlm plan my_config.py --topology v5p-128 --search
