"""Preparation on Apache Beam: the folder that `prepare` makes, byte for byte, by as many machines as a runner has.

Texts pass between workers in chunks of about a million characters; what is decided about them passes as hashes. A
worker holds one shard of tokens, or what one sketch's band has in common, at a time. This process, as `prepare` does,
holds the index (11 bytes a record), and reads the finished shards once for the digest of all tokens; one worker holds
the pairs of near-duplicates.
"""

import contextlib
import functools
import importlib
import json
import logging
import shlex
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from etils import epath

from jaxlm import files
from jaxlm.data import beam_steps as steps
from jaxlm.data import neardup, prepare, records
from jaxlm.data.choice import SPLITS, Quarantine, Rules
from jaxlm.data.prepare import QUARANTINE, Job, Made
from jaxlm.data.prepared import Count, Summary
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError

STAGING = '.beam-'  # folders in `out` where workers write
DATAFLOW = 'DataflowRunner'
PLAIN_EVERY = 10.0  # seconds between lines about one stage

Say = Callable[[str], None]


def run(
  specs: Sequence[str],
  tokenizer: Tokenizer,
  out: epath.PathLike,
  *,
  runner: str,
  options: str = '',
  say: Say = lambda line: None,
  **choices: Any,
) -> Summary:
  """`prepare.prepare(specs, tokenizer, out, **choices)` by a runner of Beam's, which `options` (flags) configure.

  'DirectRunner' is this process. Workers read the sources and write into a folder in `out`, so both have to be where
  they can; a folder prepared before is whole until they have finished. `say` gets lines about what is being done.
  Raises InputError as `prepare.prepare` does, for a runner or flags that Beam does not know, and where a step failed.
  """
  this = prepare.job(specs, tokenizer, out, **choices)
  if done := prepare.finished(this):
    return done
  if runner.lower() == DATAFLOW.lower():
    _refuse_local([this.out, *(file.path for file in this.files)])
  engine, flags = _engine(runner, options)
  if this.rules.near is not None:
    neardup.Sketcher(this.rules.near)  # refuses what the workers would
  with _staging(this.out) as folder:
    tokenizer.save(folder / 'tokenizer.json')
    (folder / 'files.json').write_text(json.dumps([[str(file.path), *file[1:]] for file in this.files]))
    with _heard(engine, say):
      _execute(this, folder, engine, flags)
    say('beam: putting the index together')
    return _collected(this, folder)


def _library(module: str = 'apache_beam', install: str = "-e '.[beam]'") -> Any:
  """A module of Beam's, imported without what it logs about optional parts of it."""
  logging.disable(logging.WARNING)
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise InputError(f'--beam-runner needs more than is installed: pip install {install}') from error
  finally:
    logging.disable(logging.NOTSET)


def _engine(runner: str, options: str) -> tuple[str, Any]:
  """Beam's name of the runner, and its options. Raises InputError for what Beam does not know."""
  _library()
  module = _library('apache_beam.options.pipeline_options')
  names = [name.rsplit('.', 1)[-1] for name in module.StandardOptions.KNOWN_RUNNER_NAMES]
  known = {name.lower(): name for name in names}
  name = known.get(runner.lower())
  if name is None:
    raise InputError(f'--beam-runner {runner}: Beam has no such runner; it has {", ".join(sorted(known.values()))}')
  if name == DATAFLOW:
    _library('apache_beam.runners.dataflow.internal.apiclient', "'apache-beam[gcp]'")
  try:
    words = shlex.split(options)
    flags = module.PipelineOptions([*words, f'--runner={name}'])
    with contextlib.redirect_stderr(None):
      unknown = set(flags.get_all_options(drop_default=True, retain_unknown_options=True)) - set(
        flags.get_all_options()
      )
  except (ValueError, SystemExit) as error:
    raise InputError(f'--beam-options {options!r}: Beam cannot read them: {error}') from error
  if unknown:
    raise InputError(f'--beam-options: Beam has no {", ".join(f"--{flag}" for flag in sorted(unknown))}')
  return name, flags


