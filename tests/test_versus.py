"""`jaxlm eval A --against B --judge WHAT` on tiny runs: whose prompts, whose answers, who judges, what is written."""

import json

import numpy as np
import pytest
from servers import judge
from tiny_run import furnish

from jaxlm import cli, report
from jaxlm.data import chat, prepared, turns
from jaxlm.evals import asked, tasks, versus
from jaxlm.loops import bases, foreign, rollouts

COLOURS = ('red', 'green', 'blue')
ROWS = [{'question': f'What is {a} and {b}?', 'answer': f'{a} {b}.'} for a in COLOURS for b in range(20)]
PROMPTS = [{'prompt': f'What is {a} and {b}?', 'answer': a[0]} for a in COLOURS for b in range(7)]
SFT = ('--lora.rank', '0', '--data.seq-len', '64', '--data.global-batch', '8', '--chat.val-fraction', '0.2')
SFT += ('--epochs', '1', '--chat.template', 'plain', '--optim.warmup-steps', '1')
RL = ('--algo', 'grpo', '--prompts', '4', '--samples', '2', '--max-new-tokens', '5', '--held-out', '5', '--steps', '1')
RL += ('--data.seq-len', '64', '--data.global-batch', '8', '--lora.rank', '0', '--watch.save-every', '1')
RL += ('--optim.warmup-steps', '0')
SHORT = ('--max-new-tokens', '6', '--batch', '8')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """A base, tuned twice: `more` at ten times the rate, and `rl` on top of it; `own.py` has a reward."""
  home = furnish(tmp_path_factory.mktemp('versus'))
  (home / 'rows.jsonl').write_text('\n'.join(map(json.dumps, ROWS)))
  (home / 'prompts.jsonl').write_text('\n'.join(map(json.dumps, PROMPTS)))
  (home / 'own.py').write_text('def many(prompts, said, rows):\n  return [len(set(text)) for text in said]\n')
  run = lambda *args: cli.main(list(map(str, args)))
  assert run('pretrain', home / 'tiny.py', '--run', home / 'base', '--steps', 8, '--data.global-batch', 8) == 0
  given = ('--init', home / 'base', '--data.path', home / 'rows.jsonl')
  assert run('sft', *given, '--run', home / 'less', *SFT, '--optim.lr', '1e-4') == 0
  assert run('sft', *given, '--run', home / 'more', *SFT, '--optim.lr', '5e-3') == 0
  given = ('--init', home / 'more', '--data.path', home / 'prompts.jsonl')
  assert run('rl', *given, '--run', home / 'rl', *RL, '--reward', f'python:{home / "own.py"}:many') == 0
  return home


def against(home, a, b, what, *args):
  return cli.main(['eval', str(home / a), '--against', str(home / b), '--judge', what, *SHORT, *map(str, args)])


def written(path):
  return [json.loads(line) for line in path.read_text().splitlines()], json.loads(path.with_suffix('.json').read_text())


@pytest.mark.slow
def test_by_a_reward_on_what_the_run_held_out(home, capsys):
  assert against(home, 'more', 'less', f'python:{home / "own.py"}:many') == 0
  lines, figures = written(home / 'more' / 'winrate.jsonl')
  folder = prepared.load(bases.newest(home / 'more').config.data.path)
  held_out = tasks.examples(folder, 1000)
  assert len(lines) == len(held_out) > 4
  for line, example in zip(lines, held_out, strict=True):
    (said,) = line['prompt']
    assert said['role'] == 'user' and said['content'] in folder.tokenizer.decode(example.prompt)
    assert line['result'] == 0.5 + 0.5 * np.sign(len(set(line['a'])) - len(set(line['b'])))
  whole = figures['table'][0]
  assert whole['wins'] + whole['losses'] > 0
  assert whole['win-rate'] == pytest.approx(np.mean([line['result'] for line in lines]))
  assert whole['from'] <= whole['win-rate'] <= whole['to'] and whole['number'] == len(lines)
  out = capsys.readouterr().out
  assert 'characters of an answer' in out and 'preferred' in out and '| all' in out
  assert report.write(home / 'more').read_text().count(f'win-rate over {home / "less"}') == 1


