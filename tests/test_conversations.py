"""Rows of every format as conversations; what is bad is told in one line, with file and line."""

import gzip
import json
import os
import time

import pyarrow
import pyarrow.parquet
import pytest

from jaxlm.data import conversations, prepare, sources, turns
from jaxlm.data import tokenizer as tok
from jaxlm.data.conversations import Conversation
from jaxlm.errors import InputError

PAIR = [{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'So.'}]
SYSTEM = {'role': 'system', 'content': 'Be brief.'}
SHARED = [{'from': 'human', 'value': 'Why?'}, {'from': 'gpt', 'value': 'So.'}]
CALL = {'type': 'function', 'function': {'name': 'look', 'arguments': {'at': 3}}}
TOOLS = [{'type': 'function', 'function': {'name': 'look'}}]

ROWS = {
  'messages': ({'messages': PAIR}, PAIR, 'messages (messages)'),
  'messages, null keys': ({'messages': [PAIR[0] | {'tool_calls': None}, PAIR[1]]}, PAIR, 'messages (messages)'),
  'parts': (
    {
      'messages': [
        {'role': 'user', 'content': [{'type': 'text', 'text': 'Wh'}, {'type': 'text', 'text': 'y?'}]},
        PAIR[1],
      ]
    },
    PAIR,
    'messages (messages)',
  ),
  'messages and other columns': ({'messages': PAIR, 'prompt': 'x', 'completion': 'y'}, PAIR, 'messages (messages)'),
  'sharegpt': ({'conversations': SHARED, 'id': 7}, PAIR, 'messages (conversations)'),
  'sharegpt, system': ({'conversations': SHARED, 'system': 'Be brief.'}, [SYSTEM, *PAIR], 'messages (conversations)'),
  'sharegpt, tool': (
    {'conversations': [SHARED[0], {'from': 'function', 'value': '3'}, SHARED[1]]},
    [PAIR[0], {'role': 'tool', 'content': '3'}, PAIR[1]],
    'messages (conversations)',
  ),
  'alpaca': (
    {'instruction': 'Why?', 'input': '', 'output': 'So.'},
    PAIR,
    'Alpaca (instruction, input, output)',
  ),
  'alpaca, input and system': (
    {'instruction': 'Sum it up.', 'input': 'It is.', 'output': 'Is.', 'system': 'Be brief.'},
    [SYSTEM, {'role': 'user', 'content': 'Sum it up.\n\nIt is.'}, {'role': 'assistant', 'content': 'Is.'}],
    'Alpaca (instruction, input, output)',
  ),
  'prompt': ({'prompt': 'Why?', 'completion': 'So.'}, PAIR, 'prompt and response (prompt, response=completion)'),
  'prompt of messages': (
    {'prompt': [SYSTEM, PAIR[0]], 'completion': [PAIR[1]]},
    [SYSTEM, *PAIR],
    'prompt and response (prompt, response=completion)',
  ),
  'question': ({'question': 'Why?', 'answer': 'So.'}, PAIR, 'prompt and response (prompt=question, response=answer)'),
  'summary': ({'document': 'Why?', 'summary': 'So.'}, PAIR, 'prompt and response (prompt=document, response=summary)'),
}


@pytest.mark.parametrize('row, messages, name', ROWS.values(), ids=ROWS.keys())
def test_formats_are_guessed_from_their_columns(row, messages, name):
  form = conversations.guess(list(row))
  assert form.name == name
  assert conversations.checked(form.read(row)).messages == messages


def test_columns_that_are_given_go_before_what_would_be_guessed():
  row = {'q': 'Why?', 'a': 'So.', 's': 'Be brief.', 'messages': 'x'}
  columns = conversations.parse_columns(('prompt=q,response=a', 'system=s'))
  assert conversations.guess(list(row), columns).read(row).messages == [SYSTEM, *PAIR]
  with pytest.raises(InputError, match='no column "r"; the columns are q, a, s, messages'):
    conversations.guess(list(row), {'prompt': 'q', 'response': 'r'})
  assert conversations.guess(['talk'], {'messages': 'talk'}).read({'talk': json.dumps(PAIR)}).messages == PAIR


