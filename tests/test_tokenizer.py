"""Tokenizer: nothing is lost, nothing typed becomes a control token, and a saved one is the same one."""

import json
import random

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jaxlm.data import tokenizer as tok
from jaxlm.errors import InputError

TEXTS = [
  "Call me Ishmael. It's 1851, isn't it?\n\n\tThe whale -- 12345 tons!  \r\n",
  'सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है। क्\u200dष १२३४',
  'Все люди рождаются свободными и равными в своём достоинстве и правах.',
  'يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. می\u200cخواهم',
  '人人生而自由,在尊严和权利上一律平等。すべての人間は、生まれながら',
  'int main(void) {\n    return x[0] != NULL ? 1 : -1;  /* ok */\n}\n',
  'cafe\u0301 naïve 👨\u200d👩\u200d👧 ❤\ufe0f \u0000\u2028 มนุษย์ทั้งหลาย',
]
TYPED = 'a <|bos|> b<|eos|><|pad|> </s>'


@pytest.fixture(scope='module')
def t() -> tok.Tokenizer:
  return tok.train(TEXTS * 3 + [TYPED] * 50, 700)


def pieces(text: str) -> list[str]:
  split = pre_tokenizers.Split(tokenizers.Regex(tok.PIECES), 'isolated')
  return [piece for piece, _ in split.pre_tokenize_str(text)]


def brought(decoder, vocab: dict[str, int], controls: list[str]) -> tokenizers.Tokenizer:
  """A tokenizer as others write them: other control names, one added token that is text, padding turned on."""
  inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
  inner.decoder = decoder
  inner.add_special_tokens([AddedToken(c, special=True, normalized=False) for c in controls])
  inner.add_tokens(['<think>'])
  inner.enable_padding(length=64)
  inner.enable_truncation(5)
  return inner


def test_trained_ids_are_fixed(t):
  assert (t.bos_id, t.eos_id, t.pad_id) == (0, 1, 2)
  assert t.vocab_size == 700
  assert t.control_ids == {0, 1, 2}


@pytest.mark.parametrize('text', [*TEXTS, TYPED, '', ' ', '\n'])
def test_round_trip(t, text):
  assert t.decode(t.encode(text)) == text
  assert t.encode_batch([text, 'x', text]) == [t.encode(text), t.encode('x'), t.encode(text)]


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.characters(exclude_categories=['Cs'])))
def test_any_text_comes_back_and_its_bytes_are_counted(t, text):
  ids = t.encode(text)
  assert t.decode(ids) == text
  assert t.token_bytes()[ids].sum() == len(text.encode())
  assert not set(ids) & {0, 1, 2}


def test_token_bytes_of_every_script(t):
  sizes = t.token_bytes()
  assert sizes.dtype == np.int32 and sizes.shape == (700,)
  assert [sizes[i] for i in (0, 1, 2)] == [0, 0, 0] and (sizes[3:] > 0).all()
  for text in [*TEXTS, TYPED]:
    assert sizes[t.encode(text)].sum() == len(text.encode())


def test_typed_control_tokens_are_text(t):
  for name in ('<|bos|>', '<|eos|>', '<|pad|>'):
    assert not set(t.encode(f'x{name}')) & {0, 1, 2}
    assert not set(t.encode(name)) & {0, 1, 2}


def test_decode_skips_control_tokens(t):
  assert t.decode([0, *t.encode('one'), 1, 2, 2]) == 'one'


def test_words_keep_their_marks_and_joiners():
  assert pieces('हिन्दी में किताबें') == ['हिन्दी', ' में', ' किताबें']
  assert pieces('क्\u200dष می\u200cخواهم cafe\u0301s') == ['क्\u200dष', ' می\u200cخواهم', ' cafe\u0301s']
  assert pieces("don't 12345") == ['don', "'t", ' ', '123', '45']
  assert pieces('a\n\n  b  ') == ['a', '\n\n', ' ', ' b', '  ']


def test_same_texts_same_digest(t):
  again = tok.train(iter(TEXTS * 3 + [TYPED] * 50), 700)
  assert again.digest == t.digest and len(t.digest) == 64
  assert tok.train(TEXTS, 700).digest != t.digest


