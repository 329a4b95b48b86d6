"""Questions made of texts by rule: their answers are what the text says."""

from jaxlm import lessons
from jaxlm.data import sources
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
