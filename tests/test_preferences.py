"""Preference rows in the formats that users have, prepared and packed: pairs stay whole, answers alone are learned."""

import json

import numpy as np
import preferred
import pytest

from jaxlm import cli
from jaxlm.data import packing, pairs, preferences, prepare, prepared, tokenizer
from jaxlm.errors import InputError
from jaxlm.loops import corpus

ASKED, SO, NO = ({'role': r, 'content': c} for r, c in (('user', 'Why?'), ('assistant', 'So.'), ('assistant', 'No.')))
FORMATS = {
  'texts': ({'prompt': 'Why?', 'chosen': 'So.', 'rejected': 'No.'}, [[ASKED, SO], [ASKED, NO]], [True, False], 0.0),
  'messages': ({'prompt': [ASKED], 'chosen': [SO], 'rejected': [NO]}, [[ASKED, SO], [ASKED, NO]], [True, False], 0.0),
  'implicit prompt': ({'chosen': [ASKED, SO], 'rejected': [ASKED, NO]}, [[ASKED, SO], [ASKED, NO]], [True, False], 0.0),
  'a prompt beside whole conversations': (
    {'prompt': 'Why?', 'chosen': [ASKED, SO], 'rejected': [ASKED, NO], 'score_chosen': 7.5, 'score_rejected': 4},
    [[ASKED, SO], [ASKED, NO]],
    [True, False],
    3.5,
  ),
  'whole conversations as texts': (
    {'chosen': '\n\nHuman: Why?\n\nAssistant: So.', 'rejected': '\n\nHuman: Why?\n\nAssistant: No.', 'margin': 0.5},
    [[ASKED, SO], [ASKED, NO]],
    [True, False],
    0.5,
  ),
  'labelled': ({'prompt': 'Why?', 'completion': 'No.', 'label': False}, [[ASKED, NO]], [False], 0.0),
  'labelled, response': ({'prompt': [ASKED], 'response': [SO], 'label': 1}, [[ASKED, SO]], [True], 0.0),
}


@pytest.mark.parametrize('name', FORMATS)
def test_formats(name):
  row, answers, labels, margin = FORMATS[name]
  found = preferences.checked(preferences.guess(list(row)).read(row))
  assert [answer.messages for answer in found.answers] == answers
  assert (found.labels, found.margin) == (labels, margin)
  assert preferences.Preference.from_json(found.to_json()) == found


@pytest.mark.parametrize(
  'row, why',
  [
    ({'prompt': 'Why?', 'chosen': 'So.'}, 'no preferences have the columns prompt, chosen'),
    ({'chosen': [ASKED, SO], 'rejected': [SO, ASKED, NO]}, 'part at message 1, before their last turn'),
    ({'chosen': [ASKED, SO], 'rejected': [ASKED, SO, ASKED, NO]}, 'part at message 2, before their last turn'),
    ({'chosen': [ASKED, SO, ASKED], 'rejected': [ASKED, NO]}, 'ends with a turn of the user'),
    ({'chosen': 'So.', 'rejected': 'No.'}, 'no whole conversation, and there is no column with its prompt'),
    ({'prompt': 'Why?', 'completion': 'So.', 'label': 'good'}, "neither true nor false: 'good'"),
    ({'prompt': 'Why?', 'chosen': 'So.', 'rejected': 'No.', 'margin': float('nan')}, '"margin" is no number'),
  ],
)
def test_what_cannot_be_compared_is_refused(row, why):
  with pytest.raises(InputError, match=why):
    preferences.checked(preferences.guess(list(row)).read(row))


def test_columns_are_named():
  columns = preferences.parse_columns(('chosen=good,rejected=bad', 'prompt=q'))
  row = {'q': 'Why?', 'good': 'So.', 'bad': 'No.', 'chosen': 3}
  form = preferences.guess(list(row), columns)
  assert form.name == 'chosen and rejected (chosen=good, rejected=bad, prompt=q)'
  assert [answer.messages for answer in form.read(row).answers] == [[ASKED, SO], [ASKED, NO]]
  for given in ('chosen=good', 'prompt=q,label=l', 'messages=m'):
    with pytest.raises(InputError, match='--columns'):
      preferences.parse_columns((given,))


def documents(folder, split):
  tokens = folder.split(split)
  starts = tokens.document_starts().tolist()
  return [(tokens.read(a, b)[0], tokens.learned(a, b)) for a, b in zip(starts, starts[1:], strict=False)]


def said(folder, ids):
  return folder.tokenizer.decode([int(i) for i in ids])


