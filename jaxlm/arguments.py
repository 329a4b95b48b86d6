"""What each verb takes, as frozen dataclasses that tyro turns into flags and help."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import Positional

from jaxlm.errors import InputError, at_least, within


@dataclasses.dataclass(frozen=True)
class Quickstart:
  """The whole life of a model: tokenizer, data, pre-training, instructions, reward models, PPO, who wins, reports."""

  run: str = 'runs/quickstart'  # where everything goes; run again, it goes on where it stopped
  short: bool = False  # a minute or two instead of seven: fewer steps, the same path


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Train a byte-level BPE tokenizer."""

  sources: Positional[tuple[str, ...]]  # as for `jaxlm prepare`
  out: str = 'tokenizer.json'
  vocab_size: int = 8192
  val_fraction: float = 0.05  # leaves out what `jaxlm prepare` holds out with the same fraction
  max_bad: int = 0  # bad records to leave out before giving up; `jaxlm prepare` lists them
  text_column: str = 'text'  # the key or column that holds a document

  def __post_init__(self):
    at_least(0, max_bad=self.max_bad)
    within('[0, 1)', val_fraction=self.val_fraction)


@dataclasses.dataclass(frozen=True)
class Prepare:
  """Turn text, or with --chat conversations, or with --preference rows that say which answer is better, into tokens.

  A source is [KIND=]SPEC[*WEIGHT]; SPEC is a file, a folder or a glob of text, .jsonl or .parquet, also .gz and .zst,
  or tfds:NAME[:split[:column]], or hf://datasets/ORG/NAME[/GLOB].
  Weights are shares of the training rows: 'wiki=dump/*.jsonl*0.5 + code*0.3'.
  """

  sources: Positional[tuple[str, ...]]
  tokenizer: str  # a tokenizer.json, the folder of a run or a model that has one, or a .gguf file
  out: str
  val_fraction: float = 0.05  # share of the documents held out, chosen by the hash of their text
  max_bad: int = 0  # bad records to leave out, listed in OUT/quarantine.jsonl, before giving up
  text_column: str = 'text'  # the key or column that holds a document
  near_duplicates: float | None = None  # also drop what is that similar (Jaccard, as 0.8) to a document kept before
  quality: bool = False  # also drop what is not prose: a few words, odd or repeated ones (code and tables are not)
  chat: bool = False  # rows are conversations: messages, ShareGPT, Alpaca, prompt and completion, question and answer
  template: str | None = (
    None  # 'model' (its own, beside the tokenizer), chatml, llama3, gemma, mistral, qwen, plain, a file
  )
  learn: Literal['assistant', 'last', 'all'] = 'assistant'  # every turn of the assistant, its last one, or all tokens
  max_len: int | None = None  # tokens of a conversation; longer ones lose turns from their end
  columns: tuple[str, ...] = ()  # what to read: prompt=COLUMN,response=COLUMN or messages=COLUMN; system=, tools= too
  preference: bool = False  # rows are preferences: chosen and rejected (and prompt), or prompt, completion and label
  beam_runner: str | None = None  # on Apache Beam: DirectRunner, DataflowRunner, FlinkRunner, SparkRunner, ...
  beam_options: str = ''  # its flags in one string: '--project=mine --region=us-central1 --temp_location=gs://...'

  def __post_init__(self):
    if self.beam_options and not self.beam_runner:
      raise InputError('--beam-options needs --beam-runner')
    if self.chat and self.preference:
      raise InputError('--chat and --preference: a folder holds conversations or preferences')
    if self.preference and self.learn != 'assistant':
      raise InputError(f'--learn {self.learn}: of preferences the answer is learned, which is the last turn')
    talks, named = self.chat or self.preference, '--preference' if self.preference else '--chat'
    if talks and (self.beam_runner or self.quality or self.text_column != 'text'):
      raise InputError(f'{named} goes without --beam-runner, --quality and --text-column')
    if not talks and (self.template or self.learn != 'assistant' or self.max_len or self.columns):
      raise InputError('--template, --learn, --max-len and --columns need --chat or --preference')
    at_least(0, max_bad=self.max_bad)
    at_least(2, max_len=self.max_len)
    within('[0, 1)', val_fraction=self.val_fraction)


