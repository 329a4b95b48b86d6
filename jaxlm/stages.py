"""The verbs that train, one a stage, and what they share: a config, its flags, its rows made ready."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.errors import InputError

if TYPE_CHECKING:
  from jaxlm import arguments
  from jaxlm.config import Pretrain
  from jaxlm.evals.rewards import Judged

ACCELERATORS = {'/dev/nvidia0': 'cuda', '/dev/accel0': 'tpu', '/dev/vfio/0': 'tpu'}  # device file -> extra

ABOUT = {  # what each stage is, in its help
  'sft': 'Instruction-tune a model on conversations: adapters on their base, or with --lora.rank 0 all of it.',
  'reward': 'Learn scores of answers from preferences, and say how many held-out pairs they tell right.',
  'preference': 'Learn what is preferred from pairs or labelled answers, by dpo, ipo, kto, orpo, simpo or cpo.',
  'rl': 'Learn from rewards: answers to prompts are drawn, scored, and learnt from, by ppo, grpo and others.',
  'distill': "Learn what a teacher would say, on data or on the student's own answers.",
}


def devices_line(accelerators: Mapping[str, str] = ACCELERATORS) -> str:
  """Which devices this process computes on.

  Raises InputError, with the pip line that helps, if JAX lacks what was asked for with JAX_PLATFORMS, or if it would
  compute on the CPU beside an idle accelerator without having been asked to.
  """
  import jax

  asked = os.environ.get('JAX_PLATFORMS', '')
  try:
    devices = jax.devices()
  except (RuntimeError, AssertionError) as e:  # JAX asserts where it knows the platform and no plugin brings it
    extra = {'gpu': 'cuda', 'cuda': 'cuda', 'tpu': 'tpu'}.get(asked.split(',')[0])
    remedy = f"pip install -e '.[{extra}]', or " if extra else ''
    raise InputError(f'JAX has no {asked!r} here: {remedy}unset JAX_PLATFORMS') from e
  idle = next((path for path in accelerators if Path(path).exists()), None)
  if devices[0].platform == 'cpu' and idle and not asked:
    raise InputError(
      f"this machine has an accelerator ({idle}) and JAX sees only the CPU: pip install -e '.[{accelerators[idle]}]', "
      'or set JAX_PLATFORMS=cpu to compute on the CPU all the same'
    )
  processes = f', in {jax.process_count()} processes' * (jax.process_count() > 1)
  return f'devices: {len(devices)} x {devices[0].device_kind} ({devices[0].platform}){processes}, jax {jax.__version__}'


def _config(args: Sequence[str], default: 'Pretrain') -> 'tuple[Pretrain, Sequence[str]]':
  """The config file that the arguments begin with, or the default, and the other arguments."""
  from jaxlm import config

  if not args or args[0].startswith('-'):
    return default, args
  found = config.load(args[0])
  if not isinstance(found, config.Pretrain):
    raise InputError(f'this config is a {type(found).__name__}, not a Pretrain')
  return found, args[1:]


def pretraining(args: Sequence[str]) -> 'Pretrain':
  """The run that `jaxlm pretrain` makes of its arguments; what the dial set, where it was turned, is printed."""
  from jaxlm import arguments, config, scale

  default, args = _config(args, config.Pretrain())
  named = arguments.named(args)
  start = scale.dialled(default, checked='depth' not in named)
  options = arguments.parse(scale.Dialled, args, 'pretrain', start)
  if 'depth' in named:
    chosen, base = scale.turned(options, default, named)
    print(scale.describe(chosen, base), flush=True)
    return chosen
  if options.tokens_per_parameter is not None:
    raise InputError('--tokens-per-parameter needs --depth')
  return scale.undialled(options)


def pretrain(args: Sequence[str]) -> None:
  """`jaxlm pretrain`."""
  _trained(pretraining(args))


def _trained(options: 'Pretrain', rows: bool = False) -> None:
  """Runs it, its rows of conversations or preferences made ready first."""
  from jaxlm import hosts

  with hosts.joined(options.watch.step_timeout):
    _run(_begun(options, rows))


def _begun(options: 'Pretrain', rows: bool) -> 'Pretrain':
  """Says which devices there are; with `rows`, the run on the folder that they were made ready in."""
  from jaxlm import hosts
  from jaxlm.console import reading, summary_shown
  from jaxlm.loops import tuning

  line, first = devices_line(), hosts.first()
  if first:
    print(line, flush=True)
  if not rows:
    return options
  with reading() as on_progress:
    options, summary = tuning.prepared(options, lambda line: print(line) if first else None, on_progress)
  if summary and first:
    summary_shown(summary)
  _check(options.data.path, show=first)
  return options


def _check(path: str, *, show: bool) -> None:
  """Raises InputError for a prepared folder with a document that cannot be learnt as it is, which is shown."""
  from jaxlm import inspector
  from jaxlm.console import rows_shown
  from jaxlm.data import prepared

  if found := inspector.faulty(prepared.load(path)):
    if show:
      rows_shown(dict([found]))
    raise InputError(f'{path}: {found[0]}')


def _run(options: 'Pretrain') -> None:
  import signal

  from jaxlm import hosts
  from jaxlm.console import Training, terminable
  from jaxlm.loops import feeds
  from jaxlm.loops import pretrain as runs

  options = feeds.counted(options)
  signals = (signal.SIGINT,) if hosts.count() > 1 else ()  # a process that left alone would leave the others waiting
  with terminable(*signals) as asked, Training(options.steps, quiet=not hosts.first()) as shown:
    runs.pretrain(options, say=shown.say, on_step=shown.step, stop=hosts.agreed(asked))


def sft(args: Sequence[str]) -> None:
  """`jaxlm sft`."""
  from jaxlm import config

  _trained(_staged(args, 'sft', config.SFT), rows=True)


def preference(args: Sequence[str]) -> None:
  """`jaxlm preference`."""
  from jaxlm import config

  _trained(_staged(args, 'preference', config.PREFERENCE), rows=True)


def rl(args: Sequence[str]) -> None:
  """`jaxlm rl`."""
  from jaxlm import config

  _trained(_staged(args, 'rl', config.RL))


def distill(args: Sequence[str]) -> None:
  """`jaxlm distill`."""
  from jaxlm import config

  options = _staged(args, 'distill', config.DISTILL)
  if not options.distill.teacher:
    raise InputError('distill: needs --teacher: a run, a Hugging Face folder or a .gguf file')
  _trained(options, rows=True)


def reward(args: Sequence[str]) -> None:
  """`jaxlm reward`: the run, before it those of the folds, and after each what held-out pairs say of it."""
  import dataclasses

  from jaxlm import config, hosts
  from jaxlm.evals import rewards

  options = _staged(args, 'reward', config.REWARD)
  with hosts.joined(options.watch.step_timeout):
    options, parts = _begun(options, rows=True), []
    for fold in range(options.preference.folds):
      part = rewards.of_fold(options, fold)
      _run(part)
      parts.append(rewards.judge(part.run, kept=True))
    options = dataclasses.replace(options, preference=dataclasses.replace(options.preference, folds=0))
    _run(options)
    if parts:
      _judged(options.run, rewards.pooled(parts), f'{len(parts)} folds', 'folds')
    _judged(options.run, rewards.judge(options.run, kept=True), 'held-out pairs', 'held_out')


def short_names(stage: str) -> dict[str, str]:
  """A stage's flags that have a short name: {'loss': 'preference.loss'}, all of `rl` and `distill` for these two."""
  import dataclasses

  from jaxlm import config

  if kind := {'rl': config.Rl, 'distill': config.Distill}.get(stage):
    names = (field.name.replace('_', '-') for field in dataclasses.fields(kind) if field.name != 'architecture')
    return {name: f'{stage}.{name}' for name in names}
  return {name: f'preference.{name}' for name in {'preference': ('loss', 'beta'), 'reward': ('folds',)}.get(stage, ())}


