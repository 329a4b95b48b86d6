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


LETTERS = 'abcdefghijklmnopqrstuvwxyz<>|/[]_EOS▁'


def with_config(folder, inner, **config):
  inner.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return tok.load(folder)


def lettered(plain=(), special=('</s>',)):
  inner = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(LETTERS)}, []))
  inner.add_special_tokens([AddedToken(name, special=True) for name in special])
  inner.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
  return inner


@pytest.mark.parametrize(
  'name, config',
  [
    ('<|im_end|>', {}),
    ('<｜User｜>', {}),
    *[('END', {f'{role}_token': 'END'}) for role in ('bos', 'pad', 'unk')],
    ('END', {'eos_token': {'content': 'END'}}),
    ('END', {'added_tokens_decoder': {len(LETTERS) + 1: {'content': 'END', 'special': True}}}),
    ('END', {'extra_special_tokens': ['END']}),
    ('E', {'bos_token': 'E'}),  # in the vocabulary, not among the added tokens
  ],
)
def test_control_tokens_that_are_not_flagged(tmp_path, name, config):
  t = with_config(tmp_path, lettered(['<think>', name][: 1 + (name != 'E')][::-1]), **{'eos_token': '</s>', **config})
  control = t.control_id(name)
  assert control is not None
  if name == 'E':  # a letter of this model
    with pytest.raises(InputError, match="a text would become the control token 'E'"):
      t.encode('aE')
  else:
    assert control not in t.encode(f'a{name}b') and t.decode([0, control, 1]).replace(' ', '') == 'ab'
  think = t.inner.token_to_id('<think>')
  assert t.encode('a<think>b') == [0, think, 1] and think not in t.control_ids


def unigram(letters=LETTERS[:-1] + '\n'):
  pieces = [('<unk>', 0.0), ('<s>', 0.0), ('</s>', 0.0), ('▁', -2.0), *((c, -3.0) for c in letters)]
  inner = tokenizers.Tokenizer(models.Unigram(pieces, 0))
  inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  return inner, ['<unk>', '<s>', '</s>']


def wordlevel():
  inner = tokenizers.Tokenizer(models.WordLevel({'[UNK]': 0, '[EOS]': 1, 'a': 2, '[': 3, 'EOS]': 4}, '[UNK]'))
  inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return inner, ['[UNK]', '[EOS]']


def merging():
  vocab = {c: i for i, c in enumerate(LETTERS)} | {'</': 90, 's>': 91, '</s>': 92}
  return tokenizers.Tokenizer(models.BPE(vocab, [('<', '/'), ('s', '>'), ('</', 's>')])), ['</s>']


@pytest.mark.parametrize('made', [unigram, wordlevel, merging])
def test_a_model_that_knows_control_tokens_as_words(made):
  inner, special = made()
  inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
  t = tok.Tokenizer(inner, {'eos': special[-1]})
  end = special[-1]
  assert t.eos_id in t.inner.encode(f'a {end} a', add_special_tokens=False).ids
  for text in (end, f'a {end} a', f'{end} {end}', f'a {end} ☃'):
    (ids,) = t.encode_batch([text])
    assert t.eos_id not in ids and ids
  assert t.encode_batch(['a', f'a {end}', 'a'])[::2] == [t.encode('a')] * 2
  if made is unigram:
    assert t.decode(t.encode(f'a {end} bc')) == f'a {end} bc'
    assert t.unk_id == 0 and 0 in t.encode('a ☃')  # unknown text stays that


def test_a_control_token_that_begins_with_a_new_line():
  pieces = [('<unk>', 0.0), ('\nb', 0.0), *((c, -3.0) for c in 'ab\n')]
  inner = tokenizers.Tokenizer(models.Unigram(pieces, 0))
  inner.add_special_tokens([AddedToken('\nb', special=True)])
  t = tok.Tokenizer(inner, {'eos': '\nb'})
  assert t.encode('a\nb') == [2, 4, 3] and t.encode('b', inside=True) == [3]
  inner.add_special_tokens([AddedToken('\n', special=True)])
  assert tok.Tokenizer(inner, {'eos': '\n'}).encode('a', inside=True) == [2]


