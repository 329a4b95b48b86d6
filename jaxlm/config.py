"""What a run is: frozen dataclasses, one instance to a config file, every field a dotted flag of the command line."""

import dataclasses
import difflib
import importlib.util
import json
import re
import typing
from typing import Annotated, Any, Literal

import tyro
from etils import epath

from jaxlm.errors import InputError, at_least, within
from jaxlm.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Data:
  """What is read, and how a batch is cut from it."""

  path: str = ''  # a folder that `jaxlm prepare` wrote
  mix: str = ''  # 'wiki*0.5 + data/code*0.3': shares of the rows by kind or further folder; '': as it was prepared
  phases: tuple[str, ...] = ()  # 'SHARE: MIX': another mixture after that share of the steps, in any order
  seq_len: int = 512
  packing: Literal['concat', 'best_fit'] = 'concat'  # no place wasted, or no document cut that fits into a row
  global_batch: int = 32  # rows in an optimizer step, over all devices and micro-batches
  batch_warmup: tuple[str, ...] = ()  # 'ROWS=STEP': so many rows before that step, as in '8=200' '16=400'
  held_out: tuple[str, ...] = ()  # further prepared folders, whose held-out text is evaluated and nothing is read of

  def __post_init__(self):
    at_least(1, 'data', seq_len=self.seq_len, global_batch=self.global_batch)


@dataclasses.dataclass(frozen=True)
class Chat:
  """How `jaxlm sft` reads conversations, where data.path is no prepared folder (see `jaxlm prepare --chat`)."""

  template: str = (
    ''  # 'model' (that of init), chatml, llama3, gemma, mistral, qwen, plain, a file; '': model, else chatml
  )
  learn: Literal['assistant', 'last', 'all'] = 'assistant'  # whose turns have a loss
  columns: tuple[str, ...] = ()  # 'prompt=question' 'response=answer', where they are not to be guessed
  val_fraction: float = 0.05  # of the conversations, held out
  max_bad: int = 0  # rows that may be left out


