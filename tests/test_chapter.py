"""The chapter's table: costs counted of what runs wrote, written for a reader, and shown in the report."""

import json

import pytest
from rich.cells import cell_len

from jaxlm import chapter, config, report
from jaxlm.console import wrapped
from jaxlm.models import ModelConfig
from jaxlm.train import metrics

MODEL = ModelConfig(vocab_size=131, d_model=24, n_layers=2, n_heads=2, d_ff=37)
HEADER, CELLS = ('', 'before', 'after'), [('says to: a | b', "'1\\n2'", 'short'), ('cost', '1 TFLOP <all>', 'सभी')]


def furnished(folder, **kind):
  """A run of two steps of 100 and 60 tokens, in 2.0 and 0.5 seconds, with an evaluation between them."""
  folder.mkdir()
  of = config.Pretrain(run=str(folder), model=MODEL, data=config.Data(seq_len=29), **kind)
  (folder / 'config.json').write_text(config.to_json(of))
  (folder / 'facts.json').write_text(json.dumps({'model': {'parameters': 1234}}))
  rows = [
    {'step': 1, 'perf/tokens_per_s': 50.0, 'perf/step_s': 2.0},
    {'step': 1, 'eval/loss': 3.0},
    {'step': 2, 'perf/tokens_per_s': 120.0, 'perf/step_s': 0.5},
  ]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(folder)


def test_costs_are_those_of_the_steps(tmp_path):
  per_token = metrics.flops_per_token(MODEL, 29)
  plain = chapter.cost(furnished(tmp_path / 'plain'))
  assert plain == pytest.approx((160, 160 * per_token, 2.5, 1234))
  judge = chapter.cost(furnished(tmp_path / 'judge', preference=config.Preference(stage='reward')))
  assert judge.flops == pytest.approx(160 * (per_token - 6 * 24 * 131))  # no head
  ppo = chapter.cost(furnished(tmp_path / 'ppo', rl=config.Rl(algo='ppo')))
  assert ppo.flops == pytest.approx(160 * per_token * 7 / 3)  # learns, and is read forwards four times


def test_it_is_written_for_readers(tmp_path, capsys):
  run = furnished(tmp_path / 'run')
  assert 'Pre-trained against' not in report.write(run).read_text()
  chapter.write(run, HEADER, CELLS)
  lines = (tmp_path / 'run' / 'chapter.md').read_text().splitlines()
  assert len(lines) == 6 and {line.replace('\\|', '').count('|') for line in lines[2:]} == {4}
  assert 'a \\| b' in lines[4] and 'सभी' in lines[5]
  text = report.write(run).read_text()
  assert 'Pre-trained against' in text and '1 TFLOP &lt;all&gt;' in text
  wrapped(HEADER, [(*CELLS[0][:2], 'long ' * 40 + 'end'), CELLS[1]])
  shown = capsys.readouterr().out
  assert 'end' in shown and max(map(cell_len, shown.splitlines())) <= 120
