"""`jaxlm serve` as a process, asked by OpenAI's own client: what it answers, refuses, and survives."""

import asyncio
import concurrent.futures
import http.client
import json
import signal
import socket
import threading
import time
import urllib.parse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for needed in ('openai', 'httpx', 'starlette', 'uvicorn'):
  pytest.importorskip(needed, reason="pip install -e '.[dev,serve]'")

import hostile_requests  # noqa: E402
import httpx  # noqa: E402
import openai  # noqa: E402
from served import Server, adapter, model  # noqa: E402

from jaxlm import interop, models, sample  # noqa: E402
from jaxlm.loops import chatting, writing  # noqa: E402
from jaxlm.serve import app  # noqa: E402

MESSAGES = [{'role': 'user', 'content': 'Call me Ishmael.'}]


@pytest.fixture(scope='module')
def tiny():
  return model()


@pytest.fixture(scope='module')
def folder(tiny, tmp_path_factory):
  path = tmp_path_factory.mktemp('serve') / 'model'
  interop.export(tiny, path)
  return path


@pytest.fixture(scope='module')
def adapted(tiny, folder):
  return adapter(tiny, folder.parent / 'adapter')


@pytest.fixture(scope='module')
def server(folder, adapted):
  flags = ('--slots', '3', '--context', '768', '--queue', '8', '--answers', '6', '--body-seconds', '2')
  flags += ('--choices', str(folder.parent / 'choices.jsonl'))
  server = Server(folder, folder.parent, *flags, '--adapter', f'other={folder.parent / "adapter"}')
  yield server
  assert server.stop() == 0, server.log


@pytest.fixture(scope='module')
def client(server):
  with openai.OpenAI(base_url=server.url, api_key='any', max_retries=0, timeout=120) as client:
    yield client


def complete(client, prompt='Once upon a time', **asked):
  usual = {'model': 'tiny', 'max_tokens': 12, 'temperature': 0.0}
  return client.completions.create(prompt=prompt, **usual | asked)


def chat(client, messages=MESSAGES, **asked):
  asked = {'max_tokens': 12, 'temperature': 0.0} | asked
  return client.chat.completions.create(model='tiny', messages=messages, **asked)


def gauge(server, name):
  lines = httpx.get(server.url.removesuffix('/v1') + '/metrics').text.splitlines()
  return sum(float(line.split()[-1]) for line in lines if line.startswith((f'jaxlm_{name} ', f'jaxlm_{name}{{')))


