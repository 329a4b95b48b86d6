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
# # पूर्व-प्रशिक्षित बनाम सूक्ष्म-समायोजित: एक ही क़दम, दो चरण, वही सवाल
#
# यह पन्ना पढ़ने के बाद आप सादे पाठ पर एक भाषा-मॉडल का पूर्व-प्रशिक्षण (pre-training) कर सकेंगे, फिर उसका
# सूक्ष्म-समायोजन (fine-tuning) कर सकेंगे कि वह कहा हुआ काम करे, और आँकड़ों से बता सकेंगे कि दूसरे चरण ने क्या बदला और
# उसकी क़ीमत क्या रही। आप देखेंगे कि दोनों चरण प्रशिक्षण का *एक ही* क़दम चलाते हैं: अन्तर बस इतना है कि भीतर कौन-सी
# पंक्तियाँ जाती हैं, और हानि (loss) किन टोकनों पर देखी जाती है।
#
# लैपटॉप पर इसमें एक-दो मिनट लगते हैं। अन्त में वही सवाल 13.5 करोड़ प्राचलों वाले एक असली मॉडल से भी पूछे जाते हैं,
# यदि उसकी फ़ाइल आपकी डिस्क पर हो। चित्रों पर लिखावट अंग्रेज़ी में है, क्योंकि हर मशीन पर देवनागरी का फ़ॉण्ट नहीं
# होता।

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
# ## पाठ, और जो अलग रखा गया
# पाठ वही है जो पैकेज के साथ आता है: उपन्यास, नाटक, क़ानून, कोड और भी बहुत कुछ, लगभग दस लाख बाइट। हर बारहवाँ दस्तावेज़
# अलग रखा जाता है; उससे कुछ भी नहीं सीखता, टोकनाइज़र भी नहीं। इसमें हिन्दी थोड़ी ही है (मानव अधिकारों की सार्वभौम
# घोषणा), इसलिए सीखने वाले हिन्दी दस्तावेज़ चार-चार बार पढ़े जाते हैं।

# %%
documents = list(sources.documents(lessons.TEXT))
held_out, learnt = documents[::12], [d for i, d in enumerate(documents) if i % 12]
read = learnt + 3 * [d for d in learnt if d.kind == 'hindi']  # हिन्दी चार बार
vocabulary = tokenizer.train([d.text for d in read], 2048)
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


text, text_quiz = text_rows(read), text_rows(held_out)[::2]
print(f'सीखने के लिए {len(learnt)} दस्तावेज़, {T} टोकन की {len(text)} पंक्तियाँ; अलग रखे {len(held_out)}')

# %% [markdown]
# ## सवाल
# सूक्ष्म-समायोजन के लिए जवाब चाहिए। यहाँ वे उसी पाठ से नियम द्वारा बनाए गए हैं, किसी को लिखने नहीं पड़े: अंश किस
# प्रकार के पाठ का है, किसी पंक्ति के बाद की पंक्ति, किसी प्रकार की एक पंक्ति। सवाल हिन्दी में हैं। संवाद का साँचा
# (chat template) हर सवाल-जवाब को टोकनों में बदलता है और बताता है कि उनमें से सहायक के लिखे कौन-से हैं: केवल वही सीखे
# जाते हैं।

# %%
_, template = turns.choose('plain', None)
KINDS = {
  'novel': 'उपन्यास',
  'play': 'नाटक',
  'speeches': 'भाषण',
  'scripture': 'धर्मग्रन्थ',
  'law': 'क़ानून',
  'technical': 'तकनीकी',
  'code': 'कोड',
  'hindi': 'हिन्दी',
  'languages': 'विदेशी',
}
KIND, CONTINUE = 'यह किस प्रकार का पाठ है?', 'आगे लिखो।'


def line_of(kind):
  return f'{KINDS[kind]} की एक पंक्ति लिखो।'


