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
SHOWN = 2  # held-out prompts with their answers


class Cost(NamedTuple):
  """What the steps of a run took: tokens with padding, FLOPs, seconds without evaluations, parameters that learnt."""

  tokens: float
  flops: float
  seconds: float
  parameters: int

  @property
  def said(self) -> str:
    """In words."""
    return (
      f'{self.flops / 1e12:,.1f} TFLOP, {self.seconds:,.0f} s, '
      f'{self.tokens:,.0f} tokens, {self.parameters / 1e6:.2f} M parameters learn'
    )


def cost(run: str) -> Cost:
  """From the rows that a run wrote, one a step, by the counter that perf/mfu is computed with."""
  folder = epath.Path(run)
  config = from_json(Pretrain, (folder / 'config.json').read_text())
  steps = [row for row in read_rows(folder / 'metrics.jsonl') if 'perf/step_s' in row]
  tokens = sum(row['perf/tokens_per_s'] * row['perf/step_s'] for row in steps)
  flops = tokens * program.flops_per_token(config) * (PASSES if config.rl.algo else 1)
  parameters = json.loads((folder / 'facts.json').read_text())['model']['parameters']
  return Cost(tokens, flops, sum(row['perf/step_s'] for row in steps), parameters)


def rows(
  base: str, sft: str, judges: Sequence[str], ppo: str, found: 'Mapping[str, Answers]', verdict: 'Verdict'
) -> Table:
  """Header and rows; `found` are answers of the runs to the same questions, `verdict` those to held-out prompts."""
  header = ('', 'pre-trained', 'fine-tuned: instructions (SFT)', 'fine-tuned: rewards (PPO)')
  cells = [
    (
      'purpose',
      'know the language: the next token of any text',
      'do as asked: the answer to a question',
      'answer better: what is preferred, near to SFT',
    ),
    ('data', _text(base), _questions(sft), _preferences(judges[0], ppo)),
    ('cost', cost(base).said, cost(sft).said, _both(judges, ppo)),
    ('held out', *_held_out(base, sft, ppo, verdict)),
    ('behaviour', *(_right(found[run]) for run in (base, sft, ppo))),
    ('answers that differ, words of the text', *(_like(verdict.variety[name]) for name in ('base', 'SFT', 'PPO'))),
  ]
  i = next(i for i, one in enumerate(found[sft].examples) if one.kind == 'kind')
  said = (repr(found[run].texts[i]) for run in (base, sft, ppo))
  cells.append((f'says to: Which kind of text is this? (right: {found[sft].examples[i].reference})', *said))
  for i, row in enumerate(verdict.rows[:SHOWN]):
    said = (repr(verdict.said[name][i]) for name in ('base', 'SFT', 'PPO'))
    cells.append((f'says to: {row["prompt"]!r} (the text: {row["answer"]!r})', *said))
  return header, cells


def write(run: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
  """`chapter.md`, and `chapter.json` which the report shows as a table."""
  safe = lambda row: '| ' + ' | '.join(cell.replace('|', '\\|').replace('\n', ' ') for cell in row) + ' |'
  lines = [safe(header), safe(['---'] * len(header)), *map(safe, cells)]
  write_whole(f'{run}/chapter.md', '# Pre-trained against fine-tuned\n\n' + '\n'.join(lines) + '\n')
  write_whole(f'{run}/chapter.json', json.dumps({'header': header, 'rows': cells}, ensure_ascii=False, indent=1))


def _text(base: str) -> str:
  count = prepare.load(f'{base}/data').summary.splits['train']
  return f'{count.documents:,} documents, {count.tokens:,} tokens, {count.bytes:,} bytes of plain text, no labels'


def _questions(sft: str) -> str:
  path = from_json(Pretrain, (epath.Path(sft) / 'config.json').read_text()).data.path
  count = prepare.load(path).summary.splits['train']
  what = 'questions with answers, made of the same text by rule'
  return f'{count.documents:,} {what}: {count.tokens:,} tokens, {count.bytes:,} bytes; labels: the answers'


def _preferences(judge: str, ppo: str) -> str:
  path = from_json(Pretrain, (epath.Path(judge) / 'config.json').read_text()).data.path
  counts = prepare.load(path).summary.splits.values()
  pairs, tokens, size = (sum(of) for of in zip(*(count.figures for count in counts), strict=True))
  prompts = json.loads((epath.Path(ppo) / 'facts.json').read_text())['data']['prompts']
  what = 'pairs, the better one of each known by rule'
  return f'{pairs // 2:,} {what}: {tokens:,} tokens, {size:,} bytes; then {prompts:,} prompts without answers'


def _both(judges: Sequence[str], ppo: str) -> str:
  parts = [cost(run) for run in judges]
  together = Cost(*(sum(of) for of in list(zip(*parts, strict=True))[:3]), parts[0].parameters)
  return f'two reward models: {together.said}; PPO: {cost(ppo).said}'


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
  return 'right: ' + ', '.join(
    f'{kind} {of["exact_match"]:.0f} % (F1 {of["f1"]:.0f})' for kind, of in found.scores.items()
  )


def _like(of: Mapping[str, float]) -> str:
  return f'{of["different answers"]:.0f} % of answers differ, {of["words of the text"]:.0f} % of their words are known'
