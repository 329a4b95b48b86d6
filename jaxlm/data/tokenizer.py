"""Text to token ids and back: byte-level BPE that we train, or any Hugging Face tokenizer.json that is brought."""

import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxlm.errors import InputError
from jaxlm.files import read_json, read_text, write_whole

BOS, EOS, PAD = '<|bos|>', '<|eos|>', '<|pad|>'  # ids 0, 1, 2 of the tokenizers trained here
ROLES = ('bos', 'eos', 'pad')
LARGEST = 1 << 24  # ids: more than any vocabulary has, and little enough for an array with a number for each
# What other families call them, looked up only where no tokenizer_config.json says it.
USUAL = {
  'bos': (BOS, '<s>', '<bos>', '<|begin_of_text|>', '<|startoftext|>', '<|endoftext|>'),
  'eos': (EOS, '</s>', '<eos>', '<|end_of_text|>', '<|im_end|>', '<|endoftext|>'),
  'pad': (PAD, '<pad>', '[PAD]', '<|finetune_right_pad_id|>'),
}
# GPT-4's rules, with two changes: a letter keeps its combining marks, and joiners (U+200C, U+200D) stay in a word, so
# that Indic and Persian words are not cut in their middle.
PIECES = '|'.join(
  [
    r"(?i:'(?:s|t|re|ve|m|ll|d))",
    r'[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}][\p{L}\p{M}\u200c\u200d]*',
    r'\p{N}{1,3}',
    r' ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*',
    r'\s*[\r\n]+',
    r'\s+(?!\S)',
    r'\s+',
  ]
)


