"""What answers are worth against references: ROUGE-L, chrF, exact match and F1, by libraries where there are some."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from jaxlm.errors import InputError

NAMES = ('rouge_l', 'chrf', 'exact_match', 'f1')


def words(text: str) -> list[str]:
  """Words of any script, in lower case, without punctuation; signs that stand alone (Chinese) one by one."""
  text = unicodedata.normalize('NFKC', text).lower()
  letters = ''.join(c if unicodedata.category(c)[0] in 'LMN' else ' ' for c in text)
  return [part for word in letters.split() for part in re.findall(r'[぀-ヿ㐀-鿿]|[^぀-ヿ㐀-鿿]+', word)]


def exact_match(answer: str, reference: str) -> float:
  """1 if the words are the same, articles of English left out (SQuAD, Rajpurkar et al. 2016, arXiv:1606.05250)."""
  return float(_said(answer) == _said(reference))


def f1(answer: str, reference: str) -> float:
  """The harmonic mean of precision and recall over words, counted as often as they occur (SQuAD)."""
  said, wanted = _said(answer), _said(reference)
  common = sum((Counter(said) & Counter(wanted)).values())
  return 2.0 * common / (len(said) + len(wanted)) if common else float(said == wanted)


def _said(text: str) -> list[str]:
  return [word for word in words(text) if word not in ('a', 'an', 'the')]


class _Words:
  tokenize = staticmethod(words)


def score(answers: Sequence[str], references: Sequence[str], names: Sequence[str] = NAMES) -> dict[str, float]:
  """Means in percent of `names`: `rouge_l` (F, rouge-score), `chrf` (of the corpus, sacrebleu), `exact_match`, `f1`.

  Raises InputError where a library for one of them is missing.
  """
  pairs = list(zip(answers, references, strict=True))
  mean = lambda values: 100.0 * sum(values) / max(1, len(pairs))
  of = {
    'rouge_l': lambda: mean(_rouge_l(pairs)),
    'chrf': lambda: _chrf(answers, references) if pairs else 0.0,
    'exact_match': lambda: mean(exact_match(*pair) for pair in pairs),
    'f1': lambda: mean(f1(*pair) for pair in pairs),
  }
  try:
    return {name: of[name]() for name in names}
  except ImportError as error:
    raise InputError("scores need rouge-score and sacrebleu: pip install -e '.[eval]'") from error


def _rouge_l(pairs: Sequence[tuple[str, str]]) -> list[float]:
  from rouge_score.rouge_scorer import RougeScorer

  rouge = RougeScorer(['rougeL'], tokenizer=_Words())
  return [rouge.score(reference, answer)['rougeL'].fmeasure for answer, reference in pairs]


def _chrf(answers: Sequence[str], references: Sequence[str]) -> float:
  from sacrebleu.metrics import CHRF

  return CHRF().corpus_score(list(answers), [list(references)]).score
