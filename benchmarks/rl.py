"""GRPO and DPO beside TRL's trainers: the same weights, prompts, lengths and micro-batches, interleaved step by step.

python benchmarks/rl.py [MODEL.gguf] [--what grpo dpo] [--rounds 5] [--prompts 4] [--samples 4] [--prompt-tokens 48] ...

Without a model a Llama of 2 M parameters is made, with a vocabulary of 2048. Float32 on the CPU, AdamW, no gradient
checkpointing (TRL's default has it, and bfloat16), nothing logged or saved. No answer ends before --new tokens: ours
has no stop ids, TRL's `min_new_tokens`. `grpo`: one update a rollout, no reference; `grpo-lora`: adapters of rank 16
and a KL term, whose reference is the model without them; `dpo`: all weights, the reference's log-probabilities computed
before; `dpo-lora`: adapters, the reference in the step. --paged: TRL's continuous batching instead of `generate`.
Each side is a process of its own that waits for its turn; ours has memory in large pages as the command `jaxlm` has it
(`jaxlm/__main__.py`), theirs what the system gives; with GLIBC_TUNABLES set both have that.
Only ratios mean something on a shared machine: of seconds, and in the last column of seconds of CPU, which do not count
what other processes took.
Needs torch and TRL (pip install -e '.[parity]').
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxlm import config, interop, models, program, sharding
from jaxlm.__main__ import LARGE, TUNED
from jaxlm.config import Lora, Optim, Pretrain, Rl
from jaxlm.console import table
from jaxlm.data import chat, tokenizer, turns
from jaxlm.loops import answers, bases, feeds, tuning
from jaxlm.models import ModelConfig
from jaxlm.rl import rollout
from jaxlm.train import metrics

WHAT = 'grpo', 'grpo-lora', 'dpo', 'dpo-lora'
RANK, ALPHA, KL = 16, 32.0, 0.04
SMALL = ModelConfig(vocab_size=2048, d_model=192, n_layers=4, n_heads=6, n_kv_heads=2, d_ff=512)
SAMPLE = Path(interop.__file__).parents[1] / 'assets' / 'sample' / 'novel.jsonl'
REWARD = 'def e(prompts, said, rows):\n  return [text.count("e") / (1 + len(text)) for text in said]\n'
TURN = 'turn '  # what a line of a child begins with


def texts() -> list[str]:
  return [json.loads(line)['text'] for line in SAMPLE.read_text().splitlines()]


def furnish(folder: Path, args: argparse.Namespace) -> None:
  """The model as a Hugging Face folder, prompts and preferences of the very lengths, a reward."""
  if args.model:
    found = interop.load(args.model)
  else:
    vocabulary = tokenizer.train(texts(), SMALL.vocab_size)
    params, plain = models.init(SMALL, jax.random.key(0)), turns.choose('plain', None)[1]
    found = interop.Model(SMALL, params, vocabulary, plain, {'eos_token_id': vocabulary.eos_id})
  interop.export(found, folder / 'model')
  (folder / 'reward.py').write_text(REWARD)
  passages = Passages(found.tokenizer, found.chat_template)
  prompts = [{'prompt': [passages.asked(args.prompt_tokens)]} for _ in range(8 * args.prompts)]
  (folder / 'prompts.jsonl').write_text('\n'.join(map(json.dumps, prompts)))
  pairs = [passages.pair(args.pair_tokens) for _ in range(8 * args.pairs)]
  (folder / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, pairs)))


class Passages:
  """Conversations of an exact number of tokens, cut out of a novel."""

  def __init__(self, vocabulary: Any, template: str | None):
    self.vocabulary, self.template = vocabulary, template
    self.ids = vocabulary.encode(' '.join(texts()))
    self.at = 0

  def _cut(self, role: str, before: list[dict[str, str]], wanted: int, generation: bool) -> dict[str, str]:
    """A message with which the conversation has that many tokens."""
    around = len(
      chat.encode(self.template, [*before, {'role': role, 'content': 'a'}], self.vocabulary, generation=generation)
    )
    for tries in range(1000):
      n = max(1, wanted - around + tries % 5 - 1)
      self.at = (self.at + 41) % (len(self.ids) - wanted)
      message = {'role': role, 'content': self.vocabulary.decode(self.ids[self.at : self.at + n]).strip()}
      found = chat.encode(self.template, [*before, message], self.vocabulary, generation=generation)
      if len(found) == wanted:
        return message
    raise SystemExit(f'no passage gives {wanted} tokens: ask for more')

  def asked(self, wanted: int) -> dict[str, str]:
    return self._cut('user', [], wanted, True)

  def pair(self, wanted: int) -> dict[str, Any]:
    prompt = [self.asked(wanted // 2)]
    return {'prompt': prompt} | {
      name: [self._cut('assistant', prompt, wanted, False)] for name in ('chosen', 'rejected')
    }


class Clock:
  """Seconds on the wall and of the processors, of which a process that is kept waiting by others uses no more."""

  def __init__(self):
    self.wall, self.cpu = time.perf_counter(), time.process_time()

  def told(self, name: str) -> dict[str, float]:
    return {name: time.perf_counter() - self.wall, f'{name} cpu': time.process_time() - self.cpu}


def settings(folder: Path, args: argparse.Namespace) -> Pretrain:
  """Our run."""
  base = config.RL if args.what[0].startswith('grpo') else config.PREFERENCE
  optim = Optim(lr=1e-6, schedule='constant', warmup_steps=0, weight_decay=0.0, b2=0.999)
  low = Lora(rank=RANK, alpha=ALPHA) if args.what[0].endswith('lora') else Lora()
  more: dict[str, Any] = {'init': str(folder / 'model'), 'optim': optim, 'lora': low, 'run': str(folder / args.what[0])}
  more |= {'mesh': config.Mesh(fsdp=1), 'epochs': 0.0, 'steps': 10_000}
  if args.what[0].startswith('grpo'):
    sizes = {'prompts': args.prompts, 'samples': args.samples, 'max_new_tokens': args.new, 'held_out': 0}
    how = Rl('grpo', f'python:{folder / "reward.py"}:e', **sizes, decode_rows=args.decode_rows)
    how = dataclasses.replace(how, kl_coef=KL if low.rank else 0.0)
    length, rows = args.prompt_tokens + args.new, args.prompts * args.samples
    data = config.Data(str(folder / 'prompts.jsonl'), seq_len=-(-length // 64) * 64, global_batch=rows)
    return dataclasses.replace(base, **more, data=data, rl=how)
  data = dataclasses.replace(base.data, path=str(folder / 'pairs.jsonl'), seq_len=2 * args.pair_tokens)
  talk = dataclasses.replace(base.chat, val_fraction=0.0)
  return dataclasses.replace(base, **more, chat=talk, data=dataclasses.replace(data, global_batch=args.pairs))


def ours(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, float]]:
  """Our loop, a step each time: its seconds, and those of the rollout in it."""
  settled = settings(folder, args)
  if args.what[0].startswith('dpo'):
    settled, _ = tuning.prepared(settled, lambda line: None)
  settled, feed = feeds.open_feed(settled)
  mesh = sharding.make_mesh(**dataclasses.asdict(settled.mesh), devices=jax.devices()[:1])
  with jax.set_mesh(mesh):
    built = program.build(settled, mesh, groups=feed.groups, places=feed.places)
    state = built.around(bases.fitted(settled, bases.open_base(settled.init, mesh)).params)
    feed.attach(built, state, lambda line: None)
    spent: dict[str, float] = {'tokens': 0.0}
    if args.what[0].startswith('grpo'):
      asker, ready = feed.asker, feed.asker._readied  # ty: ignore
      engine = answers.engine(settled, built.run, mesh, (), answers.drawing(settled.rl))  # no stop ids

      def laid_out(params: Any) -> Any:
        clock, found = Clock(), jax.block_until_ready(ready(params))
        spent.update(clock.told('rollout'))
        return found

      def timed(*given: Any) -> rollout.Completions:
        clock, made = Clock(), engine(*given)
        spent.update({name: spent[name] + time_ for name, time_ in clock.told('rollout').items()})
        spent['tokens'] = float(made.lengths_M.sum())
        return made

      asker._readied, asker._sampled = laid_out, timed
    after = feed.stream(state, settled.steps, metrics.Unwritten())
    yield {}
    while True:
      clock = Clock()
      state, told = built.step(state, after(state))
      loss = float(told['loss'])
      yield clock.told('step') | spent | {'loss': loss}


def theirs(folder: Path, args: argparse.Namespace, wait: Callable[[dict[str, float]], None]) -> None:
  """TRL's own loop, which waits before each step."""
  import datasets
  import torch
  import transformers
  import trl

  torch.set_num_threads(args.cores)
  grpo, low = args.what[0].startswith('grpo'), args.what[0].endswith('lora')
  model = transformers.AutoModelForCausalLM.from_pretrained(folder / 'model', dtype=torch.float32)
  words = tokenizer_of(folder)
  common = {'use_cpu': True, 'bf16': False, 'gradient_checkpointing': False, 'report_to': 'none', 'disable_tqdm': True}
  common |= {'logging_strategy': 'no', 'save_strategy': 'no', 'output_dir': str(folder / 'trl'), 'max_steps': 10_000}
  common |= {'learning_rate': 1e-6, 'lr_scheduler_type': 'constant'}
  spent: dict[str, float] = {'tokens': 0.0}

  class Turns(transformers.TrainerCallback):
    def on_step_begin(self, *_: Any, **__: Any) -> None:
      wait(spent | self.clock.told('step') if hasattr(self, 'clock') else {})
      self.clock = Clock()

  adapters = None
  if low:
    import peft

    adapters = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules='all-linear', task_type='CAUSAL_LM')
  rows = datasets.Dataset.from_json(str(folder / ('prompts.jsonl' if grpo else 'pairs.jsonl')))
  given: dict[str, Any] = {'model': model, 'train_dataset': rows, 'processing_class': words, 'peft_config': adapters}
  given['callbacks'] = [Turns()]
  if not grpo:
    how = trl.DPOConfig(per_device_train_batch_size=args.pairs, precompute_ref_log_probs=not low, **common)
    trl.DPOTrainer(args=how, **given).train()
    return
  count, short = args.prompts * args.samples, {'min_new_tokens': args.new}
  sizes = {'per_device_train_batch_size': count, 'num_generations': args.samples, 'max_completion_length': args.new}
  paged = {'use_transformers_continuous_batching': args.paged}
  how = trl.GRPOConfig(**sizes, **common, **paged, generation_kwargs=short, beta=KL if low else 0.0, loss_type='grpo')
  score = lambda completions, **_: [c[0]['content'].count('e') / (1 + len(c[0]['content'])) for c in completions]
  trainer = trl.GRPOTrainer(reward_funcs=score, args=how, **given)
  generate = trainer._generate_single_turn

  def timed(*some: Any, **named: Any) -> Any:
    clock, made = Clock(), generate(*some, **named)
    spent.update(clock.told('rollout'))
    spent['tokens'] = float(sum(map(len, made[0])))
    return made

  trainer._generate_single_turn = timed
  trainer.train()


