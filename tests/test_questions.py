"""Tasks of rows: what a row may look like, examples before it, likelihoods by hand, intervals, two models compared."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import cli, interop, models
from jaxlm.data import prepare, prepared, sources, tokenizer
from jaxlm.errors import InputError
from jaxlm.evals import questions, subject
from jaxlm.evals.questions import Measure
from jaxlm.models import ModelConfig
from jaxlm.quickstart import SAMPLE

ROWS = {
  'choices': [
    {'prompt': f'{i} plus {i} is', 'choices': [f'{2 * i}', f'{2 * i + 1}', 'a horse'], 'answer': i % 3}
    for i in range(13)
  ],
  'continuation': [{'prompt': f'one, two, {word},', 'continuation': ' four five'} for word in ('three', 'tree', 'thé')],
  'text': [{'text': 'It was a cold night. ' * n} for n in (1, 2, 7)],
  'answer': [{'question': f'Say {i}:', 'answer': [f'{i}', 'nothing']} for i in range(5)],
}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Two random models of one tokenizer, as Hugging Face folders, and a file of each kind of rows."""
  home = tmp_path_factory.mktemp('questions')
  vocabulary = tokenizer.train((d.text for d in sources.documents([str(SAMPLE / 'novel.jsonl')])), 331)
  cfg = ModelConfig(vocab_size=331, d_model=42, n_layers=2, n_heads=3, d_ff=37, max_seq_len=53)
  for name, seed in (('a', 1), ('b', 2)):
    params = jax.tree.map(lambda x: 2.0 * x, models.init(cfg, jax.random.key(seed)))
    interop.export(interop.Model(cfg, params, vocabulary, None, {}), home / name)
  for kind, rows in ROWS.items():
    (home / f'{kind}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return home


@pytest.fixture(scope='module')
def asked(folders):
  return subject.opened(str(folders / 'a'), batch=3)


def by_hand(asked, ids):
  """Log-probabilities of all ids but the first, one text alone."""
  logits = models.forward(asked.model.cfg, asked.model.params, jnp.asarray(ids)[None])[0][0]
  return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]], np.asarray(logits).argmax(-1)[:-1]


@pytest.mark.slow
def test_likelihoods_are_those_of_a_row_alone(asked):
  """Among rows of all lengths, some of them the same but for the last token, in batches of three."""
  rng = np.random.default_rng(0)
  pairs = [
    ([0, *rng.integers(3, 331, n).tolist()], rng.integers(3, 331, m).tolist()) for n in (0, 5, 31) for m in (1, 7, 19)
  ]
  pairs += [(pairs[0][0], [int(by_hand(asked, [0, 5])[1][0])]), (pairs[3][0], [9])]
  told = []
  found = subject.likelihoods(asked, pairs, lambda *of: told.append(of))
  for (context, said), one in zip(pairs, found, strict=True):
    logp, best = by_hand(asked, context + said)
    assert one.logp == pytest.approx(logp[len(context) - 1 :].sum(), abs=1e-4)
    assert one.greedy == (best[len(context) - 1 :].tolist() == said)
  assert {one.greedy for one in found} == {True, False}
  assert told[-1] == (9, 9)  # of 11: two begin as others do
  with pytest.raises(InputError, match='54 tokens is longer than its 53'):
    subject.likelihoods(asked, [([0], [5] * 54)])


def test_what_is_too_long_loses_its_beginning(asked):
  ids = np.random.default_rng(1).integers(3, 331, 60).tolist()
  (one,) = subject.likelihoods(asked, [(ids[:50], ids[50:])])
  assert one.logp == pytest.approx(by_hand(asked, ids[-54:])[0][-10:].sum(), abs=1e-4)


def test_every_token_of_a_long_text_counts_once():
  ids = list(range(1, 24))
  found = list(subject.windows(ids, 0, 10))
  assert [said for _, said in found] == [ids[:10], ids[10:20], ids[20:]]
  assert [context for context, _ in found] == [[0], [10], ids[12:20]]
  assert {len(context) + len(said) for context, said in found} == {11}
  assert list(subject.windows([5], 0, 10)) == [([0], [5])]


def test_white_space_goes_to_what_follows(asked):
  whole = subject.encoded(asked, 'the night \n was')
  before, said = subject.pair(asked, 'the night \n ', 'was')
  assert before + said == whole and before == subject.encoded(asked, 'the night')
  assert subject.pair(asked, '', 'was') == ([asked.first], asked.tokenizer.encode('was'))
  assert subject.pair(asked, ' ', 'was') == ([asked.first], asked.tokenizer.encode(' was'))
  with pytest.raises(InputError, match='nothing is to be scored'):
    subject.pair(asked, '', '')