def _refuse_local(paths: Sequence[epath.Path]) -> None:
  for path in paths:
    if not files.remote(path):
      raise InputError(f'{path}: workers of Dataflow cannot reach it: give a place on an object store, as gs://...')


@contextmanager
def _staging(out: epath.Path) -> Generator[epath.Path]:
  """A folder in `out` for the workers; those of earlier runs that were killed are removed."""
  out.mkdir(parents=True, exist_ok=True)
  for left in [path for path in files.children(out) if path.name.startswith(STAGING)]:
    left.rmtree()
  folder = out / f'{STAGING}{uuid.uuid4().hex[:12]}'
  folder.mkdir()
  try:
    yield folder
  finally:
    folder.rmtree(missing_ok=True)


class _Told(logging.Handler):
  """Lines about what workers in this process do, one a stage and, while it lasts, one every few seconds.

  Of runners elsewhere it passes on what they log.
  """

  def __init__(self, say: Say):
    super().__init__(logging.INFO)
    self.say, self.began = say, time.monotonic()
    self.counts, self.last = Counter[str](), dict[str, float]()

  def emit(self, record: logging.LogRecord) -> None:
    self.say(f'beam: {record.getMessage()}')

  def stage(self, what: str) -> None:
    self.counts[what] += 1
    now = time.monotonic()
    if now - self.last.get(what, -PLAIN_EVERY) >= PLAIN_EVERY:
      self.last[what] = now
      many = f', {self.counts[what]} parts' if self.counts[what] > 1 else ''
      self.say(f'beam: {what}{many} ({now - self.began:.0f} s)')


@contextmanager
def _heard(engine: str, say: Say) -> Generator[None]:
  told, logger = _Told(say), logging.getLogger('apache_beam')
  level, direct = logger.level, engine == 'DirectRunner'
  steps.PROGRESS.append(told.stage)
  logger.setLevel(logging.ERROR if direct else logging.INFO)
  if not direct:
    logger.addHandler(told)
  try:
    yield
  finally:
    steps.PROGRESS.remove(told.stage)
    logger.removeHandler(told)
    logger.setLevel(level)


def _execute(this: Job, folder: epath.Path, engine: str, flags: Any) -> None:
  """Runs the pipeline. Raises InputError, naming the step, where one failed."""
  beam = _library()
  here = _library('apache_beam.runners.portability.fn_api_runner').FnApiRunner
  try:
    pipeline = beam.Pipeline(here() if engine == 'DirectRunner' else None, options=flags)
    _build(pipeline, this, str(folder))
    result = pipeline.run()
    state = result.wait_until_finish()
  except (InputError, OSError):
    raise
  except Exception as error:  # each runner has its own
    lines = str(error).strip().splitlines() or ['']
    raise InputError(f'{engine}: the pipeline failed: {type(error).__name__}: {lines[-1]}') from error
  if state not in (None, 'DONE'):
    raise InputError(f'{engine}: the pipeline ended as {state}')