def until(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def test_what_it_says_first(server):
  assert server.log[0].startswith('devices: ') and server.url.startswith('http://127.0.0.1:')


def test_models(client):
  assert [m.id for m in client.models.list()] == ['tiny', 'other'] and client.models.retrieve('tiny').object == 'model'


@pytest.mark.parametrize('prompt', ['Once upon a time', 'नमस्ते', '', '<|im_end|> is text', 'long ' * 30])
def test_greedy_is_what_generate_writes(tiny, client, prompt):
  how = {'new': 20, 'run': models.Run(), 'sampling': sample.Sampling(temperature_B=0.0)}
  (text,) = writing.complete(tiny.cfg, tiny.params, tiny.tokenizer, [prompt], jax.random.key(0), **how)
  found = complete(client, prompt, max_tokens=20)
  assert found.choices[0].text == text and found.choices[0].finish_reason in ('length', 'stop')
  assert found.usage.prompt_tokens == len(tiny.tokenizer.prefix_ids + tiny.tokenizer.encode(prompt)) or not prompt


def test_an_adapter_is_a_model_of_its_own(tiny, adapted, client):
  how = {'new': 20, 'run': models.Run(), 'sampling': sample.Sampling(temperature_B=0.0)}
  write = lambda m: writing.complete(m.cfg, m.params, m.tokenizer, ['Once more'], jax.random.key(0), **how)[0]
  ask = lambda name: complete(client, 'Once more', max_tokens=20, model=name).choices[0].text
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    texts = list(pool.map(ask, ['tiny', 'other', 'tiny', 'other']))
  assert texts == [write(tiny), write(adapted)] * 2 and texts[0] != texts[1]


def test_greedy_is_what_chat_writes(tiny, client):
  how = {'sampling': sample.Sampling(temperature_B=0.0), 'max_new_tokens': 20}
  text = ''.join(chatting.answer(tiny, MESSAGES, jax.random.key(0), **how))
  parts = [{'role': 'user', 'content': [{'type': 'text', 'text': 'Call me '}, {'type': 'text', 'text': 'Ishmael.'}]}]
  for messages in (MESSAGES, parts):
    (choice,) = chat(client, messages, max_tokens=20).choices
    assert choice.message.content == text and choice.message.role == 'assistant'


def test_streams_are_the_whole_in_pieces(client):
  how = {'max_tokens': 30, 'seed': 3, 'temperature': 1.0, 'extra_body': {'ignore_eos': True}}
  whole = complete(client, **how)
  *chunks, last = list(complete(client, stream=True, stream_options={'include_usage': True}, **how))
  assert ''.join(c.choices[0].text for c in chunks) == whole.choices[0].text
  assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ['length']
  assert len(chunks) > 3 and last.choices == [] and last.usage.completion_tokens == 30
  whole = chat(client, max_completion_tokens=30, max_tokens=None)
  chunks = list(chat(client, max_tokens=30, stream=True))
  assert ''.join(c.choices[0].delta.content or '' for c in chunks) == whole.choices[0].message.content
  assert chunks[0].choices[0].delta.role == 'assistant' and len({c.id for c in chunks}) == 1


def test_a_stream_ends_with_done(server):
  body = {'model': 'tiny', 'prompt': 'a', 'stream': True, 'max_tokens': 3}
  events = httpx.post(f'{server.url}/completions', json=body, timeout=60).text
  assert events.startswith('data: {') and events.endswith('data: [DONE]\n\n')


def scores(tiny, ids):
  """The log-probabilities of each token given those before it, and of all tokens."""
  logits_1TV, _ = models.forward(tiny.cfg, tiny.params, jnp.asarray([ids]))
  return np.asarray(jax.nn.log_softmax(logits_1TV[0], axis=-1))


def test_logprobs_and_echo_are_the_models(tiny, client):
  text = 'It was the best of times, it was the worst of times. ' * 3
  ids = tiny.tokenizer.prefix_ids + tiny.tokenizer.encode(text)
  assert len(ids) > 64  # more than is read at once
  expected_TV = scores(tiny, ids)
  (choice,) = complete(client, text, max_tokens=0, echo=True, logprobs=2).choices
  told = choice.logprobs
  assert choice.text == text and told.token_logprobs[0] is None and len(told.tokens) == len(ids)
  np.testing.assert_allclose(told.token_logprobs[1:], [expected_TV[t - 1, i] for t, i in enumerate(ids)][1:], atol=1e-4)
  best = [max(top.values()) for top in told.top_logprobs[1:]]
  np.testing.assert_allclose(best, expected_TV[:-1].max(axis=-1), atol=1e-4)
  starts = [told.text_offset[t] for t in range(1, len(ids))]
  assert starts == sorted(starts) and text[starts[3] : starts[4]] == told.tokens[4]

  (choice,) = complete(client, text, max_tokens=4, echo=True, logprobs=0).choices
  assert choice.text.startswith(text) and len(choice.logprobs.tokens) == len(ids) + 4


def test_logprobs_of_a_conversation(tiny, client):
  (choice,) = chat(client, logprobs=True, top_logprobs=3, max_tokens=6).choices
  content = choice.logprobs.content
  assert b''.join(bytes(t.bytes) for t in content).decode(errors='replace') == choice.message.content
  assert all(t.top_logprobs[0].token == t.token and len(t.top_logprobs) == 3 for t in content)
  streamed = [t for c in chat(client, logprobs=True, top_logprobs=3, max_tokens=6, stream=True) for t in told(c)]
  assert streamed == content


def told(chunk):
  logprobs = chunk.choices[0].logprobs
  return logprobs.content if logprobs else []


def test_several_answers_and_seeds(client):
  how = {'temperature': 1.0, 'max_tokens': 10}
  texts = [c.text for c in complete(client, n=3, seed=5, **how).choices]
  assert texts == [c.text for c in complete(client, n=3, seed=5, **how).choices] and len(set(texts)) == 3
  assert texts[0] == complete(client, seed=5, **how).choices[0].text
  assert texts != [c.text for c in complete(client, n=3, seed=6, **how).choices]
  assert len({complete(client, **how).choices[0].text for _ in range(3)}) == 3  # nobody's seed is everybody's
  assert len({c.text for c in complete(client, ['Once'] * 3, **how).choices}) == 3
  both = complete(client, ['Once', 'Twice'], n=2, seed=5, **how)
  assert [c.index for c in both.choices] == [0, 1, 2, 3]
  assert [c.text for c in both.choices[:2]] == [c.text for c in complete(client, 'Once', n=2, seed=5, **how).choices]


def test_stop_strings(client):
  text = complete(client, max_tokens=30).choices[0].text
  for stop in (text[7], text[5:8], [text[20:24], text[9:12]]):
    first = min(text.find(s) for s in ([stop] if isinstance(stop, str) else stop))
    (choice,) = complete(client, max_tokens=30, stop=stop, logprobs=1).choices
    assert choice.text == text[:first] and choice.finish_reason == 'stop'
    assert all(offset < first for offset in choice.logprobs.text_offset)
    streamed = ''.join(c.choices[0].text for c in complete(client, max_tokens=30, stop=stop, stream=True))
    assert streamed == text[:first]


def test_settings_do_what_they_say(tiny, client):
  free = complete(client, max_tokens=20)
  assert (
    complete(client, max_tokens=20, temperature=1.0, extra_body={'top_k': 1}).choices[0].text == free.choices[0].text
  )
  assert complete(client, max_tokens=20, temperature=1.0, top_p=1e-9).choices[0].text == free.choices[0].text
  asked = {'max_tokens': 20, 'temperature': 3.0, 'seed': 5}
  assert complete(client, **asked, extra_body={'min_p': 1.0}).choices[0].text == free.choices[0].text
  assert complete(client, **asked, extra_body={'min_p': 0.0}).choices[0].text != free.choices[0].text
  first = complete(client, max_tokens=1, logprobs=1).choices[0].logprobs
  banned = dict.fromkeys(map(str, range(tiny.cfg.vocab_size)), -100)
  only = tiny.tokenizer.encode('q')[0]
  banned[str(only)] = 0
  assert complete(client, max_tokens=5, logit_bias=banned).choices[0].text == 'qqqqq'
  assert first.token_logprobs[0] < 0
  repeated = complete(client, max_tokens=20, extra_body={'repetition_penalty': 50.0}).choices[0].text
  assert repeated != free.choices[0].text
  penalized = complete(client, max_tokens=25, frequency_penalty=2.0, presence_penalty=2.0).choices[0].text
  assert penalized != complete(client, max_tokens=25).choices[0].text


@pytest.mark.parametrize('penalty', ['presence_penalty', 'frequency_penalty'])
def test_penalties_are_for_what_was_made(tiny, client, penalty):
  """A token of the prompt that leads by 1 stays ahead, though 2 would be taken from it had it been made."""
  ids = tiny.tokenizer.prefix_ids + tiny.tokenizer.encode('Once upon a time')
  logits_V = np.asarray(models.forward(tiny.cfg, tiny.params, jnp.asarray([ids]))[0])[0, -1]
  best, leading = int(logits_V.argmax()), ids[-1]
  assert best not in ids
  bias = {str(leading): float(logits_V[best] - logits_V[leading]) + 1.0}
  told = lambda **more: complete(client, max_tokens=1, logit_bias=bias, **more).choices[0].text
  assert told() == told(**{penalty: 2.0}) == tiny.tokenizer.decode([leading])


@pytest.mark.parametrize('temperature', [1e-300, 1e-45, 1e-38, 1e-37, 1e-9, 9e-4])
def test_a_tiny_temperature_is_greedy(client, temperature):
  """To the last bit; and where two tokens have such a bias that their logits, divided, are both infinite."""
  for bias in ({}, {'7': 100, '5': 99}):
    answers = [
      complete(client, temperature=t, logprobs=3, logit_bias=bias, seed=1).choices[0] for t in (0.0, temperature)
    ]
    assert answers[0] == answers[1] and all(np.isfinite(answers[1].logprobs.token_logprobs))


REFUSED = [
  ({'model': 'unknown'}, 404, 'model'),
  ({'n': 0}, 400, 'n'),
  ({'n': 10**9}, 400, 'n'),
  ({'max_tokens': 10**9}, 400, 'max_tokens'),
  ({'max_tokens': -1}, 400, 'max_tokens'),
  ({'max_tokens': 1.5}, 400, 'max_tokens'),
  ({'max_tokens': True}, 400, 'max_tokens'),
  ({'temperature': -0.1}, 400, 'temperature'),
  ({'temperature': 'hot'}, 400, 'temperature'),
  ({'temperature': 1e400}, 400, None),
  ({'temperature': float('nan')}, 400, None),
  ({'top_p': 0}, 400, 'top_p'),
  ({'seed': 2**64}, 400, 'seed'),
  ({'logprobs': 21}, 400, 'logprobs'),
  ({'stop': ['x'] * 17}, 400, 'stop'),
  ({'stop': ''}, 400, 'stop'),
  ({'stop': [3]}, 400, 'stop'),
  ({'prompt': [999]}, 400, 'prompt'),
  ({'prompt': [-1]}, 400, 'prompt'),
  ({'prompt': [[1], 'a']}, None, None),
  ({'prompt': {'a': 1}}, 400, 'prompt'),
  ({'prompt': ['a'] * 7}, 400, 'prompt'),
  ({'prompt': 'a ' * 999}, 400, 'messages'),
  ({'prompt': '\ud800'}, 400, None),
  ({'stop': ['a', '\udfff']}, 400, None),
  ({'prompt': '\ud83d\udc0b'}, None, None),
  ({'logit_bias': {'999': 1}}, 400, 'logit_bias'),
  ({'logit_bias': {'1': 1e9}}, 400, 'logit_bias'),
  ({'stream_options': {}}, 400, 'stream_options'),
  ({'whatever': 1}, 400, 'whatever'),
]


@pytest.mark.parametrize('asked, status, param', REFUSED, ids=lambda x: str(x)[:40])
def test_what_is_refused(server, asked, status, param):
  body = json.dumps({'model': 'tiny', 'prompt': 'a', 'max_tokens': 2} | asked)
  headers = {'content-type': 'application/json'}
  found = httpx.post(f'{server.url}/completions', content=body, headers=headers, timeout=60)
  assert found.status_code == (status or 200), found.text
  if status:
    error = found.json()['error']
    assert error['message'] and error['type'] and (param is None or error['param'] == param)


@pytest.mark.parametrize(
  'body, status',
  [(b'{', 400), (b'[]', 400), (b'[' * 100_000, 400), (b'{"a":' * 99 + b'1' + b'}' * 99, 400), (b'\xff', 400)]
  + [(b'{"model": ' + b'9' * 9999 + b'}', 400), (b' ' * (5 << 20), 413)]
  + [(b'{"stop": "\xed\xa0\x80b"}', 400), (b'{"\xed\xa0\x80": 2}', 400), ('{"model": "tiny"}'.encode('utf-16'), 400)],
  ids=['cut', 'list', 'deep', 'nested', 'bytes', 'digits', 'large', 'half a pair', 'named by half a pair', 'UTF-16'],
)
def test_bodies_that_are_none(server, body, status):
  found = httpx.post(f'{server.url}/chat/completions', content=body, headers={'content-type': 'application/json'})
  assert found.status_code == status and found.json()['error']['message']


@pytest.mark.parametrize('sent, told', [('{', b'HTTP/1.1 408'), (None, b'')], ids=['body', 'head'])
def test_who_is_slow_is_sent_away(server, sent, told):
  host = urllib.parse.urlsplit(server.url)
  head = 'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99\r\n'
  with socket.create_connection((host.hostname, host.port), timeout=60) as connection:
    connection.sendall((f'{head}\r\n{sent}' if sent else head).encode())
    assert connection.recv(12) == told


def test_who_does_not_read_is_cut_off(client, server):
  """Answers of 6 x 700 tokens, each with 20 others: more than the system takes for a client that reads nothing."""
  host = urllib.parse.urlsplit(server.url)
  asked = {'model': 'tiny', 'prompt': 'a', 'n': 6, 'max_tokens': 700, 'ignore_eos': True, 'stream': True}
  body = json.dumps(asked | {'logprobs': 20})
  head = f'host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n'
  with socket.socket() as connection:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((host.hostname, host.port))
    connection.sendall(f'POST /v1/completions HTTP/1.1\r\n{head}{body}'.encode())
    until(lambda: gauge(server, 'live') > 0)
    established = 1
    until(lambda: connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO) != established)
  until(lambda: gauge(server, 'live') + gauge(server, 'waiting') == 0)
  assert complete(client).choices[0].text


