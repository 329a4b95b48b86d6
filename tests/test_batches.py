"""Rows and batches: what is predicted and what is not, every row once an epoch, (seed, cursor) decides alone."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data import batches as bt
from jaxlm.data import packing
from jaxlm.data import tokenizer as tok
from jaxlm.data.prepare import prepare
from jaxlm.data.prepared import Prepared, load
from jaxlm.errors import InputError

BOS, EOS, PAD = 0, 1, 2
SIZES = np.array([9, 0, 0, 1, 2, 3, 4, 5, 6, 7], np.int32)  # BOS counts nowhere, whatever stands here
TEXTS = [f'{i} the whale {i * i}\n' * (1 + i % 5) for i in range(23)]


@pytest.fixture(scope='module')
def ready(tmp_path_factory) -> Prepared:
  folder = tmp_path_factory.mktemp('data')
  for i, text in enumerate(TEXTS):
    (folder / f'{i:02}.txt').write_text(text)
  prepare([str(folder)], tok.train(TEXTS, 300), folder / 'out', val_fraction=0)
  return load(folder / 'out')


def stream(*documents: list[int], bos: int = BOS, eos: int = EOS) -> tuple[np.ndarray, np.ndarray]:
  whole = [[bos, *document, eos] for document in documents]
  return np.concatenate(whole), np.concatenate([np.arange(len(d)) == 0 for d in whole])


def test_a_row_by_hand():
  """Documents 3 4 5 | 6 | 7 8 in a row of 11, which stops within the third."""
  tokens, begins = stream([3, 4, 5], [6], [7, 8])
  row = packing.pack(tokens, begins, 11, PAD, SIZES)
  assert {name: value.tolist() for name, value in row.items()} == {
    'tokens':       [0, 3, 4, 5, 1, 0, 6, 1, 0, 7, 8],
    'targets':      [3, 4, 5, 1, 0, 6, 1, 0, 7, 8, 1],
    'loss_mask':    [1, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1],
    'segment_ids':  [1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3],
    'positions':    [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2],
    'target_bytes': [1, 2, 3, 0, 0, 4, 0, 0, 5, 6, 0],
  }  # fmt: skip
  assert {name: value.dtype.name for name, value in row.items()} == {
    name: 'float32' if name == 'loss_mask' else 'int32' for name in row
  }


def test_a_row_that_begins_inside_a_document_by_hand():
  tokens, begins = stream([3, 4, 5], [6])
  row = packing.pack(tokens[2:], begins[2:], 7, PAD, SIZES)
  assert {name: value.tolist() for name, value in row.items()} == {
    'tokens':       [4, 5, 1, 0, 6, 2, 2],
    'targets':      [5, 1, 0, 6, 1, 2, 2],
    'loss_mask':    [1, 1, 0, 1, 1, 0, 0],
    'segment_ids':  [1, 1, 1, 2, 2, 0, 0],
    'positions':    [0, 1, 2, 0, 1, 0, 0],
    'target_bytes': [3, 0, 0, 4, 0, 0, 0],
  }  # fmt: skip


def test_the_end_of_text_label_is_kept_where_padding_is_the_same_token():
  tokens, begins = stream([3], [4, 5])
  row = packing.pack(tokens, begins, 11, EOS, SIZES)
  assert row['targets'].tolist() == [3, 1, 0, 4, 5, 1, 1, 1, 1, 1, 1]
  assert row['loss_mask'].tolist() == [1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0]


def test_no_label_crosses_a_boundary_where_bos_and_eos_are_the_same_token():
  tokens, begins = stream([3], [4], bos=EOS)
  assert packing.pack(tokens, begins, 5, EOS, SIZES)['loss_mask'].tolist() == [1, 1, 0, 1, 1]


@pytest.mark.parametrize('seq_len', [5, 17, 4096])
def test_each_token_of_the_text_is_predicted_exactly_once(ready, seq_len):
  rows = packing.Rows(ready.split('train'), seq_len, ready.tokenizer)
  predicted = np.concatenate([row['targets'][row['loss_mask'] == 1] for row in (rows[r] for r in range(len(rows)))])
  t = ready.tokenizer
  assert predicted.tolist() == [i for text in TEXTS for i in [*t.encode(text), t.eos_id]]
  assert sum(int(rows[r]['target_bytes'].sum()) for r in range(len(rows))) == ready.split('train').bytes


@pytest.mark.parametrize('seq_len', [5, 17, 59, 4096])
def test_best_fit_predicts_each_token_once_and_cuts_no_document_that_fits(ready, seq_len):
  rows = packing.rows('best_fit', ready.split('train'), seq_len, ready.tokenizer)
  t = ready.tokenizer
  pieces = []
  for row in rows:
    assert row['loss_mask'].tolist() == (row['segment_ids'] > 0).tolist()
    for segment in range(1, row['segment_ids'].max() + 1):
      here = row['segment_ids'] == segment
      assert row['positions'][here].tolist() == list(range(here.sum()))
      pieces.append((row['tokens'][here].tolist(), row['targets'][here].tolist()))
  expected = []
  for text in TEXTS:
    ids = [t.bos_id, *t.encode(text), t.eos_id]
    cuts = range(0, len(ids) - 1, seq_len)
    expected += [(ids[:-1][c : c + seq_len], ids[1:][c : c + seq_len]) for c in cuts]
  assert sorted(pieces) == sorted(expected)
  assert sum(int(row['target_bytes'].sum()) for row in rows) == ready.split('train').bytes
  assert rows.fill == pytest.approx(np.mean([(row['segment_ids'] > 0).mean() for row in rows]))
  concat = packing.rows('concat', ready.split('train'), seq_len, ready.tokenizer)
  assert {k: (v.shape, v.dtype) for k, v in rows[0].items()} == {k: (v.shape, v.dtype) for k, v in concat[0].items()}
  assert concat.fill == pytest.approx(np.mean([(row['segment_ids'] > 0).mean() for row in concat]))


@given(st.lists(st.integers(1, 31), min_size=1, max_size=61))
def test_best_fit_overfills_no_row_and_leaves_no_two_that_fit_into_one(lengths):
  lengths = np.array(lengths)
  row = packing.best_fit(lengths, 31)
  full = np.bincount(row, lengths)
  assert full.max() <= 31 and (full > 0).all()  # no row is empty, none is too full
  assert np.sort(full)[:2].sum() > 31 or len(full) == 1
  least = -(-lengths.sum() // 31)
  assert len(full) <= 11 / 9 * least + 1 or len(full) <= (lengths > 15).sum() + least


def test_best_fit_by_hand():
  """10: 7 goes with 3, 6 with 4 (the fullest row with room), 5 with 5; then 2 opens a row."""
  assert packing.best_fit(np.array([5, 2, 7, 4, 6, 3, 5]), 10).tolist() == [2, 3, 0, 1, 1, 0, 2]
  assert packing.best_fit(np.array([3, 6, 7]), 10).tolist() == [0, 1, 0]  # not into the row with more room


def test_rows_out_of_range_are_refused(ready):
  rows = packing.Rows(ready.split('train'), 17, ready.tokenizer)
  assert len(list(rows)) == len(rows)  # iteration ends
  for row in (-1, len(rows)):
    with pytest.raises(IndexError):
      rows[row]


class Numbers:
  """Rows that say which they are."""

  def __init__(self, count: int):
    self.count = count

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    return {'tokens': np.full(3, row, np.int32), 'loss_mask': np.ones(3, np.float32)}


@pytest.mark.parametrize(('count', 'size'), [(53, 7), (3, 7), (1, 2)])
def test_each_epoch_is_another_permutation(count, size):
  batches = bt.Batches(Numbers(count), size, seed=0)
  epochs = np.concatenate([batches.row_ids(c) for c in range(count * 5 // size + 1)])[: count * 5]
  epochs = epochs.reshape(5, count)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(count), (5, 1)))
  if count > 50:
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert all((epoch != np.arange(count)).any() for epoch in epochs)


def test_seeds_are_not_one_order_shifted():
  """Epoch 1 of seed 0 is not epoch 0 of seed 1."""
  orders = [tuple(bt.Batches(Numbers(53), 53, seed).row_ids(epoch)) for seed in range(3) for epoch in range(3)]
  assert len(set(orders)) == 9


def test_the_order_is_the_one_that_runs_were_started_with():
  """A resumed run must see the same batches after an upgrade of the shuffling library. Renew: print the value."""
  assert bt.Batches(Numbers(53), 7, seed=11).row_ids(9).tolist() == [28, 13, 7, 49, 35, 39, 48]


def test_a_batch_depends_on_its_cursor_alone(ready):
  rows = packing.Rows(ready.split('train'), 17, ready.tokenizer)
  one, other = bt.Batches(rows, 5, seed=3), bt.Batches(rows, 5, seed=3)
  forward = [one(c) for c in range(9)]
  backward = [other(c) for c in reversed(range(9))][::-1]
  for cursor, (a, b) in enumerate(zip(forward, backward, strict=True)):
    assert a['tokens'].shape == (5, 17)
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
      np.testing.assert_array_equal(a[name], np.stack([rows[int(r)][name] for r in one.row_ids(cursor)]))


def test_data_without_a_row_is_refused():
  with pytest.raises(InputError, match='holds no row'):
    bt.Batches(Numbers(0), 4, seed=0)
  assert len(bt.in_order(Numbers(0), 4)) == 0


def test_in_order_is_every_row_once_and_masked_rows_at_the_end():
  fixed = bt.in_order(Numbers(11), 4)
  assert len(fixed) == len(list(fixed)) == 3
  assert np.concatenate([b['tokens'][:, 0] for b in fixed]).tolist() == [*range(11), 0]
  assert np.concatenate([b['loss_mask'][:, 0] for b in fixed]).tolist() == [1] * 11 + [0]


def test_prefetch_gives_what_direct_calls_give():
  batches = bt.Batches(Numbers(11), 4, seed=0)
  got = list(bt.prefetch(batches, 5, 12, depth=3))
  assert [cursor for cursor, _ in got] == list(range(5, 12))
  for cursor, batch in got:
    np.testing.assert_array_equal(batch['tokens'], batches(cursor)['tokens'])
  assert list(bt.prefetch(batches, 5, 5)) == []


def test_prefetch_works_ahead_by_depth_and_no_more():
  asked: list[int] = []
  ready = bt.prefetch(lambda cursor: asked.append(cursor), 0, 99, depth=3)
  for taken in (1, 2):
    next(ready)
    wait_for(lambda taken=taken: len(asked) == taken + 3)
    time.sleep(0.05)
    assert asked == list(range(taken + 3))
  ready.close()


def test_prefetch_raises_what_the_thread_raised_at_its_cursor():
  def fail(cursor: int) -> int:
    if cursor == 2:
      raise InputError('record 2 is damaged')
    return cursor

  ready = bt.prefetch(fail, 0, 9)
  assert [next(ready), next(ready)] == [(0, 0), (1, 1)]
  with pytest.raises(InputError, match='record 2 is damaged'):
    next(ready)
  assert not prefetching()


def test_closing_prefetch_ends_its_thread():
  ready = bt.prefetch(lambda cursor: cursor, 0, 10**9)
  next(ready)
  assert prefetching()
  ready.close()
  assert not prefetching()


def prefetching() -> list[threading.Thread]:
  return [thread for thread in threading.enumerate() if thread.name.startswith('prefetch')]


def wait_for(condition) -> None:
  for _ in range(200):
    if condition():
      return
    time.sleep(0.01)
  raise AssertionError('it did not come about within two seconds')