def hindi_lessons(some):
  """`lessons.lessons` की पंक्तियाँ, सवाल और पाठ के प्रकार हिन्दी में।"""
  found = lessons.lessons(some)
  asked = {f'Write a line of {kind}.': line_of(kind) for kind in KINDS}
  for task, rows in found.items():
    for row in rows:
      question, answer = row['messages']
      said = question['content'].replace('Which kind of text is this?', KIND, 1).replace('Continue.', CONTINUE, 1)
      question['content'] = asked.get(said, said)
      answer['content'] = KINDS[answer['content']] if task == 'kind' else answer['content']
  return found


def question_rows(some):
  found = []
  for rows in hindi_lessons(some).values():
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
print(f'{len(asked)} संवाद, {len(questions)} पंक्तियों में। उनमें से एक, सीखा जाने वाला भाग कोष्ठक में:\n')
print(vocabulary.decode(ids[~learned]) + f'[{vocabulary.decode(ids[learned])}<eos>]')

# %% [markdown]
# ## दोनों चरणों का एक ही क़दम
# हानि: अगले टोकन की क्रॉस-एण्ट्रॉपी, जहाँ मास्क खुला है। मास्क बैच का ही हिस्सा है, इसलिए यह फलन जानता ही नहीं कि वह
# किस चरण में है।

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
  print(f'{steps} क़दम, अलग रखा: {held[0][1]:.3f} -> {held[-1][1]:.3f} नैट प्रति टोकन, {cost["seconds"]:.0f} सेकण्ड')
  return state.params, {'training': curve, 'held out': held}, cost


# %% [markdown]
# ## पहला चरण: पूर्व-प्रशिक्षण
# यादृच्छिक भारों से शुरू, पूरे पाठ पर।


# %%
def frequencies(rows, quiz):
  """केवल यह जानने वाले मॉडल के नैट प्रति टोकन कि कौन-सा टोकन कितनी बार आता है।"""
  of = lambda some: np.concatenate([row['targets'][row['loss_mask'] > 0] for row in some])
  counts = 1 + np.bincount(of(rows), minlength=cfg.vocab_size)
  return -np.log(counts / counts.sum())[of(quiz)].mean()


counted = frequencies(text, text_quiz)
fresh = models.init(cfg, jax.random.key(0))
print(f'{tree.size(fresh) / 1e6:.2f} M प्राचल')
base, base_curves, base_cost = stage(fresh, text, text_quiz, steps=130, lr=1e-2, name='muon')

# %% [markdown]
# ## दूसरा चरण: सूक्ष्म-समायोजन
# उन्हीं भारों से आगे, सवालों पर: कम टोकन, सीखने की छोटी दर। `base` जैसा था वैसा ही रहता है: हर क़दम एक नया वृक्ष
# लौटाता है और किसी पुराने को नहीं बदलता।

# %%
tuned, tuned_curves, tuned_cost = stage(base, questions, questions_quiz, steps=150, lr=3e-3, name='adamw')

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
# दूसरा वक्र फिर ऊँचाई से शुरू होता है: आधार-मॉडल ने सवाल का रूप कभी नहीं देखा, और हानि केवल जवाबों पर देखी जाती है।
#
# ## वही सवाल दोनों से
# आधार-मॉडल पाठ को आगे बढ़ाता है। समायोजित मॉडल को वही सवाल बातचीत की एक बारी के रूप में मिलता है, उसी साँचे में
# जिसमें वह समायोजित हुआ। न्याय के लिए बीच के खाने में आधार-मॉडल को भी वही साँचा मिलता है।

# %%
SUMMARY = 'निम्नलिखित पाठ का सारांश लिखो: सभी मनुष्य जन्म से स्वतन्त्र हैं। उन्हें शिक्षा का, काम का और विश्राम का अधिकार है।'
PROMPTS = ('फ़्रांस की राजधानी का नाम है', SUMMARY, line_of('law'), line_of('hindi'))
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
  'आधार, पाठ के रूप में': written(base, raw, 40)[0],
  'आधार, बारी के रूप में': written(base, [turn(p) for p in PROMPTS], 40)[0],
  'समायोजित, बारी के रूप में': written(tuned, [turn(p) for p in PROMPTS], 40)[0],
}