def test_answers_do_not_wait_for_the_clients_acknowledgement(server):
  """40 ms of every answer, where a server's sockets hold back what is small (Nagle's algorithm)."""
  seconds = []
  with httpx.Client() as client:
    for _ in range(20):
      began = time.perf_counter()
      client.get(f'{server.url}/models').raise_for_status()
      seconds.append(time.perf_counter() - began)
  assert min(seconds[1:]) < 0.03


def test_messages_that_are_none(client):
  wrong = [[], [{}], [{'role': 'x', 'content': ''}], [{'role': 'user'}], [{'role': 'user', 'content': [{'type': 'x'}]}]]
  for messages in [*wrong, [{'role': 'user', 'content': 3}], ['a'], [{'role': 'user', 'content': 'a ' * 999}]]:
    with pytest.raises(openai.BadRequestError):
      chat(client, messages)


def test_errors_are_the_clients_own(client, server):
  with pytest.raises(openai.NotFoundError, match='there is no model'):
    client.completions.create(model='gpt', prompt='a')
  with pytest.raises(openai.BadRequestError, match='temperature must be from 0 to 100'):
    complete(client, temperature=-1.0)
  assert httpx.get(f'{server.url}/nothing').json()['error']['type'] == 'not_found_error'
  assert httpx.get(f'{server.url}/completions').status_code == 405
  assert httpx.post(f'{server.url}/completions', content='{}').status_code == 415
  assert httpx.get(f'{server.url}/models', headers={'host': 'elsewhere.example'}).status_code == 403