@pytest.mark.slow
def test_the_answers_are_the_models_own(home):
  """Greedy ones, as `eval --tasks` writes them."""
  assert against(home, 'more', 'less', f'python:{home / "own.py"}:many') == 0
  lines, _ = written(home / 'more' / 'winrate.jsonl')
  folder = prepared.load(bases.newest(home / 'more').config.data.path)
  found = tasks.compare([str(home / 'more'), str(home / 'less')], folder, 1000, new=6, batch=8, names=())
  a, b = (one.texts for one in found.values())
  assert [line['a'] for line in lines] == a and [line['b'] for line in lines] == b and a != b


def test_an_rl_run_asks_its_held_out_prompts(home):
  assert against(home, 'rl', 'rl', 'exact:answer') == 0
  lines, figures = written(home / 'rl' / 'winrate.jsonl')
  assert len(lines) == 5 and {line['prompt'] for line in lines} <= {row['prompt'] for row in PROMPTS}
  trained = {row['prompt'] for row in rollouts.Rollouts(bases.newest(home / 'rl').config).rows}
  assert not {line['prompt'] for line in lines} & trained
  assert figures['table'][0] | {'from': 0, 'to': 0} == {
    'prompts': 'all', 'number': 5, 'wins': 0, 'ties': 5, 'losses': 0, 'win-rate': 0.5, 'from': 0, 'to': 0
  }  # fmt: skip


@pytest.mark.slow(but='21-0.9')
@pytest.mark.parametrize('most, temperature', [(4, 0), (21, 0.9)])
def test_by_a_judge(home, tmp_path, most, temperature):
  """One that goes by the place alone makes ties, one that likes length makes the longer answer win."""
  how = ('--judge-model', 'm', '--data', home / 'prompts.jsonl', '--most', most, '--temperature', temperature)
  with judge(lambda a, b: 'A') as (url, seen):
    assert against(home, 'more', 'less', url, *how, '--out', tmp_path / 'first.jsonl') == 0
  lines, figures = written(tmp_path / 'first.jsonl')
  differ = sum(line['a'] != line['b'] for line in lines)
  assert {line['result'] for line in lines} == {0.5} and len(seen) == 2 * differ > 0 and len(lines) == most
  assert figures['table'][0]['win-rate'] == 0.5
  by_length = lambda a, b: 'C' if len(a) == len(b) else 'A' if len(a) > len(b) else 'B'
  with judge(by_length) as (url, _):
    assert against(home, 'more', 'less', url, *how, '--out', tmp_path / 'long.jsonl') == 0
  lines, figures = written(tmp_path / 'long.jsonl')
  assert all(line['result'] == 0.5 + 0.5 * np.sign(len(line['a']) - len(line['b'])) for line in lines)
  differ = any(len(line['a']) != len(line['b']) for line in lines)
  assert any('the longer answer is preferred: 100.0%' in line for line in figures['said']) == differ
  assert differ or not temperature
  assert not (home / 'less' / 'winrate.jsonl').exists()


@pytest.mark.slow
def test_foreign_models_on_either_side(home, tmp_path, capsys):
  """A folder of Hugging Face's that is the run, and a base without a template: the same answers, and a word on it."""
  foreign.export_run(home / 'less', tmp_path / 'hf')
  what = f'python:{home / "own.py"}:many'
  how = ('--data', str(home / 'prompts.jsonl'), '--most', '6')
  both = [str(tmp_path / 'hf'), '--against', str(home / 'less')]
  assert cli.main(['eval', *both, '--judge', what, *SHORT, *how]) == 0
  lines, figures = written(tmp_path / 'hf' / 'winrate.jsonl')
  assert all(line['a'] == line['b'] for line in lines) and figures['table'][0]['ties'] == 6
  assert against(home, 'base', 'more', what, *how, '--out', tmp_path / 'base.jsonl') == 0
  assert f'{home / "base"}: has no chat template: it is asked in that of the other' in capsys.readouterr().err


