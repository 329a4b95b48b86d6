"""The command line: one verb a stage. What is slow to import is imported by the verb that needs it."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm import stages
from jaxlm.errors import InputError, Stopped
from jaxlm.stages import devices_line, pretraining

if TYPE_CHECKING:
  from etils import epath

  from jaxlm import arguments, sample
  from jaxlm.data.tokenizer import Tokenizer
  from jaxlm.plan import Plan

HELP = """\
usage: jaxlm VERB ...          `jaxlm VERB --help` explains a verb

  quickstart   from raw text to a model that answers and is rewarded, on this machine, in minutes
  tokenizer    train a tokenizer on text
  prepare      turn text, conversations or preferences into a prepared data set
  inspect      rows as the model will see them, and what is wrong with them
  pretrain     train a language model: jaxlm pretrain CONFIG.py [--run DIR] [--optim.lr 1e-3 ...]
  sft          instruction-tune a model on conversations: jaxlm sft --init MODEL --data.path rows.jsonl
  reward       learn scores from preferences: jaxlm reward --init MODEL --data.path rows.jsonl [--folds 5]
  preference   learn what is preferred, by dpo, ipo, kto, orpo, simpo or cpo: jaxlm preference --loss dpo --init ...
  rl           learn from rewards, by ppo, grpo, rloo and others: jaxlm rl --algo grpo --init MODEL --reward ...
  distill      learn what another model would say: jaxlm distill --teacher MODEL --data.path DATA [--on-policy 0.5]
  eval         perplexity and bits per byte on held-out text, what a reward model gets right, with --jsonl FILE or
               --lm-eval TASKS scores, or with --against MODEL --judge WHAT how often its answers are preferred
  generate     let a model continue a text
  chat         talk to a model in the terminal
  serve        answer over HTTP as OpenAI's API does
  import       make a run of a model that others trained: a Hugging Face folder, hf://ORG/NAME or a GGUF file
  export       write a run's weights as a folder that transformers opens
  plan         what a step costs on a pod that is not here: memory, communication, speed at best
  report       a run as an HTML page, or several beside each other
  verify       check every file of a run's checkpoints, or of prepared data, against its digest
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one verb and returns the exit code.

  0, 1 for bad input, 3 for a plan that does not fit, 75 when terminated after saving, 76 where another process of the
  run died or hangs, 130 when interrupted.
  """
  code = _main(argv)
  if 'jaxlm.hosts' in sys.modules:
    sys.modules['jaxlm.hosts'].leave(code)
  return code


def _main(argv: Sequence[str] | None) -> int:
  args = list(sys.argv[1:] if argv is None else argv)
  if not args or args[0] in ('-h', '--help', 'help'):
    print(HELP, end='')
    return 0
  verb = VERBS.get(args[0])
  if verb is None:
    import difflib

    near = difflib.get_close_matches(args[0], VERBS, 1)
    hint = f'did you mean `jaxlm {near[0]}`?' if near else '`jaxlm --help` lists the verbs'
    return _fail(f'there is no verb {args[0]!r}; {hint}')
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it logs a stack for every try; the last error is told below
  try:
    return verb(args[1:]) or 0
  except InputError as e:
    return _fail(str(e))
  except OSError as e:  # a folder that cannot be written, a disk that is full: what was saved stays
    place = e.filename or next((arg for arg in args if '://' in arg), 'file')
    return _fail(f'{place}: {(e.strerror if e.filename else None) or e}')
  except Stopped as e:
    _fail(str(e))
    return e.code
  except KeyboardInterrupt:
    resumable = args[0] in ('pretrain', 'quickstart', 'sft', 'reward', 'preference', 'rl', 'distill')
    print('\nstopped' + '; the same command goes on from the last saved step' * resumable, file=sys.stderr)
    return 130


def _fail(line: str) -> int:
  print(f'jaxlm: {line}', file=sys.stderr)
  return 1


def _quickstart(args: Sequence[str]) -> None:
  from jaxlm import arguments

  options = arguments.parse(arguments.Quickstart, args, 'quickstart')
  from jaxlm import quickstart

  print(devices_line(), flush=True)
  quickstart.quickstart(options.run, short=options.short)


def _tokenizer(args: Sequence[str]) -> None:
  from jaxlm import arguments

  options = arguments.parse(arguments.Tokenizer, args, 'tokenizer')
  from jaxlm.data import prepare, tokenizer

  bad = prepare.Quarantine(limit=options.max_bad)
  texts = prepare.training_texts(options.sources, options.val_fraction, options.text_column, bad)
  trained = tokenizer.train(texts, options.vocab_size)
  trained.save(options.out)
  if bad.counts:
    print(f'left out: {bad.counts.total()} bad records')
  print(f'{options.out}: {trained.vocab_size} tokens, sha256 {trained.digest[:12]}')
  if trained.vocab_size < options.vocab_size:
    print(f'fewer tokens than --vocab-size {options.vocab_size}: this text has no more pairs to merge, give more of it')


def _prepare(args: Sequence[str]) -> None:
  from jaxlm import arguments

  options = arguments.parse(arguments.Prepare, arguments.with_value(args, '--beam-options'), 'prepare')
  from jaxlm.console import reading, summary_shown
  from jaxlm.data import prepare

  talks = options.chat or options.preference
  tokenizer, own = _vocabulary(options.tokenizer, talks)
  name, chat = '', None
  if talks:
    how = {'learn': options.learn, 'max_len': options.max_len, 'preference': options.preference}
    name, tokenizer, chat = prepare.chat_of(options.template, own, tokenizer, options.columns, **how)
  given = options.sources, tokenizer, options.out
  choices = {
    'val_fraction': options.val_fraction,
    'max_bad': options.max_bad,
    'column': options.text_column,
    'near': options.near_duplicates,
    'quality': options.quality,
  }
  if options.beam_runner:
    from jaxlm.data import beam

    say = lambda line: print(line, file=sys.stderr, flush=True)
    summary = beam.run(*given, runner=options.beam_runner, options=options.beam_options, say=say, **choices)
  else:
    with reading() as on_progress:
      summary = prepare.prepare(*given, on_progress=on_progress, chat=chat, **choices)
  if chat and summary.chat:
    print(f'template: {name}; learned: {chat.learn}')
    print('\n'.join(f'{kind}: {form}' for kind, form in summary.chat['formats'].items()) + '\n')
  summary_shown(summary)
  if summary.dropped['bad']:
    print(f'\nbad records, with file and line: {options.out}/{prepare.QUARANTINE}')


def _vocabulary(source: str, chat: bool) -> 'tuple[Tokenizer, str | None]':
  """A tokenizer, and for conversations the chat template that it comes with."""
  if not chat and not source.startswith('hf://') and not source.endswith('.gguf'):
    from jaxlm.data import tokenizer

    return tokenizer.load(source), None
  from jaxlm import interop  # imports jax, which takes a while

  return interop.vocabulary(source)


def _inspect(args: Sequence[str]) -> None:
  from jaxlm import arguments

  options, rest = arguments.parse_some(arguments.Inspect, args, 'inspect')
  from jaxlm import inspector
  from jaxlm.console import rows_shown
  from jaxlm.data import prepared

  if options.source.endswith('.py'):
    config = pretraining([options.source, *rest])
    folders, seq_len, packing = inspector.folders(config, print), config.data.seq_len, config.data.packing
  else:
    if rest:
      raise InputError(f'{rest[0]}: flags of a run need its config')
    folders, seq_len, packing = {options.source: prepared.load(options.source)}, options.seq_len, options.packing
  found = [inspector.inspect(one, options.split, seq_len, packing, options.rows) for one in folders.values()]
  for name, one in zip(folders, found, strict=True):
    print(f'{name}\n' + '\n'.join(inspector.lines(one)))
    rows_shown(one.rows, ids=options.ids)
  if options.html:
    Path(options.html).write_text(inspector.page(dict(zip(folders, found, strict=True))))
    print(options.html)
  for name, one in zip(folders, found, strict=True):
    if one.fault:
      raise InputError(f'{name}: {one.fault}')


def _eval(args: Sequence[str]) -> None:
  from jaxlm import arguments

  options = arguments.parse(arguments.Eval, args, 'eval')
  from jaxlm.console import table
  from jaxlm.evals import perplexity

  print(devices_line(), file=sys.stderr, flush=True)
  if options.tasks:
    _tasks(options)
    return
  for asked, verb in (
    (options.judge, stages.versus),
    (options.jsonl, stages.questions),
    (options.lm_eval, stages.harness),
  ):
    if asked:
      verb(options)
      return
  if stages.judged(options):
    return
  given = options.run, options.data
  found = perplexity.evaluate(*given, batch=options.batch, seq_len=options.seq_len, baselines=options.baselines)
  again = lambda name: perplexity.evaluate(name, found.data, batch=options.batch, seq_len=found.seq_len)
  others = [again(name) for name in options.against]
  figures, against = perplexity.rows(found), perplexity.compared([found, *others]) if others else None
  print(shown := '\n\n'.join(table(*one) for one in (figures, against) if one))
  report = options.run if options.out is None else None
  for path in perplexity.write(found, figures, against, shown, options.file('eval.json'), report):
    print(path)


def _tasks(options: 'arguments.Eval') -> None:
  from jaxlm.console import counting, table
  from jaxlm.data import prepared
  from jaxlm.evals import tasks
  from jaxlm.loops import bases

  if not options.data and not bases.is_run(options.run):
    raise InputError(f'{options.run}: is no run, which would know its rows: name a prepared folder with --data')
  where = options.data or (bases.newest(options.run).config.data.path,)
  if len(where) > 1:
    raise InputError(f'--tasks takes one folder of --data, not {len(where)}')
  folder = prepared.load(where[0])
  models, new = [*options.against, options.run], options.max_new_tokens
  with counting('answers') as told:
    found = tasks.compare(models, folder, options.tasks, new=new, batch=options.batch, on_progress=told)
  print(table(*tasks.rows(found)))
  print(tasks.write(found, folder, options.file('answers.jsonl')))


def _generate(args: Sequence[str]) -> None:
  from jaxlm import arguments

  options = arguments.parse(arguments.Generate, args, 'generate')
  import jax

  from jaxlm.loops import foreign, writing
  from jaxlm.models import Run, computed_in
  from jaxlm.sample import Sampling

  print(devices_line(), file=sys.stderr, flush=True)
  run = Run(computed_in(options.dtype, jax.default_backend()))
  model, draft = foreign.open_model(options.model), _draft(options.draft, run.dtype)
  truncation = options.top_k, options.top_p, options.min_p
  sampling = Sampling(options.temperature, *truncation, options.repetition_penalty)
  how = {'new': options.max_new_tokens, 'run': run, 'sampling': sampling, 'stop': options.stop, 'draft': draft}
  key = jax.random.key(options.seed)
  texts = writing.complete(model.cfg, model.params, model.tokenizer, options.prompt, key, **how)  # ty: ignore
  for prompt, text in zip(options.prompt, texts, strict=True):
    print(prompt + text)


def _draft(asked: str | None, dtype: Any) -> 'sample.Lookup | sample.Draft | None':
  """What drafts tokens: 'lookup', or a model."""
  from jaxlm import sample
  from jaxlm.loops import foreign

  if asked in (None, 'lookup'):
    return sample.Lookup() if asked else None
  model = foreign.open_model(asked)
  return sample.Draft(model.cfg, sample.readied(model.cfg, model.params, dtype))


def _chat(args: Sequence[str]) -> None:
  from jaxlm import arguments

  options = arguments.parse(arguments.Chat, args, 'chat')
  import jax

  from jaxlm.console import conversation
  from jaxlm.loops import chatting
  from jaxlm.models import Run, computed_in

  print(devices_line(), file=sys.stderr, flush=True)
  run = Run(computed_in(options.dtype, jax.default_backend()))
  model, draft = chatting.open_model(options.model, run.dtype), _draft(options.draft, run.dtype)
  if model.left_out:
    print(f'{options.model}: {model.left_out}', file=sys.stderr)
  asked = {name: getattr(options, name) for name in ('temperature', 'top_k', 'top_p', 'min_p')} | {
    'repetition': options.repetition_penalty
  }
  sampling, key = chatting.sampling_of(model.generation, **asked), jax.random.key(options.seed)

  def answer(turn: int, so_far: list[dict[str, str]]) -> Iterator[str]:
    how = {'run': run, 'sampling': sampling, 'max_new_tokens': options.max_new_tokens, 'draft': draft}
    return chatting.answer(model, so_far, jax.random.fold_in(key, turn), **how)

  conversation(answer, options.system)


def _serve(args: Sequence[str]) -> None:
  from jaxlm import arguments

  options = arguments.parse(arguments.Serve, args, 'serve')
  from jaxlm.serve import start

  print(devices_line(), flush=True)
  start.serve(options, say=lambda line: print(line, flush=True))


def _import(args: Sequence[str]) -> None:
  from jaxlm import arguments

  options = arguments.parse(arguments.Import, args, 'import')
  from jaxlm import tree
  from jaxlm.loops import foreign

  print(devices_line(), flush=True)
  model = foreign.import_run(options.source, options.run)
  if model.left_out:
    print(f'{options.source}: {model.left_out}')
  print(f'{options.run}: {tree.size(model.params):,} parameters, {model.cfg.vocab_size:,} tokens')


def _export(args: Sequence[str]) -> None:
  from jaxlm import arguments

  options = arguments.parse(arguments.Export, args, 'export')
  from jaxlm.loops import foreign

  print(devices_line(), flush=True)
  kind = foreign.export_run(options.run, options.out, dtype=options.dtype, merge=options.merge)
  print(f'{options.out}: as {kind}')


def _plan(args: Sequence[str]) -> int:
  os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing is computed: chips that this machine has stay free
  from jaxlm import arguments

  options, rest = arguments.parse_some(arguments.Plan, args, 'plan')
  import json

  from jaxlm import plan, topology
  from jaxlm.console import table
  from jaxlm.loops import bases

  config, on = bases.with_model(pretraining(rest)), topology.parse(options.topology, options.slices)
  tell = lambda line: print(line, file=sys.stderr, flush=True)
  if options.search:
    tried = plan.search(config, on, seconds=60 * options.minutes, say=tell)
    if options.json:
      print(json.dumps([_plain(found) | {'accum': c.compute.accum, 'remat': c.compute.remat} for c, found in tried]))
    else:
      print(table(plan.HEADER, [plan.row(*pair) for pair in tried]))
    return 0 if tried[0][1].fits else 3
  found = plan.plan(config, on, write_hlo=options.hlo, say=tell)
  if options.json:
    print(json.dumps(_plain(found)))
  else:
    print('\n\n'.join(plan.lines(found, table)))
  return 0 if found.fits else 3


def _plain(found: 'Plan') -> dict[str, object]:
  """As JSON has it: null for what is not known."""
  known = lambda values: {name: None if value != value else value for name, value in values.items()}
  return known(found._asdict()) | {'phases': [known(phase) for phase in found.phases]}


def _report(args: Sequence[str]) -> None:
  from jaxlm import arguments

  options = arguments.parse(arguments.Report, args, 'report')
  from jaxlm import report

  if options.runs[1:]:
    print(report.compare(options.runs, options.out))
  else:
    print(report.write(options.runs[0], options.out))


def _verify(args: Sequence[str]) -> None:
  from jaxlm import arguments

  options = arguments.parse(arguments.Verify, args, 'verify')
  from etils import epath

  from jaxlm.data import prepared
  from jaxlm.train import checkpoint

  folder = epath.Path(options.folder)
  if (folder / prepared.MARKER).exists() or (folder / 'records').exists():
    checked = {folder: prepared.verify(folder)}
  else:
    checkpoints = checkpoint.Checkpoints(folder / 'checkpoints')
    checked = {checkpoints.path(step): checkpoint.verify(checkpoints.path(step)) for step in checkpoints.steps()}
    checked |= {checkpoints.path(step): [f'no {checkpoint.DIGEST}: not finished'] for step in checkpoints.unfinished()}
    sound = [path for path, lines in checked.items() if not lines]
    checked |= _tokenizer_of(folder, max(sound)) if sound else {}
  if not checked:
    raise InputError(f'{folder}: neither prepared data nor a run with a finished checkpoint')
  for path, lines in sorted(checked.items()):
    print(f'{path}: ' + ('; '.join(lines) or 'sound'))
  if damaged := sum(map(bool, checked.values())):
    raise InputError(f'{folder}: {damaged} of {len(checked)} damaged')


def _tokenizer_of(run: 'epath.Path', newest: 'epath.Path') -> dict['epath.Path', list[str]]:
  """What is wrong with a run's tokenizer: nothing where its newest sound checkpoint was trained with it."""
  from jaxlm import files
  from jaxlm.data import tokenizer
  from jaxlm.train import checkpoint

  path = run / 'tokenizer.json'
  if not path.exists():
    return {path: ['it is missing']}
  trained_with = files.read_json(newest / checkpoint.META).get('tokenizer')
  return {path: [] if tokenizer.load(path).digest == trained_with else ['not the one that the run was trained with']}


VERBS: dict[str, Callable[[Sequence[str]], int | None]] = {
  'quickstart': _quickstart,
  'tokenizer': _tokenizer,
  'prepare': _prepare,
  'inspect': _inspect,
  'pretrain': stages.pretrain,
  'sft': stages.sft,
  'reward': stages.reward,
  'preference': stages.preference,
  'rl': stages.rl,
  'distill': stages.distill,
  'eval': _eval,
  'generate': _generate,
  'chat': _chat,
  'serve': _serve,
  'import': _import,
  'export': _export,
  'plan': _plan,
  'report': _report,
  'verify': _verify,
}
