"""The program of a run: the very step that `jaxlm pretrain` executes, built from a config and a mesh, with no data."""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm import distilling, episodic, lora, models, objectives, sharding, tree
from jaxlm.config import Preference, Pretrain, Rl
from jaxlm.data.batches import parse_ramp
from jaxlm.errors import InputError
from jaxlm.models import Run
from jaxlm.rl.algorithms import Algorithm, by_name
from jaxlm.train import metrics, optim, state, step

GIB = 2.0**30
ADAPTERS = 0x10AA  # what is folded into a run's key for them
BATCH_DTYPES = {
  'tokens': jnp.int32,
  'targets': jnp.int32,
  'loss_mask': jnp.float32,
  'segment_ids': jnp.int32,
  'positions': jnp.int32,
  'target_bytes': jnp.int32,
}
PREFERENCE_DTYPES = BATCH_DTYPES | {'labels': jnp.int32, 'margins': jnp.float32}  # and ref_logps, where they are cached
# Collectives beside work rather than waited for: on TPUs the compiler leaves gradients' sums out unless asked.
TPU_OPTIONS: dict[str, bool | str] = {
  'xla_tpu_enable_async_collective_fusion': True,
  'xla_tpu_enable_async_collective_fusion_fuse_all_gather': True,
  'xla_tpu_enable_async_collective_fusion_fuse_all_reduce': True,
  'xla_tpu_enable_async_collective_fusion_multiple_steps': True,
  'xla_tpu_overlap_compute_collective_tc': True,
  'xla_enable_async_all_gather': True,
  'xla_enable_async_all_reduce': True,
}


def compiler_options(device: Any) -> dict[str, bool | str] | None:
  """What the step is compiled with for devices of this kind; None: as the compiler would."""
  if device.platform != 'tpu':
    return None
  flat = 'lite' in device.device_kind  # a torus of two dimensions, where all-to-alls cannot be asynchronous
  return TPU_OPTIONS | ({} if flat else {'xla_tpu_enable_async_all_to_all': True})


class Program(NamedTuple):
  """Jitted functions with their shardings; nothing has been computed yet. Call them under `jax.set_mesh(mesh)`."""

  create: Callable[[], Any]  # -> a fresh state on the mesh
  around: Callable[[Any], Any]  # a base's parameters, which are donated -> the state that begins with them
  step: Callable[[Any, Any], Any]  # (state, batch) -> (state, metrics); the state is donated
  evaluate: Callable[[Any, Any], Any]  # (params, held-out batch) -> {name: Sum of arrays [groups]}
  abstract: Any  # the state as ShapeDtypeStructs with shardings: what a restore needs
  batch: Any  # the batch as ShapeDtypeStructs with shardings
  held_out: Any  # the same of a batch to evaluate on, whose targets have groups
  schedule: Callable[[Any], Any]
  run: Run
  answers: Callable[[Any, Any], Any] | None = None  # of preferences: (params, `bare` batch) -> what is kept of them
  read: Callable[..., Any] | None = None  # of rollouts: (params, batch, reference or None) -> `episodic.read`


