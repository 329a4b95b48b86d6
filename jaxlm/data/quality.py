"""A filter for prose from the web: which documents are too short, too odd or too repetitive to learn language from.

After Gopher (Rae et al., arXiv:2112.11446, section A.1.1 and table A1), C4 (Raffel et al., arXiv:1910.10683) and
FineWeb (Penedo et al., arXiv:2406.17557), for any script: no list of words of one language, combining marks belong to
their letters, and scripts without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) are counted by
characters. Code, tables and lists of terms are not prose and many of them have a fault: prepare them without it.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import islice

# Scripts that part no words by spaces; each of their characters counts as a word.
UNSPACED = (
  '\u0e01-\u0e3a\u0e40-\u0e4e\u0e80-\u0ece\u0f00-\u0fbc\u1000-\u109f\u1780-\u17d3'
  '\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af'
)
WORD = re.compile(f'[{UNSPACED}]|[^\\s{UNSPACED}]+')
SPACED = re.compile(f'[^{UNSPACED}]')
ELLIPSES = '...', '\u2026'
BULLETS = '\u2022', '\u2023', '\u25e6', '\u25aa', '\u25cf', '\u00b7', '*', '- ', '\u2013 '
PARAGRAPH = re.compile(r'\n\s*\n')
MOST_WORDS = 1 << 16  # whose repetition is looked at: counting all phrases of a long book takes a GB


@dataclass(frozen=True)
class Thresholds:
  """A document beyond one of these has a fault. Where they are not Gopher's, the reason stands beside them.

  There is no most of words (Gopher: 100,000): a book is not worse for its length.
  """

  least_words: int = 10  # Gopher's 50 is for web pages; entries of dictionaries and help pages are documents too
  least_word_length: float = 2.0  # characters, marks aside; Gopher's 3 is for English, Vietnamese is near it
  most_word_length: float = 12.0  # Gopher's 10 is for English; Finnish or Malayalam prose comes near it
  least_lettered: float = 0.8  # share of words with a letter; what has no digit either is layout, not a word
  most_symbols: float = 0.1  # '#' for each word; ellipses too
  least_judged: int = 50  # words from which on the shares below say something; Gopher's documents have that many
  most_ellipsis_lines: float = 0.3
  most_bullet_lines: float = 0.9
  most_repeated_lines: float = 0.3  # share of the lines with a letter that stood before; of the paragraphs too
  most_repeated_characters: float = 0.2  # share of the characters that are in them
  most_phrase: tuple[float, ...] = (0.2, 0.18, 0.16)  # share of characters of the commonest run of 2, 3, 4 words
  said: int = 3  # times a phrase has to be said: twice is a sixth of 50 words already


def fault(text: str, limits: Thresholds = Thresholds()) -> str | None:
  """What is wrong with a document as prose, in a word or two; None if nothing is. Never raises."""
  words = [word for word in WORD.findall(text) if word.isalpha() or any(map(_in_words, word))]
  if len(words) < limits.least_words:
    return 'few words'
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  odd = _odd(text, words, limits)
  if odd or len(words) < limits.least_judged:
    return odd
  return _lines(lines, limits) or _repetitive(text, words, lines, limits)


def _odd(text: str, words: list[str], limits: Thresholds) -> str | None:
  lengths = [_length(word) for word in words if SPACED.match(word)]
  mean = sum(lengths) / max(len(lengths), 1)
  if 2 * len(lengths) > len(words) and not limits.least_word_length <= mean <= limits.most_word_length:
    return 'word length'
  if sum(map(_has_letter, words)) < limits.least_lettered * len(words):
    return 'few letters'
  if text.count('#') > limits.most_symbols * len(words):
    return 'symbols'
  return 'ellipses' if sum(map(text.count, ELLIPSES)) > limits.most_symbols * len(words) else None


def _lines(lines: list[str], limits: Thresholds) -> str | None:
  if sum(line.endswith(ELLIPSES) for line in lines) > limits.most_ellipsis_lines * len(lines):
    return 'ellipses'
  return 'bullets' if sum(line.startswith(BULLETS) for line in lines) > limits.most_bullet_lines * len(lines) else None


def _repetitive(text: str, words: list[str], lines: list[str], limits: Thresholds) -> str | None:
  for name, parts in (('lines', lines), ('paragraphs', [part.strip() for part in PARAGRAPH.split(text)])):
    parts = [part for part in parts if _has_letter(part)]
    again = _again(parts)
    if len(again) > limits.most_repeated_lines * len(parts):
      return f'repeated {name}'
    if sum(map(len, again)) > limits.most_repeated_characters * sum(map(len, parts)):
      return f'repeated {name}'
  words = words[:MOST_WORDS]
  characters = sum(map(len, words))
  for size, share in enumerate(limits.most_phrase, 2):
    phrases = Counter(zip(*(islice(words, at, None) for at in range(size)), strict=False))
    count, length = _commonest(phrases)
    if count >= limits.said and count * length > share * characters:
      return 'repeated phrases'
  return None


def _commonest(phrases: Counter[tuple[str, ...]]) -> tuple[int, int]:
  """How often the commonest phrase is said, and its characters; the longest of several."""
  most = max(phrases.values(), default=0)
  return most, max((sum(map(len, phrase)) for phrase, count in phrases.items() if count == most), default=0)


def _again(parts: list[str]) -> list[str]:
  """The parts that stood before."""
  first = {part: at for at, part in reversed(list(enumerate(parts)))}
  return [part for at, part in enumerate(parts) if first[part] < at]


def _length(word: str) -> int:
  """Characters of a word without its combining marks."""
  return len(word) if word.isascii() else sum(unicodedata.category(c)[0] != 'M' for c in word)


def _has_letter(text: str) -> bool:
  """Whether there is a letter, or a mark of one."""
  return text.isalpha() or any(c.isalpha() or unicodedata.category(c)[0] == 'M' for c in text)


def _in_words(character: str) -> bool:
  return character.isalnum() or unicodedata.category(character)[0] == 'M'
