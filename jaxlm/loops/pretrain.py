"""Pre-training as a run: data, program, checkpoints and metrics wired to the loop, resumed where it stopped."""

import dataclasses
import json
import platform
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxlm import config as configs
from jaxlm import models, program, sample, sharding, tree
from jaxlm.config import Pretrain
from jaxlm.data import batches as data_batches
from jaxlm.data import packing, prepare
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError, Stopped
from jaxlm.files import write_whole
from jaxlm.loops import train
from jaxlm.train import checkpoint, lock, metrics

Say = Callable[[str], None]
OnStep = Callable[[int, dict[str, float]], None]
SAMPLING = sample.Sampling(temperature_B=0.6, top_p_B=0.9)


def pretrain(
  config: Pretrain,
  *,
  say: Say = lambda line: None,
  on_step: OnStep = lambda step, row: None,
  stop: Callable[[], bool] = lambda: False,
) -> Any:
  """Runs or continues `config` and returns the last state; everything else is in the run's folder.

  Once `stop()` is true the step that is running is saved and Stopped raised. Raises InputError when data, config and
  what the folder already holds do not belong together, or when another process writes to it.
  """
  prepared = prepare.load(config.data.path)
  config = resolve(config, prepared.tokenizer)
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
  run, watch = epath.Path(config.run), config.watch
  with lock.hold(run), jax.set_mesh(mesh):
    built = program.build(config, mesh)
    checkpoints = checkpoint.Checkpoints(
      run / 'checkpoints', keep_last=watch.keep_last, keep_every=watch.keep_every, keep_best=watch.keep_best
    )
    state = _start(config, prepared, built, checkpoints, say)
    _describe(run, config, prepared, built, mesh)
    writer = metrics.Writer(run, int(state.step))
    try:
      hooks = _hooks(config, prepared, built, checkpoints, writer, say)
      log = _logger(config, built, mesh, writer, on_step)
      stream = _stream(config, prepared, built, state, say)
      timing = {'steps': config.steps, 'log_every': watch.log_every, 'stop': stop}
      state = train.fit(built.step, state, stream, log=log, hooks=hooks, **timing)
      if int(state.step) < config.steps:
        hooks[-1][1](int(state.step), state)
        checkpoints.wait()
        raise Stopped(
          f'stopped and saved at step {int(state.step)} of {config.steps}; the same command goes on from it'
        )
    finally:
      writer.close()
      checkpoints.close()
  return state


def resolve(config: Pretrain, tokenizer: Tokenizer) -> Pretrain:
  """The config with the vocabulary of the tokenizer. Raises InputError if it names another size."""
  named = config.model.vocab_size
  if named not in (0, tokenizer.vocab_size):
    raise InputError(f"model.vocab_size={named} is not the {tokenizer.vocab_size} of the data's tokenizer; leave it 0")
  return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))


def _start(config: Pretrain, prepared: Any, built: Any, checkpoints: Any, say: Say) -> Any:
  """A fresh state, or the newest saved one if the folder holds a run that fits."""
  step = checkpoints.newest_sound(say)
  if step is None:
    return built.create()
  meta, where = checkpoints.meta(step), checkpoints.path(step)
  if meta['tokenizer'] != prepared.tokenizer.digest:
    raise InputError(f'{where}: was trained with another tokenizer than that of {config.data.path}; use another --run')
  if meta['data'] != prepared.summary.contents:
    raise InputError(f'{where}: was trained on other data than what is now in {config.data.path}; use another --run')
  old = meta['config'] | {'run': config.run}
  for name, was, now in _differences(old, json.loads(configs.to_json(config))):
    say(f'{name} was {was} in the saved run and is {now} now')
  state = checkpoints.restore(step, built.abstract, verified=True)
  say(f'continues from step {step} of {config.steps} ({where})')
  return state


