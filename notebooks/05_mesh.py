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
# # A mesh of eight devices on a machine that has none
#
# After this page you can lay a model out over many devices by one table of names, see which device holds what, count
# what the compiled step sends between them, and check that the loss is that of one device. The eight devices are
# virtual: the flag has to be set before JAX is imported. On eight real chips the same cells run without it.

# %%
import os

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ['JAX_PLATFORMS'] = 'cpu'

# %%
import json
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.patches import Rectangle

import jaxlm
from jaxlm import cost, hlo, models, objectives, program, sharding, train, tree
from jaxlm.data import packing
from jaxlm.train import state as states

assert len(jax.devices()) == 8, 'restart the kernel: JAX was there before the flag'
print('jax', jax.__version__, len(jax.devices()), 'devices')

# %% [markdown]
# ## Names, a table, shardings
# Every axis of a parameter has a name, written where the parameter is declared. One table maps names to axes of the
# mesh. Nothing else says where anything lies.

# %%
cfg = models.ModelConfig(
  vocab_size=256, d_model=128, n_layers=2, n_heads=8, n_kv_heads=4, d_ff=384, max_seq_len=128, tie_embeddings=False
)
named = models.abstract(cfg)
for path, box in tree.items(named, is_leaf=sharding.is_named):
  print(f'{path:24} {box.value.shape!s:16} {box.names}')
print('\nrules:', *(f'{name} -> {axes}' for name, axes in sharding.RULES.items()), sep='\n  ')

# %%
MESHES = {
  'data 8': {'data': 8, 'fsdp': 1},
  'fsdp 8': {'fsdp': 8},
  'fsdp 4 x tensor 2': {'fsdp': 4, 'tensor': 2},
  'data 2 x fsdp 2 x sequence 2': {'data': 2, 'fsdp': 2, 'sequence': 2},
}
meshes = {name: sharding.make_mesh(**sizes) for name, sizes in MESHES.items()}
B, T = 16, 128

# %% [markdown]
# ## Who holds what
# Each panel is one array of two axes (of a stack of layers: one layer), cut as the table says; in each part stand the
# numbers of the devices that hold it. Several numbers in one part are copies.

# %%
SHOWN = ('embed', 'layers/attn/q', 'layers/mlp/down', 'batch')


def parts(shape, laid):
  """{(rows, columns) of a part: the devices that hold it}, of the last two axes."""
  found = {}
  for device, index in laid.devices_indices_map(shape).items():
    place = tuple(s.indices(n)[:2] for s, n in zip(index[-2:], shape[-2:], strict=True))
    found.setdefault(place, []).append(device.id)
  return found


def draw(axis, shape, laid):
  (rows, columns), colours = shape[-2:], plt.get_cmap('tab10')
  for ((top, bottom), (left, right)), devices in parts(shape, laid).items():
    box = Rectangle((left / columns, top / rows), (right - left) / columns, (bottom - top) / rows)
    box.set(facecolor=colours(min(devices)), edgecolor='white', lw=1.5, alpha=0.6)
    axis.add_patch(box)
    middle = (left + right) / 2 / columns, (top + bottom) / 2 / rows
    axis.text(*middle, ' '.join(map(str, devices)), ha='center', va='center', fontsize=8)
  axis.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])


figure, panels = plt.subplots(len(meshes), len(SHOWN), figsize=(11, 9))
names = {path: (box.value.shape, box.names) for path, box in tree.items(named, is_leaf=sharding.is_named)}
names['batch'] = ((B, T), ('batch', 'seq'))
for row, (title, mesh) in zip(panels, meshes.items(), strict=True):
  for axis, path in zip(row, SHOWN, strict=True):
    shape, axes = names[path]
    laid = jax.sharding.NamedSharding(mesh, sharding.spec(axes, sharding.RULES))
    draw(axis, shape, laid)
    if title == next(iter(meshes)):
      axis.set_title(f'{path} {shape[-2:]}\n{axes[-2]} x {axes[-1]}', fontsize=9)
  row[0].set_ylabel(title, fontsize=9)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The step, compiled for each
# The step is the one of a single device. What makes it one of a mesh is `jax.jit` with shardings of its arguments;
# the compiler puts in the collectives. `train_on` compiles it, reads its text, and trains three steps on the same
# batches.