def test_a_pair_is_never_torn_and_its_answers_are_learned(tmp_path):
  rows = preferred.rows(40)
  folder = preferred.folder(tmp_path, rows, val_fraction=0.3)
  assert folder.summary.preference == 'pairs' and folder.summary.read()['data']['kept'] == 40
  by_prompt, seen = {row['prompt']: row for row in rows}, set()
  for split in ('train', 'validation'):
    found, (labels, margins) = documents(folder, split), folder.split(split).answers()
    assert len(found) == len(labels) and 0 < len(found) < 80
    for n in range(0, len(found), 2):
      asked = {said(folder, ids[~on]) for ids, on in found[n : n + 2]}
      (row,) = (row for prompt, row in by_prompt.items() if f'\n{prompt}\n' in next(iter(asked)))
      assert len(asked) == 1
      answers = [said(folder, ids[on][:-1]) for ids, on in found[n : n + 2]]
      assert answers == [row['chosen'], row['rejected']]
      assert all(ids[on][-1] == folder.tokenizer.eos_id for ids, on in found[n : n + 2])
      assert labels[n : n + 2].tolist() == [True, False] and margins[n] == row['margin']
      seen.add(row['prompt'])
  assert len(seen) == 40


def test_what_is_left_out_is_counted(tmp_path):
  rows = preferred.rows(20)
  same = {'prompt': 'Why?', 'chosen': 'so', 'rejected': 'so'}
  lengths = [len(ids) for ids, _ in documents(preferred.folder(tmp_path, rows, 'all'), 'train')]
  limit = sorted(map(max, zip(lengths[::2], lengths[1::2], strict=True)))[9]
  folder = preferred.folder(tmp_path, [*rows, rows[0], same], max_len=limit)
  read = folder.summary.read()['data']
  assert read['read'] == 22 and read['duplicate'] == read['no difference'] == 1
  assert 5 <= read['too long'] <= 10 and read['kept'] == 20 - read['too long']
  assert max(len(ids) for ids, _ in documents(folder, 'train')) <= limit
  with pytest.raises(InputError, match='no row is left, 20 are longer than max_len'):
    preferred.folder(tmp_path, rows, 'none', max_len=3)


def test_pairs_and_labels_do_not_mix(tmp_path):
  rows = preferred.rows(3)
  both = {'a': preferred.write(tmp_path / 'a.jsonl', rows), 'b': preferred.write(tmp_path / 'b.jsonl', [])}
  preferred.write(tmp_path / 'b.jsonl', preferred.labelled(rows))
  _, known, chat = prepare.chat_of('plain', None, preferred.vocabulary(), preference=True)
  with pytest.raises(InputError, match='into a folder each'):
    prepare.prepare(list(both.values()), known, tmp_path / 'out', chat=chat, val_fraction=0.0)


def test_the_command_shows_what_it_guessed(tmp_path, capsys):
  path = preferred.write(tmp_path / 'rows.jsonl', preferred.rows(9))
  preferred.vocabulary().save(tmp_path / 'tokenizer.json')
  args = ['prepare', path, '--tokenizer', str(tmp_path / 'tokenizer.json'), '--out', str(tmp_path / 'out')]
  assert cli.main([*args, '--preference', '--template', 'plain', '--val-fraction', '0']) == 0
  assert 'rows: chosen and rejected (prompt, chosen, rejected, margin)' in capsys.readouterr().out
  assert cli.main([*args, '--chat']) == 1
  assert 'prepare them with --preference' in capsys.readouterr().err
  assert cli.main([*args, '--chat', '--preference']) == 1
  assert 'conversations or preferences' in capsys.readouterr().err
  assert cli.main(['inspect', str(tmp_path / 'out'), '--seq-len', '139']) == 0
  shown = capsys.readouterr().out
  assert 'pairs: 9, of which 0 are longer' in shown and '-- segment 2' in shown
  with pytest.raises(InputError, match='`jaxlm preference` and `jaxlm reward` learn from them'):
    corpus.held_out([prepared.load(tmp_path / 'out')], 97)


