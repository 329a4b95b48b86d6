"""Tokenizers out of GGUF metadata give the ids of the tokenizer that was put in; and the whole of a real model."""

import json

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jaxlm.errors import InputError
from jaxlm.interop.gguf import open_file
from jaxlm.interop.gguf_tokenizer import build

TEXTS = [
  "Call me Ishmael. It's 1851, ISN'T it?\n\n\tThe whale -- 12345 tons!  \r\n",
  'Café naïve — ₹500 and नमस्ते दुनिया 🙂\n\n  two  spaces',
  'int main(void) {\n    return x[0] != NULL ? 1 : -1;  /* ok */\n}\n',
  'सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता प्राप्त है। १२३४',
  'cafe\u0301',
  '',
  ' ',
  '\n',
]
NUMBERS = [' 12345', '12345', ' 1 12 1851'] * 9
TYPED = 'a <|bos|> b<|eos|> <s></s><unk> <0x41>'
CONTROLS = ['<|bos|>', '<|eos|>']

# as the published tokenizer.json files have them
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
QWEN2 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str):
  words = pre_tokenizers.Split(Regex(pattern), 'isolated')
  return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


WORDS = {
  'gpt-2': GPT2,
  'smollm': pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
  'llama-bpe': split(LLAMA3),
  'dbrx': split(LLAMA3),
  'qwen2': split(QWEN2),
}


def trained(pre: str) -> Tokenizer:
  """A tokenizer as its makers have it; one token in ten is of no merge, so that `ignore_merges` counts."""
  inner = Tokenizer(models.BPE())
  inner.pre_tokenizer, inner.decoder = GPT2, decoders.ByteLevel()
  if pre == 'qwen2':
    inner.normalizer = normalizers.NFC()
  controls = [AddedToken(t, special=True, normalized=False) for t in CONTROLS]
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=controls, initial_alphabet=alphabet, show_progress=False)
  inner.train_from_iterator([*TEXTS, TYPED] * 3 + NUMBERS, trainer)
  inner.pre_tokenizer = WORDS[pre]  # the merges are of wider words, so that where a text is cut is seen
  whole = json.loads(inner.to_str())
  whole['model']['ignore_merges'] = pre == 'llama-bpe'
  del whole['model']['merges'][::10]
  inner = Tokenizer.from_str(json.dumps(whole))
  inner.encode_special_tokens = True
  return inner


def metadata(**values) -> dict:
  """Under the names and with the types that reading a file gives; None: left out."""
  arrays = {k: np.array(v) if isinstance(v, list) and k in ('token_type', 'scores') else v for k, v in values.items()}
  return {f'tokenizer.ggml.{k}': v for k, v in arrays.items() if v is not None}


def byte_level(inner: Tokenizer, pre: str, **more) -> dict:
  """What llama.cpp's converter writes about it."""
  model = json.loads(inner.to_str())['model']
  vocab = sorted(model['vocab'], key=model['vocab'].get)
  types = [3 if token in CONTROLS else 1 for token in vocab]
  merges = [' '.join(merge) for merge in model['merges']]
  values = {'model': 'gpt2', 'pre': pre, 'tokens': vocab, 'token_type': types, 'merges': merges}
  return metadata(**{**values, 'bos_token_id': 0, 'eos_token_id': 1, **more})


@pytest.mark.parametrize('pre', WORDS)
def test_byte_level_ids_are_the_makers(pre):
  theirs = trained(pre)
  ours = build('x', byte_level(theirs, pre), 'llama')
  for text in [*TEXTS, *NUMBERS[:3], TYPED]:
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
    assert ours.decode(ours.encode(text)) == (text if pre != 'qwen2' else normalizers.NFC().normalize_str(text))
  assert ours.names == {'bos': '<|bos|>', 'eos': '<|eos|>'} and ours.control_ids == {0, 1}
  assert ours.control_ids.isdisjoint(ours.encode(TYPED))
  assert ours.vocab_size == theirs.get_vocab_size()