@pytest.mark.slow
def test_answers_end_before_a_stop_text(asked):
  prompts = ['It was a', 'cold', 'the night and the day']
  whole = subject.continued(asked, prompts, new=20)
  stop = whole[0][2:4]
  cut = subject.continued(asked, prompts, new=20, until=['', stop])
  assert cut == [text.split(stop)[0] for text in whole] and cut[0] == whole[0][:2]
  long = 'night and day ' * 40
  once, twice = subject.continued(asked, [long, f'Once {long}'], new=20)  # the last 33 tokens are the same
  assert once == twice != subject.continued(asked, [long], new=21)[0][: len(once)]
  with pytest.raises(InputError, match='no room'):
    subject.continued(asked, prompts, new=53)


@pytest.mark.parametrize(
  'row, kind, options, gold',
  [
    ({'question': 'q', 'choices': {'text': ['a', 'b'], 'label': ['1', '2']}, 'answerKey': '2'}, 'choices', 'ab', [1]),
    ({'ctx': 'q', 'endings': ['a', 'b', 'c'], 'label': '2'}, 'choices', 'abc', [2]),
    ({'prompt': 'q', 'choices': ['x', 'y'], 'answer': 'B'}, 'choices', 'xy', [1]),
    ({'prompt': 'q', 'choices': ['2', '1'], 'answer': '1'}, 'choices', '21', [1]),
    ({'prompt': 'q', 'choices': ['x', 'y'], 'answer': 0}, 'choices', 'xy', [0]),
    ({'prompt': 'q', 'continuation': 'z'}, 'continuation', 'z', [0]),
    ({'text': 'z'}, 'text', 'z', [0]),
    ({'question': 'q', 'answer': 7}, 'answer', '7', [0]),
    ({'question': 'q', 'answer': ['7', '8']}, 'answer', '78', [0, 1]),
  ],
)
def test_rows_of_many_forms(row, kind, options, gold, tmp_path):
  (tmp_path / 'name.jsonl').write_text(json.dumps(row))
  (task,) = questions.load([str(tmp_path / 'name.jsonl')])
  assert (task.name, task.kind) == ('name', kind)
  assert (task.rows[0].options, task.rows[0].gold) == (list(options), gold)


