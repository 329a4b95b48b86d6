"""What is kept of choices between two answers: what is refused, what a line is, and what a full disk leaves."""

import json
import multiprocessing
import resource
import signal
import threading

import pytest

pytest.importorskip('starlette', reason="pip install -e '.[serve]'")

from jaxlm.data import preferences  # noqa: E402
from jaxlm.errors import InputError  # noqa: E402
from jaxlm.serve import choices  # noqa: E402
from jaxlm.serve.api import Refused  # noqa: E402

SAID = {
  'prompt': [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'नमस्ते?'}],
  'chosen': 'नमस्ते!\nHow are you?',
  'rejected': '<img src=x onerror=alert(1)>',
  'chosen_by': {'model': 'a', 'temperature': 0.5, 'seed': 7, 'finish_reason': 'stop'},
  'rejected_by': {'model': 'b', 'top_p': 0.9, 'max_tokens': 5, 'finish_reason': 'length'},
}


def test_a_row_is_a_preference():
  row = choices.row(SAID, ('a', 'b'))
  found = preferences.checked(preferences.guess(list(row)).read(row))
  assert [answer.messages[:-1] for answer in found.answers] == [SAID['prompt']] * 2
  assert [answer.messages[-1]['content'] for answer in found.answers] == [SAID['chosen'], SAID['rejected']]
  assert row['chosen_by'] == SAID['chosen_by'] and row['rejected_by']['finish_reason'] == 'length'


def called(arguments):
  """A prompt in which the model has called something."""
  return [{'role': 'assistant', 'tool_calls': [{'function': {'name': 'f', 'arguments': arguments}}]}, *SAID['prompt']]


WRONG = [
  {'prompt': []},
  {'prompt': [{'role': 'user', 'content': ''}]},
  {'prompt': [{'role': 'nobody', 'content': 'x'}]},
  {'prompt': ['x']},
  {'prompt': [*SAID['prompt'], {'role': 'assistant', 'content': 'x'}]},
  {'prompt': 'text'},
  {'chosen': ''},
  {'chosen': ' \n'},
  {'rejected': 3},
  {'rejected': SAID['chosen'] + ' '},
  {'chosen_by': None},
  {'chosen_by': {'model': 'c'}},
  {'chosen_by': {'model': ['a']}},
  {'chosen_by': {'model': 'a', 'temperature': -1}},
  {'chosen_by': {'model': 'a', 'seed': 2**63}},
  {'chosen_by': {'model': 'a', 'finish_reason': 'x' * 999}},
  {'chosen_by': {'model': 'a', 'more': 1}},
  {'more': 1},
  {'prompt': called('{"a": NaN}')},
  {'prompt': called('{"a": "\\ud800"}')},
  {'prompt': called('[' * 70 + ']' * 70)},
  {'prompt': called('[' * 900 + ']' * 900)},
  {'prompt': called('[' * 99_999 + ']' * 99_999)},
]


@pytest.mark.parametrize('wrong', WRONG, ids=lambda x: str(x)[:40])
def test_what_is_no_choice(wrong):
  with pytest.raises(Refused) as error:
    choices.row(SAID | wrong, ('a', 'b'))
  assert error.value.status == 400


def lines(path):
  return [json.loads(line) for line in path.read_text('utf-8').split('\n')[:-1]]


def test_lines_of_many_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(choices, 'BURST', 1000.0)
  path = tmp_path / 'new' / 'choices.jsonl'
  files = [choices.Choices(str(path)) for _ in range(3)]  # as of three servers
  write = lambda n: [files[n % 3].append({'n': n, 'text': 'ह\n' * 500}) for _ in range(9)]
  threads = [threading.Thread(target=write, args=(n,)) for n in range(9)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(row['n'] for row in lines(path)) == sorted(list(range(9)) * 9)


def test_too_many_in_a_short_time(tmp_path):
  file = choices.Choices(str(tmp_path / 'choices.jsonl'))
  with pytest.raises(Refused, match='too many') as error:
    for n in range(int(choices.BURST) + 5):
      file.append({'n': n})
  assert error.value.status == 429 and choices.BURST <= len(lines(file.path)) < choices.BURST + 5


def test_a_last_line_without_its_end(tmp_path):
  path = tmp_path / 'choices.jsonl'
  path.write_text('{"n": 1}')
  file = choices.Choices(str(path))
  file.append({'n': 2})
  path.rename(tmp_path / 'old.jsonl')  # and the next one goes into a new file
  file.append({'n': 3})
  assert lines(tmp_path / 'old.jsonl') == [{'n': 1}, {'n': 2}] and lines(path) == [{'n': 3}]


def _write_past_the_limit(path):
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  file = choices.Choices(path)
  file.append({'n': 1})
  resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
  try:
    file.append({'n': 2, 'text': 'long ' * 9})
  except Refused as error:
    raise SystemExit(0 if error.status == 503 else 1) from None
  raise SystemExit(2)


def test_a_line_that_does_not_fit_is_taken_back(tmp_path):
  path = tmp_path / 'choices.jsonl'
  process = multiprocessing.get_context('spawn').Process(target=_write_past_the_limit, args=(str(path),))
  process.start()
  process.join()
  assert process.exitcode == 0 and path.read_text() == '{"n": 1}\n'


def test_a_full_file_takes_no_more(tmp_path, monkeypatch):
  monkeypatch.setattr(choices, 'FULL', 30)
  file = choices.Choices(str(tmp_path / 'choices.jsonl'))
  file.append({'n': 1})
  with pytest.raises(Refused) as error:
    file.append({'n': 'x' * 30})
  assert error.value.status == 503 and lines(file.path) == [{'n': 1}]


@pytest.mark.parametrize('path', ['gs://bucket/choices.jsonl', '/dev/null/choices.jsonl', '/'])
def test_a_file_that_cannot_be_written(path):
  with pytest.raises(InputError, match='--choices'):
    choices.Choices(path)
