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
# # Pre-trained against fine-tuned: one step, two stages, the same prompts
#
# After this page you can pre-train a model on plain text, fine-tune it to do as asked, and say with figures what the
# second stage changed and what it cost. You will have seen that both stages run *the same* train step: what differs
# is which rows go in, and at which tokens the loss looks.
#
# It takes a minute or two on a laptop. At the end the same two prompts go through a real model of 135 M parameters,
# if its file is on your disk.

# %%
import os
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

from jaxlm import interop, lessons, losses, models, sample, train, tree
from jaxlm.data import chat, conversations, packing, sources, tokenizer, turns
from jaxlm.evals.scores import exact_match
from jaxlm.loops import chatting
from jaxlm.train import metrics, optim

print('jax', jax.__version__, jax.devices())

# %% [markdown]
# ## Text, and what is held out
# The sample that ships with the package: a megabyte of novels, plays, law, code and more. Every twelfth document is
# kept away from everything that learns, the tokenizer too.

# %%
documents = list(sources.documents(lessons.TEXT))
held_out, learnt = documents[::12], [d for i, d in enumerate(documents) if i % 12]
vocabulary = tokenizer.train([d.text for d in learnt], 2048)
T, B = 128, 8
bytes_of = vocabulary.token_bytes()


def stream(some):
  ids = [[vocabulary.bos_id, *one, vocabulary.eos_id] for one in vocabulary.encode_batch([d.text for d in some])]
  return np.concatenate(ids), np.concatenate([np.arange(len(one)) == 0 for one in ids])


def text_rows(some):
  """Rows of the stream, cut every T tokens: at each token but the first of a document there is something to learn."""
  ids, begins = stream(some)
  cut = [slice(i, i + T + 1) for i in range(0, len(ids) - T - 1, T)]
  return [packing.pack(ids[one], begins[one], T, vocabulary.pad_id, bytes_of) for one in cut]


text, text_quiz = text_rows(learnt), text_rows(held_out)[::2]
print(f'{len(learnt)} documents to learn from in {len(text)} rows of {T} tokens, {len(held_out)} held out')

# %% [markdown]
# ## Questions
# Fine-tuning needs answers. Here they are made of the same text by rule, so nobody had to write them: which kind of
# text a passage is of, the line after a line, a line of a kind. A chat template turns each into tokens, and says
# which of them the assistant writes: those alone are learned.

# %%
_, template = turns.choose('plain', None)


def question_rows(some):
  found = []
  for rows in lessons.lessons(some).values():
    for row in rows:
      one = turns.encode(template, conversations.Conversation(row['messages']), vocabulary, limit=T)
      if one is not None:
        found.append((one.ids, one.learned))
  return found


def packed(encoded):
  """Whole conversations, as many in a row as fit; each is a segment that sees itself alone."""
  places = packing.best_fit(np.array([len(ids) - 1 for ids, _ in encoded]), T)
  one = lambda ids, learned: packing.pack(
    ids, np.zeros(len(ids), bool), len(ids) - 1, vocabulary.pad_id, bytes_of, learned
  )
  return [
    packing.joined([one(*encoded[i]) for i in np.flatnonzero(places == row)], T, vocabulary.pad_id)
    for row in range(places.max() + 1)
  ]


asked = question_rows(learnt)
questions, questions_quiz = packed(asked), packed(question_rows(held_out))[::2]
ids, learned = asked[0]
print(f'{len(asked)} conversations in {len(questions)} rows. One of them, what is learned in brackets:\n')
print(vocabulary.decode(ids[~learned]) + f'[{vocabulary.decode(ids[learned])}<eos>]')

# %% [markdown]
# ## One step for both stages
# The loss: next-token cross entropy where the mask is on. The mask is part of the batch, so this function does not
# know which stage it is in.

# %%
cfg = models.ModelConfig(
  vocab_size=vocabulary.vocab_size, d_model=144, n_layers=3, n_heads=6, n_kv_heads=2, d_ff=384, max_seq_len=T
)
run = models.Run(unroll=cfg.n_layers)


def loss_fn(params, batch, key):
  logits_BTV, _ = models.forward(
    cfg, params, batch['tokens'], run=run, positions_BT=batch['positions'], segment_ids_BT=batch['segment_ids']
  )
  return losses.lm.next_token(logits_BTV, batch['targets'], batch['loss_mask']), {}