def tokenizer_of(folder: Path) -> Any:
  """The exported tokenizer, of whose ids for a prompt it is checked that they are ours."""
  import transformers

  words = transformers.AutoTokenizer.from_pretrained(folder / 'model')
  mine, template = interop.vocabulary(str(folder / 'model'))
  row = json.loads((folder / 'prompts.jsonl').read_text().splitlines()[0])['prompt']
  here = chat.encode(str(template), row, mine, generation=True)
  there = words.apply_chat_template(row, add_generation_prompt=True, tokenize=True, return_dict=False)
  assert here == there, (here, there)
  return words


def child(side: str, folder: Path, args: argparse.Namespace) -> None:
  """One side of a comparison: a step for each line that comes in."""

  def wait(told: dict[str, float]) -> None:
    print(TURN + json.dumps(told), flush=True)
    if not sys.stdin.readline():
      os._exit(0)

  if side == 'trl':
    theirs(folder, args, wait)
  for told in ours(folder, args):
    wait(told)


class Side:
  """A process that does one step when it is told to."""

  def __init__(self, side: str, what: str, folder: str):
    given = [sys.executable, __file__, *sys.argv[1:], '--what', what, '--child', side, '--folder', folder]
    quiet = {'HF_HUB_OFFLINE': '1', 'TRL_EXPERIMENTAL_SILENCE': '1', 'JAX_PLATFORMS': 'cpu', 'TQDM_DISABLE': '1'}
    if side == 'jaxlm' and TUNED not in os.environ:
      quiet[TUNED] = LARGE  # as `jaxlm` itself has it
    how: Any = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True, 'env': os.environ | quiet}
    self.process = subprocess.Popen(given, **how)
    self._told()

  def _told(self) -> dict[str, float]:
    for line in self.process.stdout or ():
      if line.startswith(TURN):
        return json.loads(line.removeprefix(TURN))
    raise SystemExit(f'it ended: {self.process.args}')

  def step(self) -> dict[str, float]:
    assert self.process.stdin
    self.process.stdin.write('\n')
    self.process.stdin.flush()
    return self._told()

  def close(self) -> None:
    assert self.process.stdin
    self.process.stdin.close()
    self.process.wait()