def test_an_end_that_stands_for_unknown_text_is_refused():
  inner = tokenizers.Tokenizer(models.WordLevel({'[EOS]': 0, 'a': 1}, '[EOS]'))
  inner.add_special_tokens([AddedToken('[EOS]', special=True)])
  with pytest.raises(InputError, match=r"would become the control token '\[EOS\]'"):
    tok.Tokenizer(inner, {'eos': '[EOS]'}).encode('[EOS]')


def test_padding_with_a_letter_leaves_it_a_letter(tmp_path):
  t = with_config(tmp_path, lettered(), eos_token='</s>', pad_token='E')
  assert t.encode('aE') == [0, t.pad_id] and t.pad_id not in t.control_ids


def test_a_control_token_of_one_letter_is_refused():
  inner = tokenizers.Tokenizer(models.WordLevel({'[UNK]': 0, '☃': 1, 'a': 2}, '[UNK]'))
  inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  inner.add_special_tokens([AddedToken('☃', special=True)])
  t = tok.Tokenizer(inner, {'eos': '☃'})
  with pytest.raises(InputError, match="^tokenizer: a text would become the control token '☃'$"):
    t.encode_batch(['a', 'a ☃'])


def test_text_goes_on_inside_another():
  inner, special = unigram()
  inner.add_special_tokens(special)
  t = tok.Tokenizer(inner, {'eos': '</s>'})
  begun = [t.inner.token_to_id('\u2581'), t.inner.token_to_id('c')]
  assert t.decode([*begun, *t.encode('a b')]) == 'c a b'
  assert t.decode([*begun, *t.encode('a b', inside=True)]) == 'ca b'
  assert t.encode('a</s>', inside=True, controls=True) == [t.inner.token_to_id('a'), t.eos_id]
  assert t.decode([*begun, *t.encode('a</s> b', inside=True)]) == 'ca</s> b'
  inner, _ = unigram(LETTERS[:-1])
  inner.add_special_tokens(special)
  t = tok.Tokenizer(inner, {'eos': '</s>'})
  assert t.encode('\u2603', inside=True) == t.encode('\u2603')  # one unknown would swallow the other


def test_tokens_of_the_config_alone_get_their_ids(tmp_path):
  first = len(LETTERS) + 1
  numbered = {
    str(first + 1): {'content': '<think>', 'special': False},
    str(first): {'content': '<two>', 'special': True},
  }
  t = with_config(
    tmp_path, lettered(), eos_token='</s>', added_tokens_decoder=numbered, extra_special_tokens=['<three>']
  )
  assert [t.inner.token_to_id(name) for name in ('<two>', '<think>', '<three>')] == [first, first + 1, first + 2]
  assert t.control_ids == {first - 1, first, first + 2} and t.encode('<think>') == [first + 1]


@pytest.mark.parametrize(
  'config, why',
  [
    ({'added_tokens_decoder': {'99': {'content': '<two>'}}}, "added token '<two>' has the id 99, but 38"),
    ({'added_tokens_decoder': {'3': {'content': '</s>'}}}, "added token '</s>' has the id 3, but 37"),
    ({'added_tokens_decoder': {'x': {'content': '<two>'}}}, 'damaged: its added tokens'),
    ({'added_tokens_decoder': {'40': 7}}, 'damaged: its added tokens'),
    ({'added_tokens_decoder': ['<two>']}, 'damaged: its added tokens'),
    ({'extra_special_tokens': '<two>'}, "damaged: its added tokens are not read: '<two>' is no list"),
  ],
)
def test_tokens_of_the_config_that_would_get_other_ids(tmp_path, config, why):
  with pytest.raises(InputError, match=why) as caught:
    with_config(tmp_path, lettered(), eos_token='</s>', **config)
  assert '\n' not in str(caught.value)


def test_names_that_a_config_does_not_give_stay_ungiven(tmp_path):
  """They are looked for, but a template does not see them, and a saved config does not name them."""
  t = with_config(tmp_path, lettered(special=('<s>', '</s>', '<pad>')), eos_token='</s>', unk_token='a')
  assert t.names == {'bos': '<s>', 'eos': '</s>', 'pad': '<pad>', 'unk': 'a'} and t.unnamed == {'bos', 'pad'}
  t.save(tmp_path / 'again' / 'tokenizer.json')
  again = tok.load(tmp_path / 'again')
  assert (again.names, again.unnamed, again.digest) == (t.names, t.unnamed, t.digest)


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