@pytest.mark.parametrize(
  'pre, more, want',
  [
    ('gpt-2', {}, 'a'),
    ('gpt-2', {'add_bos_token': True}, '<|bos|>a'),
    ('gpt-2', {'add_bos_token': True, 'add_eos_token': True}, '<|bos|>a<|eos|>'),
    ('llama-bpe', {}, '<|bos|>a'),
    ('llama-bpe', {'add_bos_token': False}, 'a'),
    ('gpt-2', {'add_bos_token': True, 'bos_token_id': None}, 'a'),
  ],
)
def test_what_a_text_begins_with_is_the_post_processors(pre, more, want):
  ours = build('x', byte_level(trained(pre), pre, **more), 'llama')
  assert ours.inner.decode(ours.inner.encode('a').ids, skip_special_tokens=False) == want
  assert ours.decode(ours.encode('a')) == 'a' and len(ours.encode('a')) == 1
  assert ours.prefix_ids == ([0] if want.startswith('<|bos|>') else [])


def test_the_old_default_is_gpt2s_for_gpt2_alone():
  theirs = trained('gpt-2')
  for pre in ('default', None):
    assert build('x', byte_level(theirs, pre), 'gpt2').encode(TEXTS[0]) == theirs.encode(TEXTS[0]).ids
    with pytest.raises(InputError, match=r"^x: tokenizer: tokenizer\.ggml\.pre 'default' is not read; take .*qwen2"):
      build('x', byte_level(theirs, pre), 'llama')


def sentencepiece(**more) -> dict:
  """A vocabulary as SentencePiece makes it: control, 256 bytes, letters, then pieces with falling scores."""
  special, all_bytes = ['<unk>', '<s>', '</s>'], [f'<0x{i:02X}>' for i in range(256)]
  pieces = [
    'he',
    '\u2581t',
    '\u2581the',
    'the',
    'in',
    '\u2581m',
    'ain',
    '\u2581\u2581',
    'ma',
    '\u2581main',
    'main',
    '</',
  ]
  pieces += ['s>', 'नम', 'स्', 'नमस्', 'ें', 'a\u2581', '12', '123', '23', 'all', 'ale']
  used = ''.join([*pieces, *TEXTS[:2]]).replace(' ', '\u2581')
  letters = sorted({*used} - {*'\n\r\t🙂₹'})
  tokens = [*special, *all_bytes, *pieces, *letters, 'hello world']
  types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters)) + [4]
  scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) + len(letters) + 1)]
  values = {'model': 'llama', 'tokens': tokens, 'token_type': types, 'scores': scores}
  ids = {'bos_token_id': 1, 'eos_token_id': 2, 'unknown_token_id': 0}
  return metadata(**{**values, **ids, **more})


def by_hand(text: str, data: dict, prefix: bool) -> list[int]:
  """SentencePiece's BPE as its paper has it: join the neighbours with the best score, the leftmost of equals."""
  ids = {t: i for i, t in enumerate(data['tokenizer.ggml.tokens'])}
  scores, types = data['tokenizer.ggml.scores'], data['tokenizer.ggml.token_type']
  pieces = list(('\u2581' * (prefix and bool(text)) + text).replace(' ', '\u2581'))
  while True:
    joined = [(a + b, i) for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False))]
    found = [(-scores[ids[t]], i) for t, i in joined if t in ids and types[ids[t]] == 1]
    if not found:
      break
    i = min(found)[1]
    pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
  out = []
  for piece in pieces:
    out += [ids[piece]] if piece in ids else [ids[f'<0x{b:02X}>'] for b in piece.encode()]
  return out


@pytest.mark.parametrize('prefix', [True, False])
def test_sentencepiece_ids_are_those_of_its_scores(prefix):
  data = sentencepiece(**({} if prefix else {'add_space_prefix': False}))
  ours = build('x', data, 'llama')
  for text in [*TEXTS, TYPED, 'the main theme', ' the  main', 'all ale 1234']:
    assert ours.encode(text) == by_hand(text, data, prefix), text
    assert ours.decode(ours.encode(text)) == text
  assert ours.control_ids == {0, 1, 2} and ours.control_ids.isdisjoint(ours.encode(TYPED))
  whole = data['tokenizer.ggml.tokens'].index('hello world')  # user-defined: cut out before all else
  assert whole in ours.encode('the hello world') and ours.inner.encode('a').ids[0] == 1


def without(data: dict, key: str) -> dict:
  return {k: v for k, v in data.items() if k != f'tokenizer.ggml.{key}'}


