"""The life of a language model on a laptop, from shipped text to rewards, through the functions behind the verbs."""

import time
from typing import TYPE_CHECKING, Any

from etils import epath

from jaxlm.config import Compute, Data, Optim, Pretrain, Watch
from jaxlm.console import clock, table
from jaxlm.lessons import SAMPLE as SAMPLE
from jaxlm.lessons import TEXT
from jaxlm.models.config import ModelConfig

if TYPE_CHECKING:
  from jaxlm.aligning import Verdict
  from jaxlm.data.tokenizer import Tokenizer
  from jaxlm.evals.tasks import Answers
VOCAB_SIZE = 2048
VAL_FRACTION = 0.06
PROMPTS = ('The whale', 'And the king said', 'सभी')


def settings(run: str, *, short: bool = False) -> Pretrain:
  """The run: a Llama-style model of some 3 M parameters on about a million bytes of text."""
  steps = 40 if short else 460
  return Pretrain(
    run=run,
    model=ModelConfig(d_model=256, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=640, max_seq_len=1024),
    data=Data(path=f'{run}/data', seq_len=256, global_batch=8),
    optim=Optim(name='muon', lr=5e-3, schedule='wsd', warmup_steps=20, decay_fraction=0.5, final_ratio=0.02),
    compute=Compute(unroll=4),
    watch=Watch(
      log_every=1,
      eval_every=60,
      eval_batches=64,
      sample_every=60,
      sample_tokens=48,
      prompts=PROMPTS,
      save_every=60,
    ),
    steps=steps,
  )


def tuning(run: str, *, short: bool = False) -> Pretrain:
  """The run that follows it: all weights learn to answer the instructions of `lessons`.

  The short form has folders of its own, as all that follows it: its base is another.
  """
  form = '-short' if short else ''
  return Pretrain(
    run=f'{run}/sft{form}',
    init=run,
    data=Data(path=f'{run}/instructions{form}', seq_len=256, packing='best_fit', global_batch=8),
    optim=Optim(lr=1e-3, warmup_steps=10, weight_decay=0.0, final_ratio=0.0),
    compute=Compute(unroll=4),
    watch=Watch(log_every=1, eval_every=40, eval_batches=16, save_every=40, prompts=()),
    steps=20 if short else 240,
  )


def quickstart(run: str, *, short: bool = False) -> epath.Path:
  """Runs or continues the whole life in the folder `run`; prints what happens and returns the report's path."""
  from jaxlm import aligning, report

  began = time.monotonic()
  config = settings(run, short=short)
  epath.Path(run).mkdir(parents=True, exist_ok=True)
  vocabulary = _tokenizer(run)
  baselines = _data(config, vocabulary)
  _pretrained(config, baselines)
  _writes(run)
  tuned, most = tuning(run, short=short), 5 if short else 60
  found = _tuned(tuned, vocabulary, most, short)
  reward, ppo = aligning.judge_runs(tuned)[0], aligning.reinforcing(tuned, short=short)
  verdict = _rewarded(tuned, ppo, short)
  _chapter(run, tuned, ppo, found, verdict, most)
  pages = [report.write(one) for one in (run, tuned.run, reward, ppo.run)]
  print(f'reports: {", ".join(map(str, pages))}  ({clock(time.monotonic() - began)})')
  return pages[0]


def _tokenizer(run: str) -> 'Tokenizer':
  from jaxlm.data import prepare, sources, tokenizer

  print('1. tokenizer: byte-level BPE on the shipped sample of public-domain text')
  path = epath.Path(run) / 'data-tokenizer.json'
  if not path.exists():  # what is held out is held out from the tokenizer too
    tokenizer.train(prepare.training_texts(TEXT, VAL_FRACTION), VOCAB_SIZE).save(path)
  vocabulary = tokenizer.load(path)
  fertility = tokenizer.tokens_per_word(vocabulary, [d.text for d in sources.documents(TEXT)])
  per_word = {script: tokens / words for script, (words, tokens) in fertility.items() if words > 500}
  print(
    f'   {vocabulary.vocab_size} tokens; tokens per word: ' + ', '.join(f'{k} {v:.2f}' for k, v in per_word.items())
  )
  return vocabulary


def _data(config: Pretrain, vocabulary: 'Tokenizer') -> dict[str, float]:
  """Prepares the text; what compressors make of the held-out part of it, in bits per byte."""
  from jaxlm.data import prepare
  from jaxlm.evals import compression

  print('2. data: documents -> tokens on disk, a TFDS array_record data set')
  _counted(prepare.prepare(TEXT, vocabulary, config.data.path, val_fraction=VAL_FRACTION))
  prepared = prepare.load(config.data.path)
  train, held_out = prepared.document_bytes('train'), prepared.document_bytes('validation')
  return {
    'xz -9': compression.xz_bits_per_byte(held_out),
    'xz -9 after the training text': compression.xz_conditional_bits_per_byte(train, held_out),
    'byte 5-gram': compression.ngram_bits_per_byte(train, held_out),
  }


