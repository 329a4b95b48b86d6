"""What a run begins with: the weights of another run or of a foreign model, laid out as training has them."""

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

import jax
from etils import epath

from jaxlm import config as configs
from jaxlm import hosts, interop, lora, models, program, sharding, tree
from jaxlm.config import Pretrain
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.prepared import TEMPLATE
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.files import sha256
from jaxlm.interop import hf_config
from jaxlm.loops.corpus import Corpus
from jaxlm.models import ModelConfig
from jaxlm.train import checkpoint

GENERATION = 'generation_config.json'
WEIGHTS = ('*.safetensors', '*.gguf')


class Base(NamedTuple):
  """A model to begin with."""

  model: ModelConfig
  params: Any
  tokenizer: Tokenizer
  said: str


def is_run(source: str) -> bool:
  """Whether a source is a run's folder rather than a foreign model. Raises InputError where there is nothing at all."""
  if str(source).startswith(interop.HUB):
    return False
  if not epath.Path(source).expanduser().exists():
    raise InputError(f'{source}: holds no finished checkpoint of a run, and is no folder or file of a foreign model')
  return (epath.Path(source) / 'checkpoints').exists()


def model_of(source: str) -> ModelConfig:
  """The architecture of a source. Raises InputError if it is neither a run nor a foreign model."""
  if is_run(source):
    text = (epath.Path(source) / 'config.json').read_text()
    return configs.from_json(Pretrain, text).model
  foreign = interop.open_source(source)
  return hf_config.parse(foreign.config, foreign.where)


def with_model(config: Pretrain) -> Pretrain:
  """The config with the model of `init`, where it names none itself, and with that of the teacher."""
  how = config.distill
  if how.teacher and how.architecture == ModelConfig():
    config = dataclasses.replace(config, distill=dataclasses.replace(how, architecture=model_of(how.teacher)))
  if not config.init or config.model != ModelConfig():
    return config
  return dataclasses.replace(config, model=model_of(config.init))


def digest_of(source: str) -> str:
  """sha256 over a source's weights: of the digests of a run's newest checkpoint, or of a foreign model's files.

  What adapters are trained on is this and no other; it reads a foreign model whole.
  """
  if is_run(source):
    checkpoints = checkpoint.Checkpoints(epath.Path(source) / 'checkpoints')
    return sha256(checkpoints.path(_last(checkpoints, source)) / checkpoint.DIGEST)
  path = epath.Path(interop.open_source(source).where)
  files = [path] if path.is_file() else sorted(file for pattern in WEIGHTS for file in path.glob(pattern))
  return hashlib.sha256(' '.join(f'{file.name} {sha256(file)}' for file in files).encode()).hexdigest()


def open_base(source: str, mesh: Any = None, rules: sharding.Rules = sharding.RULES) -> Base:
  """A source's weights in float32, on a mesh or on one device. Raises InputError for what is not whole or known."""
  if is_run(source):
    found = newest(source)
    config, params = read(found, mesh, rules)
    return Base(config.model, lora.merge(params), found.tokenizer, f'{source}, step {found.step}')
  model = interop.load(source, mesh=mesh, rules=rules)
  if model.tokenizer is None:
    raise InputError(f'{source}: has no tokenizer')
  return Base(model.cfg, model.params, model.tokenizer, source)


class Newest(NamedTuple):
  """A run's newest checkpoint, looked at and not read."""

  checkpoints: checkpoint.Checkpoints
  step: int
  meta: dict[str, Any]
  config: Pretrain
  tokenizer: Tokenizer


def newest(run: Any) -> Newest:
  """Raises InputError if the run has no checkpoint, a damaged one, or another tokenizer than it was trained with."""
  run = epath.Path(run)
  checkpoints = checkpoint.Checkpoints(run / 'checkpoints')
  step = _last(checkpoints, run)
  where = checkpoints.path(step)
  if damaged := hosts.from_first(lambda: checkpoint.verify(where)):
    raise InputError(f'{where}: damaged: {"; ".join(damaged)}')
  meta, vocabulary = checkpoints.meta(step), tokenizers.load(run / 'tokenizer.json')
  if vocabulary.digest != meta['tokenizer']:
    raise InputError(f'{run / "tokenizer.json"}: is not the tokenizer that the run was trained with: put that one back')
  return Newest(checkpoints, step, meta, configs.from_json(Pretrain, json.dumps(meta['config'])), vocabulary)


def _last(checkpoints: checkpoint.Checkpoints, run: Any) -> int:
  steps = checkpoints.steps()
  if not steps:
    raise InputError(f'{run}: holds no finished checkpoint; train one with `jaxlm pretrain ... --run {run}`')
  return steps[-1]


