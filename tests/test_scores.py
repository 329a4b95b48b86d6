"""Scores of answers, by hand and in several scripts."""

import pytest

from jaxlm.evals import scores

pytest.importorskip('sacrebleu', reason="needs pip install -e '.[eval]'")


@pytest.mark.parametrize(
  'text, expected',
  [
    ('The cat, again!', ['the', 'cat', 'again']),
    ('यह किताब है।', ['यह', 'किताब', 'है']),
    ('你好 world', ['你', '好', 'world']),
    ("l'eau", ['l', 'eau']),
    ('', []),
  ],
)
def test_words_of_any_script(text, expected):
  assert scores.words(text) == expected


@pytest.mark.parametrize(
  'answer, reference, exact, f1',
  [
    ('The cat.', 'a cat', 1, 1),
    ('cat cat dog', 'cat dog dog', 0, 2 * 2 / 6),
    ('horse', 'cat', 0, 0),
    ('', '', 1, 1),
    ('किताब है', 'यह किताब है', 0, 0.8),
  ],
)
def test_match_and_f1(answer, reference, exact, f1):
  assert (scores.exact_match(answer, reference), scores.f1(answer, reference)) == (exact, pytest.approx(f1))


def test_rouge_and_chrf_of_a_corpus():
  """ROUGE-L by hand: the longest common subsequence of 'b d' in 'a b c d' is 2: P 1, R 1/2."""
  got = scores.score(['b d', 'य र ल'], ['a b c d', 'य र ल'])
  assert got['rouge_l'] == pytest.approx(100 * (2 / 3 + 1) / 2)
  assert got['exact_match'] == 50 and 0 < got['chrf'] < 100
  assert scores.score(['same text'], ['same text']) == dict.fromkeys(scores.NAMES, 100.0)
  assert scores.score([], []) == dict.fromkeys(scores.NAMES, 0.0)