def _staged(args: Sequence[str], stage: str, default: 'Pretrain') -> 'Pretrain':
  """The run of a stage after pre-training; its help says what that is, and lists the short names."""
  import dataclasses

  from jaxlm import arguments, config

  (default, args), short = _config(args, default), short_names(stage)
  if stage in ('preference', 'reward'):
    default = dataclasses.replace(default, preference=dataclasses.replace(default.preference, stage=stage))
  name = lambda arg: arg[2:].partition('=')[0].replace('_', '-') if arg.startswith('--') else ''
  args = [f'--{short[name(arg)]}{arg[2 + len(name(arg)) :]}' if name(arg) in short else arg for arg in args]
  listed = '\n'.join(['\n\nShort names:'] * bool(short) + [f'--{one} is --{long}' for one, long in short.items()])
  return arguments.parse(config.Pretrain, args, stage, default, ABOUT[stage] + listed)


def judged(options: 'arguments.Eval') -> bool:
  """`jaxlm eval` of a reward model: its table, if it is one."""
  from jaxlm.evals import rewards

  if not rewards.is_reward(options.run):
    return False
  if options.against:
    raise InputError(f'{options.run}: is a reward model, which --against compares with no other')
  found = rewards.judge(options.run, options.data, batch=options.batch, seq_len=options.seq_len)
  _judged(options.run, found, ', '.join(options.data) or 'held-out pairs', 'held_out', options.out)
  return True


