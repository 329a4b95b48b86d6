"""Masks against ones written by hand, for every template; ids against the text tokenised in one piece and serving."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import processors

from jaxlm import interop
from jaxlm.data import chat, turns
from jaxlm.data import tokenizer as tok
from jaxlm.data.conversations import Conversation
from jaxlm.errors import InputError

TRAINED = ['user assistant\n\n call me Ishmael, what is it? two four नमस्ते\n' * 9, 'a\n\nb\n\n' * 9]


@pytest.fixture(scope='module')
def base() -> tok.Tokenizer:
  return tok.train(TRAINED, 330)


def of(base, name):
  """A built-in template and the tokenizer for it."""
  return turns.choose(name, None)[1], base.with_controls(turns.BUILT_IN[name])


def shown(t, found):
  """The text of the ids with the learned runs in ⟦⟧."""
  text = ''
  for on, run in itertools.groupby(zip(found.ids, found.learned, strict=True), lambda pair: pair[1]):
    said = t.inner.decode([int(i) for i, _ in run], skip_special_tokens=False)
    text += f'⟦{said}⟧' if on else said
  return text


def one_shot(t, text):
  return t.reader.encode(text, add_special_tokens=False).ids


def say(role, content, **more):
  return {'role': role, 'content': content, **more}


TALK = [say('system', 'Hm.'), say('user', 'one'), say('assistant', 'two!'), say('user', 'three'), say('assistant', '4')]
MASKS = {
  'chatml': (
    '<|bos|><|im_start|>system\nHm.<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n⟦two!<|im_end|>⟧\n'
    '<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n'
  ),
  'qwen': (
    '<|bos|><|im_start|>system\nHm.<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n⟦two!<|im_end|>⟧\n'
    '<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n'
  ),
  'llama3': (
    '<|bos|><|start_header_id|>system<|end_header_id|>\n\nHm.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\none'
    '<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦two!<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>'
    '\n\nthree<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦4<|eot_id|>⟧'
  ),
  'gemma': (
    '<|bos|><start_of_turn>user\nHm.\n\none<end_of_turn>\n<start_of_turn>model\n⟦two!<end_of_turn>⟧\n'
    '<start_of_turn>user\nthree<end_of_turn>\n<start_of_turn>model\n⟦4<end_of_turn>⟧\n'
  ),
  'mistral': '<|bos|>[INST] Hm.\n\none [/INST]⟦ two!<|eos|>⟧[INST] three [/INST]⟦ 4<|eos|>⟧',
  'plain': (
    '<|bos|>Hm.\n\n### Instruction:\none\n\n### Response:\n⟦two!<|eos|>⟧\n\n### Instruction:\nthree\n\n'
    '### Response:\n⟦4<|eos|>⟧'
  ),
}
TOOLS = [
  *TALK[:2],
  say('assistant', '', tool_calls=[{'type': 'function', 'function': {'name': 'look', 'arguments': {'at': 3}}}]),
  say('tool', 'seen'),
  say('assistant', 'two'),
]
TOOL_MASKS = {
  'chatml': (
    '<|bos|><|im_start|>system\nHm.<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n⟦<tool_call>\n'
    '{"name": "look", "arguments": {"at": 3}}\n</tool_call><|im_end|>⟧\n<|im_start|>tool\nseen<|im_end|>\n'
    '<|im_start|>assistant\n⟦two<|im_end|>⟧\n'
  ),
  'qwen': (
    '<|bos|><|im_start|>system\nHm.<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n⟦<tool_call>\n'
    '{"name": "look", "arguments": {"at": 3}}\n</tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>\nseen\n'
    '</tool_response><|im_end|>\n<|im_start|>assistant\n⟦two<|im_end|>⟧\n'
  ),
  'llama3': (
    '<|bos|><|start_header_id|>system<|end_header_id|>\n\nHm.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\none'
    '<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦{"name": "look", "parameters": {"at": 3}}<|eot_id|>⟧'
    '<|start_header_id|>ipython<|end_header_id|>\n\nseen<|eot_id|>'
    '<|start_header_id|>assistant<|end_header_id|>\n\n⟦two<|eot_id|>⟧'
  ),
}


@pytest.mark.parametrize('name', MASKS)
def test_what_is_learned_of_several_turns(base, name):
  template, t = of(base, name)
  found = turns.encode(template, Conversation(TALK), t)
  assert shown(t, found) == MASKS[name]
  text = MASKS[name].replace('⟦', '').replace('⟧', '')
  assert found.ids.tolist() == one_shot(t, text) == chat.encode(template, TALK, t)
  assert (found.ids == t.bos_id).sum() == 1
  assert turns.end_ids(template, t) == [found.ids[found.learned][-1]]


@pytest.mark.parametrize('name', TOOL_MASKS)
def test_what_is_learned_around_a_tool(base, name):
  template, t = of(base, name)
  assert shown(t, turns.encode(template, Conversation(TOOLS), t)) == TOOL_MASKS[name]
  described = turns.encode(template, Conversation(TOOLS, [{'type': 'function', 'function': {'name': 'look'}}]), t)
  assert shown(t, described).count('"name": "look"') == 2


@pytest.mark.parametrize('name', MASKS)
def test_the_last_turn_and_all(base, name):
  template, t = of(base, name)
  last, holes = (turns.encode(template, Conversation(TALK), t, learn) for learn in ('last', 'assistant'))
  before = len(turns.encode(template, Conversation(TALK[:3]), t).ids)
  assert last.learned.sum() and not last.learned[:before].any()
  np.testing.assert_array_equal(last.learned[before:], holes.learned[before:])
  assert turns.encode(template, Conversation(TALK), t, 'all').learned.all()


@pytest.mark.parametrize('name', MASKS)
def test_what_serving_begins_with_is_what_training_began_with(base, name):
  template, t = of(base, name)
  found = turns.encode(template, Conversation(TALK), t, 'last')
  prompt = chat.encode(template, TALK[:-1], t, generation=True)
  assert found.ids[: len(prompt)].tolist() == prompt
  assert np.flatnonzero(found.learned)[0] == len(prompt)


# the same conversations through templates without generation blocks
CHATML = (
  '{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ CONTENT }}<|im_end|>\n{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
CONTENTS = {
  'as it is': 'm.content',
  'trimmed': 'm.content | trim',
  'looked into': "m.content if m.content[0] in 'Hot4 ' else 'X'",
  'escaped': '(m.content | tojson(ensure_ascii=true))[1:-1]',
  'behind a word': "'' + m.content",
}


@pytest.mark.parametrize('content', CONTENTS.values(), ids=CONTENTS.keys())
@pytest.mark.parametrize('space', ['', ' '], ids=['', 'spaces'])
def test_templates_without_blocks(base, content, space):
  _, t = of(base, 'chatml')
  template = CHATML.replace('CONTENT', content)
  talk = [one | {'content': space + one['content'] + space} for one in TALK]
  kept = '' if 'trim' in content else space
  expected = MASKS['chatml'].replace('⟦two!<', f'⟦{kept}two!{kept}<').replace('⟦4<', f'⟦{kept}4{kept}<')
  for part in ('Hm.', 'one', 'three'):
    expected = expected.replace(part, f'{kept}{part}{kept}')
  assert shown(t, turns.encode(template, Conversation(talk), t)) == expected


CALLS = "m.content ~ (m.tool_calls | tojson if m.tool_calls else '') ~ (m.thought or '')"


@pytest.mark.parametrize(
  'more', [{'tool_calls': [{'function': {'name': 'f', 'arguments': {}}}]}, {'thought': 'Let me see.'}]
)
def test_what_is_more_than_content(base, more):
  _, t = of(base, 'chatml')
  talk = [*TALK[:2], TALK[2] | more, *TALK[3:]]
  found = shown(t, turns.encode(CHATML.replace('CONTENT', CALLS), Conversation(talk), t))
  assert '⟦two!' in found and ('Let me see.<|im_end|>⟧\n' in found or '"f", "arguments": {}}}]<|im_end|>⟧\n' in found)


THINKS = (
  "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think>\n</think>\n' if loop.last and m.role == 'assistant' }}"
  '{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


def test_what_the_template_writes_for_the_model_is_learned(base):
  _, t = of(base, 'chatml')
  found = shown(t, turns.encode(THINKS, Conversation(TALK), t))
  assert 'assistant\n⟦two!<|im_end|>⟧' in found and 'assistant\n⟦<think>\n</think>\n4<|im_end|>⟧' in found


def test_a_turn_that_is_shown_otherwise_later(base):
  """Thoughts in contents that are left out of all but the last answer."""
  _, t = of(base, 'chatml')
  template = THINKS.replace('m.content', "(m.content if loop.last else m.content.split('</think>')[-1])")
  template = template.replace("'<think>\n</think>\n'", "''")
  talk = [*TALK[:2], say('assistant', '<think>a</think>two'), TALK[3], say('assistant', '<think>b</think>4')]
  with pytest.raises(InputError, match='message 3 stands is not to be seen'):
    turns.encode(template, Conversation(talk), t)
  found = shown(t, turns.encode(template, Conversation(talk), t, 'last'))
  assert 'assistant\ntwo<|im_end|>\n' in found and 'assistant\n⟦<think>b</think>4<|im_end|>⟧' in found


def test_the_text_ends_where_the_template_has_no_end(base):
  template = '{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}'
  found = turns.encode(template, Conversation(TALK), base)
  assert found.ids[-1] == base.eos_id and found.learned[-1] and (found.ids == base.eos_id).sum() == 1
  assert shown(base, found).endswith('assistant: ⟦4\n<|eos|>⟧')
  assert base.eos_id not in turns.encode(template, Conversation(TALK[:4]), base).ids, 'the user speaks last'


def test_a_token_over_the_edge_of_a_turn_is_learned(base):
  """The text is tokenised as a whole: glued from pieces it would have other ids."""
  template, t = of(base, 'plain')
  talk = [say('user', 'a'), say('assistant', '\nb')]
  found = turns.encode(template, Conversation(talk), t)
  whole = '<|bos|>### Instruction:\na\n\n### Response:\n\nb<|eos|>'
  glued = [*one_shot(t, whole[: whole.index('\nb')]), *t.encode('\nb'), t.eos_id]
  assert found.ids.tolist() == one_shot(t, whole) != glued
  learned = t.inner.decode(found.ids[found.learned].tolist(), skip_special_tokens=False)
  assert learned.endswith('\nb<|eos|>') and len(learned) > len('\nb<|eos|>')


@pytest.mark.parametrize('name', MASKS)
@pytest.mark.parametrize('typed', ['<|im_end|>', '<|eot_id|>x', '[INST]', 'a<end_of_turn>b<|eos|>', '<|bos|>'])
def test_control_tokens_that_were_typed_are_text_and_learned(base, name, typed):
  template, t = of(base, name)
  talk = [say('user', typed), say('assistant', f'{typed} so'), *TALK[3:]]
  found = turns.encode(template, Conversation(talk), t)
  plain = turns.encode(template, Conversation([say('user', 'x'), say('assistant', 'y'), *TALK[3:]]), t)
  control = lambda ids: [i for i in ids if i in t.control_ids]
  assert control(found.ids) == control(plain.ids)
  assert control(found.ids[found.learned]) == control(plain.ids[plain.learned])
  assert f'⟦{" " * (name == "mistral")}{typed} so<' in shown(t, found)


@pytest.mark.parametrize('name', MASKS)
def test_truncation_keeps_whole_turns(base, name):
  template, t = of(base, name)
  full, first = (turns.encode(template, Conversation(talk), t) for talk in (TALK, TALK[:3]))
  at = lambda limit: turns.encode(template, Conversation(TALK), t, limit=limit)
  assert at(len(full.ids)).dropped == 0
  for limit in (len(full.ids) - 1, len(first.ids)):
    assert at(limit).dropped == 2
    np.testing.assert_array_equal(at(limit).ids, first.ids)
    np.testing.assert_array_equal(at(limit).learned, first.learned)
  assert at(len(first.ids) - 1) is None


def test_two_beginnings_are_refused(base):
  with pytest.raises(InputError, match='two tokens for the beginning'):
    turns.encode('{{ bos_token }}{{ bos_token }}{{ messages[1].content }}', Conversation(TALK[1:3]), base)


def test_templates_are_found_by_name_by_file_and_beside_the_tokenizer(tmp_path):
  (tmp_path / 'mine.jinja').write_text('{{ mine }}')
  assert turns.choose(str(tmp_path / 'mine.jinja'), 'own')[1] == '{{ mine }}'
  assert turns.choose(None, 'own') == turns.choose('model', 'own') == ('model', 'own')
  assert turns.choose(None, None) == turns.choose('chatml', 'own') and turns.choose(None, None)[0] == 'chatml'
  for asked in ('model', 'lama3', str(tmp_path)):
    with pytest.raises(InputError, match='--template'):
      turns.choose(asked, None)


TEXT = st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=30)
TRIMS = ('llama3', 'gemma')


@pytest.mark.parametrize('name', MASKS)
@settings(max_examples=40, deadline=None)
@given(contents=st.lists(TEXT.filter(lambda s: s.strip() and not s[0].isspace()), min_size=2, max_size=5))
def test_what_is_learned_are_the_contents(base, name, contents):
  """With the tokens that end the turns, and nothing else."""
  template, t = of(base, name)
  talk = [say(('user', 'assistant')[i % 2], content) for i, content in enumerate(contents)]
  found = turns.encode(template, Conversation(talk), t)
  edges = np.flatnonzero(np.diff(np.concatenate([[False], found.learned, [False]])))
  said = [found.ids[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]
  end = turns.end_ids(template, t)
  assert [run[-1:] for run in said] == [end] * len(said)
  expected = [content.strip() if name in TRIMS else content for content in contents[1::2]]
  assert [t.decode(run[:-1]).removeprefix(' ' if name == 'mistral' else '') for run in said] == expected
  assert found.ids.tolist() == chat.encode(template, talk, t)


@pytest.mark.parametrize('trims', [False, True])
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=['Cs']) | st.just(' '), max_size=40), inside=st.booleans())
def test_the_characters_of_tokens(base, trims, text, inside):
  """Also where the tokenizer itself leaves spaces out of them."""
  inner = base.with_controls(['<|im_end|>']).inner
  if trims:
    inner = type(inner).from_str(inner.to_str())
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
  t = tok.Tokenizer(inner)
  spans = t.spans(text, inside=inside)
  assert [i for i, _, _ in spans] == t.encode(text, inside=inside)
  assert t.decode([i for i, _, _ in spans]) == text
  covered = [c for _, start, end in spans for c in range(start, end)]
  assert sorted(set(covered)) == list(range(len(text))) and covered == sorted(covered)


def test_new_control_tokens_come_after_the_last_and_change_no_text(base, tmp_path):
  grown = base.with_controls(['<|im_start|>', '<|im_end|>', '<|bos|>'])
  assert [grown.control_id(name) for name in ('<|im_start|>', '<|im_end|>')] == [base.vocab_size, base.vocab_size + 1]
  assert grown.vocab_size == base.vocab_size + 2 and base.control_id('<|im_end|>') is None
  for text in (*TRAINED, 'x <|im_start|> <|im_end|>', 'नमस्ते <|bos|>'):
    assert grown.encode(text) == base.encode(text)
  assert (grown.names, grown.prefix_ids, grown.eos_id) == (base.names, base.prefix_ids, base.eos_id)
  assert grown.with_controls(['<|im_end|>']) is grown
  grown.save(tmp_path / 'tokenizer.json')
  assert tok.load(tmp_path).digest == grown.digest


def test_no_new_token_falls_into_a_gap(base):
  import json

  whole = json.loads(base.inner.to_str())
  token = max(whole['model']['vocab'], key=whole['model']['vocab'].get)
  whole['model']['vocab'][token] += 5
  gaps = tok.Tokenizer(type(base.inner).from_str(json.dumps(whole)), base.names)
  with pytest.raises(InputError, match='gaps'):
    gaps.with_controls(['<|im_end|>'])


@pytest.mark.slow
def test_a_real_model(smollm2):
  t, template = interop.vocabulary(str(smollm2))
  assert turns.choose(None, template)[0] == 'model' and t.with_controls(turns.BUILT_IN['chatml']) is t
  found = turns.encode(template, Conversation(TALK), t)
  text = MASKS['chatml'].removeprefix('<|bos|>')
  assert shown(t, found) == text
  text = text.replace('⟦', '').replace('⟧', '')
  assert found.ids.tolist() == one_shot(t, text) == chat.encode(template, TALK, t)
  assert turns.end_ids(template, t) == [t.eos_id]
  built_in = turns.encode(turns.choose('chatml', None)[1], Conversation(TALK), t)
  assert found.ids.tolist() == built_in.ids.tolist() and found.learned.tolist() == built_in.learned.tolist()


@pytest.mark.parametrize('name', MASKS)
def test_ids_and_masks_are_those_of_transformers(base, name, tmp_path):
  transformers = pytest.importorskip('transformers', reason="needs pip install -e '.[parity]'")
  template, t = of(base, name)
  t.save(tmp_path / 'tokenizer.json')
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  theirs.chat_template = template
  for talk in (TALK, TALK[1:]):
    said = theirs.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    found = turns.encode(template, Conversation(talk), t)
    assert said['input_ids'] == found.ids.tolist()
    assert said['assistant_masks'] == found.learned.astype(int).tolist()