def test_save_and_load(t, tmp_path):
  path = tmp_path / 'run' / 'tokenizer.json'
  t.save(path)
  for again in (tok.load(path), tok.load(path.parent)):
    assert again.digest == t.digest
    assert again.encode_batch([*TEXTS, TYPED]) == t.encode_batch([*TEXTS, TYPED])
  assert tokenizers.Tokenizer.from_file(str(path)).get_vocab_size() == 700


def test_brought_tokenizer_is_told_its_names(tmp_path):
  alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
  inner = brought(decoders.ByteLevel(), alphabet, ['<|endoftext|>', '<|im_start|>', '<|im_end|>'])
  inner.save(str(tmp_path / 'tokenizer.json'))
  config = {'bos_token': None, 'eos_token': {'content': '<|im_end|>'}, 'chat_template': 'keep me'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  t = tok.load(tmp_path)
  assert (t.bos_id, t.eos_id, t.pad_id) == (256, 258, 258)
  assert t.vocab_size == 260 and t.control_ids == {256, 257, 258}
  assert t.encode('<think>' * 9) == [259] * 9  # text, once; neither cut nor padded
  assert t.token_bytes()[259] == 7
  assert not set(t.encode('<|im_end|>')) & t.control_ids
  t.save(tmp_path / 'tokenizer.json')
  assert json.loads((tmp_path / 'tokenizer_config.json').read_text())['chat_template'] == 'keep me'
  t.save(tmp_path / 'elsewhere' / 'tokenizer.json')
  assert tok.load(tmp_path / 'elsewhere').eos_id == 258
  assert tok.load(tmp_path / 'elsewhere').digest == tok.load(tmp_path).digest == t.digest
  assert tok.Tokenizer(inner, {'eos': '<|endoftext|>'}).digest != tok.Tokenizer(inner, {'eos': '<|im_end|>'}).digest


def test_brought_sentencepiece_counts_bytes():
  inner = brought(
    decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
    {'<0xE0>': 0, '▁': 1, 'é': 2, '▁éa': 3},
    ['<s>', '</s>'],
  )
  t = tok.Tokenizer(inner)
  assert (t.bos_id, t.eos_id) == (4, 5)
  assert t.token_bytes().tolist() == [1, 1, 2, 4, 0, 0, 7]


def test_tokens_per_word_by_script(t):
  got = tok.tokens_per_word(t, ['two words, हिन्दी में 12', 'Все люди', '人人 ab'])
  assert {s: w for s, (w, _) in got.items()} == {'Latin': 3, 'Devanagari': 2, 'Cyrillic': 2, 'Han': 2}
  bytewise = tok.train(['x'], 259)  # every token is one byte
  assert tok.tokens_per_word(bytewise, ['ab cd, में हि!']) == {'Latin': (2, 4), 'Devanagari': (2, 9 + 6)}
  assert tok.tokens_per_word(bytewise, ['人人']) == {'Han': (2, 6)}


def test_errors(t, tmp_path):
  for texts in ([], ['', '']):
    with pytest.raises(InputError, match='no text'):
      tok.train(texts, 300)
  with pytest.raises(InputError, match='259'):
    tok.train(['x'], 258)
  with pytest.raises(InputError, match='text 1 .* surrogate at character 2'):
    t.encode_batch(['fine', 'no\ud800'])
  missing = tmp_path / 'none.json'
  with pytest.raises(InputError, match='none.json: no such'):
    tok.load(missing)
  bad = tmp_path / 'bad.json'
  for content in ('{}', 'no json', ''):
    bad.write_text(content)
    with pytest.raises(InputError, match='bad.json: not a tokenizer'):
      tok.load(bad)
  tokenizers.Tokenizer(models.BPE()).save(str(bad))
  with pytest.raises(InputError, match='bad.json: .*end-of-text'):
    tok.load(bad)
  (tmp_path / 'bad_config.json').write_text('{"eos_token": "</x>"}')
  with pytest.raises(InputError, match="bad.json: .*'</x>'"):
    tok.load(bad)
  (tmp_path / 'bad_config.json').write_text('[')
  with pytest.raises(InputError, match='bad_config.json: damaged: not JSON'):
    tok.load(bad)


def test_order_of_texts_does_not_matter():
  """Counts decide the merges, so shuffled shards train the same tokenizer."""
  shuffled = random.Random(7).sample(TEXTS, len(TEXTS))
  assert tok.train(shuffled, 400).digest == tok.train(TEXTS, 400).digest