# %%
folder = Path(jaxlm.__file__).parent / 'assets' / 'sample'
text = '\n\n'.join(json.loads(line)['text'] for line in (folder / 'novel.jsonl').read_text('utf-8').splitlines())
stream = np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def batch(cursor):
  starts = np.random.default_rng(cursor).integers(0, len(stream) - T - 1, B)
  rows = [packing.pack(stream[s : s + T + 1], np.zeros(T + 1, bool), T, 0, np.ones(256, np.int32)) for s in starts]
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


optimizer = optax.adamw(1e-3)


def create():
  return train.create_state(models.init(cfg, jax.random.key(0)), optimizer, jax.random.key(1))


def train_on(mesh):
  how = models.Run(attention='ring' if mesh.shape['sequence'] > 1 else 'xla', rules=sharding.RULES)
  laid = sharding.state_shardings(states.abstract(create, named), mesh)
  rows = sharding.batch_shardings(batch(0), mesh)
  step = jax.jit(
    train.make_train_step(objectives.next_token(cfg, how), optimizer),
    in_shardings=(laid, rows),
    out_shardings=(laid, None),
  )
  with jax.set_mesh(mesh):
    state = jax.jit(create, out_shardings=laid)()
    compiled = step.lower(state, batch(0)).compile()
    held, curve = program.local_bytes(state), []
    for cursor in range(3):
      state, metrics = compiled(state, jax.device_put(batch(cursor), rows))
      curve.append((float(metrics['loss']), float(metrics['grad_norm'])))
  return np.array(curve), cost.by_kind(hlo.collectives(compiled.as_text())), held


alone = sharding.make_mesh(devices=jax.devices()[:1])
reference, none, whole = train_on(alone)
found = {name: train_on(mesh) for name, mesh in meshes.items()}
print(f'one device: losses {reference[:, 0]}, state {whole / 2**20:.2f} MiB, collectives: {none}')

# %%
print(f'{"mesh":30} {"losses differ by":>16} {"gradient norms":>15} {"state a device":>15}  collectives a step')
for name, (curve, sent, held) in found.items():
  loss, norm = np.abs(curve - reference).max(axis=0)
  counted = ', '.join(f'{one["times"]} {one["kind"]}' for one in sent)
  print(f'{name:30} {loss:16.1e} {norm:15.1e} {held / 2**20:11.2f} MiB  {counted}')

# %% [markdown]
# Data parallelism keeps a whole state on each device and adds gradients up. FSDP keeps an eighth, and gathers weights
# where they are needed. Tensor parallelism sends activations instead; a sequence over two devices sends keys and
# values round a ring. (CPUs compile collectives otherwise than TPUs do, more of them and none beside other work:
# kinds are to be looked at here, and notebook 06 counts what a TPU would do.)

# %%
kinds = sorted({one['kind'] for _, sent, _ in found.values() for one in sent})
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3), width_ratios=(2, 1), sharey=True)
start = np.zeros(len(found))
for kind in kinds:
  size = [sum(one['gib'] for one in sent if one['kind'] == kind) * 1024 for _, sent, _ in found.values()]
  left.barh(list(found), size, left=start, label=kind)
  start += size
left.set_xlabel('MiB that collectives put out, a device and step')
left.legend(fontsize=8)
left.invert_yaxis()
right.barh(list(found), [held / 2**20 for _, _, held in found.values()], color='grey')
right.axvline(whole / 2**20, color='black', ls=':')
right.set_xlabel('MiB of state a device (dotted: one device)')
figure.tight_layout()
plt.show()

# %%
for name, (curve, sent, _) in found.items():
  assert np.abs(curve - reference).max() < 1e-5, f'{name}: not the loss of one device'
  assert sent, f'{name}: eight devices that send nothing do not train together'
assert not none, 'one device has nobody to send to'
kinds_of = {name: {one['kind'] for one in sent} for name, (_, sent, _) in found.items()}
assert kinds_of['data 8'] == {'all-reduce'}, 'data parallelism adds up gradients, and no more'
assert 'all-gather' in kinds_of['fsdp 8'], 'FSDP gathers weights'
assert 'collective-permute' in kinds_of['data 2 x fsdp 2 x sequence 2'], 'a ring passes keys and values on'
assert found['fsdp 8'][2] < whole / 7, 'FSDP keeps an eighth of the state'

# %% [markdown]
# On a command line this is `--mesh.data 2 --mesh.fsdp 4` and the like, on any run.
