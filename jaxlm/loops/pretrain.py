"""Pre-training as a run: data, program, checkpoints and metrics wired to the loop, resumed where it stopped."""

import contextlib
import dataclasses
import itertools
import json
import platform
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jaxlm import config as configs
from jaxlm import fitting, hosts, program, sharding, tree
from jaxlm.config import Pretrain
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError, Stopped
from jaxlm.files import read_json, write_whole
from jaxlm.loops import bases, feeds, rewind, train, writing
from jaxlm.loops.feeds import Feed, Writer
from jaxlm.loops.trace import Trace
from jaxlm.program import Program
from jaxlm.train import lock, metrics, trackers
from jaxlm.train.checkpoint import Checkpoints

Say = Callable[[str], None]
OnStep = Callable[[int, dict[str, float]], None]


class Wired(NamedTuple):
  """A run's parts, put together."""

  config: Pretrain
  feed: Feed
  built: Program
  checkpoints: Checkpoints
  rewinds: rewind.Rewinds
  say: Say


def pretrain(
  config: Pretrain,
  *,
  say: Say = lambda line: None,
  on_step: OnStep = lambda step, row: None,
  stop: Callable[[], int] = lambda: False,
) -> Any:
  """Runs or continues `config` and returns the last state; everything else is in the run's folder.

  Once `stop()` is true the step that is running is saved and Stopped raised. Raises InputError when data, config and
  what the folder already holds do not belong together, or when another process writes to it.
  """
  trackers.check(config.watch.tracker)
  config, feed = feeds.open_feed(config)
  config = _warmed(config, say)
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
  run, watch = epath.Path(config.run), config.watch
  with _held(run), jax.set_mesh(mesh):
    _check_same(config, feed)
    built = program.build(config, mesh, groups=feed.groups, segments=feed.segments, places=feed.places)
    built = fitting.fitting(built, fitting.memory_limit(mesh))
    keep = {'keep_last': watch.keep_last, 'keep_every': watch.keep_every, 'keep_best': watch.keep_best}
    checkpoints = Checkpoints(run / 'checkpoints', **keep, say=say)
    rewinds = rewind.Rewinds(run, watch.spike, watch.most_rewinds)
    wired = Wired(config, feed, built, checkpoints, rewinds, say)
    try:
      state = _start(wired)
      feed.attach(built, state, say)
      learnt, all_ = (tree.size(x) for x in (tree.split(state.params, program.trainable(config))[0], state.params))
      if learnt < all_:
        say(f'{learnt:,} of {all_:,} parameters learn')
      _describe(wired, mesh)
      while True:
        offset = int(state.cursor) - int(state.step)
        try:
          return _train(wired, state, mesh, on_step, stop)
        except rewind.Spike as spike:
          state = _rewound(wired, spike, spike.step + offset)
    finally:
      checkpoints.close()


@contextlib.contextmanager
def _held(run: epath.Path) -> Generator[None]:
  """The lock of the run's folder, held by process 0 for all."""
  with contextlib.ExitStack() as stack:
    hosts.from_first(lambda: stack.enter_context(lock.hold(run)))
    yield


def _warmed(config: Pretrain, say: Say) -> Pretrain:
  """With a warm-up of half the steps where epochs of few rows are not as many as were asked for."""
  steps, asked = config.steps, config.optim.warmup_steps
  if not config.epochs or asked < steps:
    return config
  say(f'{steps} steps are {config.epochs:g} epochs of these rows: optim.warmup_steps is {steps // 2}, not {asked}')
  return dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_steps=steps // 2))


def _check_same(config: Pretrain, feed: Feed) -> None:
  """Raises InputError if this process was given another config, or other data, than process 0."""
  mine = {'config': json.loads(configs.to_json(config)), 'contents of the data': feed.contents}
  theirs = hosts.from_first(lambda: mine)
  if lines := _differences(theirs, mine):
    raise InputError('not what process 0 was given: ' + '; '.join(f'{n} is {b}, not {a}' for n, a, b in lines))