@dataclasses.dataclass(frozen=True)
class Optim:
  """The optimizer and its learning-rate schedule (see `jaxlm.train.optim`)."""

  name: Literal['adamw', 'muon', 'lion', 'adafactor', 'schedule_free'] = 'adamw'
  lr: float = 1e-3
  schedule: Literal['cosine', 'linear', 'wsd', 'constant', 'restarts'] = 'cosine'
  warmup_steps: int = 100
  decay_fraction: float = 0.2  # of the steps, at the end of a wsd schedule
  final_ratio: float = 0.1  # last learning rate over the peak
  cycles: int = 4  # of a restarts schedule
  weight_decay: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  muon_momentum: float = 0.95
  clip_norm: float | None = 1.0
  group_lr: tuple[str, ...] = ()  # 'PATTERN=FACTOR': leaves whose path matches learn at a multiple of lr
  ema_decay: float = 0.0  # above 0, an average of the weights is kept, and evaluated, sampled and exported
  group_decay: tuple[str, ...] = ()  # the same for weight_decay

  def __post_init__(self):
    within('(0, inf)', 'optim', clip_norm=self.clip_norm)
    within('[0, inf)', 'optim', lr=self.lr, weight_decay=self.weight_decay, eps=self.eps)
    within('[0, 1]', 'optim', decay_fraction=self.decay_fraction, final_ratio=self.final_ratio)
    within('[0, 1)', 'optim', b1=self.b1, b2=self.b2, muon_momentum=self.muon_momentum, ema_decay=self.ema_decay)
    if self.ema_decay and self.name == 'schedule_free':
      raise InputError('ema_decay: schedule_free keeps an average of its own; leave it 0')
    at_least(0, 'optim', warmup_steps=self.warmup_steps)
    at_least(1, 'optim', cycles=self.cycles)


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each mesh axis; one of them may be -1, the rest."""

  data: int = 1
  fsdp: int = -1
  tensor: int = 1
  sequence: int = 1
  expert: int = 1  # devices that a layer's experts are spread over; to all else they are more of fsdp


@dataclasses.dataclass(frozen=True)
class Compute:
  """How the step is computed."""

  dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # auto: bfloat16 on accelerators, float32 on CPU
  # auto: by the platform (cudnn has no soft caps, and heads of up to 128), and ring where mesh.sequence > 1
  attention: Literal['auto', 'xla', 'splash', 'cudnn', 'ring'] = 'auto'
  remat: str = 'none'
  unroll: int = 1
  dropout: float = 0.0
  embed_noise: float = 0.0  # NEFTune's alpha: noise on embeddings in training (5 to 15 is usual)
  float8: bool = False  # the layers' matmuls in eight bits (needs qwix), experts' not
  loss_chunks: int = 1  # slices of the vocabulary; 1 keeps whole logits
  accum: int = 1  # micro-batches in a step

  def __post_init__(self):
    at_least(1, 'compute', unroll=self.unroll, loss_chunks=self.loss_chunks, accum=self.accum)
    within('[0, 1)', 'compute', dropout=self.dropout)
    within('[0, inf)', 'compute', embed_noise=self.embed_noise)


@dataclasses.dataclass(frozen=True)
class Lora:
  """Adapters of low rank, which then learn alone (see `jaxlm.lora`)."""

  rank: int = 0  # 0: no adapters
  alpha: float = 16.0  # the update is scaled by alpha / rank
  where: str = 'all-linear'  # or 'attention', or patterns of paths: 'layers/attn/q,layers/mlp/*'
  ranks: tuple[str, ...] = ()  # 'PATTERN=RANK' for paths or layers ('layers/3/*') of another rank
  rank_stabilized: bool = False  # alpha / sqrt(rank) (rsLoRA)
  dora: bool = False  # the magnitude of each column learns apart
  dropout: float = 0.0  # of what enters an adapter
  also: str = ''  # patterns of further leaves that learn, whole ('embed,head' for new tokens), with commas
  b_lr: float = 1.0  # times optim.lr for the second matrix (LoRA+)
  bits: Literal['none', 'nf4', 'int8'] = 'none'  # what the frozen matrices are kept in (QLoRA; needs qwix)
  tile: int = 64  # inputs that share a scale there

  def __post_init__(self):
    at_least(0, 'lora', rank=self.rank)
    at_least(1, 'lora', tile=self.tile)
    within('(0, inf)', 'lora', alpha=self.alpha, b_lr=self.b_lr)
    within('[0, 1)', 'lora', dropout=self.dropout)
    if self.bits != 'none' and not self.rank:
      raise InputError(f'lora.bits={self.bits} freezes matrices: set lora.rank, which learns in their place')
    _ = self.ranks_by_pattern

  @property
  def ranks_by_pattern(self) -> dict[str, int]:
    """`ranks` read. Raises InputError for what is not PATTERN=RANK."""
    found = [rank.rpartition('=') for rank in self.ranks]
    for pattern, _, rank in found:
      if not pattern or not rank.isdigit():
        raise InputError(f"lora.ranks: {pattern}={rank} is not PATTERN=RANK, as 'layers/attn/*=4' is")
    return {pattern: int(rank) for pattern, _, rank in found}


@dataclasses.dataclass(frozen=True)
class Watch:
  """How often what is written down; everything is counted in steps."""

  log_every: int = 10
  eval_every: int = 500
  eval_batches: int = 20
  sample_every: int = 500
  sample_tokens: int = 64
  prompts: tuple[str, ...] = ('The ',)
  save_every: int = 500
  keep_last: int = 3  # checkpoints: the newest,
  keep_every: int = 0  # those at multiples of so many steps,
  keep_best: int = 0  # and those of the best held-out loss
  patience: int = 0  # evaluations in a row without a better held-out loss after which the run ends; 0: none
  spike: float = 0.0  # go back to the last save where the loss exceeds that many times its recent median; 0: never
  most_rewinds: int = 5  # and give up after so many
  # what is given every row beside metrics.jsonl; trackio and wandb are extras of their names
  tracker: Literal['none', 'tensorboard', 'trackio', 'wandb'] = 'tensorboard'
  step_timeout: float = 120.0  # several processes: seconds that one may stay behind the others; 0: for ever

  def __post_init__(self):
    at_least(1, 'watch', log_every=self.log_every, eval_batches=self.eval_batches, sample_tokens=self.sample_tokens)
    at_least(0, 'watch', eval_every=self.eval_every, sample_every=self.sample_every, save_every=self.save_every)
    at_least(0, 'watch', keep_last=self.keep_last, keep_every=self.keep_every, keep_best=self.keep_best)
    at_least(0, 'watch', most_rewinds=self.most_rewinds, patience=self.patience)
    within('[0, inf)', 'watch', step_timeout=self.step_timeout)
    if self.spike:
      within('(1, inf)', 'watch', spike=self.spike)


@dataclasses.dataclass(frozen=True)
class Preference:
  """Learning from preferences, where a stage says so: data.path is then a folder of `jaxlm prepare --preference`."""

  stage: Literal['none', 'preference', 'reward'] = 'none'
  loss: Literal['dpo', 'ipo', 'kto', 'orpo', 'simpo', 'cpo'] = 'dpo'  # see `jaxlm.losses.preference`
  beta: float = 0.1  # how near the model is held to its reference; simpo wants 2 to 10; the weight of orpo's odds
  label_smoothing: float = 0.0  # the share of labels thought to be wrong (dpo, simpo, cpo)
  gamma: float = 0.5  # simpo: the margin that is asked for
  sft: float = 1.0  # orpo, cpo: weight of the chosen answers' own likelihood
  desirable_weight: float = 1.0  # kto: of good answers,
  undesirable_weight: float = 1.0  # and of others
  # adapters: the model without them, in the step; cached: computed once, kept in the run; none: dpo without a reference
  reference: Literal['auto', 'adapters', 'cached', 'none'] = 'auto'
  center: float = 0.01  # reward: weight of what keeps scores near 0
  margin: float = 1.0  # reward: times the margins that rows say, which scores are to keep
  folds: int = 0  # reward: cross-validate over so many parts of all rows first; 0: not
  fold: int = -1  # the part that is held out, of a run that is one of these
  features: str = (
    'features'  # reward, where only the value head learns: folder, seen from the run's, that keeps what the
  )
  # trunk makes of answers, computed once; '': the trunk is read in every step

  def __post_init__(self):
    within('(0, inf)', 'preference', beta=self.beta)
    within('[0, 0.5)', 'preference', label_smoothing=self.label_smoothing)
    weights = ('gamma', 'sft', 'desirable_weight', 'undesirable_weight', 'center', 'margin')
    within('[0, inf)', 'preference', **{name: getattr(self, name) for name in weights})
    at_least(0, 'preference', folds=self.folds)
    at_least(-1, 'preference', fold=self.fold)
    if self.folds == 1 or self.fold >= max(1, self.folds) or (self.folds and self.stage != 'reward'):
      raise InputError(f'preference.folds={self.folds}, fold={self.fold}: two or more parts, of a reward model')
    if self.reference == 'none' and self.stage == 'preference' and self.loss in ('ipo', 'kto'):
      raise InputError(f'preference.reference=none: {self.loss} needs one')

  @property
  def compared(self) -> bool:
    """Whether the loss reads log-probabilities of a reference."""
    return self.stage == 'preference' and self.loss in ('dpo', 'ipo', 'kto') and self.reference != 'none'


@dataclasses.dataclass(frozen=True)
class Rl:
  """Learning from rewards, where an algorithm is named; data.path is then rows of prompts, or 'gym:TASK'."""

  # ppo, grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce_pp, or one's own as FILE.py:NAME (docs/new-algorithm.md)
  algo: str = ''
  reward: str = ''  # 'math:answer*0.8 + regex:^<think>*0.2', 'run:runs/reward', 'python:FILE.py:NAME', 'gym:TASK'
  reward_timeout: float = 60.0  # seconds that a part of it may take for one batch of answers
  prompts: int = 8  # of a rollout,
  samples: int = 8  # and answers to each
  held_out: int = 32  # prompts that are kept for evaluation
  decode_rows: int = 64  # answers that are written at the same time
  max_new_tokens: int = 128
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  epochs: int = 1  # times that a rollout is learnt from
  kl_coef: float = 0.0  # how near the policy is held to its reference
  clip_low: float | None = None  # None: the algorithm's own
  clip_high: float | None = None
  entropy_coef: float = 0.0
  value_coef: float = 0.1
  value_clip: float = 0.2
  gamma: float = 1.0
  lam: float = 0.95
  rounds: int = 4  # dapo: rollouts at most for a batch of groups whose scores differ
  kl_target: float = 0.0  # nats a token from the reference above which a run warns; 0: 1
  engine: str = ''  # http://HOST:PORT of a vLLM server that answers in this program's place (see `jaxlm.rl.vllm`)
  importance: Literal['', 'token', 'sequence'] = ''  # weigh the loss by old policy / sampler, for such an engine,
  importance_cap: float = 2.0  # up to this

  def __post_init__(self):
    at_least(1, 'rl', rounds=self.rounds)
    within('[0, inf)', 'rl', kl_target=self.kl_target)
    if self.kl_target and not self.kl_coef:
      raise InputError(f'rl.kl_target={self.kl_target}: a reference is read where rl.kl_coef > 0 alone: set --kl-coef')
    if self.engine and not self.engine.startswith(('http://', 'https://')):
      raise InputError(f'rl.engine={self.engine!r}: is no address of a server: http://HOST:PORT')
    within('(0, inf)', 'rl', importance_cap=self.importance_cap)
    at_least(1, 'rl', prompts=self.prompts, samples=self.samples, max_new_tokens=self.max_new_tokens)
    at_least(1, 'rl', epochs=self.epochs, decode_rows=self.decode_rows)
    at_least(0, 'rl', held_out=self.held_out)
    within('(0, inf)', 'rl', temperature=self.temperature, reward_timeout=self.reward_timeout)
    within('[0, inf)', 'rl', kl_coef=self.kl_coef, value_coef=self.value_coef, entropy_coef=self.entropy_coef)
    within('[0, 1]', 'rl', gamma=self.gamma, lam=self.lam)


@dataclasses.dataclass(frozen=True)
class Distill:
  """Learning from a teacher, where one is named; data.path is then prepared text, or conversations as `sft` reads them.

  A student's own answers (on_policy) are written as rl.max_new_tokens, rl.temperature and the like say.
  """

  teacher: str = ''  # a run, a Hugging Face folder or a GGUF file, of the same vocabulary; '': none
  loss: Literal['forward_kl', 'reverse_kl', 'jensen_shannon'] = 'forward_kl'  # see `jaxlm.losses.distill`
  beta: float = 0.5  # jensen_shannon: the teacher's share of the mixture
  temperature: float = 1.0  # that logits of both are divided by
  alpha: float = 1.0  # weight of the divergence; 1 - alpha is that of the next-token loss on data
  on_policy: float = 0.0  # share of the batches that are the student's own answers to the prompts of the rows (GKD)
  architecture: Annotated[ModelConfig, tyro.conf.Suppress] = ModelConfig()  # the teacher's, filled in

  def __post_init__(self):
    within('[0, 1]', 'distill', beta=self.beta, alpha=self.alpha, on_policy=self.on_policy)
    within('(0, inf)', 'distill', temperature=self.temperature)


@dataclasses.dataclass(frozen=True)
class Pretrain:
  """A pre-training run."""

  run: str = 'runs/pretrain'
  init: str = ''  # a run, a Hugging Face folder or a GGUF file to take the first weights from
  model: ModelConfig = ModelConfig()  # vocab_size 0: the tokenizer's
  data: Data = Data()
  chat: Chat = Chat()
  optim: Optim = Optim()
  trainable: str = ''  # patterns of paths that learn, with commas ('layers/*/mlp/*,head'); '': all, or the adapters
  lora: Lora = Lora()
  mesh: Mesh = Mesh()
  compute: Compute = Compute()
  watch: Watch = Watch()
  steps: int = 1000
  epochs: float = 0.0  # above 0: as many steps as read the training rows so often, rather than `steps`
  z_loss: float = 0.0
  balance_loss: float = 0.01  # models with experts: weight of what keeps their load even (router_aux_loss_coef)
  router_z_loss: float = 0.001  # models with experts: weight of what keeps their routers' logits small
  seed: int = 0
  profile: str = ''  # 'A:B': a trace of these steps into the run's folder, for TensorBoard or Perfetto
  preference: Preference = Preference()
  rl: Rl = Rl()
  distill: Distill = Distill()

  def __post_init__(self):
    at_least(1, steps=self.steps)
    within('[0, inf)', epochs=self.epochs)
    within('[0, inf)', z_loss=self.z_loss, balance_loss=self.balance_loss, router_z_loss=self.router_z_loss)
    within('[-9e18, 9e18]', seed=self.seed)  # 64 bits
    if self.trainable and self.lora.rank:
      raise InputError(f'trainable={self.trainable!r}: with lora.rank the adapters learn, and they alone')
    bare = not self.lora.rank or self.lora.also
    if self.preference.stage == 'preference' and self.preference.reference == 'adapters' and bare:
      raise InputError('preference.reference=adapters: needs lora.rank, and no lora.also: set cached')
    if self.distill.teacher and (self.rl.algo or self.preference.stage != 'none'):
      raise InputError(
        f'distill.teacher={self.distill.teacher}: a run has one stage: no teacher for rewards, preferences'
      )
    if self.profile and not self.profiled:
      raise InputError(f"profile={self.profile!r} is not 'A:B', two steps with A below B")
    if self.profiled and self.profiled[1] > self.steps:
      raise InputError(f'profile={self.profile!r} goes beyond the {self.steps} steps of the run')

  @property
  def reference(self) -> Literal['none', 'adapters', 'cached']:
    """Where the reference's log-probabilities come from."""
    if not self.preference.compared:
      return 'none'
    asked, bare = self.preference.reference, not self.lora.rank or self.lora.also
    return 'adapters' if asked == 'adapters' or (asked == 'auto' and not bare) else 'cached'

  @property
  def profiled(self) -> tuple[int, int] | None:
    """The steps between which a trace is written."""
    match = re.fullmatch(r'(\d+):(\d+)', self.profile)
    return (int(match[1]), int(match[2])) if match and int(match[1]) < int(match[2]) else None