def build(
  config: Pretrain,
  mesh: Mesh,
  rules: sharding.Rules = sharding.RULES,
  *,
  groups: int = 1,
  segments: int = 2,
  places: int = 0,
) -> Program:
  """Wires model, loss, optimizer and shardings; `groups` is how many the held-out text is counted in.

  `segments` is how many a row may have, of a batch that holds what a frozen trunk makes of them; `places` how many of
  a row's have logits (see `data.pairs`), 0 for all.

  Raises InputError for sizes that do not divide.
  """
  cfg, compute = config.model, config.compute
  platform = mesh.devices.flat[0].platform
  dtype = models.computed_in(compute.dtype, platform)
  attention = _attention(compute.attention, cfg, mesh, dtype, 'model')
  if config.data.seq_len % mesh.shape['sequence']:
    raise InputError(f'data.seq_len={config.data.seq_len} does not divide by mesh.sequence={mesh.shape["sequence"]}')
  rules_of = rules if mesh.size > 1 else None
  if compute.float8 and importlib.util.find_spec('qwix') is None:
    raise InputError("compute.float8 needs qwix: pip install -e '.[quant]'")
  run = Run(
    dtype,
    attention,
    compute.remat,
    compute.unroll,
    compute.dropout,
    embed_noise=compute.embed_noise,
    float8=compute.float8,
    ragged=platform == 'tpu',
    rules=rules_of,
  )
  _check_length(config, cfg, 'model')
  if cfg.padded_vocab % compute.loss_chunks:
    raise InputError(
      f'compute.loss_chunks={compute.loss_chunks} does not divide the padded vocabulary of {cfg.padded_vocab}'
    )
  ways = mesh.shape['data'] * mesh.shape['fsdp'] * mesh.shape['expert'] * compute.accum
  ramp = parse_ramp(config.data.batch_warmup, config.data.global_batch)
  for rows in (config.data.global_batch, *(rows for _, rows in ramp)):
    if rows % ways:
      raise InputError(f'data.global_batch={rows} does not divide by data x fsdp x expert x accum = {ways}')
  lr = schedule(config)
  optimizer, learns = make_optimizer(config), trainable(config)

  params_key, state_key = (lambda n=n: jax.random.split(jax.random.key(config.seed))[n] for n in range(2))

  def around(params: Any) -> state.State:
    return state.create(adapt(config, params), optimizer, state_key(), trainable=learns)

  def create() -> state.State:
    return around(models.init(cfg, params_key()))

  named = state.abstract(create, models.abstract(cfg))
  shardings = sharding.state_shardings(named, mesh, rules)
  sharding.check_replicated(named, shardings, mesh)
  abstract = sharding.laid(jax.eval_shape(create), shardings)
  shape, dtypes = (config.data.global_batch, config.data.seq_len), _dtypes(config)
  held_out = {name: jax.ShapeDtypeStruct(shape, t) for name, t in (dtypes | {'group': jnp.int32}).items()}
  held_out = sharding.laid(held_out, sharding.batch_shardings(held_out, mesh, rules))
  batch = {name: held_out[name] for name in dtypes}
  if frozen(config):
    rows = sharding.batch_shardings(jax.ShapeDtypeStruct(shape[:1], jnp.float32), mesh, rules)
    batch['features'] = jax.ShapeDtypeStruct((shape[0], segments, cfg.d_model), jnp.float32, sharding=rows)
  if places and mesh.shape['sequence'] == 1:
    batch['places'] = jax.ShapeDtypeStruct((shape[0], places), jnp.int32, sharding=batch['tokens'].sharding)
  text = config.preference.stage == 'none' and not config.rl.algo
  held_out = held_out if text else batch
  layout = lambda tree_: jax.tree.map(lambda x: x.sharding, tree_)
  whole = NamedSharding(mesh, PartitionSpec())

  if config.distill.teacher:
    batch['teacher'] = held_out['teacher'] = _teacher(config, mesh, rules)
    held_out.pop('data_mask', None)
  loss_fn, evaluate, answers = _objectives(config, run, groups, mesh)
  if frozen(config):
    answers = objectives.ends(cfg, run, segments=segments)
  return Program(
    jax.jit(create, out_shardings=shardings),
    jax.jit(around, out_shardings=shardings, donate_argnums=0),
    jax.jit(
      _step(config, loss_fn, optimizer, learns),
      in_shardings=(shardings, layout(batch)),
      out_shardings=(shardings, whole),
      donate_argnums=0,
      compiler_options=compiler_options(mesh.devices.flat[0]),
    ),
    jax.jit(evaluate, in_shardings=(shardings.params, layout(held_out)), out_shardings=whole),
    abstract,
    batch,
    held_out,
    lr,
    run,
    answers and jax.jit(answers, in_shardings=(shardings.params, layout(bare(batch))), out_shardings=whole),
    _reader(config, run, mesh),
  )


def bare(batch: Any) -> dict[str, Any]:
  """A batch of preferences, or what it is like, without what is computed once before the first step."""
  return {name: x for name, x in batch.items() if name not in ('ref_logps', 'features')}


def _reader(config: Pretrain, run: Run, mesh: Mesh) -> Any:
  """What a rollout is read with before it is learnt from; nothing where that is not needed."""
  how, rl = algorithm(config), config.rl
  if how is None:
    return None
  wants = {'valued': how.valued, 'compared': rl.kl_coef > 0, 'places': _places(config, mesh)}
  return jax.jit(
    episodic.read(config.model, run, temperature=rl.temperature, chunks=config.compute.loss_chunks, **wants)
  )


def _places(config: Pretrain, mesh: Mesh) -> int | None:
  """Of a row of a rollout that have logits; all of them where rows are cut over devices."""
  return config.rl.max_new_tokens if mesh.shape['sequence'] == 1 else None