def _differences(old: Any, new: Any, prefix: str = '') -> list[tuple[str, Any, Any]]:
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return [] if old == new else [(prefix, old, new)]
  names = sorted(old.keys() | new.keys())
  return [d for n in names for d in _differences(old.get(n), new.get(n), f'{prefix}.{n}' if prefix else n)]


def _describe(run: epath.Path, config: Pretrain, prepared: Any, built: Any, mesh: Any) -> None:
  """Writes what a reader of the run's folder needs: config, tokenizer, and the facts that the report shows."""
  run.mkdir(parents=True, exist_ok=True)
  write_whole(run / 'config.json', configs.to_json(config))
  prepared.tokenizer.save(run / 'tokenizer.json')
  devices = mesh.devices.flat
  facts = {
    'model': {
      'parameters': tree.size(built.abstract.params),
      'training FLOPs a token': metrics.flops_per_token(config.model, config.data.seq_len),
      'tokens a step': config.data.global_batch * config.data.seq_len,
    },
    'data': {s: len(prepared.split(s)) for s in ('train', 'validation')},
    'environment': {
      'devices': f'{len(devices)} x {devices[0].device_kind}',
      'mesh': ', '.join(f'{k}={v}' for k, v in mesh.shape.items()),
      'dtype': str(built.run.dtype),
      'jax': jax.__version__,
      'python': platform.python_version(),
      'system': platform.platform(),
    },
  }
  add_facts(run, facts)


def add_facts(run: epath.Path, facts: dict[str, dict[str, Any]]) -> None:
  """Adds sections to `facts.json`, which the report shows as tables."""
  path = run / 'facts.json'
  old = json.loads(path.read_text()) if path.exists() else {}
  write_whole(path, json.dumps(old | facts, indent=1, ensure_ascii=False))


def _stream(config: Pretrain, prepared: Any, built: Any, state: Any, say: Say) -> Any:
  """Batches on the devices from the state's cursor on, made ahead in the background."""
  rows = packing.rows(config.data.packing, prepared.split('train'), config.data.seq_len, prepared.tokenizer)
  if config.data.packing != 'concat':
    say(f'{config.data.packing}: {len(rows):,} rows, {rows.fill:.1%} full')
  batches = data_batches.Batches(rows, config.data.global_batch, config.seed)
  start = int(state.cursor)
  stop = start + max(0, config.steps - int(state.step))
  ready = data_batches.prefetch(lambda cursor: program.put(batches(cursor), built.batch), start, stop)
  return (batch for _, batch in ready)


def _hooks(config: Pretrain, prepared: Any, built: Any, checkpoints: Any, writer: Any, say: Say) -> tuple:
  """Evaluation, samples and saving, in this order: what a save acknowledges was written before it began."""
  watch, tokenizer = config.watch, prepared.tokenizer
  rows = packing.Rows(prepared.split('validation'), config.data.seq_len, tokenizer)
  fixed = data_batches.in_order(rows, config.data.global_batch)
  held_out = [program.put(fixed[i], built.batch) for i in range(min(len(fixed), watch.eval_batches))]

  meta = {'config': json.loads(configs.to_json(config)), 'tokenizer': tokenizer.digest}
  meta['data'] = prepared.summary.contents
  saved: dict[str, Any] = {'step': None, 'scores': {}}

  def evaluate(step: int, state: Any) -> None:
    values = train.evaluate(built.evaluate, state.params, held_out)
    writer.row(step, {f'eval/{k}': v for k, v in (values | {'loss': values['nll']}).items() if k != 'nll'})
    saved['scores'] = {step: values['nll']}
    say(f'step {step}: held-out {values["nll"]:.3f} nats a token, {values["bits_per_byte"]:.3f} bits per byte')

  def show(step: int, state: Any) -> None:
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    texts = complete(config, state.params, tokenizer, watch.prompts, key, new=watch.sample_tokens, run=built.run)
    for prompt, text in zip(watch.prompts, texts, strict=True):
      writer.sample(step, prompt, text)
      say(f'step {step}: {prompt}{text}')

  def save(step: int, state: Any) -> None:
    if step != saved['step']:
      checkpoints.save(step, state, meta | {'score': saved['scores'].get(step)})
      saved['step'] = step

  if not held_out:
    say(f'{config.data.path} has no held-out documents: nothing is evaluated')
  hooks = ((watch.eval_every, evaluate),) if held_out else ()
  if watch.prompts:
    _check_room(config, tokenizer)
    hooks = (*hooks, (watch.sample_every, show))
  return (*hooks, (watch.save_every, save))


