"""Sources: which files a spec stands for, what a document is, and one clear line with file and line for bad input."""

import json
from pathlib import Path

import pytest

from jaxlm.data import sources
from jaxlm.errors import InputError


def write(path: Path, content: str | bytes) -> str:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def refused(path: Path, content: bytes) -> str:
  with pytest.raises(InputError) as info:
    list(sources.documents([write(path, content)]))
  assert '\n' not in str(info.value)
  return str(info.value)


def test_text_is_one_document_a_file_byte_for_byte(tmp_path):
  text = 'नमस्ते\r\n\r\n  Ishmael\t\x00\u2028 é\n'
  path = write(tmp_path / 'novels' / 'moby.txt', text)
  assert list(sources.documents([path])) == [(text, 'novels', f'{path}:1', 'novels')]


def test_jsonl_is_one_document_a_line(tmp_path):
  second = json.dumps({'text': '', 'source': 'web', 'other': 1})
  lines = [json.dumps({'text': 'one\ntwo'}), '', second, '{"text": "é"}']
  path = write(tmp_path / 'mixed.jsonl', '\n'.join(lines))
  assert list(sources.documents([path])) == [
    ('one\ntwo', 'mixed', f'{path}:1', 'mixed'),
    ('', 'web', f'{path}:3', 'mixed'),
    ('é', 'mixed', f'{path}:4', 'mixed'),
  ]


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl'])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
  content = {'a.txt': 'text', 'a.jsonl': '{"text": "text"}\n'}[name]
  assert [d.text for d in sources.documents([write(tmp_path / name, '\ufeff' + content)])] == ['text']


def test_folders_and_globs(tmp_path):
  for name in ['b/2.txt', 'b/1.txt', 'b/deep/er/3.md', 'b/.hidden/no.txt', 'b/.no.txt', 'a/4.txt', 'a/5.jsonl']:
    write(tmp_path / name, '{"text": "x"}')

  def found(*specs: str) -> list[str]:
    paths = sources.files([f'{tmp_path}/{spec}' for spec in specs])
    return [str(file.path).removeprefix(f'{tmp_path}/') for file in paths]

  assert found('b') == ['b/1.txt', 'b/2.txt', 'b/deep/er/3.md']
  assert found('*/*.txt') == ['a/4.txt', 'b/1.txt', 'b/2.txt']
  assert found('**/*.md') == found('b/**/*.md') == found('**/er/*') == ['b/deep/er/3.md']
  assert found('b/[1-1].txt') == found('b/?.txt')[:1] == ['b/1.txt']
  assert found('b/2.txt', 'a/**', 'b/*.txt') == ['b/2.txt', 'a/4.txt', 'a/5.jsonl', 'b/1.txt']  # each once


def test_a_file_with_glob_characters_in_its_name_is_that_file(tmp_path):
  path = write(tmp_path / 'a[1].txt', 'x')
  assert [str(file.path) for file in sources.files([path])] == [path]


def test_reading_is_lazy(tmp_path):
  path = write(tmp_path / 'a.jsonl', '{"text": "good"}\nbad\n')
  documents = sources.documents([path])
  assert next(documents).text == 'good'
  with pytest.raises(InputError, match=':2: not JSON'):
    next(documents)


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (b'{"text": "cut', ':2: not JSON'),
    (b'["text"]', ':2: expected a JSON object with a string "text", found list'),
    (b'{"body": "x", "id": 3}', ':2: no "text"; its keys are body, id: name the one with the text (--text-column)'),
    (b'{"messages": []}', ':2: no "text"; its keys are messages: name'),
    (b'{}', ':2: no "text"; it is empty'),
    (b'{"text": 3}', ':2: "text" must be a string, found 3'),
    (b'{"text": null}', ':2: "text" must be a string, found null'),
    (b'{"text": ["a", "b"]}', ':2: "text" must be a string, found ["a", "b"]'),
    (b'{"text": "x", "source": 3}', ':2: "source" must be a string, found 3'),
    (b'{"text": "ab\\ud800"}', ':2: "text" has half of a surrogate pair at character 2'),
    (b'{"text": "\xff"}', ':2: not UTF-8: byte 11 of the line is 0xff'),
    (b'[' * 100_000, ':2: not JSON'),
  ],
)
def test_bad_jsonl_names_file_and_line(tmp_path, line, message):
  path = tmp_path / 'a.jsonl'
  assert refused(path, b'{"text": "good"}\n' + line + b'\n').startswith(f'{path}{message}')


