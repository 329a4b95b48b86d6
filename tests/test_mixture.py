"""Mixtures: exact proportions at every row, phases, batches that grow, held-out text counted by kind."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm import config as configs
from jaxlm.config import Data, Pretrain
from jaxlm.data import batches as bt
from jaxlm.data import tokenizer as tok
from jaxlm.data.mixture import Mixture, interleave, parse, parse_phase
from jaxlm.data.prepare import prepare
from jaxlm.errors import InputError
from jaxlm.loops import corpus, feeds
from jaxlm.masked import Sum


@given(st.lists(st.integers(0, 23), min_size=1, max_size=7).filter(any))
def test_every_prefix_has_each_share_rounded_up_or_down(counts):
  order, total = interleave(np.array(counts)), sum(counts)
  for source, count in enumerate(counts):
    given_so_far = np.cumsum(order == source)
    share = [Fraction(count * n, total) for n in range(1, total + 1)]
    assert all(abs(a - b) < 1 for a, b in zip(given_so_far.tolist(), share, strict=True))
    assert given_so_far[-1] == count


def test_draws_are_counted_and_no_row_of_a_source_is_left_out_between_phases():
  weights = [[Fraction('0.5'), Fraction('0.3'), Fraction('0.2')], [Fraction(0), Fraction(1), Fraction(2)]]
  mixed = Mixture([(0, weights[0]), (37, weights[1])])
  seen: Counter[int] = Counter()
  for position in range(101):
    assert mixed.drawn(position).tolist() == [seen[s] for s in range(3)]
    source, draw = mixed.draw(position)
    assert draw == seen[source]
    seen[source] += 1
  late = Counter(mixed.draw(position)[0] for position in range(37, 37 + 300))
  assert late == {1: 100, 2: 200}
  assert mixed.draw(10**9) == mixed.draw(10**9)


def test_a_million_rows_have_the_exact_proportions():
  mixed = Mixture([(0, [Fraction('0.512'), Fraction('0.3'), Fraction('0.188')])])
  assert mixed.drawn(10**6).tolist() == [512_000, 300_000, 188_000]
  assert mixed.drawn(123_457).tolist() == [pytest.approx(123_457 * w, abs=1) for w in (0.512, 0.3, 0.188)]


@pytest.mark.parametrize('mix', ['a', 'a*1 + b', 'a*1 + a*2', 'k=a*1', 'a*0'])
def test_a_mixture_that_is_none_is_refused(mix):
  with pytest.raises(InputError):
    parse(mix)


@pytest.mark.parametrize('phase', ['a*1', '0: a*1', '1.0: a*1', 'x: a*1', '-1: a*1'])
def test_a_phase_that_is_none_is_refused(phase):
  with pytest.raises(InputError, match='data.phases'):
    parse_phase(phase)


def test_weights_of_too_many_digits_are_refused():
  with pytest.raises(InputError, match='too many digits'):
    Mixture([(0, [Fraction('0.1234567'), Fraction('0.7')])])


class Numbers:
  """Rows that say which source and row they are."""

  def __init__(self, source: int, count: int):
    self.source, self.count = source, count

  def __len__(self):
    return self.count

  def __getitem__(self, row):
    assert 0 <= row < self.count
    return {'x': np.array([self.source, row])}


def test_batches_of_a_mixture_read_each_source_in_whole_epochs():
  mixed = Mixture([(0, [2, 1, 4])])
  batches = bt.Batches(bt.Joined([Numbers(0, 11), Numbers(1, 5), Numbers(2, 13)]), 7, 3, mixture=mixed)
  rows = np.concatenate([batches(cursor)['x'] for cursor in range(65)])
  assert Counter(rows[:, 0].tolist()) == {0: 130, 1: 65, 2: 260}
  for source, count in [(0, 11), (1, 5), (2, 13)]:
    of = rows[rows[:, 0] == source][:, 1]
    epochs = [of[i : i + count].tolist() for i in range(0, len(of) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1]
  assert batches.epochs(65) == [130 / 11, 13.0, 20.0]
  np.testing.assert_array_equal(batches(9)['x'], rows[63:70])


def test_batches_grow_and_no_row_is_left_out_or_repeated():
  ramp = bt.parse_ramp(('2=3', '5=7'), 11)
  growing, flat = bt.Batches(Numbers(0, 97), 11, 5, ramp=ramp), bt.Batches(Numbers(0, 97), 1, 5)
  sizes = [2] * 3 + [5] * 4 + [11] * 3
  assert [growing.size(cursor) for cursor in range(10)] == sizes
  assert [growing.first(cursor) for cursor in range(11)] == np.cumsum([0, *sizes]).tolist()
  rows = np.concatenate([growing(cursor)['x'] for cursor in range(10)])
  np.testing.assert_array_equal(rows, np.concatenate([flat(cursor)['x'] for cursor in range(sum(sizes))]))


@pytest.mark.parametrize('ramp', [('8',), ('8=a',), ('8=5', '8=7'), ('8=5', '9=5'), ('16=5',), ('0=5',), ('8=0',)])
def test_a_warmup_that_does_not_grow_is_refused(ramp):
  with pytest.raises(InputError, match='data.batch_warmup'):
    bt.parse_ramp(ramp, 16)


@pytest.fixture(scope='module')
def home(tmp_path_factory) -> Path:
  """Folders `both` (kinds sea and land) and `more`, of one tokenizer, and `foreign`, of another."""
  home = tmp_path_factory.mktemp('mixture')
  texts = {name: [f'{name} {i} is {i * i} and a word more\n' for i in range(90)] for name in ('sea', 'land', 'sky')}
  for name, some in texts.items():
    rows = [{'text': text, 'source': f'{name}{i % 2}'} for i, text in enumerate(some)]
    (home / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  vocabulary = tok.train([text for some in texts.values() for text in some], 300)
  prepare([f'{home}/sea.jsonl*0.75 + {home}/land.jsonl*0.25'], vocabulary, home / 'both', val_fraction=0.2)
  prepare([f'{home}/sky.jsonl'], vocabulary, home / 'more', val_fraction=0.2)
  prepare([f'{home}/sky.jsonl'], tok.train(texts['sky'], 290), home / 'foreign', val_fraction=0.2)
  return home


def test_weights_that_data_was_prepared_with_are_what_training_draws(home):
  opened = corpus.load(str(home / 'both'))
  config = Pretrain(data=Data(path=str(home / 'both'), seq_len=13, global_batch=4), steps=10)
  stream = corpus.training(opened, config)
  assert stream.names == ['sea', 'land']
  assert stream.batches.mixture.drawn(40).tolist() == [30, 10]
  tokens = {kind: count.tokens for kind, count in opened.folders[str(home / 'both')].summary.kinds('train').items()}
  assert feeds.Prepared(config, opened).composition() == tokens and len(tokens) == 2
  text = lambda batch: opened.tokenizer.decode(batch['tokens'].reshape(-1).tolist())
  assert 'sea' in text(stream.batches(0)) and 'land' in text(stream.batches(0))


def test_phases_and_further_folders(home):
  opened = corpus.load(str(home / 'both'), 'sea*1', (f'0.8: {home}/more*1', '0.5: land*1 + sea*3'))
  config = Pretrain(data=Data(seq_len=13, global_batch=4, batch_warmup=('2=3',)), steps=10)
  stream = corpus.training(opened, config)
  assert stream.names == ['sea', 'land', f'{home}/more']
  sources = [[stream.batches.mixture.draw(position)[0] for position in range(34)]]
  assert sources[0][:14] == [0] * 14  # 3 batches of 2 and 2 of 4
  assert Counter(sources[0][14:26]) == {0: 9, 1: 3}
  assert sources[0][26:] == [2] * 8
  text = opened.tokenizer.decode(stream.batches(9)['tokens'].reshape(-1).tolist())
  assert 'sky' in text and 'sea' not in text
  assert opened.contents.count(' ') == 1
  sky = opened.folders[f'{home}/more'].summary.splits['train'].tokens
  found = feeds.Prepared(config, opened).composition()
  assert list(found) == stream.names and found[f'{home}/more'] == sky and found['sea'] != sky


@pytest.mark.parametrize(
  'mix, phases, why',
  [
    ('sea*1 + lake*1', (), "'lake' is no kind of .* \\(sea, land\\), and as a folder"),
    ('{home}/foreign*1', (), 'was prepared with another tokenizer'),
  ],
)
def test_names_that_stand_for_nothing(home, mix, phases, why):
  with pytest.raises(InputError, match=why):
    corpus.load(str(home / 'both'), mix.format(home=home), phases)


def test_phases_need_a_beginning(home):
  with pytest.raises(InputError, match='needs a data.mix'):
    corpus.load(str(home / 'more'), '', ('0.5: sky*1',))


def test_two_phases_that_begin_together_are_refused(home):
  with pytest.raises(InputError, match='data.phases: two phases begin at 0.5 of the steps'):
    corpus.load(str(home / 'both'), 'sea*1', ('0.5: land*1', '0.7: sea*1', '0.50: sea*1'))


def test_held_out_targets_are_counted_by_kind_and_source(home):
  folders = list(corpus.load(str(home / 'both'), f'{home}/more*1').folders.values())
  rows, groups = corpus.held_out(folders, 13)
  assert sorted(groups) == sorted((kind, f'{kind}{i}') for kind in ('sea', 'land', 'sky') for i in (0, 1))
  tokens, sizes = np.zeros(6), np.zeros(6)
  for row in (rows[i] for i in range(len(rows))):
    assert row['group'].dtype == np.int32
    tokens += np.bincount(row['group'], row['loss_mask'], 6)
    sizes += np.bincount(row['group'], row['target_bytes'], 6)
  for number, (kind, source) in enumerate(groups):
    of = [
      count
      for one in folders
      for group, count in zip(one.summary.groups, one.summary.by_group['validation'], strict=True)
      if group == (kind, source)
    ]
    assert sizes[number] == sum(count.bytes for count in of)
    assert tokens[number] == sum(count.tokens - count.documents for count in of)  # BOS is no target


def test_scores_add_groups_of_one_name_and_leave_out_empty_ones():
  totals = {'nll': Sum(np.array([2.0, 4.0, 0.0]), np.array([1.0, 3.0, 0.0]))}
  totals['bits_per_byte'] = Sum(np.array([8.0, 2.0, 0.0]), np.array([4.0, 6.0, 0.0]))
  assert corpus.scores(totals, ['a', 'a', 'b']) == {'a': (1.5, 1.0, 4, 10)}
  assert corpus.scores(totals, ['a', 'c', 'b']) == {'a': (2.0, 2.0, 1, 4), 'c': (4 / 3, 1 / 3, 3, 6)}


def test_a_limit_takes_rows_evenly():
  assert [b['x'][:, 1].tolist() for b in bt.in_order(Numbers(0, 23), 3, 5)] == [[0, 4, 9], [13, 18, 0]]
  assert len(bt.in_order(Numbers(0, 23), 3, 100)) == 8


def test_the_chapter_mixes_its_five_kinds(tmp_path):
  config = configs.load(str(Path(__file__).parents[1] / 'configs' / 'pretrain' / 'chapter.py'))
  kinds = ('encyclopedia', 'web', 'books', 'code', 'social')
  texts = {
    kind: [f'{kind} {i} is {i * i} and a word more, so that a row is filled\n' * 9 for i in range(30)] for kind in kinds
  }
  for kind, some in texts.items():
    (tmp_path / f'{kind}.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in some))
  vocabulary = tok.train([text for some in texts.values() for text in some], 300)
  prepare([f'{tmp_path}/{kind}.jsonl' for kind in kinds], vocabulary, tmp_path / 'out')
  opened = corpus.load(str(tmp_path / 'out'), config.data.mix, config.data.phases)
  stream = corpus.training(opened, config)
  assert set(stream.names) == set(kinds)
  last = config.steps * config.data.global_batch
  shares = stream.batches.mixture.drawn(last) - stream.batches.mixture.drawn(last * 9 // 10)
  assert dict(zip(stream.names, (shares / (last // 10)).round(2), strict=True))['encyclopedia'] == 0.35
