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
# # LoRA as a tree transform, and what it costs
#
# After this page you can put adapters of low rank on any tree of parameters, train them with a step that knows
# nothing of them, fold them in or take them off again, and say what that saves: parameters that learn, optimizer
# memory, FLOPs and temporaries of a step as they are in the compiled program, and what it costs in loss. It takes
# about a minute on a laptop.
#
# An adapted matrix is `w + scale * a @ b`, with `a` [inputs, rank] and `b` [rank, outputs] (Hu et al. 2021).
# `lora.init` replaces the leaves that you name by this sum; everything else is what any function of a tree does.

# %%
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import Markdown

import jaxlm
from jaxlm import cost, lora, losses, models, train, tree
from jaxlm.models import presets

print('jax', jax.__version__, jax.devices())

# %% [markdown]
# ## A base
# A small model of bytes, trained on novels, as in notebook 01. It will have to learn C.

# %%
sample_folder = Path(jaxlm.__file__).parent / 'assets' / 'sample'


def stream(kind):
  lines = (sample_folder / f'{kind}.jsonl').read_text(encoding='utf-8').splitlines()
  return np.frombuffer('\n\n'.join(json.loads(line)['text'] for line in lines).encode(), np.uint8).astype(np.int32)


T = 128
novel, code = stream('novel'), stream('code')
held_out, code = code[:4096], code[4096:]


def cut(stream, starts):
  rows = stream[starts[:, None] + np.arange(T + 1)]
  return {'tokens': rows[:, :-1], 'targets': rows[:, 1:], 'mask': np.ones((len(rows), T), np.float32)}


def batch(stream, cursor, rows):
  return cut(stream, np.random.default_rng(cursor).integers(0, len(stream) - T - 1, rows))


cfg = models.ModelConfig(vocab_size=256, d_model=128, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=352, max_seq_len=T)
run = models.Run(unroll=cfg.n_layers)


def loss_fn(params, batch, key):
  logits_BTV, _ = models.forward(cfg, params, batch['tokens'], run=run)
  return losses.lm.next_token(logits_BTV, batch['targets'], batch['mask']), {}


quiz = cut(held_out, np.arange(0, len(held_out) - T - 1, T))
measured = jax.jit(lambda params: loss_fn(params, quiz, None)[0])


def bits(params):
  found = measured(params)
  return float(found.total / found.weight) / np.log(2)


def trained(params, text, *, steps, lr, rows=8, trainable=tree.everything):
  """The one step; `trainable` says which leaves learn. Returns the parameters and held-out bits per byte of C."""
  optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, lr, 10, steps, lr / 20), b2=0.98, weight_decay=0.0)
  step = jax.jit(train.make_train_step(loss_fn, optimizer, trainable=trainable))
  state, curve = train.create_state(params, optimizer, jax.random.key(1), trainable=trainable), []
  for cursor in range(steps):
    if cursor % 20 == 0:
      curve.append((cursor, bits(state.params)))
    state, _ = step(state, batch(text, cursor, rows))
  return state.params, [*curve, (steps, bits(state.params))]


base, _ = trained(models.init(cfg, jax.random.key(0)), novel, steps=80, lr=5e-3, rows=8)
print(f'{tree.size(base) / 1e6:.2f} M parameters, raised on novels: {bits(base):.2f} bits per byte of C')

# %% [markdown]
# ## Adapters are put on
# No layer was rewritten: `models.forward` multiplies by whatever kind of leaf it meets. `b` begins at 0, so at first
# nothing is another number than before, and the arrays of the base are not copied.

# %%
adapted = lora.init(jax.random.key(2), base, rank=8, alpha=16.0, where='all-linear')
print(*(f'{path}: {tuple(w.a.shape)} @ {tuple(w.b.shape)}' for path, w in lora.adapted(adapted).items()), sep='\n')
probe = jnp.asarray(quiz['tokens'][:4])
forward = jax.jit(lambda params: models.forward(cfg, params, probe, run=run)[0])
print('exactly the base at first:', bool((forward(adapted) == forward(base)).all()))
same = jax.tree.map(lambda x, y: x is y, lora.base(adapted), base)
print('taken off, the very arrays of the base:', all(jax.tree.leaves(same)))