def refused_tokenizers():
  good, theirs = sentencepiece(), trained('gpt-2')
  tokens, scores, types = (good[f'tokenizer.ggml.{k}'] for k in ('tokens', 'scores', 'token_type'))
  yield 'wordpiece', sentencepiece(model='bert'), "model 'bert' is not read"
  yield 'pre', byte_level(theirs, 'tekken'), "pre 'tekken' is not read"
  yield 'no tokens', without(good, 'tokens'), 'has no tokenizer.ggml.tokens'
  yield 'twice', sentencepiece(tokens=[*tokens[:-1], 'he']), "tokens 259 and .* are both 'he'"
  yield 'types', sentencepiece(token_type=types[:-1].tolist()), 'types'
  yield 'scores', sentencepiece(scores=scores[:-1].tolist()), 'scores'
  yield 'no scores', without(good, 'scores'), '0 scores'
  yield 'bytes', sentencepiece(tokens=[t if t != '<0x41>' else 'x0' for t in tokens]), '<0x41> the first'
  yield 'eos', without(good, 'eos_token_id'), 'no tokenizer.ggml.eos_token_id'
  yield 'id', sentencepiece(bos_token_id=10**6), 'bos_token_id is 1000000'
  yield 'text as an id', sentencepiece(bos_token_id='1'), 'bos_token_id is not a int'
  yield 'long', sentencepiece(tokens=[*tokens[:-1], 'y' * 5000]), '5000 characters'
  yield 'unknown key', sentencepiece(precompiled_charsmap=np.ones(3, 'u1')), 'precompiled_charsmap is not translated'
  yield 'spaces', sentencepiece(remove_extra_whitespaces=True), 'remove_extra_whitespaces is not translated'
  yield 'merge', byte_level(theirs, 'gpt-2', merges=['a b c']), "merge 0, 'a b c'"
  yield 'merge of none', byte_level(theirs, 'gpt-2', merges=['zzzz qqqq']), "merge 0, 'zzzz qqqq'"
  data = byte_level(trained('llama-bpe'), 'llama-bpe')
  made = {merge.replace(' ', '') for merge in data['tokenizer.ggml.merges']}
  whole = next(i for i, t in enumerate(data['tokenizer.ggml.tokens']) if i > 258 and t.isascii() and t not in made)
  byte = data['tokenizer.ggml.tokens'].index('à')  # 0xE0, the first of three in Hindi's letters
  for name, pre, i in (('merge', 'gpt-2', 290), ('byte', 'gpt-2', byte), ('word', 'llama-bpe', whole)):
    control = byte_level(trained(pre), pre)
    control['tokenizer.ggml.token_type'] = np.where(np.arange(len(control['tokenizer.ggml.tokens'])) == i, 3, 1)
    yield f'a {name} as control', control, 'a text would become the control token'
  yield 'a letter as control', sentencepiece(bos_token_id=len(tokens) - 2), 'a text would become the control token'


@pytest.mark.parametrize('data, message', [pytest.param(d, m, id=i) for i, d, m in refused_tokenizers()])
def test_tokenizers_whose_ids_would_differ_are_refused(data, message):
  with pytest.raises(InputError, match=message) as caught:
    build('x.gguf', data, 'llama')
  assert str(caught.value).startswith('x.gguf: tokenizer: ') and '\n' not in str(caught.value)


def test_no_tokenizer_is_none():
  assert build('x', {}, 'llama') is None and build('x', {'tokenizer.ggml.model': 'none'}, 'llama') is None


# --- SmolLM2-135M-Instruct, 98 MB ---

