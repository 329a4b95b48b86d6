"""The five kinds of text a first language model is raised on, mixed by weight; the best of them again at the end.

With a network, by the names of TFDS (its catalogue has no code: give checkouts of your own):

  set -- encyclopedia=tfds:wikipedia/20230601.en web=tfds:c4/en books=tfds:pg19:train:book_text \
    code='checkouts/**/*.py' social=tfds:reddit:train:content

Without one, from files of the same five kinds:

  set -- encyclopedia=corpus/wiki.jsonl web=corpus/web.jsonl books=corpus/books.jsonl code=corpus/code.jsonl \
    social=corpus/social.jsonl

Then, for both:

  jaxlm tokenizer "$@" --out data/tokenizer.json --vocab-size 8192
  jaxlm prepare "$@" --tokenizer data/tokenizer.json --out data/chapter
  jaxlm pretrain configs/pretrain/chapter.py --run runs/chapter
  jaxlm eval runs/chapter --baselines
"""

from jaxlm.config import Compute, Data, Optim, Pretrain, Watch
from jaxlm.models.config import ModelConfig

config = Pretrain(
  run='runs/chapter',
  model=ModelConfig(d_model=320, n_layers=6, n_heads=5, d_ff=864, max_seq_len=1024),
  data=Data(
    path='data/chapter',
    mix='encyclopedia*0.2 + web*0.3 + books*0.2 + code*0.15 + social*0.15',
    phases=('0.8: encyclopedia*0.35 + web*0.1 + books*0.35 + code*0.1 + social*0.1',),
    seq_len=256,
    global_batch=8,
  ),
  optim=Optim(name='muon', lr=4e-3, schedule='wsd', warmup_steps=50, decay_fraction=0.3, final_ratio=0.02),
  compute=Compute(unroll=6),
  watch=Watch(
    log_every=5,
    eval_every=200,
    eval_batches=40,
    sample_every=400,
    save_every=200,
    prompts=('The history of', 'def ', 'Subject:'),
    spike=1.6,
  ),
  steps=4000,
)
