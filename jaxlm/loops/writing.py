"""What a model writes: texts completed by parameters at hand, or by those of a saved run."""

import json
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from jaxlm import config as configs
from jaxlm import hosts, models, program, sample, sharding
from jaxlm.config import Pretrain
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.models import ModelConfig
from jaxlm.train import checkpoint, optim

SAMPLING = sample.Sampling(temperature_B=0.6, top_p_B=0.9)


def complete(
  cfg: ModelConfig,
  params: Any,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  key: Any,
  *,
  new: int,
  run: models.Run,
  sampling: sample.Sampling = SAMPLING,
  stop: Sequence[str] = (),
  draft: sample.Lookup | sample.Draft | None = None,
) -> list[str]:
  """What the model writes after each prompt, as text, to the end of a document or before a `stop` string."""
  first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id  # something has to be there to go on from
  ids = [tokenizer.prefix_ids + tokenizer.encode(p) or [first] for p in prompts]
  ends = {'stop_ids': (tokenizer.eos_id,), 'stop': stop, 'tokenizer': tokenizer}
  out = sample.generate(cfg, params, ids, key, max_new_tokens=new, sampling=sampling, run=run, draft=draft, **ends)
  tokens_BN, lengths_B = hosts.read(out.tokens_BN), hosts.read(out.lengths_B)
  texts = [tokenizer.decode(row[:n].tolist()) for row, n in zip(tokens_BN, lengths_B, strict=True)]
  return [text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))] for text in texts]


def load(run: Any, layout: Any = None) -> tuple[Pretrain, Any, Tokenizer, int]:
  """(config, parameters, tokenizer, step) of a run's newest checkpoint: its average, where the optimizer keeps one.

  `layout` gives the sharding of each parameter (a tree like them); without it all are on one device of this process.
  The optimizer's state is read only where the average is in it. Raises InputError if the run has no checkpoint, a
  damaged one, or another tokenizer than it was trained with.
  """
  run = epath.Path(run)
  checkpoints = checkpoint.Checkpoints(run / 'checkpoints')
  steps = checkpoints.steps()
  if not steps:
    raise InputError(f'{run}: holds no finished checkpoint; train one with `jaxlm pretrain ... --run {run}`')
  step, where = steps[-1], checkpoints.path(steps[-1])
  if damaged := hosts.from_first(lambda: checkpoint.verify(where)):
    raise InputError(f'{where}: damaged: {"; ".join(damaged)}')
  meta, vocabulary = checkpoints.meta(step), tokenizers.load(run / 'tokenizer.json')
  if vocabulary.digest != meta['tokenizer']:
    raise InputError(f'{run / "tokenizer.json"}: is not the tokenizer that the run was trained with: put that one back')
  config = configs.from_json(Pretrain, json.dumps(meta['config']))
  params = jax.eval_shape(lambda: models.init(config.model, jax.random.key(0)))
  like = {'params': params}
  if config.optim.ema_decay or config.optim.name == 'schedule_free':
    like['opt_state'] = jax.eval_shape(program.make_optimizer(config).init, params)
  if layout is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda x: device, like)
  else:
    mesh = jax.tree.leaves(layout)[0].mesh
    named = sharding.with_names(like, models.abstract(config.model))
    shardings = sharding.state_shardings(named, mesh) | {'params': layout}
  like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
  found = checkpoints.restore(step, like, partial=True, verified=True)
  return config, optim.eval_params(found.get('opt_state'), found['params']), vocabulary, step
