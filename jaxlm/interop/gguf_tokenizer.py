"""The tokenizer in a GGUF file's metadata, as a `tokenizers.Tokenizer`: byte-level BPE, and SentencePiece's BPE."""

from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.interop.gguf_file import shown

PREFIX = 'tokenizer.ggml.'
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token_type
SPACE = '\u2581'  # what SentencePiece writes for a space
LONGEST = 1024  # characters of a token: the work of finding its merges grows with their square
# What GGUF says about other tasks than ours, or what changes neither ids nor text here.
IGNORED = ('add_sep_token', 'token_type_count', 'scores')

LLAMA3 = '|'.join(
  (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r'[^\r\n\p{L}\p{N}]?\p{L}+',
    r'\p{N}{1,3}',
    r' ?[^\s\p{L}\p{N}]+[\r\n]*',
    r'\s*[\r\n]+',
    r'\s+(?!\S)',
    r'\s+',
  )
)
QWEN2 = LLAMA3.replace(r'\p{N}{1,3}', r'\p{N}')


class Words(NamedTuple):
  """How a text is cut into the words that BPE merges within."""

  pattern: str | None = None  # None: GPT-2's
  digits_apart: bool = False
  nfc: bool = False
  whole_words: bool = False  # a word that is a token is that token, whatever the merges say
  begins: bool = False  # a text begins with the bos token unless the file says otherwise


WORDS = {
  'gpt-2': Words(),
  'smollm': Words(digits_apart=True),
  'llama-bpe': Words(LLAMA3, whole_words=True, begins=True),
  'dbrx': Words(LLAMA3),  # OLMo 2
  'qwen2': Words(QWEN2, nfc=True),
}


def build(where: str, metadata: dict[str, Any], architecture: str) -> Tokenizer | None:
  """The tokenizer of a file, None if it has none. Raises InputError where its ids could not be the model's own.

  What the file says about `add_bos_token` and `add_eos_token` is its post-processor, as Hugging Face has it:
  `Tokenizer.encode` adds neither.
  """
  kind = metadata.get(f'{PREFIX}model', 'none')
  if isinstance(kind, str) and kind == 'none':
    return None
  vocabulary = _Vocabulary(where, metadata)
  if not isinstance(kind, str) or kind not in ('gpt2', 'llama'):
    raise vocabulary.fail(f'model {shown(kind)} is not read', "take a file with model 'gpt2' or 'llama'")
  try:
    inner, begins = _byte_level(vocabulary, architecture) if kind == 'gpt2' else (_sentencepiece(vocabulary), True)
    _add_controls(inner, vocabulary, begins)
    tokenizer = Tokenizer(inner, vocabulary.names())
  except InputError:
    raise
  except Exception as error:  # the library raises bare Exception
    raise vocabulary.fail(f'it is no tokenizer: {" ".join(str(error).split())[:80]}') from error
  _check_controls(tokenizer, vocabulary, kind == 'gpt2')
  return tokenizer


def _check_controls(tokenizer: Tokenizer, vocabulary: '_Vocabulary', byte_level: bool) -> None:
  """Raises InputError if some text would become a control token: by a merge, as a single letter, as a whole word."""
  controls = {vocabulary.tokens[i] for i in tokenizer.control_ids}
  made = {merge.replace(' ', '') for merge in vocabulary.get('merges', list, [])} if byte_level else set()
  made |= {token for token in controls if len(token) == 1}
  texts = [*controls, *(decoders.ByteLevel().decode([t]) if byte_level else t.replace(SPACE, ' ') for t in controls)]
  for whole in tokenizer.inner.encode_batch(texts, add_special_tokens=False):
    made |= {vocabulary.tokens[i] for i in tokenizer.control_ids.intersection(whole.ids)}
  if made & controls:
    raise vocabulary.fail(f'a text would become the control token {shown(min(made & controls))}')


class _Vocabulary:
  """The tokenizer.ggml.* keys, with their types and ranges checked."""

  def __init__(self, where: str, metadata: dict[str, Any]):
    self.where = where
    self.keys = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
    self.tokens: list[str] = self.get('tokens', list, [])
    self.ids = {token: i for i, token in enumerate(self.tokens)}
    self.check_tokens()
    types = self.get('token_type', np.ndarray, np.full(len(self.tokens), NORMAL))
    if len(types) != len(self.tokens):
      raise self.fail(f'{len(self.tokens)} tokens have {len(types)} types')
    self.types: list[int] = types.tolist()
    known = ('model', 'pre', 'tokens', 'token_type', 'merges', 'add_bos_token', 'add_eos_token', 'add_space_prefix')
    for key in self.keys:
      if key not in (*known, *IGNORED) and not key.endswith('_token_id') and self.matters(key):
        raise self.fail(f'{PREFIX}{key} is not translated, and may change the ids', 'convert the model without it')

  def matters(self, key: str) -> bool:
    """Some keys are written with the value that changes nothing."""
    value = self.keys[key]
    return not (value is False or (isinstance(value, (str, list, np.ndarray)) and not len(value)))

  def fail(self, what: str, todo: str = 'convert the model again with its own tokenizer') -> InputError:
    return InputError(f'{self.where}: tokenizer: {what}; {todo}')

  def get(self, key: str, kind: type, default: Any) -> Any:
    value = self.keys.get(key, default)
    if not isinstance(value, kind):
      raise self.fail(f'damaged: {PREFIX}{key} is not a {kind.__name__}')
    return value

  def check_tokens(self) -> None:
    if not self.tokens:
      raise self.fail(f'it has no {PREFIX}tokens')
    if not all(isinstance(t, str) for t in self.tokens):
      raise self.fail(f'damaged: {PREFIX}tokens are not all text')
    if len(self.ids) != len(self.tokens):
      i = next(i for i, token in enumerate(self.tokens) if self.ids[token] != i)
      raise self.fail(f'tokens {i} and {self.ids[self.tokens[i]]} are both {shown(self.tokens[i])}')
    for i, token in enumerate(self.tokens):
      if len(token) > LONGEST:
        raise self.fail(f'damaged: token {i} has {len(token)} characters')

  def of_type(self, *types: int) -> list[int]:
    return [i for i, kind in enumerate(self.types) if kind in types]

  def token(self, role: str) -> str | None:
    """The token of 'bos', 'eos', ...; None if the file names none."""
    i = self.get(f'{role}_token_id', int, -1)
    if i >= len(self.tokens):
      raise self.fail(f'damaged: {role}_token_id is {i}, of {len(self.tokens)} tokens')
    return None if i < 0 else self.tokens[i]

  def names(self) -> dict[str, str]:
    roles = {'bos': self.token('bos'), 'eos': self.token('eos'), 'pad': self.token('padding')}
    if roles['eos'] is None:
      raise self.fail(f'it has no {PREFIX}eos_token_id, so that answers would never end')
    return {role: name for role, name in roles.items() if name is not None}


