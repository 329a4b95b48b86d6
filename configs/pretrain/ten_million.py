"""A 10 M-parameter model on 89 MB of ten kinds of text, English, code and Hindi: about an hour on two CPU cores.

  set -- corpus/{wiki,encyclopedia,books,code,technical,web,social,legal_gov,medical,hindi}.jsonl
  jaxlm tokenizer "$@" --out data/tokenizer.json --vocab-size 8192
  jaxlm prepare "$@" --tokenizer data/tokenizer.json --out data/ten
  jaxlm pretrain configs/pretrain/ten_million.py --run runs/ten --data.path data/ten
  jaxlm eval runs/ten --baselines

The last fifth of the run, while the learning rate falls, is spent on the best written of them.
"""

from jaxlm.config import Compute, Data, Optim, Pretrain, Watch
from jaxlm.models.config import ModelConfig

config = Pretrain(
  run='runs/ten',
  model=ModelConfig(d_model=320, n_layers=6, n_heads=5, d_ff=864, max_seq_len=1024),
  data=Data(
    path='data/ten',
    mix='technical*0.2 + code*0.14 + legal_gov*0.12 + books*0.12 + encyclopedia*0.1 + social*0.1 + wiki*0.08'
    ' + medical*0.06 + hindi*0.06 + web*0.02',
    phases=(
      '0.8: books*0.25 + encyclopedia*0.15 + wiki*0.15 + code*0.1 + social*0.1 + web*0.05 + technical*0.05'
      ' + legal_gov*0.05 + medical*0.05 + hindi*0.05',
    ),
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
    prompts=('The history of', 'def ', 'Subject:', 'भारत'),
    spike=1.6,
  ),
  steps=3600,
)
