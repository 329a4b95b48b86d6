"""What a tokenizer puts before a text by itself: our own, others', as transformers reads the same files."""

import dataclasses
import json

import jax
import pytest
from conftest import GPT2, LLAMA, randomized
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxlm import interop, sample
from jaxlm.data import chat
from jaxlm.data import tokenizer as tok
from jaxlm.loops import writing
from jaxlm.models import Run

TEXTS = ['Call me Ishmael.', '', ' नमस्ते\n']


def template(first, last=()):
  names = {'<s>': 1, '</s>': 2}
  parts = [*first, '$A', *last]
  special = [(name, names[name]) for name in {*first, *last}]
  return processors.TemplateProcessing(single=parts, pair=[*parts, '$B:1'], special_tokens=special)


LEVEL = processors.ByteLevel(trim_offsets=False)
# name: (post-processor, what tokenizer_config.json has besides, what a text begins with)
KINDS = {
  'llama2, mistral, gemma': (template(['<s>']), {'add_bos_token': True}, [1]),
  'llama3': (processors.Sequence([LEVEL, template(['<s>'])]), {}, [1]),
  'with an end': (template(['<s>'], ['</s>']), {}, [1]),
  'an end alone': (template([], ['</s>']), {'add_bos_token': False}, []),
  'qwen': (LEVEL, {'add_bos_token': False, 'bos_token': None}, []),
  'gpt2': (LEVEL, {'add_bos_token': False}, []),
  'smollm2': (None, {}, []),
}


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
  """(folder, what a text begins with) of a tokenizer as others publish it."""
  after, config, want = KINDS[request.param]
  inner = Tokenizer(models.BPE())
  inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  controls = [AddedToken(name, special=True, normalized=False) for name in ('<unk>', '<s>', '</s>')]
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=controls, initial_alphabet=alphabet, show_progress=False)
  inner.train_from_iterator(TEXTS * 9, trainer)
  if after is not None:
    inner.post_processor = after
  inner.save(str(tmp_path / 'tokenizer.json'))
  names = {'bos_token': '<s>', 'eos_token': '</s>', 'tokenizer_class': 'PreTrainedTokenizerFast'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(names | config))
  return tmp_path, want


def test_what_others_begin_with_survives_being_saved(kind, tmp_path):
  folder, want = kind
  ours = tok.load(folder)
  ours.save(tmp_path / 'again' / 'tokenizer.json')
  assert ours.prefix_ids == tok.load(tmp_path / 'again').prefix_ids == want


def test_ids_are_those_of_transformers(kind):
  transformers = pytest.importorskip('transformers', reason="needs pip install -e '.[parity]'")
  folder, _ = kind
  ours, theirs = tok.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
  ends = [ours.eos_id] if ours.inner.encode('').ids[-1:] == [ours.eos_id] else []
  for text in TEXTS:
    assert theirs(text).input_ids == ours.prefix_ids + ours.encode(text) + ends, text


def test_our_own_begin_as_their_documents_do(tmp_path):
  ours = tok.train(TEXTS * 9, 300)
  ours.save(tmp_path / 'tokenizer.json')
  assert ours.prefix_ids == tok.load(tmp_path).prefix_ids == [ours.bos_id] == [0]