class Tokenizer:
  """A `tokenizers.Tokenizer` whose `encode` never makes control tokens: callers put `bos_id` and `eos_id` themselves.

  `inner` is copied, its padding and truncation are turned off. `names` says which tokens are 'bos', 'eos' and 'pad';
  one that is missing is looked for under its usual names. Raises InputError if there is no end-of-text token.
  """

  def __init__(self, inner: tokenizers.Tokenizer, names: dict[str, str] | None = None):
    self.inner: Any = tokenizers.Tokenizer.from_str(inner.to_str())
    self.inner.no_padding()
    self.inner.no_truncation()
    self.inner.encode_special_tokens = True  # a control token typed in a text is text
    known = {t.content for t in self.inner.get_added_tokens_decoder().values() if t.special}
    found = {role: next((n for n in USUAL[role] if n in known), None) for role in ROLES}
    self.names: dict[str, str] = {role: name for role, name in {**found, **(names or {})}.items() if name}
    if 'eos' not in self.names:
      raise InputError("tokenizer: no end-of-text token: add 'eos_token' to its tokenizer_config.json")
    for role, name in self.names.items():
      if self.inner.token_to_id(name) is None:
        raise InputError(f'tokenizer: its {role} token {name!r} is not in its vocabulary')

  @cached_property
  def vocab_size(self) -> int:
    """The largest id plus one."""
    return max(self.inner.get_vocab(with_added_tokens=True).values()) + 1

  @property
  def bos_id(self) -> int | None:
    """Some models have no beginning-of-text token: then None."""
    return self.inner.token_to_id(self.names['bos']) if 'bos' in self.names else None

  @property
  def eos_id(self) -> int:
    return self.inner.token_to_id(self.names['eos'])

  @property
  def pad_id(self) -> int:
    """The end-of-text token where there is none for padding."""
    return self.inner.token_to_id(self.names.get('pad', self.names['eos']))

  @cached_property
  def prefix_ids(self) -> list[int]:
    """What it puts before a text by itself, and a prompt therefore begins with.

    Its post-processor says it; the names may have a BOS that is never put there. Where there is no post-processor (as
    in tokenizers that were trained here before they had one) it is our own BOS, or nothing.
    """
    if self.inner.post_processor is None:
      return [self.bos_id] if self.names.get('bos') == BOS and self.bos_id is not None else []
    whole = self.inner.encode('a')
    return [
      i for i, _ in itertools.takewhile(lambda pair: pair[1], zip(whole.ids, whole.special_tokens_mask, strict=True))
    ]

  @cached_property
  def control_ids(self) -> frozenset[int]:
    """Ids that stand for no text."""
    return frozenset(i for i, t in self.inner.get_added_tokens_decoder().items() if t.special)

  def control_id(self, text: str) -> int | None:
    """The id of the control token that is spelled like that, if there is one."""
    found = self.inner.token_to_id(text)
    return found if found in self.control_ids else None

  @cached_property
  def digest(self) -> str:
    """sha256 of the canonical JSON: equal digests give equal ids for every text."""
    whole = {'names': self.names, 'tokenizer': json.loads(self.inner.to_str())}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, separators=(',', ':')).encode()).hexdigest()

  def encode(self, text: str) -> list[int]:
    """Ids of the text alone. Raises InputError on a lone surrogate, which is no text in UTF-8."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text, on all cores."""
    try:
      return [e.ids for e in self.inner.encode_batch_fast(texts, add_special_tokens=False)]
    except TypeError as error:
      raise InputError(f'tokenizer: {_bad_text(texts)}') from error

  def decode(self, ids: Sequence[int]) -> str:
    """The text, without control tokens; bytes that are no UTF-8 become U+FFFD."""
    return self.inner.decode(list(ids), skip_special_tokens=True)

  def token_bytes(self) -> np.ndarray:
    """int32 [V]: bytes of UTF-8 that each token stands for, 0 for control tokens.

    With a byte-level tokenizer the sum over `encode(text)` is `len(text.encode())` exactly; one that normalises its
    input gives the size of the normalised text.
    """
    byte_level = '"ByteLevel"' in json.dumps(json.loads(self.inner.to_str())['decoder'])
    added = {i: t.content for i, t in self.inner.get_added_tokens_decoder().items()}
    sizes = np.zeros(self.vocab_size, np.int32)
    for token, i in self.inner.get_vocab(with_added_tokens=True).items():
      if i in added:
        sizes[i] = 0 if i in self.control_ids else len(added[i].encode())
      elif byte_level:
        sizes[i] = len(token)  # one character of this alphabet is one byte
      else:
        sizes[i] = 1 if re.fullmatch('<0x[0-9A-F]{2}>', token) else len(token.replace('\u2581', ' ').encode())
    return sizes

  def save(self, path: epath.PathLike) -> None:
    """Write the tokenizer.json at `path` and, beside it, the names of its control tokens (Hugging Face's layout).

    Other keys of a `tokenizer_config.json` that is there already are kept.
    """
    path = epath.Path(path)
    config = read_json(_config_path(path)) if _config_path(path).exists() else {}
    config.update({f'{role}_token': self.names.get(role) for role in ROLES})
    config['tokenizer_class'] = 'PreTrainedTokenizerFast'  # transformers would else split as the family's own does
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(_config_path(path), json.dumps(config, indent=2, ensure_ascii=False))
    write_whole(path, self.inner.to_str(pretty=True))