def _train(wired: Wired, state: Any, mesh: Any, on_step: OnStep, stop: Any) -> Any:
  """From `state` to the end of the run, or to the SIGTERM or the spike that ends it before."""
  config, checkpoints = wired.config, wired.checkpoints
  profile = Trace(config.run, config.profiled if hosts.first() else None)
  writer = _writer(wired, int(state.step))
  try:
    patience = Patience(config.watch.patience, **_past(checkpoints, int(state.step)))
    hooks = _hooks(wired, writer, patience)
    log = _logger(wired, mesh, writer, on_step, int(state.cursor) - int(state.step))
    ends = _between(lambda: stop() or patience.over, wired.feed.unit, int(state.cursor))
    timing = {'steps': config.steps, 'log_every': config.watch.log_every, 'stop': ends}
    watched: Any = {'profile': profile, 'check': wired.rewinds.check if config.watch.spike else None}
    before = patience.over
    if int(state.step) == 0 and config.init and wired.feed.watches:
      hooks[0][1](0, state)  # what is gained and forgotten is seen from here
    if not before:
      after = wired.feed.stream(state, config.steps, writer)
      state = train.fit(wired.built.step, state, after, log=log, hooks=hooks, **watched, **timing)
    if patience.over:
      wired.say(f'step {int(state.step)}: no better held-out loss for {patience.limit} evaluations: the run ends here')
    if int(state.step) < config.steps and not before:
      hooks[-1][1](int(state.step), state)
      _settled(checkpoints)
      if patience.over:
        return state
      raise Stopped(f'stopped and saved at step {int(state.step)} of {config.steps}; the same command goes on from it')
    _settled(checkpoints)
    return state
  finally:
    profile.close()
    writer.close()


def _between(ends: Callable[[], bool], unit: int, cursor: int) -> Callable[[], bool]:
  """`ends`, asked after every batch from `cursor` on, but true after multiples of `unit` batches alone."""
  batches = itertools.count(cursor + 1)
  return lambda: [ends(), next(batches) % unit == 0] == [True, True]


def _writer(wired: Wired, step: int) -> Writer:
  if not hosts.first():
    return metrics.Unwritten()
  config = wired.config
  told = json.loads(configs.to_json(config))
  return metrics.Writer(config.run, step, wired.say, tracker=config.watch.tracker, config=told)


@dataclasses.dataclass
class Patience:
  """How many evaluations in a row brought no better held-out loss; `limit` of them end a run (0: none do)."""

  limit: int
  best: float = float('inf')
  worse: int = 0

  def look(self, nll: float) -> None:
    self.best, self.worse = (nll, 0) if nll < self.best else (self.best, self.worse + 1)

  @property
  def over(self) -> bool:
    return bool(self.limit) and self.worse >= self.limit


def _past(checkpoints: Checkpoints, step: int) -> dict[str, Any]:
  return checkpoints.meta(step).get('held_out', {}) if step in checkpoints.steps() else {}


def _settled(checkpoints: Checkpoints) -> None:
  hosts.mark('the end of the last save', slow=True)
  checkpoints.wait()


def _start(wired: Wired) -> Any:
  """A fresh state, or the newest saved one if the folder holds a run that fits."""
  config, checkpoints = wired.config, wired.checkpoints
  step = checkpoints.newest_sound(wired.say)
  if step is None:
    checkpoints.tidy()
    return _initial(wired)
  meta, where = checkpoints.meta(step), checkpoints.path(step)
  if meta['tokenizer'] != wired.feed.tokenizer.digest:
    raise InputError(f'{where}: was trained with another tokenizer than that of {config.data.path}; use another --run')
  if meta['data'] != wired.feed.contents:
    raise InputError(f'{where}: was trained on other data than what is now in {config.data.path}; use another --run')
  old = json.loads(configs.to_json(configs.from_json(Pretrain, json.dumps(meta['config'])))) | {'run': config.run}
  for name, was, now in _differences(old, json.loads(configs.to_json(config))):
    wired.say(f'{name} was {was} in the saved run and is {now} now')
  state = _restored(wired, step)
  checkpoints.tidy()  # not before all fits: a run that is refused deletes nothing
  wired.say(f'continues from step {step} of {config.steps} ({where})')
  return _at_cursor(state, wired.rewinds.begin(step))


def _initial(wired: Wired) -> Any:
  """The state before the first step: fresh, or with the weights that `init` names."""
  config, built = wired.config, wired.built
  if not config.init:
    return _at_cursor(built.create(), wired.rewinds.begin(0))
  base = _base(wired)
  wired.say(f'begins with the weights of {base.said}')
  return _at_cursor(built.around(base.params), wired.rewinds.begin(0))