def test_a_control_token_that_was_typed_is_text(tiny, client):
  plain = chat(client, [{'role': 'user', 'content': 'x'}]).usage.prompt_tokens
  typed = chat(client, [{'role': 'user', 'content': '<|im_end|>'}]).usage.prompt_tokens
  assert typed - plain == len(tiny.tokenizer.encode('<|im_end|>')) - 1 > 1


def kinds(i):
  """Requests that have little in common."""
  more = [
    {'temperature': 0.0},
    {'temperature': 1.3, 'top_p': 0.7},
    {'temperature': 1.0, 'extra_body': {'top_k': 5}},
    {'temperature': 0.7, 'frequency_penalty': 1.0},
  ]
  text = ('Some years ago ' * (1 + 3 * (i % 5)))[i:]
  return {'prompt': text, 'max_tokens': 9 + 5 * (i % 7), 'seed': i, 'logprobs': i % 3, **more[i % 4]}


def test_together_is_as_alone(client):
  """To the last bit of their log-probabilities: whatever others ask for at the same time, and whoever asked before."""
  plain = lambda found: [(c.text, c.finish_reason, c.logprobs.token_logprobs) for c in found.choices]
  alone = [plain(complete(client, **kinds(i))) for i in range(9)]
  with concurrent.futures.ThreadPoolExecutor(9) as pool:
    together = list(pool.map(lambda i: plain(complete(client, **kinds(i))), range(9)))
  assert together == alone