# %% [markdown]
# ## The same text, everything or a few directions
# `trainable=lora.is_adapter` splits the tree: only what it picks has gradients and moments. Each way learns C for as
# many steps; adapters get a larger learning rate, as is usual, and no rate was searched for.

# %%
RANKS = (1, 4, 16)
steps, ways = 40, {}
tuned, curve = trained(base, code, steps=steps, lr=3e-3)
ways['everything'] = (tuned, tree.size(base), curve)
for rank in RANKS:
  begun = lora.init(jax.random.key(2), base, rank=rank, alpha=2.0 * rank)
  params, curve = trained(begun, code, steps=steps, lr=1e-2, trainable=lora.is_adapter)
  ways[f'rank {rank}'] = (params, tree.size(lora.split(begun)[0]), curve)
for name, (_, count, curve) in ways.items():
  print(f'{name:>10}: {count:>7,} parameters learn, {curve[0][1]:.3f} -> {curve[-1][1]:.3f} bits per byte')

# %% [markdown]
# Why a few directions can do: what full fine-tuning added to a matrix is itself nearly of low rank, or it is not. Its
# singular values say which.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
for name, (_, count, curve) in ways.items():
  left.plot(*zip(*curve, strict=True), label=f'{name} ({count:,})')
left.set_xlabel('step')
left.set_ylabel('held-out bits per byte of C')
left.legend(title='what learns', fontsize=8)
for path in ('attn/q', 'attn/v', 'mlp/up', 'mlp/down'):
  group, leaf = path.split('/')
  change = np.asarray(tuned['layers'][group][leaf][1] - base['layers'][group][leaf][1])
  energy = np.linalg.svd(change, compute_uv=False) ** 2
  right.plot(np.arange(1, len(energy) + 1), np.cumsum(energy) / energy.sum(), label=path)
  print(f'{path:>8}: rank 16 of {len(energy)} holds {energy[:16].sum() / energy.sum():.0%} of what changed')
right.set_xscale('log')
right.set_xlabel('rank')
right.set_ylabel('share of the squared change')
right.set_title('what full fine-tuning added to layer 1', fontsize=10)
right.legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# From English to C is a long way, and here everything that learns beats any rank: a few directions hold most of what
# full fine-tuning added to these matrices, but adapters leave the embedding as it was, which had hardly met a brace,
# and 40 steps are few. Adapters are for when memory decides, and for moves that are less far.
#
# ## Folded in, taken off, exchanged
# `merge` is what is exported: plain matrices, no cost at decoding. `base` is the reference of DPO and PPO without a
# second copy. `split` keeps adapters apart from what they sit on: several tasks on one base are several small trees.

# %%
learnt = ways['rank 16'][0]
merged, off = lora.merge(learnt), lora.base(learnt)
logits = forward(learnt)
apart = float(jnp.abs(forward(merged) - logits).max())
print(
  f'merged against adapted: logits differ by {apart:.1e} at most (they are up to {float(jnp.abs(logits).max()):.0f})'
)
print(f'adapters on: {bits(learnt):.3f}, merged: {bits(merged):.3f}, off: {bits(off):.3f} bits per byte of C')
adapters, rest = lora.split(learnt)
print(f'to keep for one task: {tree.nbytes(adapters) / 1024:.0f} KiB of {tree.nbytes(learnt) / 1024:.0f}')
together = tree.combine(adapters, rest)
unchanged = jax.tree.map(lambda x, y: bool((x == y).all()), off, base)
print('the base has not moved:', all(jax.tree.leaves(unchanged)))