def _base(wired: Wired) -> bases.Base:
  config, mesh = wired.config, jax.tree.leaves(wired.built.abstract)[0].sharding.mesh
  base = bases.open_base(config.init, mesh)
  bases.check_tokenizer(config, base, wired.feed.tokenizer)
  return bases.fitted(config, base)


def _rewound(wired: Wired, spike: rewind.Spike, cursor: int) -> Any:
  """The last saved state, to go on from the batch `cursor`, behind the one that spiked."""
  hosts.mark('the way back to the last save', slow=True)
  with contextlib.suppress(OSError):  # a save that failed was told
    wired.checkpoints.wait()
  step = wired.checkpoints.newest_sound(wired.say)
  wired.rewinds.add(step or 0, spike.step, cursor)
  wired.say(f'{spike}; back to step {step or 0}, and on with batch {cursor}')
  if step is None:
    return _initial(wired)
  return _at_cursor(_restored(wired, step), wired.rewinds.begin(step))


def _restored(wired: Wired, step: int) -> Any:
  """A saved state; adapters are put on their base."""
  config, abstract, mesh = wired.config, wired.built.abstract, jax.tree.leaves(wired.built.abstract)[0].sharding.mesh
  like = dataclasses.replace(abstract, params=program.kept(config, abstract.params))
  state = wired.checkpoints.restore(step, like, verified=True)
  if not config.lora.rank:
    return state
  params = bases.on_base(config, state.params, wired.checkpoints.meta(step)['base'], mesh)
  params = jax.device_put(params, jax.tree.map(lambda x: x.sharding, abstract.params))
  return dataclasses.replace(state, params=params)


def _at_cursor(state: Any, cursor: int | None) -> Any:
  if cursor is None:
    return state
  new = jax.make_array_from_callback((), state.cursor.sharding, lambda index: np.int32(cursor))
  return dataclasses.replace(state, cursor=new)


def _differences(old: Any, new: Any, prefix: str = '') -> list[tuple[str, Any, Any]]:
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return [] if old == new else [(prefix, old, new)]
  names = sorted(old.keys() | new.keys())
  return [d for n in names for d in _differences(old.get(n), new.get(n), f'{prefix}.{n}' if prefix else n)]


def _describe(wired: Wired, mesh: Any) -> None:
  """Writes what a reader of the run's folder needs: config, tokenizer, and the facts that the report shows."""
  if not hosts.first():
    return
  config, built, run = wired.config, wired.built, epath.Path(wired.config.run)
  run.mkdir(parents=True, exist_ok=True)
  write_whole(run / 'config.json', configs.to_json(config))
  wired.feed.tokenizer.save(run / 'tokenizer.json')
  for name, text in wired.feed.files(config).items():
    write_whole(run / name, text)
  devices = mesh.devices.flat
  facts = {
    'model': {
      'parameters': tree.size(built.abstract.params),
      'training FLOPs a token': program.flops_per_token(config, wired.feed.places),
      'tokens a step': config.data.global_batch * config.data.seq_len,
    },
    'data': wired.feed.facts(),
    'environment': {
      'devices': f'{len(devices)} x {devices[0].device_kind}',
      'mesh': ', '.join(f'{k}={v}' for k, v in mesh.shape.items()),
      'dtype': str(built.run.dtype),
      'jax': jax.__version__,
      'python': platform.python_version(),
      'system': platform.platform(),
    },
  }
  if kinds := wired.feed.composition():
    facts[metrics.COMPOSITION] = kinds
  add_facts(run, facts | ({'lineage': {'first weights': config.init}} if config.init else {}))


def add_facts(run: epath.Path, facts: dict[str, dict[str, Any]]) -> None:
  """Adds sections to `facts.json`, which the report shows as tables."""
  path = run / 'facts.json'
  old = read_json(path) if path.exists() else {}
  write_whole(path, json.dumps(old | facts, indent=1, ensure_ascii=False))


