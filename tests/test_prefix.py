"""What a tokenizer puts before a text by itself: our own, others', as transformers reads the same files."""

import dataclasses
import json

import jax
import pytest
from conftest import GPT2, LLAMA, randomized
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxlm import interop, sample
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
