"""The chapter's table, pre-trained against fine-tuned, filled with the figures of one run of the quickstart."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from etils import epath

from jaxlm import program
from jaxlm.config import Pretrain, from_json
from jaxlm.data import prepare
from jaxlm.files import write_whole
from jaxlm.train.metrics import read_rows

if TYPE_CHECKING:
  from jaxlm.aligning import Verdict
  from jaxlm.evals.tasks import Answers

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]

# PPO reads each answer four times besides learning from it, a third of a step's FLOPs each time: it is written, read by
# the policy, by its reference, and by the reward model.
PASSES = 1 + 4 / 3
COSTS = ('cost: FLOPs', 'cost: seconds of steps', 'cost: tokens of steps', 'cost: parameters that learn')
SHOWN = 2  # held-out prompts with their answers


class Cost(NamedTuple):
  """What the steps of a run took: tokens with padding, FLOPs, seconds without evaluations, parameters that learnt."""

  tokens: float
  flops: float
  seconds: float
  parameters: int


def cost(run: str) -> Cost:
  """From the rows that a run wrote, one a step, by the counter that perf/mfu is computed with."""
  folder = epath.Path(run)
  config = _config(run)
  steps = [row for row in read_rows(folder / 'metrics.jsonl') if 'perf/step_s' in row]
  tokens = sum(row['perf/tokens_per_s'] * row['perf/step_s'] for row in steps)
  flops = tokens * program.flops_per_token(config) * (PASSES if config.rl.algo else 1)
  parameters = json.loads((folder / 'facts.json').read_text())['model']['parameters']
  return Cost(tokens, flops, sum(row['perf/step_s'] for row in steps), parameters)


def rows(
  base: str, sft: str, judges: Sequence[str], ppo: str, found: 'Mapping[str, Answers]', verdict: 'Verdict'
) -> Table:
  """Header and rows; `found` are answers of the runs to the same questions, `verdict` those to held-out prompts."""
  header = ('', 'pre-trained', 'fine-tuned on instructions (SFT)', 'fine-tuned on rewards (PPO)')
  runs, names = (base, sft, ppo), ('base', 'SFT', 'PPO')
  both = zip(_cost(*judges), _cost(ppo), strict=True)
  cells = [
    ('purpose', 'know the language: the next token', 'do as asked: an answer', 'answer better, and stay near to SFT'),
    *_lines(('data: rows', 'data: size', 'data: labels'), _text(base), _questions(sft), _preferences(judges[0], ppo)),
    *_lines(COSTS, _cost(base), _cost(sft), [f'{a} (reward models), {b} (PPO)' for a, b in both]),
    ('held out', *_held_out(base, sft, ppo, verdict)),
    ('behaviour: right on held-out questions', *(_right(found[run]) for run in runs)),
    ('behaviour: drawn answers', *(_like(verdict.variety[name]) for name in names)),
  ]
  i = next(i for i, one in enumerate(found[sft].examples) if one.kind == 'kind')
  said = (repr(found[run].texts[i]) for run in runs)
  cells.append((f'output: which kind of text is this? (right: {found[sft].examples[i].reference})', *said))
  for i, row in enumerate(verdict.rows[:SHOWN]):
    said = (repr(verdict.said[name][i]) for name in names)
    cells.append((f'output: {row["prompt"]} (the text: {row["answer"]})', *said))
  return header, cells


def _lines(*columns: Sequence[str]) -> list[tuple[str, ...]]:
  return list(zip(*columns, strict=True))


def write(run: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
  """`chapter.md`, and `chapter.json` which the report shows as a table."""
  safe = lambda row: '| ' + ' | '.join(cell.replace('|', '\\|').replace('\n', ' ') for cell in row) + ' |'
  lines = [safe(header), safe(['---'] * len(header)), *map(safe, cells)]
  write_whole(f'{run}/chapter.md', '# Pre-trained against fine-tuned\n\n' + '\n'.join(lines) + '\n')
  write_whole(f'{run}/chapter.json', json.dumps({'header': header, 'rows': cells}, ensure_ascii=False, indent=1))


def _text(base: str) -> tuple[str, ...]:
  count = prepare.load(f'{base}/data').summary.splits['train']
  return f'{count.documents:,} documents of plain text', _size(*count.figures[1:]), 'none'


def _questions(sft: str) -> tuple[str, ...]:
  count = prepare.load(_config(sft).data.path).summary.splits['train']
  return f'{count.documents:,} questions', _size(*count.figures[1:]), 'answers, made of the same text by rule'


def _preferences(judge: str, ppo: str) -> tuple[str, ...]:
  splits = prepare.load(_config(judge).data.path).summary.splits.values()
  answers, tokens, size = (sum(of) for of in zip(*(count.figures for count in splits), strict=True))
  prompts = json.loads((epath.Path(ppo) / 'facts.json').read_text())['data']['prompts']
  rows = f'{answers // 2:,} pairs for the reward models, {prompts:,} prompts for PPO'
  return rows, _size(tokens, size), "which of two answers is the text's own, known by rule; no person judged"


def _size(tokens: int, size: int) -> str:
  return f'{tokens:,} tokens, {size:,} bytes'


def _config(run: str) -> Pretrain:
  return from_json(Pretrain, (epath.Path(run) / 'config.json').read_text())


def _cost(*runs: str) -> tuple[str, ...]:
  """Of runs together, in words."""
  found = [cost(run) for run in runs]
  tokens, flops, seconds = (sum(of) for of in list(zip(*found, strict=True))[:3])
  return f'{flops / 1e12:,.1f} T', f'{seconds:,.0f}', f'{tokens:,.0f}', f'{found[0].parameters:,}'


def _held_out(base: str, sft: str, ppo: str, verdict: 'Verdict') -> tuple[str, ...]:
  values = lambda run, name: [row[name] for row in read_rows(epath.Path(run) / 'metrics.jsonl') if name in row]
  loss, reward = values(sft, 'eval/loss'), values(ppo, 'eval/reward/mean')
  (_, _, judge), rate = next(item for item in verdict.rates.items() if item[0][:2] == ('PPO', 'SFT'))
  return (
    f'{values(base, "eval/bits_per_byte")[-1]:.3f} bits per byte of text',
    f'{loss[0]:.3f} to {loss[-1]:.3f} nats a token of answers',
    f'reward {reward[0]:.3f} to {reward[-1]:.3f}; over SFT {rate.said}, by {judge}',
  )


def _right(found: 'Answers') -> str:
  return ', '.join(f'{kind} {of["exact_match"]:.0f} % (F1 {of["f1"]:.0f})' for kind, of in found.scores.items())


def _like(of: Mapping[str, float]) -> str:
  return f'{of["different answers"]:.0f} % of answers differ, {of["words of the text"]:.0f} % of their words are known'
