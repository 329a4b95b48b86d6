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
# # A reward model and PPO by hand, in one page
#
# After this page you can train a reward model on preferences and a policy on its scores without any trainer:
# sampling, scoring, advantages and the clipped loss are functions of arrays, and the loop between them is yours. You
# will see why the policy is held near to where it began, by letting it go once. It takes about a minute on a laptop.
#
# The task is one whose reward is plain to see. In 1939 E. V. Wright wrote a novel without the letter *e*. A small
# model of bytes shall write like that; the preferences that say so are **derived by a rule, no person judged**: of
# two continuations that the model drew itself, the one with fewer e's is preferred. PPO never sees the rule, only a
# model that learnt from pairs.

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
from jaxlm import losses, masked, models, sample, train, tree
from jaxlm.losses import policy
from jaxlm.rl import advantages

print('jax', jax.__version__, jax.devices())

# %% [markdown]
# ## A model that writes, more or less
# As in notebook 01: bytes of novels, next-token loss, two layers.

# %%
novel = Path(jaxlm.__file__).parent / 'assets' / 'sample' / 'novel.jsonl'
text = '\n\n'.join(json.loads(line)['text'] for line in novel.read_text(encoding='utf-8').splitlines())
stream = np.frombuffer(text.replace('\n', ' ').encode(), np.uint8).astype(np.int32)
cfg = models.ModelConfig(vocab_size=256, d_model=112, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=304, max_seq_len=128)
run = models.Run(unroll=cfg.n_layers)
P, N = 16, 32  # bytes of a prompt and of an answer


def windows(seed, count, width):
  starts = np.random.default_rng(seed).integers(0, len(stream) - width, count)
  return stream[starts[:, None] + np.arange(width)]


def trained(params, loss_fn, batches, *, lr):
  """The one step over some batches."""
  optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, lr, 10, len(batches), lr / 20), weight_decay=0.0)
  step = jax.jit(train.make_train_step(loss_fn, optimizer))
  state, curve = train.create_state(params, optimizer, jax.random.key(1)), []
  for batch in batches:
    state, found = step(state, batch)
    curve.append(float(found['loss']))
  return state.params, curve


def next_byte(params, rows, key):
  logits_BTV, _ = models.forward(cfg, params, rows[:, :-1], run=run)
  return losses.lm.next_token(logits_BTV, rows[:, 1:], jnp.ones(rows[:, 1:].shape)), {}


base, curve = trained(models.init(cfg, jax.random.key(0)), next_byte, [windows(i, 16, 97) for i in range(160)], lr=7e-3)
print(f'{tree.size(base) / 1e6:.2f} M parameters, {np.mean(curve[-20:]) / np.log(2):.2f} bits per byte')

# %% [markdown]
# ## Pairs by rule
# Two answers to each prompt, drawn at temperature 1. Which has fewer e's is the rule; equal ones teach nothing and
# go.


# %%
def write(params, prompts, seed):
  """int32 [rows, P + N]: prompts with the answers that were drawn."""
  out = sample.generate(cfg, params, prompts.tolist(), jax.random.key(seed), max_new_tokens=N, run=run)
  return np.concatenate([prompts, np.asarray(out.tokens_BN)], axis=1)


def rule(rows):
  """How many of an answer's bytes are an e: what is to fall."""
  return np.isin(rows[:, P:], [ord('e'), ord('E')]).sum(axis=1)


prompts = windows(1000, 2048, P)
one, two = write(base, prompts, 1), write(base, prompts, 2)
differ = rule(one) != rule(two)
first = (rule(one) < rule(two))[:, None]
chosen, rejected = np.where(first, one, two)[differ], np.where(first, two, one)[differ]
quiz, pairs = slice(0, 384), slice(384, None)
print(f'{len(chosen)} pairs, derived from counts of e, 384 of them held out; {rule(one).mean() / N:.1%} of bytes are e')

# %% [markdown]
# ## The reward model
# The same trunk with one more vector: a number at each token, and the last one's is the score. Bradley and Terry: the
# chance that the first is preferred is the sigmoid of the difference of scores.


# %%
def score(params, rows):
  hidden = models.hidden(cfg, params, rows, run=run)
  return models.value(params, hidden.x_BTD)[:, -1]


