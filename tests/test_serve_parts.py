"""Serving's parts alone: text as tokens come, calls in answers, settings of requests, the engine without a network."""

import dataclasses
import json
import queue
import socket
import threading
import traceback

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import model

from jaxlm import interop, models, sample, sharding
from jaxlm.data import tokenizer as tok
from jaxlm.data import turns
from jaxlm.loops import writing
from jaxlm.serve import answers, api, app, engine, metrics, slots, start, text, tools
from jaxlm.serve.engine import Ask, Bank, Closed, Engine, Full, Piece, Settings
from jaxlm.serve.line import Line

WORDS = tok.train(['the whale, the sea and the ship: नमस्ते दुनिया, 日本語 and 🐋🐳 ' * 9], 300)
SAID = st.text(alphabet='the wale, sआनमस्ते日本🐋\ufffdé\n', max_size=40)


def grown(words, ids, stop=()):
  """What `Text` tells of each token, and at the end."""
  growing, told = text.Text(words, stop), []
  for i in ids:
    told.append(growing.add(i))
    if growing.stopped:
      return told, growing
  return [*told, growing.finish()], growing


@given(SAID)
@settings(max_examples=200, deadline=None)
def test_pieces_of_text_are_the_text(said):
  pieces, _ = grown(WORDS, WORDS.encode(said))
  assert ''.join(pieces) == said
  assert all(text.BROKEN not in piece for piece in pieces) or text.BROKEN in said