@dataclasses.dataclass(frozen=True)
class Inspect:
  """Show rows as the model will see them, and check the masks, ends and beginnings of documents. Exit code 1: a fault.

  jaxlm inspect FOLDER, or jaxlm inspect CONFIG.py [any flag of the run, as --data.seq-len 1024].
  """

  source: Positional[str]  # a prepared folder, or a run's config
  rows: int = 2  # how many to show
  split: str = 'train'
  seq_len: int = 1024  # tokens in a row; of a config, its own
  packing: Literal['concat', 'best_fit'] | None = (
    None  # where not given: best_fit for conversations; of a config, its own
  )
  ids: bool = False  # a line for each token, with its id, segment and position
  html: str | None = None  # a file for the rows as a page

  def __post_init__(self):
    at_least(0, rows=self.rows)
    at_least(2, seq_len=self.seq_len)


@dataclasses.dataclass(frozen=True)
class Eval:
  """Perplexity and bits per byte of a run on held-out text, by kind and by source, with 95 % intervals.

  jaxlm eval RUN_A --against RUN_B: of both, and how far they are apart, paired by document.
  jaxlm eval RUN_A --against RUN_B --judge WHAT: how often A's answers to held-out prompts are preferred to those of B.
  jaxlm eval MODEL --jsonl FILE --shots 5: multiple choice, continuations, texts or answers of your own.
  jaxlm eval MODEL --lm-eval TASK,TASK --include-path DIR: tasks of lm-eval.
  """

  run: Positional[str]  # a run's folder, or any model that generate takes
  data: tuple[str, ...] = ()  # prepared folders, with a judge rows and gym:TASK too; by default what it was trained on
  batch: int = 16  # rows at a time
  seq_len: int | None = None  # tokens in a row; by default the run's
  baselines: bool = False  # beside xz -9 and a byte 5-gram of the training text, on the same documents
  out: str | None = None  # a JSON file; by default RUN/eval.json
  tasks: int = 0  # answer so many held-out conversations of each kind and score the answers, rather than perplexity
  against: tuple[
    str, ...
  ] = ()  # further models, runs or foreign ones, on the same rows, as the one that the run began with
  max_new_tokens: int = 128  # of an answer
  judge: str = ''  # what prefers one of two answers: a reward of `jaxlm rl` (run:FOLDER, ...), or http(s)://HOST/v1
  judge_model: str = ''  # of such a server, whose key is in OPENAI_API_KEY
  most: int = 200  # with a judge: prompts
  temperature: float = 0.0  # with a judge: of the answers; 0: the likeliest tokens
  jsonl: tuple[str, ...] = ()  # [NAME=]FILE of rows, one task each, rather than perplexity
  lm_eval: str = ''  # names of lm-eval's tasks, with commas between them
  include_path: str | None = None  # with lm-eval: a folder with YAML files of further tasks
  shots: int | None = None  # examples before each question; by default none, with lm-eval the task's own number
  shots_from: tuple[str, ...] = ()  # with jsonl: as many files that examples are drawn from, not the other rows
  seed: int = 0  # of which examples
  limit: int | None = None  # only the first rows of each task
  apply_chat_template: bool = False  # ask in the model's own chat template, examples as turns

  def __post_init__(self):
    if sum(map(bool, (self.tasks, self.judge, self.jsonl, self.lm_eval))) > 1:
      raise InputError('--tasks, --judge, --jsonl and --lm-eval: one of them at a time')
    if self.shots_from and len(self.shots_from) != len(self.jsonl):
      raise InputError(f'--shots-from: {len(self.shots_from)} files for {len(self.jsonl)} of --jsonl')
    if self.include_path and not self.lm_eval:
      raise InputError('--include-path needs --lm-eval')
    if self.judge and (len(self.against) != 1 or self.tasks):
      raise InputError('--judge compares with one other model: --against MODEL, without --tasks')
    within('[0, inf)', temperature=self.temperature)
    at_least(1, most=self.most)
    at_least(1, batch=self.batch, seq_len=self.seq_len, max_new_tokens=self.max_new_tokens)
    at_least(1, limit=self.limit)
    at_least(0, tasks=self.tasks, shots=self.shots, seed=self.seed)

  def file(self, name: str) -> str:
    """Where the figures go: `out`, else a file in the folder of the run or the adapter; of what is no folder, here."""
    inside = Path(self.run).is_dir() or '://' in self.run.removeprefix('hf://')
    return self.out or (f'{self.run}/{name}' if inside else name)