def read(found: Newest, mesh: Any = None, rules: sharding.Rules = sharding.RULES) -> tuple[Pretrain, Any]:
  """(config, parameters) of a checkpoint: its average, where the optimizer keeps one; adapters on their base.

  The optimizer's state is read only where the average is in it.
  """
  config, learns = found.config, program.trainable(found.config)
  params = jax.eval_shape(lambda: program.adapt(config, models.init(config.model, jax.random.key(0))))
  picked = tree.split(params, learns)[0]
  like = {'params': program.kept(config, params)}
  if config.optim.ema_decay or config.optim.name == 'schedule_free':
    like['opt_state'] = jax.eval_shape(program.make_optimizer(config).init, picked)
  if mesh is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda x: device, like)
  else:
    named = sharding.with_names(like, models.abstract(config.model))
    shardings = sharding.state_shardings(named, mesh, rules)
  like = sharding.laid(like, shardings)
  loaded = found.checkpoints.restore(found.step, like, partial=True, verified=True)
  whole = loaded['params']
  if config.lora.rank:
    whole = on_base(config, loaded['params'], found.meta['base'], mesh, rules)
  return config, program.evaluated(config, loaded.get('opt_state'), whole)


def shapes(config: Pretrain, mesh: Any, rules: sharding.Rules = sharding.RULES) -> Any:
  """What `read` has of a run of this config, as shapes laid out on a mesh whose devices may not be there."""
  params = jax.eval_shape(lambda: program.adapt(config, models.init(config.model, jax.random.key(0))))
  named = sharding.with_names(params, models.abstract(config.model))
  return sharding.laid(params, sharding.state_shardings(named, mesh, rules))


def on_base(config: Pretrain, adapters: Any, digest: str, mesh: Any, rules: sharding.Rules = sharding.RULES) -> Any:
  """Saved adapters on the base that `config.init` names. Raises InputError if that is not the one of `digest`."""
  mine = hosts.from_first(lambda: digest_of(config.init))
  if mine != digest:
    shown = f'sha256 {mine[:12]}, not {digest[:12]}'
    raise InputError(f'{config.init}: is not the base that the adapters were trained on ({shown}): put that one back')
  params = program.adapt(config, fitted(config, open_base(config.init, mesh, rules)).params)
  return tree.combine(adapters, tree.split(params, program.trainable(config))[1])


def fitted(config: Pretrain, base: Base) -> Base:
  """The base as `config.model` has it, with new tokens that begin as the mean of the old ones.

  Raises InputError where they differ in more than that and in how positions are met.
  """
  if config.model.vocab_size > base.model.vocab_size:
    layout = jax.tree.map(lambda x: x.sharding, base.params)
    model, params = models.grow(base.model, base.params, config.model.vocab_size)
    base = base._replace(model=model, params=jax.device_put(params, layout))
  named = lambda m: dataclasses.asdict(dataclasses.replace(m, n_kv_heads=m.kv_heads, head_dim=m.head_size))
  old, new = named(base.model), named(config.model)
  loose = {name for name in new if name.startswith('rope_')}
  loose |= {'max_seq_len'} if base.model.positions == 'rope' else set()
  other = [f'model.{n} is {old[n]}, not {new[n]}' for n in new if old[n] != new[n] and n not in loose]
  if other:
    raise InputError(f'{config.init}: is another model: ' + '; '.join(other))
  return base._replace(model=config.model)


def check_tokenizer(config: Pretrain, base: Base, tokenizer: Tokenizer) -> None:
  """Raises InputError if the data's tokenizer is neither that of the base nor one with some tokens more."""
  if tokenizer.digest == base.tokenizer.digest:
    return
  if not tokenizer.extends(base.tokenizer):
    raise InputError(f'{config.init}: has another tokenizer than the data in {config.data.path}: prepare that with it')
  learns = program.trainable(config)
  if not learns('embed', base.params['embed']):
    new = ', '.join(map(tokenizer.inner.id_to_token, range(base.tokenizer.vocab_size, tokenizer.vocab_size)))
    raise InputError(f'new tokens ({new}) would never be learnt: add --lora.also embed,head (or trainable with them)')


def talk(config: Pretrain, opened: Corpus) -> dict[str, str]:
  """The files that make a run one to talk with: the template of its conversations and what ends an answer.

  Of a run without conversations those of the run that it begins with, if it has them.
  """
  for path, folder in opened.folders.items():
    if folder.summary.chat:
      ends = sorted({*folder.summary.chat['end'], folder.tokenizer.eos_id})
      return {TEMPLATE: (epath.Path(path) / TEMPLATE).read_text(), GENERATION: json.dumps({'eos_token_id': ends})}
  there = [epath.Path(config.init) / name for name in (TEMPLATE, GENERATION)] if config.init else []
  return {path.name: path.read_text() for path in there if is_run(config.init) and path.exists()}