def test_who_goes_away_frees_the_slot(client, server):
  until(lambda: gauge(server, 'live') == 0)
  before = gauge(server, 'cancelled_total')
  stream = complete(client, max_tokens=200, stream=True, extra_body={'ignore_eos': True})
  next(iter(stream))
  stream.close()
  host = urllib.parse.urlsplit(server.url)
  connection = http.client.HTTPConnection(host.hostname, host.port)
  body = json.dumps({'model': 'tiny', 'prompt': 'a', 'max_tokens': 250, 'ignore_eos': True})
  connection.request('POST', '/v1/completions', body, {'content-type': 'application/json'})
  until(lambda: gauge(server, 'live') >= 1 or gauge(server, 'cancelled_total') > before)
  connection.close()
  until(lambda: gauge(server, 'live') == 0)
  assert gauge(server, 'cancelled_total') >= before + 1


def test_too_many_are_told_so(client, server):
  long = lambda: complete(client, max_tokens=240, stream=True, n=5, extra_body={'ignore_eos': True})
  streams, refused = [], None
  try:
    for _ in range(4):
      streams.append(long())
  except openai.RateLimitError as error:
    refused = error
  for stream in streams:
    stream.close()
  assert refused is not None and refused.response.headers['retry-after'] == '1' and streams
  until(lambda: gauge(server, 'live') + gauge(server, 'waiting') == 0)
  assert complete(client).choices[0].text