def load(path: epath.PathLike) -> Tokenizer:
  """Read a tokenizer.json (or the folder that holds one). Raises InputError with the file's name."""
  path = epath.Path(path)
  path = path / 'tokenizer.json' if path.is_dir() else path
  if not path.exists():
    raise InputError(f'{path}: no such tokenizer file')
  config = read_json(_config_path(path)) if _config_path(path).exists() else {}
  text = read_text(path)
  try:
    inner = tokenizers.Tokenizer.from_str(text)
  except Exception as error:  # the library raises bare Exception
    raise InputError(f'{path}: not a tokenizer.json: {error}') from error
  names = {role: name for role in ROLES if (name := _content(config.get(f'{role}_token')))}
  if wrong := [role for role, name in names.items() if not isinstance(name, str)]:
    raise InputError(f'{_config_path(path)}: damaged: {wrong[0]}_token is no text')
  if (last := max(inner.get_vocab(with_added_tokens=True).values(), default=0)) > LARGEST:
    raise InputError(f'{path}: damaged: a token has the id {last}')
  try:
    return Tokenizer(inner, names)
  except InputError as error:
    raise InputError(f'{path}: {error}') from error
  except Exception as error:  # the library raises bare Exception, here when it reads what it has written
    raise InputError(f'{path}: not a tokenizer.json: {error}') from error


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Byte-level BPE with <|bos|>, <|eos|>, <|pad|> as ids 0, 1, 2 and all 256 bytes, so that every text has ids.

  The same texts give the same tokenizer. Small texts give fewer than `vocab_size` tokens. Raises InputError if
  there is no text, or `vocab_size` is under 259 (bytes and control tokens).
  """
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  least = len(alphabet) + len(ROLES)
  if vocab_size < least:
    raise InputError(f'tokenizer: vocab_size {vocab_size} is too small: 256 bytes and 3 control tokens need {least}')
  texts = iter(texts)
  first = next((t for t in texts if t), None)
  if first is None:
    raise InputError('tokenizer: no text to train on')
  inner: Any = tokenizers.Tokenizer(models.BPE())
  inner.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(PIECES), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  inner.decoder = decoders.ByteLevel()
  controls = [tokenizers.AddedToken(name, special=True, normalized=False) for name in (BOS, EOS, PAD)]
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=controls, initial_alphabet=alphabet, show_progress=False
  )
  inner.train_from_iterator(itertools.chain([first], texts), trainer)
  controls = [(name, inner.token_to_id(name)) for name in (BOS, EOS)]
  inner.post_processor = processors.TemplateProcessing(
    single=[BOS, '$A'], pair=[BOS, '$A', '$B'], special_tokens=controls
  )
  return Tokenizer(inner)


def tokens_per_word(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, tuple[int, int]]:
  """{script: (words, tokens)}: tokens / words is the fertility, the price a language pays for this vocabulary.

  A word is a run of letters and marks of one script; in Han, Hiragana and Katakana, written without spaces, it is one
  character. A token counts for the script of its last character, so one that begins with a space is the word's.
  """
  words: Counter[str] = Counter()
  tokens: Counter[str] = Counter()
  for text in texts:
    scripts = list(_scripts(text))
    for script, run in itertools.groupby(scripts):
      words[script] += len(list(run)) if script in ('Han', 'Hiragana', 'Katakana') else 1
    for _, end in tokenizer.inner.encode(text, add_special_tokens=False).offsets:
      tokens[scripts[end - 1]] += 1
  return {s: (words[s], tokens[s]) for s in sorted(words) if s}


def _scripts(text: str) -> Iterator[str]:
  """The script of each character, '' outside words; marks and joiners have that of the letter before them."""
  last = ''
  for char in text:
    if not (last and (unicodedata.category(char)[0] == 'M' or char in '\u200c\u200d')):
      last = _script(char)
    yield last


@lru_cache(maxsize=1 << 16)
def _script(char: str) -> str:
  if unicodedata.category(char)[0] != 'L':
    return ''
  first = unicodedata.name(char, 'OTHER').split()[0]  # 'DEVANAGARI LETTER KA', 'CJK UNIFIED IDEOGRAPH-4E00'
  return {'CJK': 'Han', 'FULLWIDTH': 'Latin', 'HALFWIDTH': 'Katakana'}.get(first, first.capitalize())


def _config_path(path: epath.Path) -> epath.Path:
  return path.with_name(f'{path.stem}_config.json')


def _content(token: str | dict[str, Any] | None) -> str | None:
  """A token's text: Hugging Face writes it bare or as {"content": ...}."""
  return token.get('content') if isinstance(token, dict) else token


def _bad_text(texts: Sequence[str]) -> str:
  for i, text in enumerate(texts):
    if not isinstance(text, str):
      return f'text {i} of the batch is a {type(text).__name__}, not a str'
    if found := re.search('[\ud800-\udfff]', text):
      return f'text {i} of the batch has a lone surrogate at character {found.start()}'
  return 'not a list of texts'