measure_batch = jax.jit(lambda params, batch: loss_fn(params, batch, None)[0])


def stack(rows):
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def measure(params, rows):
  """Nats a token, over all tokens that count: totals and weights are added, and divided once."""
  parts = [measure_batch(params, stack(rows[i : i + B])) for i in range(0, len(rows) - B + 1, B)]
  return float(sum(p.total for p in parts) / sum(p.weight for p in parts))


def stage(params, rows, quiz, *, steps, lr, name, every=60):
  """Trains on `rows`; returns the parameters, the curves, and what it cost."""
  rate = optim.schedule('wsd', lr=lr, steps=steps, warmup_steps=10, decay_fraction=0.5, final_ratio=0.02)
  optimizer = optim.make(name, rate, axes=models.axes(cfg), weight_decay=0.0)
  step = jax.jit(train.make_train_step(loss_fn, optimizer), donate_argnums=0)
  state = train.create_state(jax.tree.map(np.copy, params), optimizer, jax.random.key(1))
  order = np.concatenate([np.random.default_rng(epoch).permutation(len(rows)) for epoch in range(99)])
  curve, held, seconds, weight = [], [(0, measure(state.params, quiz))], 0.0, 0.0
  for i in range(steps):
    batch, began = stack([rows[r] for r in order[i * B : (i + 1) * B]]), time.perf_counter()
    state, found = step(state, batch)
    curve.append(float(found['loss']))
    seconds += time.perf_counter() - began if i else 0.0  # the first one compiles
    weight += float(found['weight'])
    if (i + 1) % every == 0 or i + 1 == steps:
      held.append((i + 1, measure(state.params, quiz)))
  tokens = steps * B * T
  cost = {'seconds': seconds * steps / (steps - 1), 'tokens': tokens, 'learned': weight}
  cost['tflop'] = tokens * metrics.flops_per_token(cfg, T) / 1e12
  print(f'{steps} steps, held out {held[0][1]:.3f} -> {held[-1][1]:.3f} nats a token, {cost["seconds"]:.0f} s of steps')
  return state.params, {'training': curve, 'held out': held}, cost


# %% [markdown]
# ## Stage 1: pre-training
# From random weights, on everything.


# %%
def frequencies(rows, quiz):
  """Nats a token of a model that knows how often each token comes, and no more."""
  of = lambda some: np.concatenate([row['targets'][row['loss_mask'] > 0] for row in some])
  counts = 1 + np.bincount(of(rows), minlength=cfg.vocab_size)
  return -np.log(counts / counts.sum())[of(quiz)].mean()


counted = frequencies(text, text_quiz)
fresh = models.init(cfg, jax.random.key(0))
print(f'{tree.size(fresh) / 1e6:.2f} M parameters')
base, base_curves, base_cost = stage(fresh, text, text_quiz, steps=130, lr=1e-2, name='muon')

# %% [markdown]
# ## Stage 2: fine-tuning
# From those weights, on the questions: fewer tokens, a smaller learning rate. `base` stays as it was: a step returns
# a new tree and changes none.

# %%
tuned, tuned_curves, tuned_cost = stage(base, questions, questions_quiz, steps=100, lr=2.5e-3, name='adamw')

# %%
figure, panels = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=(2, 1), sharey=True)
both = (('pre-training', base_curves, base_cost), ('fine-tuning', tuned_curves, tuned_cost))
for axis, (name, curves, cost) in zip(panels, both, strict=True):
  each = B * T / 1000
  axis.plot(np.arange(1, len(curves['training']) + 1) * each, curves['training'], alpha=0.5, label='training')
  axis.plot(*zip(*[(i * each, x) for i, x in curves['held out']], strict=True), 'o-', ms=3, label='held out')
  axis.axhline(np.log(cfg.vocab_size), color='grey', ls=':', label='knowing nothing: log V')
  axis.set_title(f'{name}: the loss is on {cost["learned"] / cost["tokens"]:.0%} of the tokens', fontsize=10)
  axis.set_xlabel('thousand tokens')
panels[0].axhline(counted, color='grey', ls='--', label='knowing how often each token comes')
panels[0].set_ylabel('nats a learned token')
panels[0].legend()
figure.tight_layout()
plt.show()