SFT = Pretrain(
  run='runs/sft',
  data=Data(seq_len=1024, packing='best_fit', global_batch=16),
  optim=Optim(lr=2e-4, warmup_steps=10, weight_decay=0.0, final_ratio=0.0),
  lora=Lora(rank=16, alpha=32.0),
  watch=Watch(log_every=5, eval_every=100, save_every=100, prompts=()),
  epochs=1.0,
)  # what `jaxlm sft` begins with

PREFERENCE = dataclasses.replace(
  SFT,
  run='runs/preference',
  data=Data(seq_len=1024, packing='best_fit', global_batch=8),
  optim=Optim(lr=5e-5, warmup_steps=10, weight_decay=0.0, final_ratio=0.0),
  preference=Preference(stage='preference'),
)  # what `jaxlm preference` begins with
REWARD = dataclasses.replace(
  PREFERENCE,
  run='runs/reward',
  optim=Optim(lr=1e-4, warmup_steps=10, weight_decay=0.0, final_ratio=0.0),
  preference=Preference(stage='reward'),
)  # and `jaxlm reward`
RL = dataclasses.replace(
  SFT,
  run='runs/rl',
  data=Data(seq_len=512, global_batch=64),
  optim=Optim(lr=1e-5, schedule='constant', warmup_steps=5, weight_decay=0.0, b2=0.99),
  watch=dataclasses.replace(SFT.watch, log_every=1, eval_every=20, save_every=20),
  epochs=0.0,
  steps=100,
  rl=Rl(algo='grpo'),
)  # and `jaxlm rl`
DISTILL = dataclasses.replace(SFT, run='runs/distill', lora=Lora())  # and `jaxlm distill`


