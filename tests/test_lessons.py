"""Questions made of texts by rule: their answers are what the text says."""

import numpy as np
import pytest

from jaxlm import lessons
from jaxlm.data import sources, tokenizer
from jaxlm.data.sources import Document
from jaxlm.quickstart import TEXT

VERSES = 'And God said, Let there be light.\nAnd there was light upon the deep waters.\nगांव में एक बड़ा घर है\n'


def asked(rows):
  return [tuple(message['content'] for message in row['messages']) for row in rows]


def test_by_hand():
  found = lessons.lessons([Document(VERSES, 's', 'w', 'verse')])
  assert asked(found['continue']) == [('Continue.\nAnd God said, Let there be light.', VERSES.splitlines()[1])]
  assert found['kind'] == []  # no passage is long enough
  assert asked(found['write']) == [('Write a line of verse.', VERSES.splitlines()[1])]
  (passage,) = asked(lessons.lessons([Document(VERSES * 3, 's', 'w', 'verse')])['kind'])[:1]
  assert passage[1] == 'verse' and len(passage[0]) >= lessons.CHARACTERS


def test_of_the_sample_no_more_than_so_many_of_a_kind():
  found = lessons.lessons(sources.documents(TEXT))
  kinds = [answer for _, answer in asked(found['kind'])]
  assert len(set(kinds)) == 9 and max(map(kinds.count, set(kinds))) == lessons.EACH
  assert all(len(rows) > 1000 for rows in found.values())
  assert found == lessons.lessons(sources.documents(TEXT))


def test_every_prompt_once():
  row = lessons.row
  found = lessons.prompts([row('Continue.\na', 'b'), row('Continue.\na', 'c'), row('Continue.\nd', 'e')])
  assert found == [{'prompt': 'Continue.\na', 'answer': 'b'}, {'prompt': 'Continue.\nd', 'answer': 'e'}]


def test_preferences_are_matched_in_length():
  made = [row for rows in lessons.lessons(sources.documents(TEXT)).values() for row in rows][-400:]
  rows = lessons.prompts(made)
  vocabulary = tokenizer.train((row['answer'] for row in rows), 400)
  encode, decode = vocabulary.encode, vocabulary.decode
  pairs = lessons.preferences(rows, encode, decode)
  assert len(pairs) > 1.8 * len(rows) and pairs == lessons.preferences(rows, encode, decode)
  right = {row['prompt']: row['answer'] for row in rows}
  apart = []
  for pair in pairs:
    assert pair['chosen'] == right[pair['prompt']] != pair['rejected'] and '\ufffd' not in pair['rejected']
    ids, spoilt = encode(pair['chosen']), encode(pair['rejected'])
    assert len(ids) == len(spoilt)
    apart.append(np.mean(np.array(ids) != spoilt))
  assert 0.2 < np.mean(apart) < 0.5  # tokens that join others count as well
  assert lessons.preferences(rows[:1], lambda text: [1], lambda ids: rows[0]['answer']) == []  # never another line


def test_invented_words_are_told():
  share = lessons.known(['And God said', 'गांव में'])
  assert share('God, and Gord: said!') == 0.75 and share('में') == 1.0 and share('') == share(' .') == 0.0


def test_variety_tells_what_repeats_itself():
  found = lessons.variety(['the king', 'the king', 'a queen', 'the end'])
  assert found == {'different answers': 75.0, 'different words': pytest.approx(100 * 5 / 8), 'words': 2.0}


def test_rows_are_written_once(tmp_path):
  path = tmp_path / 'new' / 'rows.jsonl'
  lessons.write(path, [{'prompt': 'सभी'}])
  first = path.stat().st_ino, path.stat().st_mtime_ns
  lessons.write(path, [{'prompt': 'सभी'}])
  assert (path.stat().st_ino, path.stat().st_mtime_ns) == first and 'सभी' in path.read_text()
  lessons.write(path, [{'prompt': 'all'}])
  assert path.read_text() == '{"prompt": "all"}\n'