@dataclasses.dataclass(frozen=True)
class Generate:
  """Let a model continue a text."""

  model: Positional[str]  # a run's folder, a Hugging Face or a peft folder, hf://ORG/NAME or a .gguf file
  prompt: tuple[str, ...] = ('The ',)
  max_new_tokens: int = 128
  temperature: float = 0.8  # 0: always the likeliest token
  top_k: int | None = None
  top_p: float | None = 0.95
  min_p: float | None = None  # only tokens of at least this share of the likeliest one's probability
  repetition_penalty: float | None = None  # above 1: what was said before is less likely
  stop: tuple[str, ...] = ()  # texts before which to stop
  draft: str | None = None  # speculative decoding: 'lookup', or a smaller model of the same vocabulary
  seed: int = 0
  dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of matmuls; auto: bfloat16 on accelerators, float32 on CPU

  def __post_init__(self):
    if not self.prompt:
      raise InputError('prompt needs a text')
    if '' in self.stop:
      raise InputError('stop needs texts that are not empty')
    within('[0, inf)', temperature=self.temperature)
    within('(0, inf)', repetition_penalty=self.repetition_penalty)
    within('(0, 1]', top_p=self.top_p, min_p=self.min_p)
    within('[1, 2147483647]', top_k=self.top_k, max_new_tokens=self.max_new_tokens)
    within('[-9e18, 9e18]', seed=self.seed)  # 64 bits


@dataclasses.dataclass(frozen=True)
class Chat:
  """Talk to a model in the terminal. /reset forgets the conversation, /exit ends it; ctrl-c stops an answer."""

  model: Positional[str]  # a run's folder, a Hugging Face or a peft folder, hf://ORG/NAME or a .gguf file
  system: str | None = None  # the system message
  max_new_tokens: int = 512  # of an answer
  temperature: float | None = None  # 0: always the likeliest token; where not given, as the model's own config says
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  repetition_penalty: float | None = None
  draft: str | None = None  # speculative decoding: 'lookup', or a smaller model of the same vocabulary
  seed: int = 0
  dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of matmuls; auto: bfloat16 on accelerators, float32 on CPU

  def __post_init__(self):
    within('[0, inf)', temperature=self.temperature)
    within('(0, inf)', repetition_penalty=self.repetition_penalty)
    within('(0, 1]', top_p=self.top_p, min_p=self.min_p)
    within('[1, 2147483647]', top_k=self.top_k, max_new_tokens=self.max_new_tokens)
    within('[-9e18, 9e18]', seed=self.seed)  # 64 bits


@dataclasses.dataclass(frozen=True)
class Serve:
  """Answer over HTTP as OpenAI's API does: completions, conversations, streams. SIGTERM: what was asked is answered."""

  model: Positional[str]  # a run's folder, a Hugging Face or a peft folder, hf://ORG/NAME or a .gguf file
  name: str | None = None  # that clients call it by; by default that of its folder or file
  adapter: tuple[str, ...] = ()  # NAME=FOLDER: adapters of peft's on this model, which clients choose by their names
  template: str | None = None  # of conversations: chatml, llama3, gemma, mistral, qwen, plain, a file; else its own
  host: str = '127.0.0.1'  # others need a key
  port: int = 8000  # 0: a free one
  api_key: str | None = None  # that every request has to bring; better in the environment, as JAXLM_API_KEY
  slots: int = 8  # answers that are made at once
  context: int = 2048  # tokens of a prompt and its answer together
  queue: int = 64  # answers that may wait for a slot; further ones are refused with 429
  prefixes: int = 4  # prompts that are remembered for others that begin like them
  answers: int = 16  # that one request may ask for
  choices: str | None = None  # a JSONL for `reward` and `preference`: the answers that people pick on the page
  data: int = 1  # devices that the slots are spread over
  tensor: int = 1  # devices that every weight is spread over
  dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of matmuls; auto: bfloat16 on accelerators, float32 on CPU
  body_seconds: float = 20.0  # for a request to arrive
  answer_seconds: float = 600.0  # for an answer to be complete
  drain_seconds: float = 60.0  # for answers to be complete once the server is asked to end

  def __post_init__(self):
    within('[0, 65535]', port=self.port)
    at_least(1, data=self.data, tensor=self.tensor)
    within('[2, 4096]', slots=self.slots)
    within('[2, 16777216]', context=self.context)
    within('[1, 1000000]', queue=self.queue, prefixes=self.prefixes, answers=self.answers)
    within('(0, 1e6]', body_seconds=self.body_seconds, answer_seconds=self.answer_seconds)
    within('[1, 1e6]', drain_seconds=self.drain_seconds)
    if any(not all(one.partition('=')[::2]) for one in self.adapter):
      raise InputError('--adapter takes NAME=FOLDER')


