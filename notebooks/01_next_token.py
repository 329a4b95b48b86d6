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
# # Next-token training from scratch, with nothing but pure functions
#
# After this page you can train a language model without a trainer: you write the batch, the loss and the loop
# yourself, and take from `jaxlm` only functions from arrays to arrays. It takes about a minute on a laptop.
#
# Pre-training is one idea: predict the next token of a great deal of text. The text is its own label.

# %%
import json
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxlm
from jaxlm import losses, models, sample, train, tree

print('jax', jax.__version__, jax.devices())

# %% [markdown]
# ## Text
# A novel from the sample that ships with the package. A byte is a token here: no tokenizer, a vocabulary of 256.

# %%
novel = Path(jaxlm.__file__).parent / 'assets' / 'sample' / 'novel.jsonl'
text = '\n\n'.join(json.loads(line)['text'] for line in novel.read_text(encoding='utf-8').splitlines())
stream = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
held_out, training = stream[:8192], stream[8192:]
print(f'{len(training):,} bytes to learn from, {len(held_out):,} held out')
print(text[:300])

# %% [markdown]
# A batch is a pure function of a number: rows from random places, inputs and the same text one step on.

# %%
B, T = 16, 128


def cut(stream, starts):
  rows = stream[starts[:, None] + np.arange(T + 1)]
  return {'tokens': rows[:, :-1], 'targets': rows[:, 1:], 'mask': np.ones((len(rows), T), np.float32)}


def batch(cursor):
  starts = np.random.default_rng(cursor).integers(0, len(training) - T - 1, B)
  return cut(training, starts)


# %% [markdown]
# ## Model, loss, step
# The model is a description (`cfg`) and a plain dictionary of arrays (`params`). The loss says how the two are used.
# `make_train_step` knows neither: it takes gradients, adds, divides once, updates.

# %%
cfg = models.ModelConfig(vocab_size=256, d_model=96, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=256, max_seq_len=512)
params = models.init(cfg, jax.random.key(0))
print(jax.tree.map(lambda x: x.shape, params))
print(f'{tree.size(params) / 1e6:.2f} M parameters')


# %%
def loss_fn(params, batch, key):
  logits_BTV, _ = models.forward(cfg, params, batch['tokens'])
  return losses.lm.next_token(logits_BTV, batch['targets'], batch['mask']), {}


steps = 260
optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 6e-3, 20, steps, 6e-4), b2=0.98)
step = jax.jit(train.make_train_step(loss_fn, optimizer), donate_argnums=0)
state = train.create_state(params, optimizer, jax.random.key(1))

# %% [markdown]
# ## The loop is yours

# %%
curve = []
for cursor in range(steps):
  state, metrics = step(state, batch(cursor))
  curve.append(float(metrics['loss']) / np.log(2))
  if cursor % 50 == 0 or cursor == steps - 1:
    print(f'step {cursor:3}  {curve[-1]:.3f} bits per byte  gradient norm {float(metrics["grad_norm"]):.2f}')

# %%
quiz = cut(held_out, np.arange(0, len(held_out) - T - 1, T))
measured, _ = jax.jit(loss_fn)(state.params, quiz, None)
bits = float(measured.total / measured.weight) / np.log(2)
plt.figure(figsize=(7, 3))
plt.plot(curve, label='training')
plt.axhline(bits, color='C1', label=f'held out, at the end: {bits:.2f}')
plt.axhline(8, color='grey', linestyle=':', label='knowing nothing: 8')
plt.xlabel('step')
plt.ylabel('bits per byte')
plt.legend()
plt.show()

# %% [markdown]
# ## It writes
# `sample.generate` is pure as well: tokens and a key in, tokens and their log-probabilities out.

# %%
prompt = 'The whale '
rollout = sample.generate(
  cfg,
  state.params,
  [list(prompt.encode())],
  jax.random.key(2),
  max_new_tokens=300,
  sampling=sample.Sampling(temperature_B=0.7),
)
print(prompt + bytes(np.asarray(rollout.tokens_BN[0]).tolist()).decode(errors='replace'))

# %%
assert bits < 3.2, 'the model should know letters and short words by now'

# %% [markdown]
# Nothing above closed over hidden state: run a cell again with the same arguments and get the same arrays. The next
# step, for a real run, is the command line: `jaxlm pretrain configs/pretrain/small.py`.