def _counted(summary: Any) -> None:
  for split, count in summary.splits.items():
    print(f'   {split}: {count.documents:,} documents, {count.tokens:,} tokens, {count.bytes:,} bytes')


def _pretrained(config: Pretrain, baselines: dict[str, float]) -> None:
  from jaxlm.aligning import trained
  from jaxlm.loops import pretrain

  print(f'3. pre-training: {config.steps} steps')
  trained(config)
  print('4. held-out bits per byte (less is better)')
  found = baselines | {'this model': final_bits_per_byte(epath.Path(config.run))}
  for name, value in sorted(found.items(), key=lambda item: -item[1]):
    print(f'   {value:6.3f}  {name}')
  pretrain.add_facts(epath.Path(config.run), {'held-out bits per byte': found})


def _writes(run: str) -> None:
  import jax

  from jaxlm.loops import writing
  from jaxlm.models import Run

  print('5. it writes')
  config, params, vocabulary, _ = writing.load(run)
  texts = writing.complete(config.model, params, vocabulary, PROMPTS, jax.random.key(1), new=80, run=Run())
  for prompt, text in zip(PROMPTS, texts, strict=True):
    print(f'   {prompt}{text}'.replace('\n', '\n   '))


def _tuned(config: Pretrain, vocabulary: 'Tokenizer', most: int, short: bool) -> 'dict[str, Answers]':
  """Instruction tuning, and what both models answer to `most` held-out instructions of each task."""
  from jaxlm import aligning, lessons
  from jaxlm.data import prepare, sources
  from jaxlm.evals import tasks
  from jaxlm.loops import pretrain

  print(f'6. instruction tuning: {config.steps} steps on questions made of the same text by rule')
  folder, made = (
    epath.Path(config.data.path.replace('instructions', 'lessons')),
    lessons.lessons(sources.documents(TEXT)),
  )
  held_out = aligning.asked(config, made['continue'], short=short)
  for task, rows in made.items():
    lessons.write(folder / f'{task}.jsonl', [row for row in rows if row['messages'][0]['content'] not in held_out])
  _, known, chat = prepare.chat_of('plain', None, vocabulary, max_len=config.data.seq_len)
  _counted(prepare.prepare((f'{folder}/*.jsonl',), known, config.data.path, chat=chat, val_fraction=0.1))
  aligning.trained(config)

  print('7. held-out questions: how many percent are answered right, before and after')
  data, runs = prepare.load(config.data.path), (config.init, config.run)
  found = tasks.compare(runs, data, most, new=24, names=('exact_match', 'f1'))
  print(table(*tasks.rows(found)))
  tasks.write(found, data, f'{config.run}/answers.jsonl')
  before, after = (found[run] for run in runs)
  percent = {
    f'{task}: {tasks.TITLES[name]}': f'{before.scores[task][name]:.0f} to {value:.0f}'
    for task, values in after.scores.items()
    for name, value in values.items()
  }
  pretrain.add_facts(epath.Path(config.run), {'percent right, before to after': percent})
  return found


def _rewarded(tuned: Pretrain, ppo: Pretrain, short: bool) -> 'Verdict':
  """Preferences, reward models, PPO, and who wins."""
  from jaxlm import aligning
  from jaxlm.evals import rewards

  print('8. two reward models, each judged on the half that the other learnt from')
  print(f'   {aligning.preferred(tuned, short=short)}')
  judged = aligning.judges(tuned, short=short)
  if judged is not None:
    print(table(*rewards.rows(judged)) + ''.join(f'\n   {line}' for line in rewards.lines(judged)))
  print(f'9. PPO on the scores of one of them: {ppo.steps} steps')
  for name, (first, last) in aligning.reinforced(ppo).items():
    print(f'   {name}: {first:.3f} at first, {last:.3f} at last')
  verdict = aligning.compared(tuned, ppo)
  print(f'10. {len(verdict.rows)} prompts that no stage after pre-training has seen, answers drawn: who wins')
  print('\n'.join(table(*one) for one in aligning.tables(verdict)))
  aligning.noted(ppo, verdict)
  return verdict


def _chapter(run: str, tuned: Pretrain, ppo: Pretrain, found: Any, verdict: 'Verdict', most: int) -> None:
  """The table of the whole life, from this run's own figures."""
  from jaxlm import aligning, chapter
  from jaxlm.console import wrapped
  from jaxlm.data import prepare
  from jaxlm.evals import tasks

  print('11. pre-trained against fine-tuned')
  found |= tasks.compare((ppo.run,), prepare.load(tuned.data.path), most, new=24, names=('exact_match', 'f1'))
  shown = chapter.rows(run, tuned.run, aligning.judge_runs(tuned), ppo.run, found, verdict)
  wrapped(*shown)
  for folder in (run, ppo.run):
    chapter.write(folder, *shown)


def final_bits_per_byte(folder: epath.Path) -> float:
  """The last evaluation that the run wrote down."""
  from jaxlm.train.metrics import read_rows

  return [row['eval/bits_per_byte'] for row in read_rows(folder / 'metrics.jsonl') if 'eval/bits_per_byte' in row][-1]