def table(header, rows):
  safe = lambda cells: '| ' + ' | '.join(' '.join(str(c).replace('|', '\\|').split()) for c in cells) + ' |'
  return Markdown('\n'.join([safe(header), safe(['---'] * len(header)), *map(safe, rows)]))


code = lambda text: '`' + ' '.join(text.replace('`', "'").split()) + '`'
table(['सवाल', *said], [[p, *map(code, each)] for p, *each in zip(PROMPTS, *said.values(), strict=True)])

# %% [markdown]
# राजधानी क्या होती है, यह दोनों में से कोई नहीं जानता: इतने छोटे मॉडल में दस लाख बाइट के बाद तथ्य नहीं होते। जो बदला
# वह व्यवहार है: समायोजित मॉडल जवाब देता है और रुक जाता है। इसे गिना जा सकता है, ऐसे दस्तावेज़ों के अंशों पर जो किसी
# चरण ने नहीं देखे: यह किस प्रकार का पाठ है? दोनों मॉडलों को वही टोकन दिए जाते हैं।

# %%
quiz = hindi_lessons(held_out)['kind']
rng = np.random.default_rng(0)
quiz = [quiz[i]['messages'] for i in rng.permutation(len(quiz))[:96]]
prompts, right = [turn(q['content']) for q, _ in quiz], [a['content'] for _, a in quiz]
score, ended = {}, {}
for name, params in (('base', base), ('fine-tuned', tuned)):
  answers, stopped = written(params, prompts, 20, greedy=True)
  score[name] = np.array([exact_match(a, r) for a, r in zip(answers, right, strict=True)])
  ended[name] = stopped.mean()
  print(f'{name:>10}: सही {score[name].mean():.1%}, स्वयं समाप्त {ended[name]:.1%}; "{answers[0][:60]}"')
commonest = max(right.count(kind) for kind in set(right)) / len(right)
print(f'हमेशा सबसे आम प्रकार कहने पर: {commonest:.1%}')

# %%
kinds, english = sorted(set(right)), {hindi: name for name, hindi in KINDS.items()}
mean = lambda name, kind: score[name][[r == kind for r in right]].mean()
plt.figure(figsize=(8, 2.8))
for shift, name in ((-0.2, 'base'), (0.2, 'fine-tuned')):
  plt.bar(np.arange(len(kinds)) + shift, [100 * mean(name, kind) for kind in kinds], 0.4, label=name)
plt.xticks(range(len(kinds)), [f'{english[kind]}\n({right.count(kind)})' for kind in kinds], fontsize=8)
plt.ylabel('% told right')
plt.legend()
plt.title('which kind of text is this? held-out passages', fontsize=10)
plt.show()

# %% [markdown]
# ## दोनों चरण एक तालिका में
# सारे आँकड़े ऊपर के ही प्रशिक्षण के हैं।

# %%
text_loss = {name: measure(params, text_quiz) for name, params in (('base', base), ('fine-tuned', tuned))}
answer_loss = {name: measure(params, questions_quiz) for name, params in (('base', base), ('fine-tuned', tuned))}
size = sum(len(d.text.encode()) for d in learnt)
columns = zip((base_cost, tuned_cost), ('base', 'fine-tuned'), strict=True)
cost_of, share_of = {}, {}
for cost, name in columns:
  cost_of[name] = f'{cost["tflop"]:.1f} TFLOP, {cost["seconds"]:.0f} सेकण्ड'
  share_of[name] = f'{cost["tokens"]:,} टोकन देखे, {cost["learned"]:,.0f} पर हानि'