@pytest.mark.parametrize('given', ['prompt', 'prompt=', 'question=q', 'prompt=q', 'prompt=q,response=a,messages=m'])
def test_columns_in_another_form_are_refused(given):
  with pytest.raises(InputError, match='--columns'):
    conversations.parse_columns((given,))


def test_columns_that_fit_nothing_are_shown():
  with pytest.raises(InputError, match=r'the columns text, id: name two with --columns'):
    conversations.guess(['text', 'id'])


@pytest.mark.parametrize('columns', [('prompt', 'completion', 'label'), ('prompt', 'chosen', 'rejected')])
def test_answers_that_are_not_wanted_are_not_learned(columns):
  with pytest.raises(InputError, match='preference rows'):
    conversations.guess(columns)


def test_tools_and_their_calls():
  call = {'function': {'name': 'look', 'arguments': '{"at": 3}'}, 'type': 'function'}
  messages = [PAIR[0], {'role': 'assistant', 'content': None, 'tool_calls': [call]}, {'role': 'tool', 'content': '4'}]
  row = {'messages': messages, 'tools': json.dumps(TOOLS)}
  found = conversations.checked(conversations.guess(list(row)).read(row))
  assert found.tools == TOOLS
  assert found.messages[1] == {'role': 'assistant', 'content': '', 'tool_calls': [CALL]}
  bare = {'role': 'assistant', 'tool_calls': [{'name': 'look', 'arguments': {'at': 3}}]}
  assert conversations.checked(Conversation([bare])).messages[0]['tool_calls'] == [CALL]


BAD = {
  'no turn of the assistant; the roles are user': [PAIR[0]],
  'an empty conversation': [],
  'message 2: unknown role "robot"': [PAIR[0], {'role': 'robot', 'content': 'x'}],
  'message 1: unknown role null': [{'content': 'x'}],
  'message 1: expected an object': ['x'],
  'message 2: a turn of the assistant without text': [PAIR[0], {'role': 'assistant', 'content': ' \n'}],
  'message 1: the user says nothing': [{'role': 'user', 'content': ''}, PAIR[1]],
  'message 1: its content is no text': [{'role': 'user', 'content': [{'type': 'image'}]}, PAIR[1]],
  'message 1: a tool call without a name': [{'role': 'assistant', 'tool_calls': [{'function': {}}]}],
  'are no JSON': [{'role': 'assistant', 'tool_calls': [{'name': 'f', 'arguments': '{'}]}],
  '"messages" must be a list, found 3': 3,
}


@pytest.mark.parametrize('why, messages', BAD.items(), ids=BAD.keys())
def test_bad_rows_are_told(why, messages):
  with pytest.raises(InputError) as error:
    conversations.checked(conversations.guess(['messages']).read({'messages': messages}))
  assert why in str(error.value) and '\n' not in str(error.value)


def test_the_prompt_says_nothing_after_the_response():
  with pytest.raises(InputError, match='has a turn of the user'):
    conversations.guess(['prompt', 'completion']).read({'prompt': 'a', 'completion': [PAIR[1], PAIR[0]]})


def read(path, **columns):
  make = conversations.Reader(columns or None)
  (file,) = sources.files([str(path)], None)
  return list(sources.read(file, make=make)), make