def preferred(params, batch, key):
  both = score(params, jnp.concatenate([batch['chosen'], batch['rejected']]))
  chosen_B, rejected_B = jnp.split(both, 2)
  return losses.preference.bradley_terry(chosen_B, rejected_B, center=0.01), {}


def some(cursor, rows=48):
  at = np.random.default_rng(cursor).integers(0, len(chosen[pairs]), rows)
  return {'chosen': chosen[pairs][at], 'rejected': rejected[pairs][at]}


judge, judge_curve = trained(models.with_value(cfg, base), preferred, [some(i) for i in range(70)], lr=1.5e-3)
scored = jax.jit(score)
told = np.asarray(scored(judge, chosen[quiz])) > np.asarray(scored(judge, rejected[quiz]))
accuracy, spread = told.mean(), 1.96 * np.sqrt(told.mean() * (1 - told.mean()) / len(told))
print(f'held-out pairs told right: {accuracy:.1%} +- {spread:.1%}')
before = np.asarray(scored(judge, one))
print(f'scores of the model it will judge: {before.mean():.2f} +- {before.std():.2f}')

# %% [markdown]
# ## PPO
# A round: draw answers, score them, take the KL to the reference off token by token, estimate advantages, and take a
# few steps on the clipped loss. Every line is one function:
#
# | what | function |
# |---|---|
# | answers | `sample.generate` |
# | reward of a token: the score at the end, minus the KL everywhere | `advantages.kl_rewards` |
# | advantages and returns | `advantages.gae` |
# | the clipped policy loss, the clipped value loss | `policy.ppo`, `policy.value_clip` |
# | the step | `train.make_train_step`, as above |

# %%
mask = jnp.concatenate([jnp.zeros(P - 1), jnp.ones(N)])  # of targets: answers are learnt from, prompts are not


def read(params, rows):
  """Of each target: its log-probability, the entropy of the distribution that it is drawn from, the value before it."""
  hidden = models.hidden(cfg, params, rows[:, :-1], run=run)
  logp_BTV = jax.nn.log_softmax(models.unembed(cfg, params, hidden.x_BTD))
  logp_BT = jnp.take_along_axis(logp_BTV, rows[:, 1:, None], axis=-1)[..., 0]
  return logp_BT, -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1), models.value(params, hidden.x_BTD)


def ppo_loss(params, batch, key):
  logp_BT, entropy_BT, values_BT = read(params, batch['rows'])
  mask_BT = jnp.broadcast_to(mask, logp_BT.shape)
  clip = {'clip_low': 0.2, 'clip_high': 0.2}
  actor = policy.ppo(logp_BT, batch['logp'], batch['advantages'], mask_BT, **clip)
  critic = policy.value_clip(values_BT, batch['values'], batch['returns'], mask_BT, clip=0.5)
  watched = policy.ratio_stats(logp_BT, batch['logp'], batch['advantages'], mask_BT, **clip)
  loss = masked.Sum(actor.total + 0.2 * critic.total, actor.weight)  # one weight, so totals add
  return loss, watched | {'entropy': masked.total(entropy_BT, mask_BT)}


@jax.jit
def judged(params, rows, kl_coef):
  """The batch that a round learns from, and what is watched of it."""
  logp_BT, _, values_BT = read(params, rows)
  ref_BT, _, _ = read(models.with_value(cfg, base), rows)
  mask_BT = jnp.broadcast_to(mask, logp_BT.shape)
  score_B = (score(judge, rows) - before.mean()) / before.std()
  kl_BT = policy.kl(logp_BT, ref_BT, mask_BT, kind='k1')
  rewards_BT = advantages.kl_rewards(score_B, kl_BT, mask_BT, kl_coef=kl_coef)
  adv_BT, returns_BT = advantages.gae(rewards_BT, values_BT, mask_BT, gamma=1.0, lam=0.95)
  batch = {'rows': rows, 'logp': logp_BT, 'values': values_BT, 'returns': returns_BT}
  batch['advantages'] = advantages.whiten(adv_BT, mask_BT)
  return batch, {'reward': score_B.mean(), 'kl': kl_BT.sum() / mask_BT.sum()}


optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3, b2=0.99))
step = jax.jit(train.make_train_step(ppo_loss, optimizer))


def reinforce(kl_coef, *, rounds=25, rows=64):
  state, log = train.create_state(models.with_value(cfg, base), optimizer, jax.random.key(2)), []
  for number in range(rounds):
    drawn = write(state.params, windows(5000 + number, rows, P), number)
    batch, seen = judged(state.params, drawn, kl_coef)
    for half in (slice(0, None, 2), slice(1, None, 2)) * 2:  # two epochs of two steps
      state, found = step(state, jax.tree.map(lambda x, half=half: x[half], batch))
    names = ('entropy', 'clip_fraction', 'approx_kl')
    log.append({'e': rule(drawn).mean() / N, **seen, **{name: found[name] for name in names}})
  return state.params, {name: np.array([float(row[name]) for row in log]) for name in log[0]}


HELD, FREE = 'held (kl_coef 0.1)', 'let go (kl_coef 0)'
held, held_log = reinforce(0.1)
free, free_log = reinforce(0.0)
logs = {HELD: held_log, FREE: free_log}
for name, log in logs.items():
  shown = ', '.join(f'{key} {x[0]:.3f} -> {x[-5:].mean():.3f}' for key, x in log.items())
  print(f'{name}: {shown}')

# %%
figure, panels = plt.subplots(1, 4, figsize=(13, 3))
titles = {
  'reward': 'score of the reward model, standardised',
  'e': 'the rule: share of e in answers',
  'kl': 'KL to the reference, nats a byte',
  'entropy': 'entropy, nats a byte',
}
for axis, (key, title) in zip(panels, titles.items(), strict=True):
  for name, log in logs.items():
    axis.plot(log[key], label=name)
  axis.set_title(title, fontsize=9)
  axis.set_xlabel('round')
panels[0].legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## What they write
# New prompts, the same seeds for all three; each e is bold.

# %%
asked = windows(9000, 64, P)
answers = {'before': write(base, asked, 7), HELD: write(held, asked, 7), FREE: write(free, asked, 7)}


def shown(row):
  said = bytes(row.astype(np.uint8).tolist()).decode(errors='replace')
  said = ''.join(c if c.isalnum() or c in ' ,.;:!?-' else "'" for c in said)
  return said.replace('e', '**e**').replace('E', '**E**')


reader = jax.jit(lambda rows: read(models.with_value(cfg, base), rows)[0][:, P - 1 :].mean())
spelled = [float(np.exp(reader(rows))) for rows in answers.values()]
lines = ['| prompt | ' + ' | '.join(answers) + ' |', '|---' * (len(answers) + 1) + '|']
for i in range(6):
  lines.append(f'| {shown(asked[i])} | ' + ' | '.join(shown(a[i, P:]) for a in answers.values()) + ' |')
lines.append('| e in 64 answers | ' + ' | '.join(f'{rule(a).mean() / N:.1%}' for a in answers.values()) + ' |')
likely = (f'{x:.3f}' for x in spelled)
lines.append('| chance of a byte to the model before (geometric mean) | ' + ' | '.join(likely) + ' |')
Markdown('\n'.join(lines))

# %% [markdown]
# Both write hardly an *e*. What is held still writes near-words that the model before finds about as likely as its
# own; what is let go has found what the reward model likes and says little else, ever farther from the reference and
# with less entropy. A reward model is right about what it was trained on, and it was never perfect there; PPO leads
# away from it.

# %%
last = lambda log, key: log[key][-5:].mean()
assert accuracy - spread > 0.55, 'the reward model should have learnt what is better'
assert last(held_log, 'e') < 0.5 * rule(one).mean() / N, 'PPO should have made e rare'
assert last(held_log, 'reward') > held_log['reward'][:3].mean() + 0.5, 'the score should rise'
assert last(held_log, 'kl') < last(free_log, 'kl'), 'the KL term should hold the policy nearer'
assert last(held_log, 'entropy') > last(free_log, 'entropy'), 'and keep it from collapsing'

# %% [markdown]
# The same with models, LoRA, adaptive references, watches for collapse and eight algorithms: `jaxlm reward`, then
# `jaxlm rl
# --algo ppo --reward run:FOLDER`.