def test_lengths_that_are_alike():
  found = versus.Versus(
    ('a', 'b'), [{'prompt': 'p'}] * 4, (['x' * 100, 'x' * 91, 'x', ''], ['x' * 90, 'x' * 100, 'xx', '']),
    np.array([1.0, 0.0, 0.0, 0.5]), 1,
  )  # fmt: skip
  header, table = versus.rows_of(found)
  assert [row[:5] for row in table] == [('all', 4, 1, 1, 2), ('lengths within 10 %', 3, 1, 1, 1)]
  told = versus.lines(found)
  assert told[0] == 'characters of an answer: 48 of a, 48 of b'
  assert told[1].startswith('the longer answer is preferred: 100.0%') and told[1].endswith('of 3')
  assert told[2].startswith('1 prompts are ties')


TALKS = [
  [{'role': 'user', 'content': 'Is <|im_end|> text?'}],
  [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'a\n\nb'}],
  [
    {'role': 'user', 'content': 'one'},
    {'role': 'assistant', 'content': 'two'},
    {'role': 'user', 'content': 'three'},
  ],
]


@pytest.mark.parametrize('name', ['chatml', 'llama3', 'plain', 'mistral', 'gemma'])
def test_messages_are_read_back_from_their_tokens(home, name):
  known = bases.newest(home / 'base').tokenizer.with_controls(turns.BUILT_IN[name])
  template = turns.choose(name, None)[1]
  read = asked._reader(template, known)
  for talk in TALKS[:1] + TALKS[2:] + TALKS[1:2] * (name not in ('gemma', 'mistral')):
    ids = chat.encode(template, talk, known, generation=True)
    assert read(ids) == talk or (name == 'plain' and chat.encode(template, read(ids), known, generation=True) == ids)
  assert read(chat.encode(template, TALKS[0], known)[:-3]) is None


@pytest.mark.parametrize(
  'row, prompt, answer',
  [
    ({'prompt': 'p', 'answer': 'x'}, 'p', 'x'),
    ({'question': 'q', 'answer': 'x'}, [{'role': 'user', 'content': 'q'}], 'x'),
    ({'prompt': 'p', 'chosen': 'x', 'rejected': 'y'}, 'p', None),
    ({'messages': TALKS[2]}, TALKS[2], None),
    ({'messages': TALKS[2][:2]}, TALKS[2][:1], 'two'),
    ({'instruction': 'i', 'input': '', 'output': 'o'}, [{'role': 'user', 'content': 'i'}], 'o'),
  ],
)
def test_rows_of_many_formats(tmp_path, row, prompt, answer):
  (tmp_path / 'rows.jsonl').write_text(json.dumps(row))
  (found,) = asked.rows('none', [str(tmp_path / 'rows.jsonl')])
  assert found['prompt'] == prompt and found.get('answer') == answer


def test_tasks_have_other_examples(home):
  pytest.importorskip('reasoning_gym', reason="needs pip install -e '.[rl]'")
  rows = asked.rows(str(home / 'base'), ['gym:chain_sum'], 9)
  assert len(rows) == 9 and {'prompt', 'answer', 'entry'} <= rows[0].keys()


@pytest.mark.parametrize(
  'args, why',
  [
    (('base', 'less', 'exact:answer'), 'was trained on text'),
    (('more', 'less', 'regx:a'), 'there are exact'),
    (('more', 'less', 'http://127.0.0.1:9/v1'), '--judge-model'),
    (('more', 'less', 'http://127.0.0.1:9/v1', '--judge-model', 'm', '--most', '2'), 'judge http://127.0.0.1:9/v1'),
    (('more', 'nothing', 'exact:answer'), 'nothing'),
    (('more', 'less', 'exact:wrong', '--most', '2'), "no column 'wrong'"),
    (('more', 'less', 'exact:answer', '--data', 'nowhere.jsonl'), 'nowhere.jsonl'),
    (('more', 'less', 'exact:answer', '--tasks', '3'), '--tasks, --judge, --jsonl and --lm-eval: one of them'),
  ],
)
def test_bad_input_is_one_line(home, capsys, args, why):
  assert against(home, *args) == 1
  assert why in capsys.readouterr().err.strip().splitlines()[-1]