@dataclasses.dataclass(frozen=True)
class Import:
  """Make a run of a model that others trained, for `generate`, `eval` and `--init`."""

  source: Positional[str]  # a Hugging Face folder, hf://ORG/NAME[@REVISION], or a .gguf file
  run: str  # the new run's folder


@dataclasses.dataclass(frozen=True)
class Export:
  """Write a run's newest weights as a folder that transformers, vLLM and others open."""

  run: Positional[str]  # the run's folder
  out: Positional[str]  # a new folder
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  merge: bool = False  # of a run with adapters: the model with them folded in, rather than a folder for peft


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a step of a run costs on chips that are not here: memory, what is sent between them, and bounds on its speed.

  jaxlm plan CONFIG.py --topology v5e-256 [any flag of the run, as --mesh.tensor 4]. Exit code 3: it does not fit.
  """

  topology: str  # v5e-256, v5p-64, v6e-256, ... as clouds name them, or in chips: v5p:4x4x8
  slices: int = 1  # joined over the data-center network: `mesh.data` is laid across them
  hlo: str | None = None  # a file for the compiled program's text
  json: bool = False  # one JSON object instead of tables
  search: bool = False  # try other remats, meshes and micro-batches, and print them, the best first
  minutes: float = 10.0  # for the search

  def __post_init__(self):
    at_least(1, slices=self.slices)
    within('(0, inf)', minutes=self.minutes)


@dataclasses.dataclass(frozen=True)
class Report:
  """Write the report.html of each run; of several, also a page that compares them."""

  runs: Positional[tuple[str, ...]]
  out: str | None = None  # the page; by default comparison.html of several runs, of one the report.html in its folder

  def __post_init__(self):
    if not self.runs:
      raise InputError('jaxlm report RUN...: names no run')


@dataclasses.dataclass(frozen=True)
class Verify:
  """Check every file of a run's checkpoints, or of prepared data, against its digest."""

  folder: Positional[str]  # of a run, or of prepared data


def parse(cls: Any, args: Sequence[str], verb: str, default: Any = None, about: str | None = None) -> Any:
  """Arguments into an instance of `cls`; tyro prints what is wrong with them, the nearest flag, and exits with 2.

  `about` heads the help; where it is not given, the docstring of `cls`.
  """
  return tyro.cli(cls, prog=f'jaxlm {verb}', args=args, default=default, description=about)


def parse_some(cls: Any, args: Sequence[str], verb: str) -> tuple[Any, list[str]]:
  """`parse` of what belongs to `cls`, and the arguments that do not."""
  return tyro.cli(cls, prog=f'jaxlm {verb}', args=args, return_unknown_args=True)


def with_value(args: Sequence[str], flag: str) -> list[str]:
  """The arguments with `flag` and its value in one, so that a value may look like a flag itself."""
  joined = list(args)
  if flag in joined[:-1]:
    at = joined.index(flag)
    joined[at : at + 2] = [f'{flag}={joined[at + 1]}']
  return joined


def named(args: Sequence[str]) -> set[str]:
  """The fields whose flags are among the arguments, as dotted paths: {'depth', 'model.d_model'}."""
  flags = (arg[2:].partition('=')[0] for arg in args if arg.startswith('--'))
  return {flag.replace('-', '_') for flag in flags}