@pytest.mark.parametrize(
  'lines, said',
  [
    ([{'prompt': 'q'}], r'bad.jsonl:1: has prompt: give prompt and choices'),
    ([{'prompt': 'q', 'choices': ['x', 'y'], 'answer': 2}], r'bad.jsonl:1: its answer 2 is none of its 2 choices'),
    ([{'prompt': 'q', 'choices': ['x', 'y'], 'answer': None}], 'its answer None is none'),
    ([{'prompt': 'q', 'choices': ['x'], 'answer': 0}], 'no list of two or more texts'),
    ([{'text': 'z'}, {'prompt': 'q', 'answer': 'a'}], "several kinds, .'answer', 'text'."),
  ],
)
def test_rows_that_are_none_are_named(lines, said, tmp_path):
  (tmp_path / 'bad.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  with pytest.raises(InputError, match=said):
    questions.load([str(tmp_path / 'bad.jsonl')])


def test_examples_are_others_and_the_same_for_a_seed(folders):
  (task,) = questions.load([str(folders / 'choices.jsonl')])
  twice = task._replace(rows=[*task.rows, task.rows[0]._replace(gold=[2])])
  found = questions.drawn(twice, twice.rows, 12, seed=0)  # all the others: a row with the same prompt is none
  for row, some in zip(twice.rows, found, strict=True):
    assert row.prompt not in {one.prompt for one in some} and len({one.prompt for one in some}) >= 11
  assert questions.drawn(task, task.rows, 3, seed=5) == questions.drawn(task, task.rows, 3, seed=5)
  assert questions.drawn(task, task.rows, 3, seed=5) != questions.drawn(task, task.rows, 3, seed=6)
  assert questions.drawn(task, [], 0, seed=5) == [[]] * 13
  with pytest.raises(InputError, match='12 other rows, too few for 13'):
    questions.drawn(task, task.rows, 13, seed=5)


def test_examples_stand_before_the_question(asked, folders):
  (task,) = questions.load([str(folders / 'choices.jsonl')])
  some = [[task.rows[4], task.rows[2]], *[[]] * 12]
  assert questions.contexts(asked, task, some, False)[:2] == [
    '4 plus 4 is 9\n\n2 plus 2 is a horse\n\n0 plus 0 is',
    '1 plus 1 is',
  ]
  with pytest.raises(InputError, match='no chat template'):
    questions.contexts(asked, task, some, True)


def test_metrics_by_hand():
  """The likeliest choice and the likeliest by the byte, where these are two."""
  a = Measure(np.array([1.0, 0.0, 1.0, 1.0]), np.ones(4))
  assert a.of() == 0.75 and questions.interval(a) == pytest.approx((0.301, 0.954), abs=1e-3)
  bits = Measure(np.array([8.0, 2.0]) * np.log(2), np.array([4.0, 16.0]), 'bits')
  assert bits.of() == pytest.approx(0.5)
  low, high = questions.interval(bits)
  assert low == pytest.approx(2 / 16) and high == pytest.approx(2.0)


def test_intervals_hold_what_they_say():
  """Of 400 draws from a known truth about 95 % of the intervals, paired ones too, have it inside."""
  rng, inside = np.random.default_rng(0), np.zeros(4)
  for _ in range(400):
    a, b = (rng.random(60) < 0.7) * 1.0, rng.normal(1.0, 0.3, 60)
    other = np.where(rng.random(60) < 0.6, a, rng.random(60) < 0.5)  # 0.62 in the mean
    first, second = Measure(a, np.ones(60)), Measure(other, np.ones(60))
    _, low, high = questions.difference(first, second)
    inside[0] += low <= 0.08 <= high
    low, high = questions.interval(first)
    inside[1] += low <= 0.7 <= high
    low, high = questions.interval(Measure(b, np.ones(60), 'perplexity'))
    inside[2] += low <= np.e <= high
    tokens = rng.lognormal(4.0, 0.5, 60).round()  # documents: of all lengths, each with a difficulty of its own
    low, high = questions.interval(Measure(tokens * rng.normal(1.0, 0.3, 60), tokens, 'bits'))
    inside[3] += low <= 1 / np.log(2) <= high
  assert (inside / 400 >= 0.92).all() and (inside / 400 <= 0.985).all()
  low, high = questions.interval(Measure(np.arange(10) < 7, np.ones(10)))
  assert (round(low, 4), round(high, 4)) == (0.3968, 0.8922)  # of 7 in 10, as in tables of Wilson's interval


def test_two_models_that_agree_are_no_certainty():
  same = Measure(np.array([1.0, 0.0, 1.0]), np.ones(3))
  apart, low, high = questions.difference(same, same)
  assert apart == 0 and low < -0.3 and high > 0.3


@pytest.mark.slow
def test_the_command_compares_two_models(folders, tmp_path, capsys):
  a, b = str(folders / 'a'), str(folders / 'b')
  files = [str(folders / f'{kind}.jsonl') for kind in ROWS if kind != 'text']
  command = ['eval', a, '--against', b, '--max-new-tokens', '5', '--out', str(tmp_path / 's.json')]
  assert cli.main([*command, '--jsonl', *files, '--shots', '1']) == 0
  assert f'| {a} - {b} ' in capsys.readouterr().out
  table = json.loads((tmp_path / 's.json').read_text())
  names = {(row['task'], row['metric']) for row in table}
  want = {('choices', 'acc'), ('choices', 'acc_norm'), ('continuation', 'acc'), ('continuation', 'perplexity')}
  assert names == want | {('answer', 'exact_match'), ('answer', 'f1')}
  assert len(table) == 3 * len(names) and all(row['from'] <= row['to'] and row['shots'] == 1 for row in table)
  said = [json.loads(line) for line in (tmp_path / 's.jsonl').read_text().splitlines()]
  acc = np.mean([one['acc'] in one['gold'] for one in said if one['task'] == 'choices' and one['model'] == a])
  (row,) = [row for row in table if (row['task'], row['metric'], row['model']) == ('choices', 'acc', a)]
  assert row['value'] == pytest.approx(acc)
  best = [np.argmax(one['logp']) for one in said if one['task'] == 'choices' and one['model'] == a]
  assert best == [one['acc'] for one in said if one['task'] == 'choices' and one['model'] == a]
  assert (tmp_path / 's.md').read_text().startswith('| task')
  assert cli.main([*command, '--jsonl', str(folders / 'text.jsonl')]) == 0
  table = {(row['metric'], row['model']): row['value'] for row in json.loads((tmp_path / 's.json').read_text())}
  assert table['bits_per_byte', a] == pytest.approx(np.log2(table['byte_perplexity', a]))
  asked, texts = subject.opened(a), [row['text'] for row in ROWS['text']]
  whole = sum(by_hand(asked, [0, *subject.encoded(asked, text)])[0].sum() for text in texts[:2])
  assert sum(subject.rolling(asked, texts)[:2]) == pytest.approx(whole, abs=1e-3)


@pytest.mark.slow
def test_perplexities_are_by_document_and_compared(folders, tmp_path, capsys):
  """Two kinds, one of two sources: values by hand, intervals and differences over documents, as JSON and Markdown."""
  texts = {'x': [f'It was {i} nights cold, and {"very " * i}dark.' for i in range(9)], 'y': ['A thé.', 'Nothing of it']}
  for kind, some in texts.items():
    rows = [{'text': text, 'source': f'{kind}{i % 2}' if kind == 'x' else 'one'} for i, text in enumerate(some)]
    (tmp_path / f'{kind}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  vocabulary = subject.opened(str(folders / 'a')).tokenizer
  given = [str(tmp_path / 'x.jsonl'), str(tmp_path / 'y.jsonl')]
  prepare.prepare(given, vocabulary, tmp_path / 'data', val_fraction=0.7)
  whole = prepared.load(tmp_path / 'data')
  held_out = {kind: list(whole.texts('validation', kind)) for kind in texts}
  assert len(held_out['x']) > 4 and len(held_out['y']) == 1
  a, b, out = str(folders / 'a'), str(folders / 'b'), tmp_path / 'e.json'
  command = ['eval', a, '--data', str(tmp_path / 'data'), '--seq-len', '997', '--out', str(out)]
  assert cli.main([*command, '--against', b]) == 0
  shown, found = capsys.readouterr().out, json.loads(out.read_text())
  assert (tmp_path / 'e.md').read_text() in shown and '| x/x0 ' in shown and '| y/one ' not in shown

  ids = lambda text: [vocabulary.bos_id, *vocabulary.encode(text), vocabulary.eos_id]
  surprise = lambda asked, some: np.array([-by_hand(asked, ids(text))[0].sum() for text in some])
  models = {name: subject.opened(name) for name in (a, b)}
  nats = {name: {kind: surprise(asked, held_out[kind]) for kind in texts} for name, asked in models.items()}
  tokens = np.array([len(vocabulary.encode(text)) + 1 for text in held_out['x']])
  value = lambda name: np.exp(nats[name]['x'].sum() / tokens.sum())
  lines = {(row['text'], row['metric'], row['model']): row for row in found['compared']}
  for name in (a, b):
    assert lines['x', 'perplexity', name]['value'] == pytest.approx(value(name), rel=1e-4)
    assert lines['x', 'perplexity', name]['documents'] == len(tokens)
  measures = [Measure(nats[name]['x'], tokens, 'perplexity') for name in (a, b)]
  row = lines['x', 'perplexity', f'{a} - {b}']
  assert (row['value'], row['from'], row['to']) == pytest.approx(questions.difference(*measures), rel=1e-3)
  sure = found['intervals']['x']
  assert (sure['perplexity_from'], sure['perplexity_to']) == pytest.approx(questions.interval(measures[0]), rel=1e-4)
  assert found['intervals']['y']['perplexity_from'] is None and not [line for line in lines if line[0] == 'y']
  bits = sum(x.sum() for x in nats[a].values()) / np.log(2)
  size = sum(len(text.encode()) for some in held_out.values() for text in some)
  assert found['all']['bits_per_byte'] == pytest.approx(bits / size, rel=1e-4)
  assert lines['all', 'bits_per_byte', a]['value'] == pytest.approx(bits / size, rel=1e-4)


@pytest.mark.parametrize(
  'flags, said',
  [
    (['--jsonl', 'x.jsonl', '--tasks', '3'], 'one of them at a time'),
    (['--jsonl', 'x.jsonl', '--shots-from', 'a', 'b'], '2 files for 1'),
    (['--include-path', 'x'], 'needs --lm-eval'),
    (['--jsonl', 'x.jsonl', '--shots', '-1'], 'shots'),
  ],
)
def test_flags_that_make_no_sense(flags, said, capsys):
  assert cli.main(['eval', 'nothing', *flags]) == 1
  assert said in capsys.readouterr().err