def algorithm(config: Pretrain) -> Algorithm | None:
  """The algorithm of a run that learns from rewards, with its own clips where the run says them.

  Raises InputError for a name that is none.
  """
  rl = config.rl
  if not rl.algo:
    return None
  found = by_name(rl.algo)
  low, high = rl.clip_low, rl.clip_high
  return found._replace(
    clip_low=found.clip_low if low is None else low, clip_high=found.clip_high if high is None else high
  )


def updates(config: Pretrain) -> int:
  """Optimizer steps that learn from one rollout."""
  return config.rl.epochs * config.rl.prompts * config.rl.samples // config.data.global_batch


def reads(config: Pretrain) -> bool:
  """Whether a rollout is read by the policy, and its reference, before it is learnt from."""
  how = algorithm(config)
  return how is not None and (how.valued or config.rl.kl_coef > 0 or updates(config) > 1)


def holds_reference(config: Pretrain) -> bool:
  """Whether a run that learns from rewards has its reference as a second tree: adapters can be left out instead."""
  return bool(config.rl.algo and config.rl.kl_coef and not config.lora.rank)


def _dtypes(config: Pretrain) -> dict[str, Any]:
  """What a batch of the run holds."""
  if how := algorithm(config):
    kept = {name: BATCH_DTYPES[name] for name in ('tokens', 'targets', 'loss_mask', 'segment_ids', 'positions')}
    more = ['sampled_logp', 'advantages', *['old_logp'] * (updates(config) > 1), *['values', 'returns'] * how.valued]
    more += ['ref_logp'] * (config.rl.kl_coef > 0 and how.kl == 'loss')
    return kept | dict.fromkeys(more, jnp.float32)
  if config.distill.teacher and config.distill.on_policy:
    return BATCH_DTYPES | {'data_mask': jnp.float32}
  if config.preference.stage == 'none':
    return BATCH_DTYPES
  return PREFERENCE_DTYPES | ({'ref_logps': jnp.float32} if config.reference == 'cached' else {})


def _objectives(config: Pretrain, run: Run, groups: int, mesh: Mesh) -> tuple[Any, Any, Any]:
  """The stage's loss, its evaluation, and of preferences what answers are worth (see `objectives.answers`)."""
  cfg, chunks, how = config.model, config.compute.loss_chunks, config.preference
  values: dict[str, Any]
  quiet = objectives.quiet(run)
  if algo := algorithm(config):
    names = ('temperature', 'kl_coef', 'value_coef', 'value_clip', 'entropy_coef', 'importance', 'importance_cap')
    values = {name: getattr(config.rl, name) for name in names} | {'longest': config.rl.max_new_tokens}
    values['places'] = _places(config, mesh)
    return episodic.learn(cfg, run, algo, chunks=chunks, **values), objectives.by_group(cfg, run, groups=1), None
  if config.distill.teacher:
    return *_distilling(config, run, groups, mesh), None
  if how.stage == 'none':
    weights = {'z_loss': config.z_loss, 'balance': config.balance_loss, 'router_z': config.router_z_loss}
    loss_fn = objectives.next_token(cfg, run, **weights, chunks=chunks)
    return loss_fn, objectives.by_group(cfg, run, groups=groups, chunks=chunks), None
  if how.stage == 'reward':
    make = lambda run: objectives.reward(cfg, run, center=how.center, margin=how.margin)
  else:
    names = ('loss', 'beta', 'label_smoothing', 'gamma', 'sft', 'desirable_weight', 'undesirable_weight')
    values = {name: getattr(how, name) for name in names} | {'reference': config.reference, 'chunks': chunks}
    make = lambda run: objectives.preference(cfg, run, **values)
  scored = how.stage == 'reward'
  return make(run), objectives.whole(make(quiet)), objectives.answers(cfg, run, scored=scored, chunks=chunks)


def _distilling(config: Pretrain, run: Run, groups: int, mesh: Mesh) -> tuple[Any, Any]:
  """The loss of distillation, and its evaluation."""
  how, chunks, shown = config.distill, config.compute.loss_chunks, taught(config)
  kernel = _attention(config.compute.attention, shown, mesh, run.dtype, 'distill.architecture')
  both = config.model, run, shown, dataclasses.replace(run, attention=kernel, float8=False)
  apart = distilling.divergence(how.loss, beta=how.beta, temperature=how.temperature)
  weights = {'alpha': how.alpha, 'balance': config.balance_loss, 'router_z': config.router_z_loss}
  learnt = distilling.learn(*both, apart, **weights, chunks=chunks)
  return learnt, distilling.by_group(*both, apart, groups=groups, chunks=chunks)