# %% [markdown]
# The second curve begins high again: the base has never seen the form of a question, and the loss looks at answers
# alone. What it learns first is the form.
#
# ## The same prompts through both
# A base model continues a text. The fine-tuned one gets the prompt as a turn of a conversation, in the template that
# it was tuned with. To be fair the base gets that too, in the middle column.

# %%
SUMMARY = (
  'Summarize the following text: The whale swam round the ship all night. In the morning the captain lowered a '
  'boat, and the men rowed after it until the sun went down.'
)
PROMPTS = ('The capital of France is', SUMMARY, 'Write a line of law.', 'Write a line of code.')
ends = [vocabulary.eos_id]


def written(params, prompts, new, greedy=False):
  how = sample.Sampling(0.0) if greedy else sample.Sampling(temperature_B=0.6, top_p_B=0.9)
  out = sample.generate(
    cfg, params, prompts, jax.random.key(3), max_new_tokens=new, sampling=how, stop_ids=ends, run=run
  )
  kept = np.asarray(out.lengths_B) - np.asarray(out.stopped_B)
  texts = [vocabulary.decode(row[:n].tolist()).strip() for row, n in zip(np.asarray(out.tokens_BN), kept, strict=True)]
  return texts, np.asarray(out.stopped_B)


def turn(prompt):
  return chat.encode(template, [{'role': 'user', 'content': prompt}], vocabulary, generation=True)


raw = [[vocabulary.bos_id, *vocabulary.encode(prompt)] for prompt in PROMPTS]
said = {
  'base, as text': written(base, raw, 32)[0],
  'base, as a turn': written(base, [turn(p) for p in PROMPTS], 32)[0],
  'fine-tuned, as a turn': written(tuned, [turn(p) for p in PROMPTS], 32)[0],
}


def table(header, rows):
  safe = lambda cells: '| ' + ' | '.join(' '.join(str(c).replace('|', '\\|').split()) for c in cells) + ' |'
  return Markdown('\n'.join([safe(header), safe(['---'] * len(header)), *map(safe, rows)]))


code = lambda text: '`' + ' '.join(text.replace('`', "'").split()) + '`'
table(['prompt', *said], [[p, *map(code, each)] for p, *each in zip(PROMPTS, *said.values(), strict=True)])

# %% [markdown]
# Neither knows what a capital is: a model this small, after a megabyte, has no facts. What changed is behaviour: the
# fine-tuned one answers and stops, and a line of law is not a line of code. That can be counted, on passages of
# documents that no stage has seen: what kind of text is this, with the same tokens to both models.

# %%
quiz = lessons.lessons(held_out)['kind']
rng = np.random.default_rng(0)
quiz = [quiz[i]['messages'] for i in rng.permutation(len(quiz))[:96]]
prompts, right = [turn(q['content']) for q, _ in quiz], [a['content'] for _, a in quiz]
score, ended = {}, {}
for name, params in (('base', base), ('fine-tuned', tuned)):
  answers, stopped = written(params, prompts, 8, greedy=True)
  score[name] = np.array([exact_match(a, r) for a, r in zip(answers, right, strict=True)])
  ended[name] = stopped.mean()
  print(f'{name:>10}: {score[name].mean():5.1%} right, {ended[name]:5.1%} ended by themselves; "{answers[0][:60]}"')
commonest = max(right.count(kind) for kind in set(right)) / len(right)
print(f'  always the commonest kind: {commonest:.1%}')

# %%
kinds = sorted(set(right))
mean = lambda name, kind: score[name][[r == kind for r in right]].mean()
plt.figure(figsize=(8, 2.8))
for shift, name in ((-0.2, 'base'), (0.2, 'fine-tuned')):
  plt.bar(np.arange(len(kinds)) + shift, [100 * mean(name, kind) for kind in kinds], 0.4, label=name)
plt.xticks(range(len(kinds)), [f'{kind}\n({right.count(kind)})' for kind in kinds], fontsize=8)
plt.ylabel('% told right')
plt.legend()
plt.title('which kind of text is this? held-out passages', fontsize=10)
plt.show()

# %% [markdown]
# ## The two stages in one table
# All figures are of the run above.