def _judged(run: str, found: 'Judged | None', title: str, name: str, out: str | None = None) -> None:
  """Prints what a reward model gets right, and puts it into its report and a file."""
  from jaxlm import hosts
  from jaxlm.console import table
  from jaxlm.evals import rewards

  if not hosts.first():
    return
  if found is None:
    print('no held-out pair: nothing is said of the reward model')
    return
  print(f'\n{title}:\n{table(*rewards.rows(found))}\n' + '\n'.join(rewards.lines(found)))
  print(rewards.write(run, found, name, out))


def versus(options: 'arguments.Eval') -> None:
  """`jaxlm eval` against another model: both answer held-out prompts, and a judge prefers one."""
  from jaxlm.console import counting, table
  from jaxlm.evals import asked, versus
  from jaxlm.loops import bases

  tell = lambda line: print(line, file=sys.stderr, flush=True)
  names, key = (options.run, *options.against), os.environ.get('OPENAI_API_KEY', '')
  report = options.run if bases.is_run(options.run) and options.out is None else None
  rows, bar = asked.rows(options.run, options.data, options.most, tell), []
  judging = {'model': options.judge_model, 'key': key, 'on_progress': lambda *of: bar[0](*of)}
  preferred = versus.by_name(options.judge, **judging)  # before minutes are spent on answers
  models, said = versus.opened(names), []
  for line in models[1]:
    tell(line)
  how = {'temperature': options.temperature, 'new': options.max_new_tokens, 'batch': options.batch}
  for name, (model, template) in zip(names, models[0], strict=True):
    with counting(f'answers of {name}') as told:
      said.append(versus.answers(model, template, rows, on_progress=told, **how))
  with counting('judged') as told:
    bar.append(told)
    found = versus.compare(names, rows, said, preferred)
  print('\n\n'.join(versus.samples(found)) + '\n')
  print(f'{names[0]} over {names[1]}, by {options.judge}:\n{table(*versus.rows_of(found))}')
  print('\n'.join(versus.lines(found)))
  print(versus.write(found, options.judge, options.file('winrate.jsonl'), report))


def questions(options: 'arguments.Eval') -> None:
  """`jaxlm eval --jsonl`: files of rows, asked of each model."""
  from jaxlm.console import counting, table
  from jaxlm.evals import questions, subject

  shots, templated = options.shots or 0, options.apply_chat_template
  tasks = questions.load(options.jsonl)
  pools = questions.load(options.shots_from) if options.shots_from else tasks
  if len(pools) != len(tasks):
    raise InputError(f'--shots-from: {len(pools)} tasks for {len(tasks)} of --jsonl')
  tasks = [task._replace(rows=task.rows[: options.limit]) for task in tasks]
  pairs = list(zip(tasks, pools, strict=True))
  examples = {task.name: questions.drawn(task, pool.rows, shots, options.seed) for task, pool in pairs}
  found, said = {}, []
  for name in (options.run, *options.against):
    asked, found[name] = subject.opened(name, batch=options.batch, seq_len=options.seq_len), {}
    for task in tasks:
      before = questions.contexts(asked, task, examples[task.name], templated)
      one = questions.ask(asked, task, before, new=options.max_new_tokens, templated=templated, bar=counting)
      found[name][task.name] = one.measures
      told = zip(before, task.rows, one.said, strict=True)
      said += [{'model': name, 'task': task.name, 'context': b, **row._asdict(), **x} for b, row, x in told]
  figures = questions.rows(found, dict.fromkeys(examples, shots))
  print(shown := table(*figures))
  report = options.run if options.out is None else None
  for path in questions.write(figures, shown, said, options.file('scores.json'), report):
    print(path)


def harness(options: 'arguments.Eval') -> None:
  """`jaxlm eval --lm-eval`: tasks of lm-eval, asked of each model."""
  from jaxlm.console import counting, table
  from jaxlm.evals import harness, subject

  how = {'include': options.include_path, 'shots': options.shots, 'limit': options.limit}
  names, found, parts = [name for name in options.lm_eval.split(',') if name], {}, []
  for name in (options.run, *options.against):
    asked = subject.opened(name, batch=options.batch, seq_len=options.seq_len)
    found[name] = harness.evaluate(asked, names, templated=options.apply_chat_template, bar=counting, **how)
    parts.append(f'{name}:\n\n{harness.shown(found[name])}')
  parts.append(table(*harness.compared(found)))
  print('\n\n'.join(parts))
  for path in harness.write(found, '\n\n'.join(parts), options.file('lm_eval.json')):
    print(path)