# %% [markdown]
# ## What it costs at a real size
# SmolLM2's architecture, 135 M parameters, 4 rows of 256 tokens: the step is compiled and read, never run. FLOPs are
# those of every matmul in the traced program; sizes are the compiler's own. AdamW keeps two numbers for each that
# learns.

# %%
big = presets.get('smollm2-135m')
shapes = {
  'tokens': jax.ShapeDtypeStruct((4, 256), jnp.int32),
  'targets': jax.ShapeDtypeStruct((4, 256), jnp.int32),
  'mask': jax.ShapeDtypeStruct((4, 256), jnp.float32),
}


def big_loss(params, batch, key):
  logits_BTV, _ = models.forward(big, params, batch['tokens'], run=models.Run(remat='dots'))
  return losses.lm.next_token(logits_BTV, batch['targets'], batch['mask']), {}


def costs(rank):
  trainable, optimizer = lora.is_adapter if rank else tree.everything, optax.adamw(1e-4)

  def create():
    params = models.init(big, jax.random.key(0))
    params = lora.init(jax.random.key(1), params, rank=rank, alpha=16.0) if rank else params
    return train.create_state(params, optimizer, jax.random.key(2), trainable=trainable)

  state = jax.eval_shape(create)
  step = jax.jit(train.make_train_step(big_loss, optimizer, trainable=trainable), donate_argnums=0)
  traced = step.trace(state, shapes)
  memory = traced.lower().compile().memory_analysis()
  return {
    'learn, M': tree.size(tree.split(state.params, trainable)[0]) / 1e6,
    'optimizer, MiB': tree.nbytes(state.opt_state) / 2**20,
    'step, GFLOP': cost.matmul_flops(traced.jaxpr.jaxpr) / 1e9,
    'temporaries, MiB': memory.temp_size_in_bytes / 2**20,
  }


table = {'everything': costs(0), 'rank 4': costs(4), 'rank 64': costs(64)}
full = table['everything']
lines = ['| | ' + ' | '.join(full) + ' |', '|---' * (len(full) + 1) + '|']
for name, row in table.items():
  cells = (f'{x:,.2f} ({x / full[key]:.0%})' for key, x in row.items())
  lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
Markdown('\n'.join(lines))

# %%
figure, panels = plt.subplots(1, 4, figsize=(11, 2.6))
for axis, key in zip(panels, ('learn, M', 'optimizer, MiB', 'step, GFLOP', 'temporaries, MiB'), strict=True):
  axis.bar(list(table), [row[key] for row in table.values()], color=['C0', 'C1', 'C2'])
  axis.set_title(key, fontsize=10)
  axis.tick_params(axis='x', labelsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# What LoRA saves is the memory of moments, and of gradients that nothing needs. Of the FLOPs it saves the third at
# most that gradients of frozen matrices would be; the pass through them, forward and back, remains, and so do
# activations and logits among the temporaries.

# %%
last = {name: curve[-1][1] for name, (_, _, curve) in ways.items()}
assert apart < 1e-3 and abs(bits(merged) - bits(learnt)) < 1e-4, 'merged is adapted, up to rounding'
assert all(jax.tree.leaves(unchanged)) and all(jax.tree.leaves(same)), 'the base stays what it was'
assert all(bool((x == y).all()) for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(learnt), strict=True))
assert last['rank 16'] < last['rank 1'] < curve[0][1] - 0.3, 'adapters learn, and more rank learns more'
assert table['rank 4']['optimizer, MiB'] < 0.05 * full['optimizer, MiB'], 'moments of adapters alone'
assert table['rank 4']['step, GFLOP'] < 0.8 * full['step, GFLOP'], 'frozen matrices have no gradient'

# %% [markdown]
# For a real model this is `jaxlm sft --init MODEL --data.path rows.jsonl --lora.rank 16 --run runs/tuned`, and `jaxlm
# export runs/tuned out --merge`. DoRA, rsLoRA, ranks by layer and four-bit bases are flags of the same.