def test_transformers_reads_our_exported_one_as_we_do(tmp_path):
  """And not as the family's own tokenizer would split; a BOS comes before the text there too."""
  transformers = pytest.importorskip('transformers', reason="needs pip install -e '.[parity]'")
  ours = tok.train(["It was 1851: the whale's  eye.\n\n नमस्ते दुनिया क्षत्रिय" * 9], 400)
  for cfg in (LLAMA, GPT2):
    folder = tmp_path / cfg.positions
    cfg = dataclasses.replace(cfg, vocab_size=ours.vocab_size)
    interop.export(interop.Model(cfg, randomized(cfg), ours, None, {}), folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in (*TEXTS, "the whale's  eye 1851", 'क्षत्रिय दुनिया\n\n x=12345'):
      assert theirs(text).input_ids == [ours.bos_id, *ours.encode(text)]
      assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == ours.eos_id


CHATML = (
  '{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}'
  '{% if tools is not none %}{{ tools | tojson }}{% endif %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
TURNS = [
  {'role': 'user', 'content': ' hello, नमस्ते it?\n'},
  {'role': 'assistant', 'content': 'yes  <think>no</think>', 'tool_calls': None},
  {'role': 'user', 'content': 'and now'},
]


def byte_level(special):
  inner = Tokenizer(models.BPE())
  inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
  inner.train_from_iterator([str(TURNS)] * 9, trainer)
  inner.add_special_tokens(special)
  inner.add_tokens(['<think>'])
  return inner


def metaspace(special):
  """As SentencePiece has it: a space before a text's first word only, and its control tokens in the vocabulary."""
  pieces = [('<unk>', 0.0), *((t.content, 0.0) for t in special)]
  pieces += [(c, -3.0) for c in sorted({*str(TURNS), *CHATML, '\n', '\u2581'} - {' '})] + [('\u2581hello', -4.0)]
  inner = Tokenizer(models.Unigram(pieces, 0))
  inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
  inner.decoder = decoders.Metaspace(prepend_scheme='first')
  inner.add_special_tokens([AddedToken('<unk>', special=True), *special])
  return inner


STRIPS = {'<|im_end|>': {'rstrip': True}, '<|im_start|>': {'lstrip': True}}
CHATS = {'byte-level': (byte_level, {}), 'metaspace': (metaspace, {}), 'strips': (byte_level, STRIPS)}


@pytest.fixture(params=CHATS)
def both(request, tmp_path):
  """The same files read by us and by transformers; one marker is not flagged, one token is the config's alone."""
  transformers = pytest.importorskip('transformers', reason="needs pip install -e '.[parity]'")
  build, strips = CHATS[request.param]
  names = ['<s>', '<|im_end|>', '<|im_start|>']
  inner = build([AddedToken(n, special=True, normalized=False, **strips.get(n, {})) for n in names])
  whole = json.loads(inner.to_str())
  for token in whole['added_tokens']:
    token['special'] &= token['content'] != '<|im_start|>'
  (tmp_path / 'tokenizer.json').write_text(json.dumps(whole))
  alone = {str(inner.get_vocab_size()): {'content': '</think>', 'special': False}}
  config = {'eos_token': '<|im_end|>', 'pad_token': '<s>', 'chat_template': CHATML, 'added_tokens_decoder': alone}
  config['tokenizer_class'] = 'PreTrainedTokenizerFast'
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  return tok.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize('tools', [None, [{'type': 'function', 'function': {'name': 'now', 'parameters': {}}}]])
def test_ids_of_a_conversation_are_those_of_transformers(both, tools):
  ours, theirs = both
  for turns in (TURNS[:1], TURNS):
    want = theirs.apply_chat_template(turns, tools=tools, add_generation_prompt=True, return_dict=False)
    assert chat.encode(CHATML, turns, ours, generation=True, tools=tools) == want


def test_what_was_typed_goes_on_inside_the_conversation(both):
  """No control token is made, and the ids stand for the same text."""
  ours, theirs = both
  typed = [{'role': 'user', 'content': 'hello<|im_end|>and<|im_start|>now'}]
  ids = chat.encode(CHATML, typed, ours, generation=True)
  plain = chat.encode(CHATML, [{'role': 'user', 'content': 'hello'}], ours, generation=True)
  assert [i for i in ids if i in ours.control_ids] == [i for i in plain if i in ours.control_ids]
  assert 'hello<|im_end|>and<|im_start|>now' in theirs.decode(ids)


SEEN = [
  '{% if tools is not none %}TOOLS{% endif %}{% if documents is defined %}DOCUMENTS{% endif %}',
  '{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ bos_token is defined }}',
  'a{% generation %}{{ messages[0].content }}{% endgeneration %}b',
  "{{ {'b': 1, 'a': 'न'} | tojson(ensure_ascii=true, sort_keys=true) }}{{ messages | tojson(indent=2) }}",
  "{{ {'b': 1, 'a': 'न'} | tojson(separators=(',', ':')) }}{{ messages[1] | tojson }}{{ messages[1].tool_calls }}",
  "{{ strftime_now('%Y %z') }}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
]


@pytest.mark.parametrize('source', SEEN)
def test_a_template_sees_what_transformers_shows_it(both, source):
  ours, theirs = both
  assert chat.render(source, TURNS, ours) == theirs.apply_chat_template(TURNS, chat_template=source, tokenize=False)


@pytest.mark.parametrize('begins', [True, False])
def test_a_prompt_begins_with_it(begins, monkeypatch):
  """An empty one with something all the same."""
  inner = tok.train(TEXTS * 9, 300).inner
  inner.post_processor = processors.TemplateProcessing(
    single='<|pad|> $A' if begins else '$A', pair='$A $B', special_tokens=[('<|pad|>', 2)]
  )
  vocabulary, seen, generate = tok.Tokenizer(inner), [], sample.generate
  spy = lambda cfg, params, ids, *args, **kwargs: seen.extend(ids) or generate(cfg, params, ids, *args, **kwargs)
  monkeypatch.setattr(sample, 'generate', spy)
  cfg = dataclasses.replace(LLAMA, vocab_size=vocabulary.vocab_size)
  texts = writing.complete(cfg, randomized(cfg), vocabulary, ['me', ''], jax.random.key(0), new=2, run=Run())
  first = [2] if begins else []
  assert len(texts) == 2 and seen == [first + vocabulary.encode('me'), first or [vocabulary.bos_id]]
