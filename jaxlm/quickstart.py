"""The life of a language model on a laptop, from shipped text to samples, through the functions behind the verbs."""

import time
from pathlib import Path

from etils import epath

from jaxlm.config import Compute, Data, Optim, Pretrain, Watch
from jaxlm.console import Training, clock, terminable
from jaxlm.models.config import ModelConfig

SAMPLE = Path(__file__).parent / 'assets' / 'sample'
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


def quickstart(run: str, *, short: bool = False) -> epath.Path:
  """Runs or continues the whole life in the folder `run`; prints what happens and returns the report's path."""
  import jax

  from jaxlm import report
  from jaxlm.data import prepare, sources, tokenizer
  from jaxlm.evals import compression
  from jaxlm.loops import pretrain, writing
  from jaxlm.models import Run

  began = time.monotonic()
  config = settings(run, short=short)
  folder = epath.Path(run)
  folder.mkdir(parents=True, exist_ok=True)
  specs = (f'{SAMPLE}/*.jsonl',)

  print('1. tokenizer: byte-level BPE on the shipped sample of public-domain text')
  path = folder / 'data-tokenizer.json'
  texts = [d.text for d in sources.documents(specs)]
  if not path.exists():  # what is held out is held out from the tokenizer too
    tokenizer.train(prepare.training_texts(specs, VAL_FRACTION), VOCAB_SIZE).save(path)
  vocabulary = tokenizer.load(path)
  fertility = tokenizer.tokens_per_word(vocabulary, texts)
  per_word = {script: tokens / words for script, (words, tokens) in fertility.items() if words > 500}
  print(
    f'   {vocabulary.vocab_size} tokens; tokens per word: ' + ', '.join(f'{k} {v:.2f}' for k, v in per_word.items())
  )

  print('2. data: documents -> tokens on disk, a TFDS array_record data set')
  summary = prepare.prepare(specs, vocabulary, config.data.path, val_fraction=VAL_FRACTION)
  for split, count in summary.splits.items():
    print(f'   {split}: {count.documents:,} documents, {count.tokens:,} tokens, {count.bytes:,} bytes')
  prepared = prepare.load(config.data.path)
  train, held_out = prepared.document_bytes('train'), prepared.document_bytes('validation')
  baselines = {
    'xz -9': compression.xz_bits_per_byte(held_out),
    'xz -9 after the training text': compression.xz_conditional_bits_per_byte(train, held_out),
    'byte 5-gram': compression.ngram_bits_per_byte(train, held_out),
  }

  print(f'3. pre-training: {config.steps} steps')
  with terminable() as stop, Training(config.steps) as shown:
    pretrain.pretrain(config, say=shown.say, on_step=shown.step, stop=stop)

  print('4. held-out bits per byte (less is better)')
  reached = final_bits_per_byte(folder)
  for name, value in sorted((baselines | {'this model': reached}).items(), key=lambda item: -item[1]):
    print(f'   {value:6.3f}  {name}')
  pretrain.add_facts(
    folder, {'held-out bits per byte': baselines | {'this model': reached}, 'tokens per word': per_word}
  )

  print('5. it writes')
  config, params, vocabulary, _ = writing.load(run)
  texts = writing.complete(config.model, params, vocabulary, PROMPTS, jax.random.key(1), new=80, run=Run())
  for prompt, text in zip(PROMPTS, texts, strict=True):
    print(f'   {prompt}{text}'.replace('\n', '\n   '))
  page = report.write(run)
  print(f'report: {page}  ({clock(time.monotonic() - began)})')
  return page


def final_bits_per_byte(folder: epath.Path) -> float:
  """The last evaluation that the run wrote down."""
  from jaxlm.train.metrics import read_rows

  return [row['eval/bits_per_byte'] for row in read_rows(folder / 'metrics.jsonl') if 'eval/bits_per_byte' in row][-1]