def test_rows_hold_whole_pairs(tmp_path):
  folder = preferred.folder(tmp_path, preferred.rows(60))
  found, wanted = documents(folder, 'train'), {}
  for ends in (False, True):
    some = preferred.stream(folder, 397, ends=ends)
    units = np.concatenate([some.units_of(i) for i in range(len(some))])
    assert sorted(units) == sorted(some.units) and some.dropped == 60 - len(units) == 0
    assert some.fill > 0.9 and max(len(some.units_of(i)) for i in range(len(some))) > 3
    for number in range(len(some)):
      row = some[number]
      for place, unit in enumerate(some.units_of(number)):
        for side in range(2):
          there = row['segment_ids'] == 2 * place + side + 1
          ids, learned = found[2 * unit + side]
          assert row['positions'][there].tolist() == list(range(there.sum()))
          np.testing.assert_array_equal(row['tokens'][there], ids if ends else ids[:-1])
          mask = row['loss_mask'][there]
          if ends:  # the very last token of the answer
            assert np.flatnonzero(mask).tolist() == [np.flatnonzero(learned)[-1]]
          else:
            np.testing.assert_array_equal(row['targets'][there], ids[1:])
            np.testing.assert_array_equal(mask, learned[1:])
          wanted.setdefault(unit, row['margins'][2 * place])
          assert row['labels'][2 * place + side] == 1 - side
      assert row['labels'].sum() == len(some.units_of(number))
  margins = folder.split('train').answers()[1][::2]
  assert all(margins[unit] == margin for unit, margin in wanted.items())


def test_pairs_longer_than_a_row_are_counted_and_none_is_cut(tmp_path):
  folder = preferred.folder(tmp_path, preferred.rows(30))
  lengths = np.array([len(ids) - 1 for ids, _ in documents(folder, 'train')]).reshape(-1, 2).sum(1)
  limit = int(np.median(lengths))
  some = preferred.stream(folder, limit)
  assert (
    some.dropped == (lengths > limit).sum() > 0 and some.units.tolist() == np.flatnonzero(lengths <= limit).tolist()
  )


def test_an_answer_is_mismatched_with_the_next_ones_prompt(tmp_path):
  """Of pairs the next row's: the other answer of the same row is to the same prompt."""
  rows = preferred.rows(7)
  for name, some, apart in (('pairs', rows, 2), ('labels', preferred.labelled(rows), 1)):
    folder = preferred.folder(tmp_path, some, name)
    assert folder.summary.preference == name and folder.summary.answers == apart
    found, (labels, _) = documents(folder, 'train'), folder.split('train').answers()
    units = preferred.stream(folder, 397, unit='single', apart=apart)
    assert units.count == 14
    for number in range(len(units)):
      row = units[number]
      for place, unit in enumerate(units.units_of(number)):
        (ids, on), (others, theirs) = found[unit], found[(unit + apart) % 14]
        pick = lambda name, segment, row=row: row[name][row['segment_ids'] == segment]
        first, second = 2 * place + 1, 2 * place + 2
        np.testing.assert_array_equal(pick('targets', first), ids[1:])
        np.testing.assert_array_equal(pick('targets', second), np.append(ids[~on], others[theirs])[1:])
        assert pick('loss_mask', second).sum() == theirs.sum()
        assert row['labels'][first - 1] == labels[unit] and row['labels'][second - 1] == 0


def test_folds_keep_equal_prompts_together(tmp_path):
  rows = preferred.rows(40)
  twice = [row | {'prompt': rows[i // 2 * 2]['prompt']} for i, row in enumerate(rows)]
  folder = preferred.folder(tmp_path, twice)
  parts = pairs.folds(folder.split('train'), 5)
  assert len(parts) == 40 and (parts[::2] == parts[1::2]).all() and set(parts) == set(range(5))
  held = preferred.stream(folder, 101, keep=parts == 3)
  assert set(held.units) <= set(np.flatnonzero(parts == 3)) and len(held.units)


def test_folders_of_conversations_have_nothing_new(tmp_path):
  rows = [{'prompt': row['prompt'], 'response': row['chosen']} for row in preferred.rows(9)]
  path = preferred.write(tmp_path / 'rows.jsonl', rows)
  _, known, chat = prepare.chat_of('plain', None, tokenizer.train([json.dumps(rows)] * 3, 290))
  summary = prepare.prepare([path], known, tmp_path / 'out', chat=chat, val_fraction=0.0)
  assert not list((tmp_path / 'out').glob('*labels*')) and 'preference' not in summary.inputs['chat']
  assert set(summary.chat) == {'template', 'learn', 'end', 'formats', 'learned', 'truncated'}
  with pytest.raises(InputError, match='jaxlm prepare --preference'):
    prepared.load(tmp_path / 'out').split('train').answers()
  assert len(packing.rows('best_fit', prepared.load(tmp_path / 'out').split('train'), 61, known))