rows = [
  ('उद्देश्य', 'भाषा जानना: अगला टोकन', 'कहा हुआ करना: जवाब, और फिर रुकना'),
  ('आँकड़े', f'{len(learnt)} दस्तावेज़, {size:,} बाइट, बिना लेबल', f'{len(asked):,} सवाल-जवाब, नियम से बने'),
  ('टोकन', share_of['base'], share_of['fine-tuned']),
  ('क़ीमत', cost_of['base'], cost_of['fine-tuned']),
  ('अलग रखा पाठ, नैट प्रति टोकन', *(f'{x:.3f}' for x in text_loss.values())),
  ('अलग रखे जवाब, नैट प्रति टोकन', *(f'{x:.3f}' for x in answer_loss.values())),
  ('व्यवहार: पाठ का प्रकार सही बताया', *(f'{x.mean():.0%}' for x in score.values())),
  ('व्यवहार: स्वयं समाप्त करता है', *(f'{x:.0%}' for x in ended.values())),
  (f'उत्तर: "{PROMPTS[2]}"', code(said['आधार, पाठ के रूप में'][2]), code(said['समायोजित, बारी के रूप में'][2])),
]
table(['', 'पूर्व-प्रशिक्षित', 'सूक्ष्म-समायोजित'], rows)

# %% [markdown]
# *अलग रखा पाठ* वाली पंक्ति देखिए: केवल सवालों पर समायोजन से मॉडल सादे पाठ में कमज़ोर हुआ। यही भूलना (forgetting) है,
# और इसी कारण असली प्रशिक्षण में कुछ सादा पाठ मिलाया जाता है (`--data.mix`)।
#
# ## एक मॉडल जो सचमुच जानता है
# SmolLM2-135M-Instruct का पूर्व-प्रशिक्षण बीस खरब टोकनों पर हुआ और फिर सूक्ष्म-समायोजन। वही भार सादा पाठ मिलने पर पाठ
# पूरा करते हैं, और संवाद का साँचा मिलने पर सहायक बन जाते हैं। उसने अंग्रेज़ी पढ़ी है: नीचे वही बात अंग्रेज़ी में भी
# पूछी गई है और हिन्दी में भी। फ़ाइल (98 MB) वहीं ढूँढी जाती है जहाँ इस पैकेज के परीक्षण उसे रखते हैं, या जहाँ
# `SMOLLM2_GGUF` बताए; न मिले तो यह भाग छोड़ दिया जाता है।

# %%
cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'jaxlm' / 'tests'
gguf = Path(os.environ.get('SMOLLM2_GGUF') or cache / 'SmolLM2-135M-Instruct.Q4_1.gguf')
ISSUE = ('The capital of France is', PROMPTS[0], SUMMARY)
real = None
if gguf.exists():
  real = interop.load(str(gguf))
  print(f'{tree.size(real.params) / 1e6:.0f} M प्राचल')
else:
  print('SmolLM2-135M-Instruct यहाँ नहीं है: यह भाग छोड़ दिया गया; ऊपर का सब कुछ जैसा था वैसा है।')


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
  display(table(['सवाल', 'पाठ के रूप में', 'बारी के रूप में'], shown))

# %%
assert base_curves['held out'][-1][1] < counted - 0.7, 'pre-training should know more than how often tokens come'
assert score['base'].mean() < 0.1, 'a base model does not answer in one word'
assert score['fine-tuned'].mean() > commonest + 0.2, 'fine-tuning should tell kinds of text apart'
assert real is None or 'Paris' in four[0] + four[len(ISSUE)], 'SmolLM2 should know the capital of France'

# %% [markdown]
# इसी जीवन-क्रम का बड़ा रूप, पुरस्कार-मॉडल और PPO सहित, एक ही आदेश है: `jaxlm quickstart`। अपनी पंक्तियों पर समायोजन:
# `jaxlm sft --init RUN --data.path rows.jsonl --run runs/tuned`।