def _check_room(config: Pretrain, tokenizer: Tokenizer) -> None:
  """Raises InputError before the first step if the samples would run past a model's learned positions."""
  longest = max(len(tokenizer.encode(prompt)) + 1 for prompt in config.watch.prompts)
  needed, there = longest + config.watch.sample_tokens, config.model.max_seq_len
  if config.model.positions == 'learned' and needed > there:
    raise InputError(f'watch.sample_tokens={config.watch.sample_tokens}: a sample needs {needed} of {there} positions')


def complete(
  config: Pretrain,
  params: Any,
  tokenizer: Tokenizer,
  prompts: Any,
  key: Any,
  *,
  new: int,
  run: Any,
  sampling: sample.Sampling = SAMPLING,
) -> list[str]:
  """What the model writes after each prompt, as text, stopping where it ends a document."""
  start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  ids = [start + tokenizer.encode(p) for p in prompts]
  stop = (tokenizer.eos_id,)
  out = sample.generate(config.model, params, ids, key, max_new_tokens=new, sampling=sampling, stop_ids=stop, run=run)
  tokens_BN, lengths_B = np.asarray(out.tokens_BN), np.asarray(out.lengths_B)
  return [tokenizer.decode(row[:n].tolist()) for row, n in zip(tokens_BN, lengths_B, strict=True)]


def continue_texts(run: Any, prompts: Any, seed: int, *, new: int, sampling: sample.Sampling) -> list[str]:
  """What the newest checkpoint of a run writes after each prompt. Raises InputError if the run has none."""
  run = epath.Path(run)
  checkpoints = checkpoint.Checkpoints(run / 'checkpoints')
  steps = checkpoints.steps()
  if not steps:
    raise InputError(f'{run}: holds no finished checkpoint; train one with `jaxlm pretrain ... --run {run}`')
  config = configs.from_json(Pretrain, (run / 'config.json').read_text())
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.eval_shape(lambda: models.init(config.model, jax.random.key(0)))
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
  params = checkpoints.restore(steps[-1], {'params': like}, partial=True)['params']
  vocabulary = tokenizers.load(run / 'tokenizer.json')
  key = jax.random.key(seed)
  return complete(config, params, vocabulary, prompts, key, new=new, run=models.Run(), sampling=sampling)


def _logger(config: Pretrain, built: Any, mesh: Any, writer: Any, on_step: OnStep) -> OnStep:
  """Turns a step's metrics into a row: names of the ecosystem, throughput, utilisation."""
  tokens = config.data.global_batch * config.data.seq_len
  flops = tokens * metrics.flops_per_token(config.model, config.data.seq_len)
  peak = metrics.peak_flops(mesh.devices.flat)

  def log(step: int, values: dict[str, float]) -> None:
    seconds = values.pop('step_time')
    wait = values.pop('data_wait')
    row = {f'train/{k}': v for k, v in values.items()}
    row['train/lr'] = float(built.schedule(max(0, step - 1 - values['skipped'])))
    row |= {'perf/tokens_per_s': tokens / seconds, 'perf/data_wait': wait / seconds, 'perf/step_s': seconds}
    if peak:
      row['perf/mfu'] = flops / seconds / peak
    writer.row(step, row)
    on_step(step, row)

  return log