def taught(config: Pretrain) -> models.ModelConfig:
  """The teacher's architecture; of the run's vocabulary, where it names none."""
  found = config.distill.architecture
  return dataclasses.replace(found, vocab_size=found.vocab_size or config.model.vocab_size)


def _teacher(config: Pretrain, mesh: Mesh, rules: sharding.Rules) -> Any:
  """Its parameters as ShapeDtypeStructs, laid out as the model's are."""
  cfg = taught(config)
  _check_length(config, cfg, 'distill.architecture')
  named = models.abstract(cfg)
  shardings = sharding.state_shardings(named, mesh, rules)
  sharding.check_replicated(named, shardings, mesh)
  shapes = jax.eval_shape(lambda: models.init(cfg, jax.random.key(0)))
  return sharding.laid(shapes, shardings)


def _step(config: Pretrain, loss_fn: step.LossFn, optimizer: Any, learns: tree.Where) -> Any:
  """The train step; of a teacher, which is in the batch, nothing is cut into micro-batches."""
  make = functools.partial(step.make_train_step, optimizer=optimizer, trainable=learns, accum=config.compute.accum)
  if not config.distill.teacher:
    return make(loss_fn)

  def beside(state: Any, batch: Any) -> Any:
    rows, teacher = {name: x for name, x in batch.items() if name != 'teacher'}, {'teacher': batch['teacher']}
    return make(lambda params, some, key: loss_fn(params, some | teacher, key))(state, rows)

  return beside


def flops_per_token(config: Pretrain, places: int = 0) -> float:
  """`metrics.flops_per_token` of the run's step, whose rows have logits at so many `places` (0: at all).

  With a reference's or a teacher's forward pass; without the head where there are no logits: in reward models, and at
  the places of a rollout that are no answer's.
  """
  flops, head = metrics.flops_per_token(config.model, config.data.seq_len), 6.0 * config.model.d_model
  head *= config.model.vocab_size
  if config.rl.algo and config.mesh.sequence == 1:
    return flops - head * max(0.0, 1 - config.rl.max_new_tokens / config.data.seq_len)
  if config.distill.teacher:
    return flops + metrics.flops_per_token(taught(config), config.data.seq_len) / 3
  if frozen(config):
    return 6.0 * config.model.d_model  # at most: where each token ends an answer
  if config.preference.stage == 'reward':
    return flops - head
  if places and config.mesh.sequence == 1:
    flops -= head * (1 - places / config.data.seq_len)
  return flops * (4 / 3 if config.reference == 'adapters' else 1)


def valued(config: Pretrain) -> bool:
  """Whether the run's model has a value head: a reward model's, or a value function's."""
  how = algorithm(config)
  return config.preference.stage == 'reward' or (how is not None and how.valued)


def adapt(config: Pretrain, params: Any) -> Any:
  """A model's parameters as the run trains them: with its adapters, the frozen matrices in as few bits as it says.

  A reward model has a value head, and nothing else has.
  """
  how, scored = config.lora, valued(config)
  params = models.with_value(config.model, params) if scored else {k: x for k, x in params.items() if k != 'value'}
  if not how.rank:
    return params
  if how.bits != 'none':
    params = lora.quantize(params, where=how.where, qtype=how.bits, tile=how.tile)
  return lora.init(
    jax.random.fold_in(jax.random.key(config.seed), ADAPTERS),
    params,
    rank=how.rank,
    alpha=how.alpha,
    where=how.where,
    ranks=how.ranks_by_pattern,
    rank_stabilized=how.rank_stabilized,
    dora=how.dora,
    dropout=how.dropout,
  )


def trainable(config: Pretrain) -> tree.Where:
  """The filter of what learns in a run; a value head always does."""
  if valued(config) and (config.lora.rank or config.trainable):
    bare = dataclasses.replace(config, preference=Preference(), rl=Rl())
    return lambda path, leaf: path == 'value' or trainable(bare)(path, leaf)
  if config.lora.rank:
    also = tree.matching(*config.lora.also.split(',')) if config.lora.also else lambda path, leaf: False
    return lambda path, leaf: lora.is_adapter(path, leaf) or also(path, leaf)
  return tree.matching(*config.trainable.split(',')) if config.trainable else tree.everything