def _build(pipeline: Any, this: Job, folder: str) -> None:
  """The whole pipeline: what it makes is files in `folder`."""
  beam = _library()
  write = lambda name: beam.Map(steps.save_json, f'{folder}/{name}')
  gathered = lambda: beam.CombineGlobally(beam.combiners.ToListCombineFn())
  many = lambda step, *tags, **given: beam.FlatMap(step, **given).with_outputs(*tags, main='main')

  numbered = pipeline | 'Start' >> beam.Create([f'{folder}/files.json']) | 'Files' >> beam.FlatMap(steps.listed)
  found = numbered | 'Spread' >> beam.Reshuffle() | 'Read' >> many(steps.read, 'bad', max_bad=this.max_bad)
  bad = found.bad | 'AllBad' >> gathered()
  bad | 'WriteBad' >> write('bad.json')
  refused = beam.pvalue.AsSingleton(bad | 'Refused' >> beam.Map(steps.is_refused, this.max_bad))
  left_out = _left_out(found.main, this.rules)
  chunks = {'chunk': found.main, 'left_out': left_out} | 'Choose' >> beam.CoGroupByKey()
  given = {'tokenizer': f'{folder}/tokenizer.json', 'val_fraction': this.val_fraction, 'refused': refused}
  made = chunks | 'Tokenize' >> many(steps.tokenized, 'counts', 'dropped', 'met', **given)
  made.dropped | 'AllDropped' >> _sums() | 'ListDropped' >> gathered() | 'WriteDropped' >> write('dropped.json')

  groups = _groups(made.met)
  groups | 'WriteGroups' >> write('groups.json')
  starts = made.counts | 'CountsOfFile' >> beam.GroupByKey() | 'Starts' >> many(steps.starts, 'totals')
  before = starts.totals | 'Totals' >> gathered() | 'FileStarts' >> beam.Map(steps.file_starts)
  placed = (
    {'records': made.main, 'start': starts.main}
    | 'Starting' >> beam.CoGroupByKey()
    | 'Place' >> beam.FlatMap(steps.placed, beam.pvalue.AsSingleton(before))
  )
  dtype = records.dtype_for(this.tokenizer).str
  shards = placed | 'Shards' >> beam.GroupByKey()
  shards | 'Write' >> beam.Map(steps.written, beam.pvalue.AsSingleton(groups), folder, dtype)


def _sums() -> Any:
  """(reason, file, count) -> (reason, file, sum)."""
  beam = _library()
  return (
    beam.Map(lambda one: (one[:2], one[2]))
    | 'Sum' >> beam.CombinePerKey(sum)
    | 'Flat' >> beam.Map(lambda one: (*one[0], one[1]))
  )


def _left_out(chunks: Any, rules: Rules) -> Any:
  """(chunk, (nth, reason)) of the documents that go, empty ones aside."""
  beam = _library()
  near, many = rules.near, lambda step, *tags, **given: beam.FlatMap(step, **given).with_outputs(*tags, main='main')
  texts = chunks | 'Look' >> beam.FlatMap(steps.looked_at, rules) | 'SameText' >> beam.GroupByKey()
  first = texts | 'FirstOnes' >> many(steps.first_ones, 'left_out', 'copies', near=near is not None)
  if near is None:
    return first.left_out
  sketches = first.main | 'SameSketch' >> beam.GroupByKey() | 'Bands' >> many(steps.bands, 'near', threshold=near)
  pairs = sketches.main | 'SameBand' >> beam.GroupByKey() | 'Alike' >> beam.FlatMap(steps.alike, near)
  pairs = pairs | 'Once' >> beam.Distinct() | 'Pairs' >> beam.CombineGlobally(beam.combiners.ToListCombineFn())
  later = (sketches.near, pairs | 'NearOnes' >> beam.FlatMap(steps.near_ones)) | 'Near' >> beam.Flatten()
  with_copies = (
    {'copies': first.copies, 'near': later}
    | 'CopiesOfNear' >> beam.CoGroupByKey()
    | 'WithCopies' >> many(steps.with_copies, 'left_out')
  )
  return (first.left_out, with_copies.left_out) | 'LeftOut' >> beam.Flatten()


def _groups(met: Any) -> Any:
  """One list: the groups in their order, with where each was met first."""
  beam = _library()
  first_met = lambda most: beam.CombineGlobally(functools.partial(steps.first_met, most=most))
  first = beam.pvalue.AsSingleton(met | 'FirstSources' >> first_met(records.MOST_SOURCES))
  others = met | 'Others' >> beam.Map(steps.others_met, first) | 'FirstOthers' >> first_met(None)
  return others | 'Groups' >> beam.Map(steps.all_groups, first)