# Made with transformers 5.23.0 and torch 2.13.0 on this file in float32: ids of texts whose control tokens are parsed,
# and sums and sums of magnitudes of weights in float64.
CHAT = (
  '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n'
  '<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n'
)
GOLDEN_IDS = {
  CHAT: [
    1,
    9690,
    198,
    2683,
    359,
    253,
    5356,
    5646,
    11173,
    3365,
    3511,
    308,
    34519,
    28,
    7018,
    411,
    407,
    19712,
    8182,
    2,
    198,
    1,
    4093,
    198,
    1780,
    314,
    260,
    3575,
    282,
    4649,
    47,
    2,
    198,
    1,
    520,
    9531,
    198,
  ],
  'Once upon a time': [6403, 1980, 253, 655],
  'Café naïve — ₹500, 12345 and नमस्ते दुनिया 🙂\n\n  two  spaces': [
    51,
    1939,
    2756,
    15486,
    46494,
    1841,
    4636,
    38058,
    37,
    32,
    32,
    28,
    216,
    33,
    34,
    35,
    36,
    37,
    284,
    12335,
    118,
    35090,
    38770,
    16525,
    26293,
    30581,
    12335,
    116,
    42990,
    30658,
    27011,
    32932,
    18075,
    47526,
    8866,
    827,
    216,
    5600,
  ],
}
SUMS = {
  'model.embed_tokens.weight': ((49152, 576), -15353.04449415207, 2802153.619805813),
  'model.layers.0.self_attn.q_proj.weight': ((576, 576), 59.22322082519531, 63395.39872741699),
  'model.layers.0.self_attn.k_proj.weight': ((192, 576), 26.937057495117188, 29794.78126525879),
  'model.layers.29.mlp.down_proj.weight': ((576, 1536), 49.83570861816406, 126250.91435241699),
  'model.norm.weight': ((576,), 1038.33203125, 1045.09765625),
}
# the first two values of rows 0 and 1: a sum does not see the order of rows
CORNERS = {
  'model.layers.0.self_attn.q_proj.weight': [[-0.0963134765625, 0.1573486328125], [-0.1591796875, 0.39794921875]],
  'model.layers.0.self_attn.k_proj.weight': [[-0.1552734375, 0.3402099609375], [0.203369140625, 0.09136962890625]],
  'model.layers.29.mlp.down_proj.weight': [[-0.2733154296875, 0.186279296875], [-0.33282470703125, -0.09429931640625]],
}


def test_smollm2_is_what_its_makers_say(smollm2):
  opened = open_file(smollm2)
  assert opened.config == {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'num_hidden_layers': 30,
    'hidden_size': 576,
    'num_attention_heads': 9,
    'num_key_value_heads': 3,
    'head_dim': 64,
    'intermediate_size': 1536,
    'hidden_act': 'silu',
    'rope_theta': 100000.0,
    'rope_scaling': None,
    'rms_norm_eps': 1e-5,
    'max_position_embeddings': 8192,
    'vocab_size': 49152,
    'tie_word_embeddings': True,
    'attention_bias': False,
    'mlp_bias': False,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'pad_token_id': 2,
  }
  assert opened.generation == {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 2}
  assert '<|im_start|>assistant' in opened.chat_template
  for name, (shape, total, magnitude) in SUMS.items():
    value = opened.read(name)
    assert value.shape == opened.shapes[name] == shape and value.dtype == np.float32
    sums = value.sum(dtype=np.float64), np.abs(value).sum(dtype=np.float64)
    np.testing.assert_allclose(sums, (total, magnitude), rtol=1e-9)
  for name, corner in CORNERS.items():
    np.testing.assert_array_equal(opened.read(name)[:2, :2], np.array(corner, np.float32))


def test_smollm2_ids_are_the_golden_ones(smollm2):
  tokenizer = open_file(smollm2).tokenizer
  for text, ids in GOLDEN_IDS.items():
    tokenizer.inner.encode_special_tokens = False
    assert tokenizer.inner.encode(text).ids == ids
    tokenizer.inner.encode_special_tokens = True
    assert tokenizer.decode(tokenizer.encode(text)) == text  # Hindi included
  assert tokenizer.control_ids == set(range(17)) and tokenizer.control_ids.isdisjoint(tokenizer.encode(CHAT))


@pytest.mark.slow
def test_smollm2_is_dequantized_as_the_library_does(smollm2):
  opened = open_file(smollm2)
  table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
  theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}
  for name in opened.shapes:
    tensor = theirs.pop(table.get_name(name, try_suffixes=('.weight',)))
    want = gguf.dequantize(tensor.data, tensor.tensor_type)
    if heads := 9 * ('q_proj' in name) + 3 * ('k_proj' in name):
      want = want.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(-1, 576)
    np.testing.assert_array_equal(opened.read(name), want, err_msg=name)
  assert not theirs