def of(name: str, times: list[dict[str, dict[str, float]]], side: str, how: str) -> list[float]:
  """Seconds of a part in each round; learning is what a step does beside its rollout, scoring included."""
  step, rolled = ([both[side].get(part + how, 0.0) for both in times] for part in ('step', 'rollout'))
  found = {'whole step': step, 'rollout': rolled}
  return found[name] if name in found else [a - b for a, b in zip(step, rolled, strict=True)]


def compared(what: str, folder: str, rounds: int, warm: int) -> list[tuple]:
  """Lines of the table: seconds of both, and the median, least and largest of the ratios of interleaved rounds."""
  sides, times = {side: Side(side, what, folder) for side in ('jaxlm', 'trl')}, []
  for number in range(warm + rounds):
    order = list(sides) if number % 2 else list(sides)[::-1]
    both = {side: sides[side].step() for side in order}
    print(json.dumps({what: both}), file=sys.stderr, flush=True)
    if number >= warm:
      times.append(both)
  for side in sides.values():
    side.close()
  lines = []
  for name in ('whole step', *['rollout', 'learning'] * what.startswith('grpo')):
    (here, there), (cpu, other) = ([of(name, times, side, how) for side in sides] for how in ('', ' cpu'))
    ratios = [b / a for a, b in zip(here, there, strict=True)]
    spread = statistics.median(ratios), min(ratios), max(ratios)
    worked = (
      statistics.median(cpu),
      statistics.median(other),
      statistics.median(b / a for a, b in zip(cpu, other, strict=True)),
    )
    lines.append((what, name, statistics.median(here), statistics.median(there), *spread, *worked))
  return lines


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('model', nargs='?', help='as `jaxlm import` takes it')
  parser.add_argument('--what', nargs='+', choices=WHAT, default=list(WHAT))
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--warm', type=int, default=2, help='rounds before them, in which programs are compiled')
  parser.add_argument('--prompts', type=int, default=4)
  parser.add_argument('--samples', type=int, default=4)
  parser.add_argument('--prompt-tokens', type=int, default=48)
  parser.add_argument('--new', type=int, default=32)
  parser.add_argument('--decode-rows', type=int, default=64)
  parser.add_argument('--pairs', type=int, default=4)
  parser.add_argument('--pair-tokens', type=int, default=128, help='of each answer with its prompt')
  parser.add_argument('--cores', type=int, default=os.cpu_count(), help='that both sides compute on')
  parser.add_argument('--paged', action='store_true')
  parser.add_argument('--child', choices=('jaxlm', 'trl'), help=argparse.SUPPRESS)
  parser.add_argument('--folder', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    os.sched_setaffinity(0, range(args.cores))  # before there are threads
    child(args.child, Path(args.folder), args)
    return
  lines = []
  with tempfile.TemporaryDirectory() as folder:
    furnish(Path(folder), args)
    for what in args.what:
      lines += compared(what, folder, args.rounds, args.warm)
  heads = ('what', 'part', 'jaxlm s', 'TRL s', 'TRL / jaxlm', 'least', 'most', 'jaxlm CPU s', 'TRL CPU s', 'ratio')
  print(table(heads, lines))


if __name__ == '__main__':
  main()
