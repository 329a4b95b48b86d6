"""Text to token ids and back: byte-level BPE that we train, or any Hugging Face tokenizer.json that is brought."""

import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from jaxlm.errors import InputError
from jaxlm.files import read_json, read_text, write_whole

BOS, EOS, PAD = '<|bos|>', '<|eos|>', '<|pad|>'  # ids 0, 1, 2 of the tokenizers trained here
ROLES = ('bos', 'eos', 'pad')
ANYTHING = ('ignore_merges', 'continuing_subword_prefix', 'end_of_word_suffix')  # BPE with more than letters and merges
CONTROL, BYTE = re.compile(r'<[|｜].+[|｜]>'), re.compile('<0x[0-9A-F]{2}>')
Span = tuple[int, int, int]  # an id, and the characters [start, end) that it stands for
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

  `inner` is copied, its padding and truncation are turned off. `names` says which tokens are 'bos', 'eos', 'pad' (and
  'unk'); one that is missing is looked for under its usual names. Control tokens are the added tokens that are flagged
  special, that have such a name, or that are spelled <|...|>; other added tokens (<think>, <tool_call>) are text that
  has an id of its own, also where it was typed. Raises InputError if there is no end-of-text token.
  """

  def __init__(self, inner: tokenizers.Tokenizer, names: Mapping[str, str | None] | None = None):
    self.inner: Any = tokenizers.Tokenizer.from_str(inner.to_str())
    self.inner.no_padding()
    self.inner.no_truncation()
    self.inner.encode_special_tokens = True  # a control token typed in a text is text
    given = {role: name for role, name in (names or {}).items() if name}
    self.unnamed = frozenset(set(ROLES) - given.keys() if names is not None else ())  # but looked for
    self._flag_controls(given)
    known = {t.content for t in self.inner.get_added_tokens_decoder().values() if t.special}
    found = {role: next((n for n in USUAL[role] if n in known), None) for role in ROLES}
    self.names: dict[str, str] = {role: name for role, name in {**found, **given}.items() if name}
    if 'eos' not in self.names:
      raise InputError("tokenizer: no end-of-text token: add 'eos_token' to its tokenizer_config.json")
    for role, name in self.names.items():
      if self.inner.token_to_id(name) is None:
        raise InputError(f'tokenizer: its {role} token {name!r} is not in its vocabulary')

  def _flag_controls(self, names: dict[str, str]) -> None:
    """Files have control tokens that are not flagged as such: then what was typed would become one."""
    added = {t.content: t for t in self.inner.get_added_tokens_decoder().values()}
    plain = {name for name, t in added.items() if not t.special and (name in names.values() or CONTROL.fullmatch(name))}
    words = {name for role, name in names.items() if role in ('bos', 'eos') or len(name) > 1}  # padding may be a letter
    bare = {name for name in words - added.keys() if self.inner.token_to_id(name) is not None}
    if plain or bare:
      self.inner.add_special_tokens([_added(name, added.get(name)) for name in sorted(plain | bare)])

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

  @property
  def _model(self) -> dict[str, Any]:
    return json.loads(self.inner.to_str())['model']

  @cached_property
  def unk_id(self) -> int | None:
    """What the model makes of text that it has no token for; None where it has one for every text."""
    model = self._model
    name = model.get('unk_token')
    return model.get('unk_id') if name is None else self.inner.token_to_id(name)

  @cached_property
  def _reachable(self) -> frozenset[int]:
    """Control ids that the model without its added tokens may make of a text, but for what stands for unknown text."""
    banned = self.control_ids - {self.unk_id} | self.control_ids & {self.bos_id, self.eos_id}
    found = {t: i for t, i in self.inner.get_vocab(with_added_tokens=False).items() if i in banned}
    model = self._model
    if model['type'] == 'BPE' and not any(map(model.get, ANYTHING)):
      merged = {''.join(pair if isinstance(pair, list) else pair.split(' ')) for pair in model['merges']}
      found = {t: i for t, i in found.items() if t in merged or len(t) == 1 or BYTE.fullmatch(t)}
    return frozenset(found.values())

  @cached_property
  def reader(self) -> Any:
    """The `inner` that reads control tokens as such, and puts none itself."""
    return self._without_processor(reads=True)

  @cached_property
  def _bare(self) -> Any:
    """The `inner`, but no token's characters lack the spaces that it begins with."""
    return self._without_processor(reads=False) if self.inner.post_processor else self.inner

  def _without_processor(self, reads: bool) -> Any:
    copy = tokenizers.Tokenizer.from_str(self.inner.to_str())
    copy.post_processor = None
    copy.encode_special_tokens = not reads
    return copy

  def control_id(self, text: str) -> int | None:
    """The id of the control token that is spelled like that, if there is one."""
    found = self.inner.token_to_id(text)
    return found if found in self.control_ids else None

  @cached_property
  def digest(self) -> str:
    """sha256 of the canonical JSON: equal digests give equal ids for every text."""
    names = {role: name for role, name in self.names.items() if role in ROLES}
    whole = {'names': names, 'tokenizer': json.loads(self.inner.to_str())}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, separators=(',', ':')).encode()).hexdigest()

  def encode(self, text: str, *, controls: bool = False, inside: bool = False) -> list[int]:
    """Ids of the text alone. Raises InputError on a lone surrogate, which is no text in UTF-8.

    With `controls` the control tokens spelled in it are read as such; `inside` another text, it does not begin with the
    space that SentencePiece puts before a text.
    """
    return [i for i, _, _ in self.spans(text, controls=controls, inside=inside)]

  def spans(self, text: str, *, controls: bool = False, inside: bool = False) -> list[Span]:
    """`encode`, and of each id the characters [start, end) of the text that it stands for, spaces before it included.

    The ids of a character that is several tokens all have that character.
    """
    inner = self.reader if controls else self._bare
    fine = lambda found: controls or self._reachable.isdisjoint(i for i, _, _ in found)
    if inside and self.unk_id not in (before := [i for i, _, _ in _spans(inner, '\n')]):
      found = _spans(inner, f'\n{text}')
      if [i for i, _, _ in found[: len(before)]] == before:
        found = [(i, max(start - 1, 0), end - 1) for i, start, end in found[len(before) :]]
        return found if fine(found) else self._cut(text, inside=True)
    found = _spans(inner, text)
    return found if fine(found) else self._cut(text)

  def extends(self, other: 'Tokenizer') -> bool:
    """Whether every id of the other is the same token here."""
    same = lambda i: self.inner.id_to_token(i) == other.inner.id_to_token(i)
    return self.vocab_size >= other.vocab_size and all(map(same, range(other.vocab_size)))

  def with_controls(self, names: Iterable[str]) -> 'Tokenizer':
    """This one with control tokens of these names; new ones get the ids after the last, so those of texts stay.

    Raises InputError where the vocabulary has gaps that a new token would fall into.
    """
    new = [name for name in dict.fromkeys(names) if self.control_id(name) is None]
    if not new:
      return self
    inner = tokenizers.Tokenizer.from_str(self.inner.to_str())
    unseen = [name for name in new if inner.token_to_id(name) is None]
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in new])
    if [inner.token_to_id(name) for name in unseen] != list(range(self.vocab_size, self.vocab_size + len(unseen))):
      raise InputError(f'tokenizer: {", ".join(unseen)}: no ids after the last: its vocabulary has gaps')
    return Tokenizer(inner, {role: name for role, name in self.names.items() if role not in self.unnamed})

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text, on all cores. Raises InputError where the model has only a control token for a text."""
    try:
      found = [e.ids for e in self.inner.encode_batch_fast(texts, add_special_tokens=False)]
    except TypeError as error:
      raise InputError(f'tokenizer: {_bad_text(texts)}') from error
    if not (reachable := self._reachable):
      return found
    cut = lambda text: [i for i, _, _ in self._cut(text)]
    return [ids if reachable.isdisjoint(ids) else cut(text) for ids, text in zip(found, texts, strict=True)]

  def _cut(self, text: str, inside: bool = False) -> list[Span]:
    """The `spans` of a text of which the model would make control tokens: those are cut after their first letter."""
    whole = self.inner.encode(text, add_special_tokens=False)
    spans = [(i, *span) for i, span in zip(whole.ids, whole.offsets, strict=True) if i in self._reachable]
    if not spans:
      return _spans(self._bare, text)
    if short := [i for i, start, end in spans if end - start < 2]:
      raise InputError(f'tokenizer: a text would become the control token {self.inner.id_to_token(short[0])!r}')
    cuts = sorted({0, len(text), *(start + 1 for _, start, _ in spans)})
    parts = [(a, self.spans(text[a:b], inside=inside or a > 0)) for a, b in itertools.pairwise(cuts)]
    return [(i, at + start, at + end) for at, part in parts for i, start, end in part]

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
        sizes[i] = 1 if BYTE.fullmatch(token) else len(token.replace('\u2581', ' ').encode())
    return sizes

  def save(self, path: epath.PathLike) -> None:
    """Write the tokenizer.json at `path` and, beside it, the names of its control tokens (Hugging Face's layout).

    Other keys of a `tokenizer_config.json` that is there already are kept.
    """
    path = epath.Path(path)
    config = read_json(_config_path(path)) if _config_path(path).exists() else {}
    roles = [*ROLES, *({'unk'} & self.names.keys())]
    config.update({f'{role}_token': None if role in self.unnamed else self.names.get(role) for role in roles})
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
  names = {role: _content(config.get(f'{role}_token')) for role in (*ROLES, 'unk')}
  if wrong := [role for role, name in names.items() if not isinstance(name, str | None)]:
    raise InputError(f'{_config_path(path)}: damaged: {wrong[0]}_token is no text')
  if names['unk'] and inner.token_to_id(names['unk']) is None:
    del names['unk']
  if (last := max(inner.get_vocab(with_added_tokens=True).values(), default=0)) > LARGEST:
    raise InputError(f'{path}: damaged: a token has the id {last}')
  for i, token in _configured(config, _config_path(path)):
    _add(inner, i, token, _config_path(path))
  try:
    return Tokenizer(inner, names if config else None)
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
  controls = [AddedToken(name, special=True, normalized=False) for name in (BOS, EOS, PAD)]
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


def _added(name: str, like: AddedToken | None, special: bool = True) -> AddedToken:
  """A token with the habits of another."""
  habits = ('single_word', 'lstrip', 'rstrip', 'normalized') if like else ()
  return AddedToken(name, special=special, **{habit: getattr(like, habit) for habit in habits})


def _spans(inner: Any, text: str) -> list[Span]:
  try:
    whole = inner.encode(text, add_special_tokens=False)
  except TypeError as error:
    raise InputError(f'tokenizer: {_bad_text([text])}') from error
  return [(i, start, end) for i, (start, end) in zip(whole.ids, whole.offsets, strict=True)]


def _configured(config: dict[str, Any], path: epath.Path) -> Iterator[tuple[int | None, AddedToken]]:
  """The added tokens that a tokenizer_config.json names, some with their ids."""
  extra = config.get('extra_special_tokens') or config.get('additional_special_tokens') or []
  extra = list(extra.values()) if isinstance(extra, dict) else extra
  numbered = config.get('added_tokens_decoder') or {}
  try:
    if not isinstance(extra, list):
      raise TypeError(f'{extra!r:.40} is no list')
    found: list[tuple[int | None, Any]] = [(int(i), numbered[i]) for i in sorted(numbered, key=int)]
    found += [(None, x if isinstance(x, dict) else {'content': x, 'special': True}) for x in extra]
    keys = ('content', 'single_word', 'lstrip', 'rstrip', 'normalized', 'special')
    yield from [(i, AddedToken(**{key: x[key] for key in keys if key in x})) for i, x in found]
  except (TypeError, ValueError, LookupError) as error:
    raise InputError(f'{path}: damaged: its added tokens are not read: {error}') from error


def _add(inner: tokenizers.Tokenizer, i: int | None, token: AddedToken, path: epath.Path) -> None:
  """A token that tokenizer.json lacks gets the next id, as in transformers, or is refused where it has another."""
  name, added = token.content, {t.content: t for t in inner.get_added_tokens_decoder().values()}
  if name not in added:
    inner.add_tokens([token])
  elif token.special and not added[name].special:
    inner.add_special_tokens([_added(name, added[name])])
  if i is not None and (got := inner.token_to_id(name)) != i:
    raise InputError(f'{path}: its added token {name!r} has the id {i}, but {got} in tokenizer.json')


def _bad_text(texts: Sequence[str]) -> str:
  for i, text in enumerate(texts):
    if not isinstance(text, str):
      return f'text {i} of the batch is a {type(text).__name__}, not a str'
    if found := re.search('[\ud800-\udfff]', text):
      return f'text {i} of the batch has a lone surrogate at character {found.start()}'
  return 'not a list of texts'
