"""Prompts of reinforcement learning: rows in the forms that users have, each once, and tasks with their settings."""

import json

import pytest

from jaxlm.errors import InputError
from jaxlm.rl import prompts


def written(tmp_path, *rows):
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
  return str(tmp_path / 'rows.jsonl')


def test_forms_of_rows(tmp_path):
  user, said = {'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'So.'}
  path = written(
    tmp_path,
    {'prompt': 'Who?', 'answer': 'Me.'},
    {'prompt': [user], 'chosen': [said], 'rejected': [said]},
    {'messages': [{'role': 'system', 'content': 'Be brief.'}, user, said], 'level': 3},
    {'instruction': 'Add.', 'input': '1 and 2', 'output': '3'},
    {'question': 'When?', 'answer': 'Now.'},
    {'prompt': 'Who?', 'answer': 'You.'},  # asked already: the later answer counts
  )
  found = prompts.rows(path, 0)
  assert [prompts.messages(row)[-1]['content'] for row in found] == ['Who?', 'Why?', 'Why?', 'Add.\n\n1 and 2', 'When?']
  assert [row.get('answer') for row in found] == ['You.', None, 'So.', '3', 'Now.']
  assert len(prompts.messages(found[2])) == 2 and found[2]['level'] == 3


@pytest.mark.parametrize(
  'row, why',
  [
    ({'text': 'a'}, r'rows.jsonl:1: no known format'),
    ({'messages': [{'role': 'assistant', 'content': 'a'}]}, 'rows.jsonl:1: a conversation in which no user asks'),
  ],
)
def test_what_is_no_prompt_is_told(tmp_path, row, why):
  with pytest.raises(InputError, match=why):
    prompts.rows(written(tmp_path, row), 0)


def test_tasks_take_settings():
  pytest.importorskip('reasoning_gym', reason="needs pip install -e '.[rl]'")
  found = prompts.rows('gym:chain_sum,max_terms=2,max_digits=1', 0)
  assert len(found) == len({row['prompt'] for row in found}) == 200  # all there are
  for spec, why in {
    'max_tems=2': 'max_tems',
    'max_terms': 'settings such as',
    'max_terms=two': 'settings such as',
  }.items():
    with pytest.raises(InputError, match=why):
      prompts.rows(f'gym:chain_sum,{spec}', 0)