def _collected(this: Job, folder: epath.Path) -> Summary:
  """What the workers wrote, as the finished folder."""
  bad = sorted(files.read_json(folder / 'bad.json', list))
  counted = _replay(bad, Quarantine(None, this.max_bad))
  groups = files.read_json(folder / 'groups.json', list)
  if len(groups) > records.MOST_GROUPS:
    raise records.too_many_groups(groups[records.MOST_GROUPS][2])
  shards = {split: _facts(folder, split) for split in SPLITS}
  made = Made(
    [(kind, source) for kind, source, _ in groups],
    {split: _counts(shards[split], len(groups)) for split in SPLITS},
    _dropped(this, files.read_json(folder / 'dropped.json', list)) | {'bad': counted.counts},
    '',
  )
  prepare.need_training(this, made)
  index = _index(folder, shards)
  made = made._replace(contents=index.contents(records.dtype_for(this.tokenizer), made.groups))
  names = {f'records/{name}': folder / name for found in shards.values() for name in found}
  digests = {f'records/{name}': facts['sha256'] for found in shards.values() for name, facts in found.items()}
  with prepare.workplace(this.out, names) as ready:
    _replay(bad, Quarantine(ready / QUARANTINE, this.max_bad))
    lengths = {split: [facts['records'] for facts in found.values()] for split, found in shards.items()}
    sizes = {split: sum(facts['bytes'] for facts in found.values()) for split, found in shards.items()}
    records.describe(ready / 'records', lengths, sizes)
    index.save(ready)
    return prepare.seal_up(this, ready, made, digests)


def _replay(bad: Sequence[Any], quarantine: Quarantine) -> Quarantine:
  """Tells what was wrong in the order of the documents. Raises InputError where that ends the preparation."""
  for _, kind, messages, end in bad:
    for message in messages:
      quarantine.of(kind)(InputError(message))
    if end:
      raise InputError(end)
  return quarantine


def _facts(folder: epath.Path, split: str) -> dict[str, Any]:
  """What `written` said of the shards of a split, by their names, in their order."""
  found = {}
  while (folder / f'{(name := records.shard_name(split, len(found)))}.json').exists():
    found[name] = files.read_json(folder / f'{name}.json')
  return found


def _counts(shards: dict[str, Any], groups: int) -> list[Count]:
  counts = [Count() for _ in range(groups)]
  for facts in shards.values():
    for number, figures in facts['groups'].items():
      counts[int(number)] = Count(*map(sum, zip(counts[int(number)].figures, figures, strict=True)))
  return counts


def _dropped(this: Job, counts: Sequence[tuple[str, int, int]]) -> dict[str, Counter[str]]:
  """{reason: {kind: documents}}, the kinds in the order in which they were met."""
  dropped = {reason: Counter[str]() for reason in this.rules.reasons}
  for reason, file, count in sorted(counts, key=lambda one: one[1]):
    dropped[reason][this.files[file].kind] += count
  return dropped


def _index(folder: epath.Path, shards: dict[str, dict[str, Any]]) -> records.Index:
  """The index of all shards; their tokens are read once, for their digest."""
  index = records.Index()
  for split, names in shards.items():
    for name in names:
      with (folder / f'{name}.npz').open('rb') as file, np.load(file, allow_pickle=False) as arrays:
        for whole in ('lengths', 'begins', 'groups'):
          getattr(index, whole)[split].frombytes(arrays[whole].tobytes())
      with _here(folder / name) as path:
        for raw in records.stored_tokens(path):
          index.tokens[split].update(raw)
  return index


@contextmanager
def _here(path: epath.Path) -> Generator[epath.Path]:
  """The file, or for an object store a copy of it here."""
  if not files.remote(path):
    yield path
    return
  with tempfile.TemporaryDirectory() as here:
    files.copy(path.parent, epath.Path(here), [path.name])
    yield epath.Path(here) / path.name