def _hooks(wired: Wired, writer: Writer, patience: Patience) -> tuple:
  """Evaluation, samples and saving, in this order: what a save acknowledges was written before it began."""
  config, built, say, tokenizer = wired.config, wired.built, wired.say, wired.feed.tokenizer
  watch = config.watch
  meta = {'config': json.loads(configs.to_json(config)), 'tokenizer': tokenizer.digest, 'data': wired.feed.contents}
  if config.lora.rank:
    meta['base'] = hosts.from_first(lambda: bases.digest_of(config.init))
  saved: dict[str, Any] = {'step': None, 'scores': {}}

  def evaluate(step: int, state: Any) -> None:
    params = program.evaluated(config, state.opt_state, state.params)
    row, score, said = wired.feed.evaluate(params, step, writer)
    writer.row(step, row)
    saved['scores'] = {step: score}
    patience.look(score)
    say(f'step {step}: {said}')

  def show(step: int, state: Any) -> None:
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    params = program.evaluated(config, state.opt_state, state.params)
    new, run = watch.sample_tokens, built.run
    texts = writing.complete(config.model, params, tokenizer, watch.prompts, key, new=new, run=run)
    for prompt, text in zip(watch.prompts, texts, strict=True):
      writer.sample(step, prompt, text)
      say(f'step {step}: {prompt}{text}')

  def save(step: int, state: Any) -> None:
    if step != saved['step']:
      score = {'score': saved['scores'].get(step)}
      score |= {'held_out': {'best': patience.best, 'worse': patience.worse}} if config.watch.patience else {}
      kept = dataclasses.replace(state, params=program.kept(config, state.params))
      wired.checkpoints.save(step, kept, meta | score, first=writer.flush)  # it stands on rows that are down
      saved['step'] = step

  hooks = [(watch.eval_every, _marked('evaluation', evaluate, writer))] if wired.feed.watches else []
  if watch.prompts:
    _check_room(config, tokenizer)
    hooks.append((watch.sample_every, _marked('samples', show, writer)))
  return (*hooks, (watch.save_every, _marked('save', save, writer)))


def _marked(name: str, act: Callable[[int, Any], None], writer: Writer) -> Callable[[int, Any], None]:
  """A hook that says to the other processes where it begins and ends, and to the timeline how long it took."""

  def hook(step: int, state: Any) -> None:
    hosts.mark(f'{name} at step {step}', slow=True)
    began = time.perf_counter()
    act(step, state)
    writer.happened(step, name, time.perf_counter() - began)
    hosts.mark(f'after {name} at step {step}')

  return hook


def _check_room(config: Pretrain, tokenizer: Tokenizer) -> None:
  """Raises InputError before the first step if the samples would run past a model's learned positions."""
  longest = max(len(tokenizer.encode(prompt)) + 1 for prompt in config.watch.prompts)
  needed, there = longest + config.watch.sample_tokens, config.model.max_seq_len
  if config.model.positions == 'learned' and needed > there:
    raise InputError(f'watch.sample_tokens={config.watch.sample_tokens}: a sample needs {needed} of {there} positions')


def _logger(wired: Wired, mesh: Any, writer: Writer, on_step: OnStep, offset: int) -> OnStep:
  """Turns a step's metrics into a row: names of the ecosystem, throughput, utilisation, epochs; looks for spikes."""
  config, built, feed = wired.config, wired.built, wired.feed
  flops = program.flops_per_token(config, feed.places)
  peak = metrics.peak_flops(mesh.devices.flat)

  def log(step: int, values: dict[str, float]) -> None:
    seconds = values.pop('step_time')
    wait = values.pop('data_wait')
    wired.rewinds.row(values['loss'])
    tokens = feed.tokens(step - 1 + offset)
    row = {f'train/{k}': v for k, v in values.items()}
    row['train/lr'] = float(built.schedule(max(0, step - 1 - values['skipped'])))
    epochs = feed.epochs(step + offset)
    row |= (
      {f'data/{name}/epochs': n for name, n in zip(feed.names, epochs, strict=True)}
      if any(feed.names)
      else {'data/epochs': epochs[0]}
    )
    if config.data.batch_warmup:
      row['train/global_batch'] = feed.size(step - 1 + offset)
    if wired.checkpoints.failed:
      row['train/failed_saves'] = wired.checkpoints.failed
    if wired.rewinds.entries:
      row['train/rewinds'] = len(wired.rewinds.entries)
    row |= {'perf/tokens_per_s': tokens / seconds, 'perf/data_wait': wait / seconds, 'perf/step_s': seconds}
    row |= metrics.memory()
    if peak:
      row['perf/mfu'] = tokens * flops / seconds / peak
    writer.row(step, row)
    for line in feed.warnings(step, row):
      wired.say(f'step {step}: {line}')
    on_step(step, feed.told() | row)

  return log