def _byte_level(vocabulary: _Vocabulary, architecture: str) -> tuple[Any, bool]:
  name = vocabulary.get('pre', str, 'default')
  if name == 'default' and architecture == 'gpt2':  # files from before the key was there
    name = 'gpt-2'
  if name not in WORDS:
    raise vocabulary.fail(f'{PREFIX}pre {shown(name)} is not read', f'take a file with one of {", ".join(WORDS)}')
  words = WORDS[name]
  merges = [tuple(merge.split(' ')) for merge in vocabulary.get('merges', list, [])]
  for i, merge in enumerate(merges):
    if len(merge) != 2 or not all(piece in vocabulary.ids for piece in (*merge, ''.join(merge))):
      raise vocabulary.fail(f'damaged: merge {i}, {shown(" ".join(merge))}, is not of two tokens that make a third')
  inner: Any = tokenizers.Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=words.whole_words))
  steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] * words.digits_apart
  if words.pattern:
    steps.append(pre_tokenizers.Split(tokenizers.Regex(words.pattern), 'isolated'))
  steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.pattern is None))
  inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
  inner.decoder = decoders.ByteLevel()
  if words.nfc:
    inner.normalizer = normalizers.NFC()
  return inner, words.begins


def _sentencepiece(vocabulary: _Vocabulary) -> Any:
  scores = vocabulary.get('scores', np.ndarray, np.zeros(0))
  if len(scores) != len(vocabulary.tokens) or scores.dtype.kind != 'f':
    raise vocabulary.fail(f'{len(vocabulary.tokens)} tokens have {len(scores)} scores')
  missing = [f'<0x{i:02X}>' for i in range(256) if f'<0x{i:02X}>' not in vocabulary.ids]
  if missing:
    raise vocabulary.fail(f'{len(missing)} of the 256 byte tokens are missing, {missing[0]} the first')
  unknown = vocabulary.token('unknown')
  model = models.BPE(
    vocabulary.ids, merges_by_score(vocabulary, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
  )
  inner: Any = tokenizers.Tokenizer(model)
  to_spaces = [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
  if vocabulary.get('add_space_prefix', bool, True):
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(' ', SPACE)])
    inner.decoder = decoders.Sequence([*to_spaces, decoders.Strip(' ', 1, 0)])
  else:
    inner.normalizer = normalizers.Replace(' ', SPACE)
    inner.decoder = decoders.Sequence(to_spaces)
  return inner


def merges_by_score(vocabulary: _Vocabulary, scores: np.ndarray) -> list[tuple[str, str]]:
  """SentencePiece joins the pair whose joint token has the best score: as a list of merges, the best first.

  Tokens that no text may become (control, bytes) are never made; of the ways to make one, the longest left side wins.
  """
  made = []
  ids = vocabulary.ids
  for i, token in enumerate(vocabulary.tokens):
    if vocabulary.types[i] in (NORMAL, UNUSED, USER_DEFINED):
      cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
      made += [(-float(scores[i]), -len(a), -len(b), a, b) for a, b in cuts if a in ids and b in ids]
  return [(a, b) for *_, a, b in sorted(made)]


def _add_controls(inner: Any, vocabulary: _Vocabulary, begins: bool) -> None:
  """Control tokens, tokens that are cut out of a text before all else, and what a text begins and ends with."""
  tokens = vocabulary.tokens
  control = set(vocabulary.of_type(CONTROL, UNKNOWN))
  control |= {vocabulary.ids[name] for name in vocabulary.names().values()}
  inner.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in sorted(control)])
  apart = [i for i in vocabulary.of_type(USER_DEFINED) if i not in control and tokens[i]]
  inner.add_tokens([AddedToken(tokens[i], special=False, normalized=False) for i in apart])
  names = vocabulary.names()
  first = [names['bos']] if 'bos' in names and vocabulary.get('add_bos_token', bool, begins) else []
  last = [names['eos']] if vocabulary.get('add_eos_token', bool, False) else []
  inner.post_processor = processors.TemplateProcessing(
    single=[*first, '$A', *last],
    pair=[*first, '$A', *last, *(f'{t}:1' for t in first), '$B:1', *(f'{t}:1' for t in last)],
    special_tokens=[(t, vocabulary.ids[t]) for t in {*first, *last}],
  )