def test_a_prompt_is_read_once(client, server):
  text = 'It is a truth universally acknowledged, that a single man in possession of a good fortune. ' * 3
  first = complete(client, text).usage
  again, other = complete(client, text).usage, complete(client, text[:-20] + ' Indeed?').usage
  cached = [u.prompt_tokens_details.cached_tokens for u in (first, again, other)]
  assert cached[0] == 0 and cached[1] == first.prompt_tokens and 0 < cached[2] < other.prompt_tokens


SCHEMA = {
  'type': 'object',
  'properties': {'name': {'type': 'string', 'maxLength': 5}, 'age': {'type': 'integer', 'minimum': 0, 'maximum': 99}},
  'required': ['name', 'age'],
  'additionalProperties': False,
}


@pytest.mark.parametrize('seed', range(3))
def test_json_by_a_schema(client, seed):
  pytest.importorskip('llguidance')
  shape = {'type': 'json_schema', 'json_schema': {'name': 'person', 'schema': SCHEMA}}
  (choice,) = chat(client, max_tokens=80, temperature=1.0, seed=seed, response_format=shape).choices
  person = json.loads(choice.message.content)
  assert person.keys() == {'name', 'age'} and 0 <= person['age'] <= 99 and len(person['name']) <= 5
  assert choice.finish_reason == 'stop'
  with pytest.raises(openai.BadRequestError):
    bad = {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': {'type': 'nothing'}}}
    chat(client, response_format=bad)


TOOL = {'type': 'function', 'function': {'name': 'age_of', 'parameters': SCHEMA}}


def test_a_tool_that_has_to_be_called(client):
  pytest.importorskip('llguidance')
  how = {'tools': [TOOL], 'tool_choice': 'required', 'max_tokens': 120, 'temperature': 1.0, 'seed': 1}
  (choice,) = chat(client, **how).choices
  (call,) = choice.message.tool_calls
  assert choice.finish_reason == 'tool_calls' and call.function.name == 'age_of' and not choice.message.content
  assert json.loads(call.function.arguments).keys() == {'name', 'age'}
  deltas = [c.choices[0].delta for c in chat(client, stream=True, **how)]
  (streamed,) = [t for delta in deltas for t in delta.tool_calls or []]
  assert streamed.function.arguments == call.function.arguments and streamed.index == 0
  history = [
    *MESSAGES,
    {'role': 'assistant', 'content': None, 'tool_calls': [call.model_dump()]},
    {'role': 'tool', 'tool_call_id': call.id, 'content': '7'},
  ]
  assert chat(client, history, tools=[TOOL]).choices[0].finish_reason


def test_hostile_requests_harm_nobody(client, server, folder):
  """A few hundred of what `tests/hostile_requests.py` sends by the thousand."""
  attack = hostile_requests.attack(server.url, 'tiny', server.process.pid, requests=300, at_once=12)
  found = asyncio.run(attack)
  assert found.statuses.total() == 300 and found.statuses['200'] and found.statuses['400'] > 50
  assert not [s for s in found.statuses if s.startswith('5') and s != '503'], found.statuses
  assert found.grown[-1] - found.grown[0] < 100 << 20 and found.during
  assert 0 < found.statuses['201'] <= hostile_requests.lines(str(folder.parent / 'choices.jsonl')) <= 300
  until(lambda: gauge(server, 'live') + gauge(server, 'waiting') == 0)
  assert complete(client).choices[0].text


@pytest.mark.slow
def test_a_key_and_a_graceful_end(folder):
  server = Server(folder, folder.parent, '--slots', '2', '--context', '256', JAXLM_API_KEY='secret')
  for headers in (
    {},
    {'authorization': 'Bearer wrong'},
    {'authorization': 'secret'},
    {'authorization': 'Basic secret'},
  ):
    for path in {*app.ROUTES, '/nothing'} - {'/'}:
      for method in ('GET', 'POST'):
        assert httpx.request(method, server.url.removesuffix('/v1') + path, headers=headers).status_code == 401, path
  with openai.OpenAI(base_url=server.url, api_key='secret', max_retries=0, timeout=120) as client:
    asked = {'max_tokens': 240, 'extra_body': {'ignore_eos': True}}
    whole = complete(client, **asked).choices[0].text
    stream = iter(complete(client, stream=True, **asked))
    text = next(stream).choices[0].text
    codes: list[int] = []
    ending = threading.Thread(target=lambda: codes.append(server.stop()))
    ending.start()
    text += ''.join(chunk.choices[0].text for chunk in stream)
    ending.join()
  assert text == whole and codes == [0]
  with pytest.raises(httpx.ConnectError):
    httpx.get(server.url)


@pytest.mark.slow
def test_answers_that_take_too_long_and_bodies_that_come_after_the_end(folder):
  server = Server(folder, folder.parent, '--slots', '2', '--context', '512', '--answer-seconds', '0.05')
  with openai.OpenAI(base_url=server.url, api_key='any', max_retries=0, timeout=120) as client:
    asked = {'max_tokens': 400, 'extra_body': {'ignore_eos': True}}
    with pytest.raises(openai.InternalServerError, match='the answer took too long') as caught:
      complete(client, **asked)
    assert caught.value.status_code == 503
    with pytest.raises(openai.APIError, match='the answer took too long'):
      list(complete(client, stream=True, **asked))
    until(lambda: gauge(server, 'live') == 0)
  host, body = urllib.parse.urlsplit(server.url), json.dumps({'model': 'tiny', 'prompt': 'a', 'max_tokens': 1})
  head = f'host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n'
  with socket.create_connection((host.hostname, host.port), timeout=60) as connection:
    connection.sendall(f'POST /v1/completions HTTP/1.1\r\n{head}{body[:5]}'.encode())
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    connection.sendall(body[5:].encode())
    assert connection.recv(12) == b'HTTP/1.1 503'
  assert server.stop() == 0


def test_others_need_a_key(folder):
  with pytest.raises(AssertionError, match='lets others in: they need a key'):
    Server(folder, folder.parent, '--host', '0.0.0.0')