# %%
text_loss = {name: measure(params, text_quiz) for name, params in (('base', base), ('fine-tuned', tuned))}
answer_loss = {name: measure(params, questions_quiz) for name, params in (('base', base), ('fine-tuned', tuned))}
size = sum(len(d.text.encode()) for d in learnt)
columns = zip((base_cost, tuned_cost), ('base', 'fine-tuned'), strict=True)
cost_of, share_of = {}, {}
for cost, name in columns:
  cost_of[name] = f'{cost["tflop"]:.1f} TFLOP, {cost["seconds"]:.0f} s of steps'
  share_of[name] = f'{cost["tokens"]:,} tokens seen, {cost["learned"]:,.0f} with a loss'
rows = [
  ('purpose', 'know the language: the next token', 'do as asked: an answer, and an end'),
  ('data', f'{len(learnt)} documents, {size:,} bytes, no labels', f'{len(asked):,} questions with answers, by rule'),
  ('tokens', share_of['base'], share_of['fine-tuned']),
  ('cost', cost_of['base'], cost_of['fine-tuned']),
  ('held-out text, nats a token', *(f'{x:.3f}' for x in text_loss.values())),
  ('held-out answers, nats a token', *(f'{x:.3f}' for x in answer_loss.values())),
  ('behaviour: kind told right', *(f'{x.mean():.0%}' for x in score.values())),
  ('behaviour: ends by itself', *(f'{x:.0%}' for x in ended.values())),
  ('output: "Write a line of law."', code(said['base, as text'][2]), code(said['fine-tuned, as a turn'][2])),
]
table(['', 'pre-trained', 'fine-tuned'], rows)

# %% [markdown]
# Look at *held-out text*: fine-tuning on questions alone made the model worse at plain text. That is forgetting, and
# why a real run mixes some text in (`--data.mix`).
#
# ## A model that does know
# SmolLM2-135M-Instruct was pre-trained on two trillion tokens and then fine-tuned. The same weights are a text
# completer when they get plain text, and an assistant when they get their chat template. The file (98 MB) is found
# where the tests of this package keep it, or where `SMOLLM2_GGUF` says; without it this part is left out.

# %%
cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'jaxlm' / 'tests'
gguf = Path(os.environ.get('SMOLLM2_GGUF') or cache / 'SmolLM2-135M-Instruct.Q4_1.gguf')
ISSUE = (PROMPTS[0], SUMMARY)
real = None
if gguf.exists():
  real = interop.load(str(gguf))
  print(f'{tree.size(real.params) / 1e6:.0f} M parameters')
else:
  print('SmolLM2-135M-Instruct is not here: this part is left out, and all of the above is as it was.')


def completed(model, ids, new=24):
  out = sample.generate(
    model.cfg,
    model.params,
    ids,
    jax.random.key(0),
    max_new_tokens=new,
    sampling=sample.Sampling(0.0),
    stop_ids=chatting.stop_ids(model),
  )
  kept = np.asarray(out.lengths_B) - np.asarray(out.stopped_B)
  return [model.tokenizer.decode(row[:n].tolist()) for row, n in zip(np.asarray(out.tokens_BN), kept, strict=True)]


if real is not None:
  as_text = [real.tokenizer.prefix_ids + real.tokenizer.encode(p) for p in ISSUE]
  as_turn = [
    chat.encode(real.chat_template, [{'role': 'user', 'content': p}], real.tokenizer, generation=True) for p in ISSUE
  ]
  four = completed(real, as_text + as_turn)
  shown = [(p, code(four[i]), code(four[i + len(ISSUE)])) for i, p in enumerate(ISSUE)]
  display(table(['prompt', 'as text', 'as a turn'], shown))

# %%
assert base_curves['held out'][-1][1] < counted - 0.7, 'pre-training should know more than how often tokens come'
assert score['base'].mean() < 0.1, 'a base model does not answer in one word'
assert score['fine-tuned'].mean() > commonest + 0.2, 'fine-tuning should tell kinds of text apart'
assert real is None or 'Paris' in four[0] + four[len(ISSUE)], 'SmolLM2 should know the capital of France'

# %% [markdown]
# The same life with more of everything, reward models and PPO included, is one command: `jaxlm quickstart`.
# Fine-tuning of your own rows: `jaxlm sft --init RUN --data.path rows.jsonl --run runs/tuned`.