def test_json_is_lines_and_never_text(tmp_path):
  path = write(tmp_path / 'c4-train.00003-of-01024.json', '{"text": "one"}\n{"text": "two"}\n')
  assert [(d.text, d.kind) for d in sources.documents([path])] == [('one', 'c4-train'), ('two', 'c4-train')]
  assert ':1: a JSON array: write one object a line' in refused(tmp_path / 'a.json', b'[\n {"text": "x"}\n]\n')
  assert ':1: not JSON' in refused(tmp_path / 'b.json', b'{\n "text": "x"\n}\n')


def test_invalid_utf8_in_text_names_line_and_byte(tmp_path):
  message = refused(tmp_path / 'a.txt', 'é\nsecond\nthé'.encode() + b'\xe9 x')
  assert message.startswith(f'{tmp_path}/a.txt:3: not UTF-8: byte 5 of the line is 0xe9')


@pytest.mark.parametrize('spec', ['missing.txt', 'missing/*.txt', '*.md', 'empty'])
def test_a_spec_without_a_file_is_named(tmp_path, spec):
  write(tmp_path / 'there.txt', 'x')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(InputError, match='no such file, and no file matches') as info:
    list(sources.documents([str(tmp_path / 'there.txt'), str(tmp_path / spec)]))
  assert str(info.value).startswith(str(tmp_path / spec))


@pytest.mark.parametrize(('name', 'content'), [('a.txt', ' \n'), ('a.jsonl', '\n'), ('a.jsonl', '{"text": ""}\n')])
def test_an_empty_corpus_is_refused(tmp_path, name, content):
  assert 'no text in there' in refused(tmp_path / name, content.encode())


def test_terms_of_a_mixture(tmp_path):
  write(tmp_path / 'a*2', 'x')
  kinds = [
    (t.spec, t.kind, t.weight and float(t.weight)) for t in sources.terms(['wiki=d/*.jsonl*0.5 + code*0.3', 'x*1'])
  ]
  assert kinds == [('d/*.jsonl', 'wiki', 0.5), ('code', None, 0.3), ('x', None, 1.0)]
  assert sources.terms([f'{tmp_path}/a*2'])[0] == (f'{tmp_path}/a*2', None, None)  # it exists as it stands
  assert sources.terms(['a=b + c']) == [('b', 'a', None), ('c', None, None)]
  for specs, why in [(['a*1 + b'], 'b: has no weight'), (['a*0'], 'a weight must be above 0')]:
    with pytest.raises(InputError, match=why):
      sources.terms(specs)


def test_kinds_and_their_weights(tmp_path):
  for name in ('web/c4-00000-of-00002.jsonl', 'web/c4-00001-of-00002.jsonl', 'books/b.txt', 'x.jsonl'):
    write(tmp_path / name, '{"text": "x"}')
  kinds = lambda *specs: [file.kind for file in sources.files([f'{tmp_path}/{spec}' for spec in specs])]
  assert kinds('web', 'books', 'x.jsonl') == ['c4', 'c4', 'books', 'x']
  assert {d.kind for d in sources.documents([f'crawl={tmp_path}/**'])} == {'crawl'}
  assert sources.weights([f'{tmp_path}/web*0.7 + novel={tmp_path}/books*0.3']) == {'c4': 0.7, 'novel': 0.3}
  assert sources.weights([f'{tmp_path}/web']) == {}
  with pytest.raises(InputError, match='a weight is for one kind, and this holds books, c4, x'):
    sources.weights([f'{tmp_path}/**/*.**1'])
  with pytest.raises(InputError, match="'c4' has a weight already"):
    sources.weights([f'{tmp_path}/web*1 + c4={tmp_path}/books*2'])


def test_another_column(tmp_path):
  path = write(tmp_path / 'a.jsonl', '{"content": "x", "text": 1}\n')
  assert [d.text for f in sources.files([path], 'content') for d in sources.read(f)] == ['x']
  with pytest.raises(InputError, match='a.jsonl:1: no "body"; its keys are content, text'):
    list(sources.read(sources.files([path], 'body')[0]))