def load(path: str) -> Any:
  """The `config` that a Python file defines. Raises InputError when there is none, or it does not hold together."""
  if not epath.Path(path).exists():
    raise InputError(f'{path}: no such config file')
  spec = importlib.util.spec_from_file_location('jaxlm_config', path)
  if spec is None or spec.loader is None:
    raise InputError(f'{path}: a config is a Python file')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except InputError as e:
    raise InputError(f'{path}: {e}') from e
  except SyntaxError as e:
    raise InputError(f'{path}:{e.lineno}: {e.msg}') from e
  except TypeError as e:
    raise InputError(f'{path}: {_nearest(e)}') from e
  except Exception as e:  # whatever the owner's code raises, with its name
    raise InputError(f'{path}: {type(e).__name__}: {e}') from e
  config = getattr(module, 'config', None)
  if not dataclasses.is_dataclass(config):
    raise InputError(f'{path}: defines no `config = Pretrain(...)`')
  _check_types(config, path)
  return config


def _check_types(config: Any, where: str) -> None:
  """Raises InputError, naming the field, if a value is not of the type that its dataclass declares."""
  for name, hint in typing.get_type_hints(type(config)).items():
    value = getattr(config, name)
    if dataclasses.is_dataclass(value) and isinstance(value, hint):
      _check_types(value, f'{where}: {name}')
    elif not _fits(value, hint):
      raise InputError(f'{where}: {name}={value!r} is not {getattr(hint, "__name__", hint)}')