def jsonl(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  os.utime(path, (time.time() - 100,) * 2)
  return str(path)


def test_every_container_gives_the_same(tmp_path):
  rows = [{'messages': PAIR, 'source': 'here'}, {'messages': [SYSTEM, *PAIR], 'source': 'there'}]
  jsonl(tmp_path / 'a.jsonl', rows)
  (tmp_path / 'a.json.gz').write_bytes(gzip.compress((tmp_path / 'a.jsonl').read_bytes()))
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet')
  with pyarrow.CompressedOutputStream(str(tmp_path / 'a.jsonl.zst'), 'zstd') as packed:
    packed.write((tmp_path / 'a.jsonl').read_bytes())
  for name in ('a.jsonl', 'a.json.gz', 'a.parquet', 'a.jsonl.zst'):
    found, make = read(tmp_path / name)
    assert [Conversation.from_json(one.text).messages for one in found] == [row['messages'] for row in rows], name
    assert [(one.source, one.where, one.kind) for one in found] == [
      ('here', f'{tmp_path / name}:1', 'a'),
      ('there', f'{tmp_path / name}:2', 'a'),
    ]
    assert make.formats == {'a': 'messages (messages)'}


@pytest.mark.parametrize('nested', [False, True], ids=['columns', 'messages'])
def test_data_sets_of_tfds(tmp_path, nested):
  import tensorflow_datasets as tfds

  text = tfds.features.Text()
  features = {'messages': tfds.features.Sequence({'role': text, 'content': text})}
  features = features if nested else {'question': text, 'answer': text}
  example = {'messages': PAIR} if nested else {'question': 'Why?', 'answer': 'So.'}
  identity = tfds.core.DatasetIdentity('talks', tfds.core.Version('1.0.0'), str(tmp_path), module_name='x')
  info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
  writer = tfds.core.SequentialWriter(info, 100, file_format='array_record')
  writer.initialize_splits(['train'])
  writer.add_examples({'train': [example] * 3})
  writer.close_all()
  make = conversations.Reader()
  (file,) = sources.files([f'tfds:{tmp_path}'], None)
  found = list(sources.read(file, make=make))
  assert [Conversation.from_json(one.text).messages for one in found] == [PAIR] * 3
  assert found[2].where == f'{file.path}:3'


def test_text_has_no_rows(tmp_path):
  (tmp_path / 'a.txt').write_text('once')
  with pytest.raises(InputError, match='no rows in there'):
    read(tmp_path / 'a.txt')


def test_bad_rows_are_counted_and_listed(tmp_path):
  t = tok.train(['Why? So. user assistant ' * 9], 300).with_controls(turns.BUILT_IN['chatml'])
  rows = [{'messages': PAIR}, {'messages': PAIR[:1]}, {'messages': [PAIR[0] | {'role': 'robot'}, PAIR[1]]}]
  source = jsonl(tmp_path / 'a.jsonl', [*rows, {'messages': PAIR}, {'other': 1}])
  chat = prepare.Chat(turns.choose('chatml', None)[1])
  how = {'val_fraction': 0.0, 'chat': chat}
  with pytest.raises(InputError, match=r'a.jsonl:2: no turn of the assistant'):
    prepare.prepare([source], t, tmp_path / 'out', **how)
  with pytest.raises(InputError, match=r'3 bad records are more than max_bad=2; the last is .*a.jsonl:5'):
    prepare.prepare([source], t, tmp_path / 'out', max_bad=2, **how)
  summary = prepare.prepare([source], t, tmp_path / 'out', max_bad=3, **how)
  assert summary.read() == {'a': {'read': 5, 'duplicate': 1, 'empty': 0, 'too long': 0, 'bad': 3, 'kept': 1}}
  told = [json.loads(line)['why'] for line in (tmp_path / 'out' / 'quarantine.jsonl').read_text().splitlines()]
  assert [why.split(': ', 1)[0] for why in told] == [f'{source}:{line}' for line in (2, 3, 5)]


def test_what_a_template_refuses_is_a_bad_row(tmp_path):
  t = tok.train(['Why? So. user assistant ' * 9], 300).with_controls(turns.BUILT_IN['mistral'])
  source = jsonl(tmp_path / 'a.jsonl', [{'messages': PAIR}, {'messages': [*PAIR, SYSTEM, *PAIR]}])
  chat = prepare.Chat(turns.choose('mistral', None)[1])
  with pytest.raises(InputError, match=r'a.jsonl:2: chat template: .*no place for a message of system'):
    prepare.prepare([source], t, tmp_path / 'out', val_fraction=0.0, chat=chat)
  summary = prepare.prepare([source], t, tmp_path / 'out', val_fraction=0.0, chat=chat, max_bad=1)
  assert summary.dropped['bad'] == {'a': 1} and summary.splits['train'].documents == 1