def frozen(config: Pretrain) -> bool:
  """Whether of a reward model the value head alone learns, from what the trunk made of answers before step 0."""
  how, compute = config.preference, config.compute
  if how.stage != 'reward' or not how.features or config.lora.rank or not config.trainable:
    return False
  trunk = tree.items(jax.eval_shape(lambda: models.init(config.model, jax.random.key(0))))
  learns = trainable(config)
  return not (compute.dropout or compute.embed_noise or any(learns(*leaf) for leaf in trunk))


def kept(config: Pretrain, params: Any) -> Any:
  """What of the parameters is saved: all, or beside adapters what learns, whose base lies elsewhere."""
  return tree.split(params, trainable(config))[0] if config.lora.rank else params


def evaluated(config: Pretrain, opt_state: Any, params: Any) -> Any:
  """The parameters to evaluate, sample and export: with the average of what learns, where the optimizer keeps one."""
  picked, rest = tree.split(params, trainable(config))
  return tree.combine(optim.eval_params(opt_state, picked), rest)


def local_bytes(tree: Any) -> int:
  """Bytes of a tree's parts on one device."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _attention(asked: str, cfg: models.ModelConfig, mesh: Mesh, dtype: Any, where: str) -> str:
  """What computes the attention of a model, which is said in a part of the config; see `config.Compute`."""
  platform = mesh.devices.flat[0].platform
  if asked == 'auto':
    asked = 'ring' if mesh.shape['sequence'] > 1 else _kernel(cfg, platform, dtype)
  if asked == 'cudnn' and _kernel(cfg, 'gpu', dtype) != 'cudnn':
    raise InputError(f'compute.attention=cudnn has no attention_softcap, heads of up to 128 and no {dtype}: set xla')
  if asked != 'xla' and cfg.kv_heads % mesh.shape['tensor']:
    heads, ways = f'{where}.n_kv_heads={cfg.kv_heads}', mesh.shape['tensor']
    raise InputError(f'{heads} does not divide by mesh.tensor={ways}: lower it, or compute.attention xla')
  return asked


def _check_length(config: Pretrain, cfg: models.ModelConfig, where: str) -> None:
  if cfg.positions == 'learned' and config.data.seq_len > cfg.max_seq_len:
    raise InputError(
      f'data.seq_len={config.data.seq_len} exceeds the {where}.max_seq_len={cfg.max_seq_len} learned positions'
    )


def _kernel(cfg: models.ModelConfig, platform: str, dtype: Any) -> str:
  """The fastest attention of a platform that does what the model asks for."""
  if platform == 'gpu':
    able = cfg.attention_softcap is None and cfg.head_size <= 128 and dtype.itemsize == 2
    return 'cudnn' if able else 'xla'
  return 'splash' if platform == 'tpu' else 'xla'


def schedule(config: Pretrain) -> optax.Schedule:
  """The run's learning rate by step."""
  o = config.optim
  return optim.schedule(
    o.schedule,
    lr=o.lr,
    steps=config.steps,
    warmup_steps=o.warmup_steps,
    decay_fraction=o.decay_fraction,
    final_ratio=o.final_ratio,
    cycles=o.cycles,
  )


def make_optimizer(config: Pretrain) -> optax.GradientTransformation:
  """The run's optimizer."""
  o = config.optim
  faster = (f'*/b={config.lora.b_lr}',) if config.lora.rank and config.lora.b_lr != 1.0 else ()
  only = config.trainable.split(',') if config.trainable else ()
  only = [*only, 'value'] if only and valued(config) else only
  return optim.make(
    o.name,
    schedule(config),
    axes=models.axes(config.model) | {'value': optim.VALUE_AXES},
    weight_decay=o.weight_decay,
    b1=o.b1,
    b2=o.b2,
    eps=o.eps,
    muon_momentum=o.muon_momentum,
    clip_norm=o.clip_norm,
    group_lr=(*o.group_lr, *faster),
    group_decay=o.group_decay,
    ema_decay=o.ema_decay,
    only=only,
  )


def put(batch: Any, like: Any) -> Any:
  """A host batch as global arrays laid out like `like`; each process hands over only the rows its devices hold."""

  def one(x: np.ndarray, spec: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(x.shape, spec.sharding, lambda index: x[index])

  return {name: one(batch[name], spec) for name, spec in like.items()}