def _fits(value: Any, hint: Any) -> bool:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is Literal:
    return value in args
  if origin is tuple:
    return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
  if args:
    return any(_fits(value, arg) for arg in args)
  if isinstance(value, bool) or hint is bool:
    return isinstance(value, bool) and hint is bool
  return isinstance(value, (int, float) if hint is float else hint)


def to_json(config: Any) -> str:
  """A config as JSON, every field written out."""
  return json.dumps(dataclasses.asdict(config), indent=1)


def from_json(cls: Any, text: str) -> Any:
  """The inverse of `to_json`. Raises InputError on a field that `cls` does not have."""
  return _build(cls, json.loads(text), cls.__name__)


def _build(cls: Any, values: dict[str, Any], where: str) -> Any:
  hints = typing.get_type_hints(cls)
  for name in values:
    if name not in hints:
      raise InputError(f'{where}: no field {name!r}{_suggest(name, hints)}')
  kwargs = {}
  for name, value in values.items():
    if dataclasses.is_dataclass(hints[name]):
      value = _build(hints[name], value, f'{where}.{name}')
    kwargs[name] = tuple(value) if isinstance(value, list) else value
  return cls(**kwargs)


def _suggest(name: str, known: Any) -> str:
  near = difflib.get_close_matches(name, list(known), 1)
  return f'; did you mean {near[0]!r}?' if near else f'; there are: {", ".join(known)}'


def _nearest(error: TypeError) -> str:
  """A dataclass's complaint about a keyword, with the nearest real one."""
  match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
  cls = match and {**globals(), 'ModelConfig': ModelConfig}.get(match[1])
  if not (match and dataclasses.is_dataclass(cls)):
    return str(error)
  return f'{match[1]} has no field {match[2]!r}{_suggest(match[2], [f.name for f in dataclasses.fields(cls)])}'