@given(SAID, st.lists(st.text(alphabet='the wale, s🐋', min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_nothing_of_a_stop_string_is_told(said, stop):
  pieces, growing = grown(WORDS, WORDS.encode(said), stop)
  ends = [at for s in stop if (at := said.find(s)) >= 0]
  assert growing.stopped == bool(ends)
  whole = ''.join(pieces)
  assert said.startswith(whole) and not any(s in whole for s in stop)
  assert len(whole) in (ends or [len(said)])


def test_bytes_that_are_no_text_come_all_the_same():
  """As whole text decodes, where it is a letter's beginning at the end, and after a long run of them."""
  whale = WORDS.encode('🐋')
  assert len(whale) == 4 or len(whale) > 1
  for ids in (whale[:1], whale[:1] * 40, [*whale[:1], *WORDS.encode('the')]):
    assert ''.join(grown(WORDS, ids)[0]) == WORDS.decode(ids)


def test_spelling():
  spelling = text.Spelling(WORDS)
  for said in ('the whale', 'नमस्ते', '🐋\n'):
    assert b''.join(spelling.bytes(i) for i in WORDS.encode(said)) == said.encode()
  assert spelling.text(WORDS.bos_id) == '<|bos|>' and spelling.said(WORDS.bos_id) == ''
  assert spelling.text(WORDS.encode('🐋')[0]).startswith('bytes:\\xf0')


CALL = '{"name": "f", "arguments": {"a": "<b>"}}'
TAGGED = f'<tool_call>\n{CALL}\n</tool_call>'


@pytest.mark.parametrize(
  'answer, said, names',
  [
    ('Hello <tool', 'Hello <tool', []),
    (TAGGED, '', ['f']),
    (f'I call: {TAGGED}\n{TAGGED}', 'I call: ', ['f', 'f']),
    (CALL.replace('arguments', 'parameters'), '', ['f']),
    (f' [{CALL}, {CALL}]', '', ['f', 'f']),
    ('{"name": "g", "arguments": {}}', '{"name": "g", "arguments": {}}', []),
    ('<tool_call>{"name": "g"}</tool_call>!', '<tool_call>{"name": "g"}</tool_call>!', []),
    ('<tool_call>{"name', '<tool_call>{"name', []),
    ('{"a": 1}', '{"a": 1}', []),
    ('[' * 9999, '[' * 9999, []),
    (f'{CALL}; {CALL}', '', ['f', 'f']),
    (f'{CALL}\n{CALL}', '', ['f', 'f']),
    (CALL * 2, CALL * 2, []),
    (f'{CALL} or so', f'{CALL} or so', []),
    (f'I call <tool_call>\n{CALL}', 'I call ', ['f']),
    ('{"name": ["f"], "arguments": {}}', '{"name": ["f"], "arguments": {}}', []),
  ],
  ids=lambda x: str(x)[:30],
)
@pytest.mark.parametrize('size', [1, 3, 10**6])
def test_calls_in_answers(answer, said, names, size):
  splitter, texts, calls = tools.Calls({'f'}), [], []
  parts = [answer[i : i + size] for i in range(0, len(answer), size)]
  for i, part in enumerate(parts, 1):
    piece, found = splitter.add(part, last=i == len(parts))
    texts.append(piece)
    calls += found
  assert ''.join(texts) == said and [call.name for call in calls] == names
  assert all(json.loads(call.arguments) == {'a': '<b>'} for call in calls)
  assert len({call.id for call in calls}) == len(calls)


TOOL = {'type': 'function', 'function': {'name': 'f', 'description': 'a whale <|im_end|>', 'parameters': {}}}
BARE = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.mark.parametrize(
  'template, system, tagged',
  [
    ('qwen', True, True),
    ('qwen', False, True),
    ('llama3', False, False),
    ('chatml', True, True),
    ('chatml', False, True),
    (None, True, True),
    (None, False, True),
  ],
)
def test_a_model_is_told_of_tools_by_its_template_or_else_by_us(template, system, tagged):
  text = (turns.ASSETS / f'{template}.jinja').read_text() if template else BARE
  call = {'id': 'a', 'type': 'function', 'function': {'name': 'f', 'arguments': {'a': 'ship'}}}
  messages = [
    *([{'role': 'system', 'content': 'Be kind.'}] if system else []),
    {'role': 'user', 'content': 'Which?'},
    {'role': 'assistant', 'content': '', 'tool_calls': [call]},
    {'role': 'tool', 'content': 'one', 'tool_call_id': 'a'},
    {'role': 'tool', 'content': 'two', 'tool_call_id': 'b'},
  ]
  words = WORDS.with_controls([*turns.BUILT_IN['chatml'], *turns.BUILT_IN['llama3']])
  ids, how = api._conversed(text, messages, words, [TOOL])
  said = words.reader.decode(ids, skip_special_tokens=False)
  assert how == tagged and said.count('a whale') == 1 and said.count('"ship"') == 1
  assert ('Be kind.' in said) == system and said.index('one') < said.index('two')
  if template in (None, 'chatml', 'qwen'):
    turn = sum(i == words.control_id('<|im_start|>') for i in ids)
    assert turn - sum(i == words.control_id('<|im_end|>') for i in ids) == 1  # what the description spells is text


@pytest.mark.parametrize(
  'asked, read', [(1e-300, 0.0), (9.99e-4, 0.0), (0, 0.0), (1e-3, 1e-3), (0.7, 0.7), (100, 100.0)]
)
def test_temperatures_below_a_thousandth_are_0(tiny, asked, read):
  body = {'model': 'tiny', 'prompt': 'a', 'temperature': asked}
  assert api.completion(body, {'tiny': start._served('tiny', tiny, None)}, api.Limits()).settings.temperature == read


@pytest.mark.parametrize('value, deep', [([[]], False), ({'a': [{}] * 3}, False)])
def test_depth(value, deep):
  assert (api._depth(value) > api.DEPTH) == deep
  for _ in range(api.DEPTH):
    value = [value]
  assert api._depth(value) > api.DEPTH


@pytest.mark.parametrize('value', [r'"\ud800"', '1e999', 'NaN'])
def test_what_cannot_be_told_as_json_is_no_call(value):
  said = f'<tool_call>{{"name": "f", "arguments": {{"x": {value}}}}}</tool_call>'
  assert tools.Calls({'f'}).add(said, last=True) == (said, [])


def test_metrics_are_what_prometheus_reads():
  found = metrics.Metrics()
  found.add('requests', 1_234_567, route='/v1', status='2"0\\0')
  found.observe('first_token_seconds', 0.3)
  found.observe('first_token_seconds', 1e9)
  lines = found.text({'live': 3}).splitlines()
  assert 'jaxlm_requests_total{route="/v1",status="2\\"0\\\\0"} 1234567' in lines and 'jaxlm_live 3' in lines
  buckets = [line for line in lines if line.startswith('jaxlm_first_token_seconds_bucket')]
  assert buckets[4].endswith('{le="0.25"} 0') and buckets[5].endswith('{le="0.5"} 1') and buckets[-1].endswith(' 2')
  assert 'jaxlm_first_token_seconds_count 2' in lines


@pytest.fixture(scope='module')
def tiny() -> interop.Model:
  return model()


@pytest.fixture(scope='module')
def bank(tiny):
  bank = Bank(tiny.cfg, tiny.params, tiny.tokenizer, rows=2, context=192, lobbies=2)
  bank.warm()
  return bank


@pytest.fixture
def running(bank):
  """An engine, and what asks it: (text, ...) -> (the ask, the queue of its pieces)."""
  found = Engine({'tiny': bank}, queue=3)
  found.start()
  yield found
  found.close()
  bank.waiting.clear()


def asking(bank, said, **how):
  told: queue.Queue[Piece] = queue.Queue()
  how = {'most': 10, 'settings': Settings(temperature=0.0)} | how
  return Ask(prompt=bank.tokenizer.prefix_ids + bank.tokenizer.encode(said), deliver=told.put, **how), told


def answer(told):
  pieces = [told.get(timeout=60)]
  while pieces[-1].finish is None:
    pieces.append(told.get(timeout=60))
  return pieces


@pytest.mark.slow
def test_more_than_may_wait_are_refused_together(bank, running):
  asks = [asking(bank, 'a')[0] for _ in range(4)]
  with pytest.raises(Full, match='0 requests wait already'):
    running.submit('tiny', asks)
  assert running.waiting() == 0
  ask, told = asking(bank, 'a')
  running.submit('tiny', [ask])
  assert answer(told)[-1].finish == 'length'


def test_who_is_cancelled_hears_no_more(bank, running):
  first, told = asking(bank, 'a', most=150)
  waiting = [asking(bank, 'b', most=150) for _ in range(3)]
  running.submit('tiny', [first])
  told.get(timeout=60)
  running.submit('tiny', [ask for ask, _ in waiting])
  running.cancel([first, *(ask for ask, _ in waiting)])
  ask, last = asking(bank, 'c', most=5)
  while True:
    try:
      running.submit('tiny', [ask])
      break
    except Full:
      pass
  assert answer(last)[-1].made == 5
  assert running.live() == running.waiting() == 0 and running.metrics.count('cancelled') == 4
  assert all(piece.finish is None for piece in list(told.queue))


def test_the_context_ends_an_answer(bank, running):
  ask, told = asking(bank, 'the whale ' * 9, most=10**6)
  running.submit('tiny', [ask])
  last = answer(told)[-1]
  assert last.finish == 'length' and last.made == 192 - len(ask.prompt)


def test_the_same_after_any_prompt(bank, running):
  """Whether a prompt was read from its beginning or went on from what an earlier one had in common with it."""
  long = 'the whale and the sea ' * 8
  results = []
  for said in (long + 'one', 'quite another', long + 'two', long + 'one', 'one', long + 'one', long + 'two'):
    ask, told = asking(bank, said, told=2, settings=Settings(temperature=1.0), seed=4)
    running.submit('tiny', [ask])
    pieces = answer(told)
    results.append((''.join(p.text for p in pieces), [t for p in pieces for t in p.tokens], pieces[0].cached))
  assert results[0][:2] == results[3][:2] == results[5][:2] and results[2][:2] == results[6][:2]
  assert results[0][2] == 0 and results[2][2] >= engine.READ and results[0][:2] != results[2][:2]
  ask, told = asking(bank, 'one', most=0, scored=True)  # by another program
  running.submit('tiny', [ask])
  assert answer(told)[-1].made == 0
  ask, told = asking(bank, 'one', told=2, settings=Settings(temperature=1.0), seed=4)
  running.submit('tiny', [ask])
  pieces = answer(told)
  assert pieces[0].cached == 0 and [t for p in pieces for t in p.tokens] == results[4][1]


def test_short_answers_come_before_the_rest_of_many_long_ones():
  line, ask = Line(), lambda most: Ask(prompt=[0] * 5, most=most, deliver=lambda piece: None)
  long = [ask(200) for _ in range(4)]
  line.join(long)
  assert line.take(brief=True) is None and line.take(brief=False) is long[0]
  taken = []
  while long[1] not in taken:  # each comes after the one before it was taken
    line.join([ask(8)])
    taken.append(line.take(brief=False))
  assert 5 < len(taken) < 30
  long[2].cancelled = True
  assert len(line) == 3 and line.drop_cancelled() == 1 and long[3] in list(line)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_what_cannot_be_answered_is_said(bank, tiny):
  """A device that fails takes all answers with it; nobody waits for ever."""
  bank = Bank(tiny.cfg, tiny.params, tiny.tokenizer, rows=2, context=192, lobbies=1)
  failing = Engine({'tiny': bank})
  bank.state = None  # its buffers are gone
  failing.start()
  asks = [asking(bank, 'a') for _ in range(3)]
  failing.submit('tiny', [ask for ask, _ in asks])
  assert [answer(told)[-1].finish for _, told in asks] == ['error'] * 3
  with pytest.raises(Closed, match='the engine has failed'):
    failing.submit('tiny', [asks[0][0]])
  failing.close()


def test_scores_do_not_depend_on_the_piece(bank, running):
  """Of a prompt of more than one piece: those of the second are given all that is before them, however long it is."""
  said = 'call me ishmael some years ago never mind how long precisely having little or no money ' * 2
  prompt, found = bank.tokenizer.prefix_ids + bank.tokenizer.encode(said), []
  for length in (engine.READ + engine.SHORT - 12, engine.READ + engine.SHORT + 13):
    ask, told = asking(bank, '', most=0, scored=True, told=1)
    ask.prompt = prompt[:length]
    running.submit('tiny', [ask])
    (piece,) = answer(told)
    found.append([t.logp for t in piece.prompt])
  assert [len(x) for x in found] == [84, 109] and found[0][0] is None
  np.testing.assert_array_equal(found[0][1:], found[1][1:84])


def test_a_prompt_that_was_given_up_lends_no_end_that_is_not_its_own(bank):
  """Where a part of it is a whole prompt of somebody else's: what comes after that is not what came after another."""
  found, told = Engine({'tiny': bank}), []
  ask = lambda prompt: Ask(prompt=prompt, most=2, deliver=told.append, told=3, settings=Settings(temperature=0.0))

  def answered(prompt: list[int]) -> tuple[int, list[engine.Token]]:
    told.clear()
    found.submit('tiny', [ask(prompt)])
    while bank.busy():
      found._turn(bank)
    return told[0].cached, [token for piece in told for token in piece.tokens]

  long = [7 + i % 90 for i in range(2 * engine.READ)]
  expected = answered(long[: engine.READ])
  for other in ([5, 6], [6, 5]):  # both lobbies have an end of another prompt
    answered(other)
  given_up = ask(long)
  found.submit('tiny', [given_up])
  assert found._read(bank) and bank.arriving is not None
  found.cancel([given_up])
  assert answered(long[: engine.READ]) == expected == (0, expected[1])


def test_talks_that_begin_alike_are_both_kept(bank):
  """The second takes a copy of what they share, in place of what nobody used for longest."""
  found, told = Engine({'tiny': bank}), []

  def answered(prompt: list[int]) -> tuple[int, list[engine.Token]]:
    told.clear()
    ask = Ask(prompt=prompt, most=2, deliver=told.append, told=3, settings=Settings(temperature=0.0))
    found.submit('tiny', [ask])
    while bank.busy():
      found._turn(bank)
    return told[0].cached, [token for piece in told for token in piece.tokens]

  def forgotten() -> None:
    answered([5, 6]), answered([6, 5])

  shared = [11 + i % 83 for i in range(engine.READ)]
  talks, expected = [shared + [20 + i] * (engine.READ + 7) for i in range(2)], []
  for talk in talks:
    forgotten()
    expected.append(answered(talk)[1])
  forgotten()
  assert [answered(talk) for talk in talks] == [(0, expected[0]), (engine.READ, expected[1])]
  assert [answered(talk) for talk in talks] == [(len(talk), want) for talk, want in zip(talks, expected, strict=True)]
  kept = [len(talk) // engine.READ * engine.READ for talk in talks]
  assert [answered([*talk, 9, 9])[0] for talk in talks] == kept


def test_a_key_is_compared_in_constant_time(running, tiny, monkeypatch):
  """Every request's, and as a digest, whose length says nothing of the key's."""
  seen, compare = [], app.hmac.compare_digest
  monkeypatch.setattr(app.hmac, 'compare_digest', lambda *given: seen.append(given) or compare(*given))
  limits = api.Limits(context=64, tokens=64)
  service = app.Service(running, {'tiny': start._served('tiny', tiny, None)}, limits, app.Settings(key='secret'))
  guard = app.Guard(None, service)
  refused = lambda key: guard._refused('/v1/models', {b'authorization': b'Bearer ' + key})
  assert refused(b'secret') is None and [refused(key).status for key in (b's', b'secre', b'secret' * 99)] == [401] * 3
  assert len(seen) == 4 and {len(part) for given in seen for part in given} == {32}


def test_nothing_is_compiled_again(bank, running):
  sizes = [f._cache_size() for f in (slots.read, slots.enter, slots.advance)]
  for how in ({'scored': True, 'told': 3}, {'settings': Settings(1.0, 5, 0.5, 0.1, 2.0, 1.0, 1.0)}, {'bias': {5: 1.0}}):
    ask, told = asking(bank, 'the whale', **how)
    running.submit('tiny', [ask])
    assert answer(told)[-1].finish == 'length'
  assert [f._cache_size() for f in (slots.read, slots.enter, slots.advance)] == sizes and sizes[2] == 1


def test_long_answers_leave_slots_to_short_ones(tiny):
  """A quarter of them: with eight slots six long answers are written at once, and a short one does not wait for any."""
  bank = Bank(tiny.cfg, tiny.params, tiny.tokenizer, rows=8, context=192, lobbies=2)
  found, ends = Engine({'tiny': bank}), []
  note = lambda name: lambda piece: ends.append(name) if piece.finish else None
  ask = lambda name, most: Ask(prompt=[5, 6, 7], most=most, deliver=note(name))
  found.submit('tiny', [ask('long', 170) for _ in range(9)])
  for _ in range(9):
    found._turn(bank)
  assert bank.live == 6 and found.waiting() == 3
  found.submit('tiny', [ask('short', 3), ask('short', 3)])
  while bank.busy():
    found._turn(bank)
  assert ends[:2] == ['short', 'short'] and len(ends) == 11


@pytest.mark.slow
def test_a_mesh_answers_the_same(bank, running, tiny):
  """Slots over two devices and weights over two others; nothing is compiled after the beginning."""
  mesh = sharding.make_mesh(data=2, tensor=2, fsdp=1, devices=jax.devices()[:4])
  spread = Bank(tiny.cfg, tiny.params, tiny.tokenizer, rows=2, context=192, lobbies=2, mesh=mesh)
  spread.warm()
  assert len(spread.state.cache[0].k.sharding.device_set) == 4
  sizes = [f._cache_size() for f in (slots.read, slots.enter, slots.advance)]
  both = Engine({'spread': spread})
  both.start()
  for said, how in (('the whale ' * 9, {}), ('a sea', {'settings': Settings(1.0, top_p=0.9), 'seed': 3})):
    texts = []
    for engine_, name in ((running, 'tiny'), (both, 'spread')):
      ask, told = asking(bank, said, told=1, **how)
      engine_.submit(name, [ask])
      texts.append(''.join(piece.text for piece in answer(told)))
    assert texts[0] == texts[1]
  both.close()
  assert [f._cache_size() for f in (slots.read, slots.enter, slots.advance)] == sizes


@pytest.mark.slow
def test_windows_answer_as_generate_does(tiny):
  """Caches of local layers are rings: prompts and answers longer than these, two at once, and one that goes on."""
  layers = {'pattern': ('local', 'global', 'local'), 'window': 19, 'rope_theta_local': 100.0}
  cfg = dataclasses.replace(tiny.cfg, **layers)
  bank = Bank(cfg, tiny.params, tiny.tokenizer, rows=3, context=256, lobbies=2)
  bank.warm()
  assert bank.rings
  found = Engine({'tiny': bank})
  found.start()
  texts = [said * 9 + 'and' for said in ('the whale and the sea ', 'a ship ')]
  how = {'new': 70, 'run': models.Run(), 'sampling': sample.Sampling(0.0)}
  write = lambda texts: writing.complete(cfg, tiny.params, tiny.tokenizer, texts, jax.random.key(0), **how)
  both = [asking(bank, said, most=70, stop_ids=frozenset([tiny.tokenizer.eos_id])) for said in texts]
  found.submit('tiny', [ask for ask, _ in both])
  answers = [''.join(piece.text for piece in answer(told)) for _, told in both]
  assert answers == write(texts)
  more = texts[0] + ' the ship and the whale'
  ask, told = asking(bank, more, most=70, stop_ids=frozenset([tiny.tokenizer.eos_id]))
  found.submit('tiny', [ask])
  pieces = answer(told)
  found.close()
  assert [''.join(piece.text for piece in pieces)] == write([more]) and pieces[0].cached >= engine.READ


@pytest.mark.parametrize(
  'arguments, why',
  [
    ('{"a":' + '[' * 800 + ']' * 800 + '}', 'nested more than 64 deep'),
    ('{"a":' + '[' * 99_999 + ']' * 99_999 + '}', 'nested more than 64 deep'),
    ('{"a": NaN}', 'NaN is no JSON'),
    ('{"a": "\\ud800"}', 'half of a pair of surrogates'),
    ('[1]', 'is no JSON object'),
    ('{', 'is no JSON'),
  ],
)
def test_arguments_of_earlier_calls_are_read_as_a_body_is(arguments, why):
  call = {'id': '1', 'type': 'function', 'function': {'name': 'f', 'arguments': arguments}}
  with pytest.raises(api.Refused, match=why):
    api._calls([call], 'messages[1]')


@pytest.fixture
def url(bank, running, tiny):
  """Of the application in front of that engine, served by uvicorn from a thread of this process."""
  uvicorn = pytest.importorskip('uvicorn', reason="pip install -e '.[dev,serve]'")
  limits = api.Limits(context=bank.context, tokens=bank.context)
  service = app.Service(running, {'tiny': start._served('tiny', tiny, None)}, limits, app.Settings())
  config = uvicorn.Config(app.application(service), lifespan='off', log_config=None, access_log=False, ws='none')
  server, listening = uvicorn.Server(config), socket.create_server(('127.0.0.1', 0))
  thread = threading.Thread(target=server.run, kwargs={'sockets': [listening]})
  thread.start()
  yield f'http://127.0.0.1:{listening.getsockname()[1]}'
  server.should_exit = True
  thread.join()
  listening.close()


def test_what_nobody_foresaw_is_told_as_an_error_and_the_server_goes_on(url, running, monkeypatch, caplog):
  httpx = pytest.importorskip('httpx', reason="pip install -e '.[dev,serve]'")
  asked = {'model': 'tiny', 'prompt': 'the whale', 'max_tokens': 8, 'temperature': 0}
  ask = lambda **more: httpx.post(f'{url}/v1/completions', json=asked | more, timeout=60)
  usual = ask().raise_for_status().json()['choices']

  def fail(*_):
    raise RuntimeError('of the inside')

  told = {'message': 'the server failed to answer; its log says why', 'type': 'server_error'}
  told = {'error': told | {'param': None, 'code': None}}
  with monkeypatch.context() as patch:
    patch.setattr(Engine, 'waiting', fail)
    for found in (httpx.get(f'{url}/metrics'), ask(), ask(stream=True)):
      assert (found.status_code, found.json()) == (500, told)
  with monkeypatch.context() as patch:
    first = answers.Completion._told
    patch.setattr(answers.Completion, '_told', lambda *given: fail() if given[-1].finish else first(*given))
    found = ask(stream=True)
  *chunks, error, done, end = found.text.split('\n\n')
  assert (
    found.status_code == 200
    and json.loads(error.removeprefix('data: ')) == told
    and (done, end) == ('data: [DONE]', '')
  )
  text = ''.join(json.loads(chunk.removeprefix('data: '))['choices'][0]['text'] for chunk in chunks)
  assert text and usual[0]['text'].startswith(text)
  traces = [''.join(traceback.format_exception(*record.exc_info)) for record in caplog.records if record.exc_info]
  assert len(traces) == 4 and all('of the inside' in trace and ', in fail\n' in trace for trace in traces)
  assert ask().json()['choices'] == usual and running.live() == 0
  assert 'status="500"' in httpx.get(f'{url}/metrics').text
