"""OpenAI's own client against `jaxlm serve` of a real chat model: what it is told is what the model computes.

golden/smollm2.npz holds what transformers writes (see test_smollm2.py).
"""

import concurrent.futures
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for needed in ('openai', 'starlette', 'uvicorn', 'llguidance'):
  pytest.importorskip(needed, reason="pip install -e '.[dev,serve]'")

import openai  # noqa: E402
from served import Server  # noqa: E402
from test_smollm2 import GOLDEN, PROMPTS  # noqa: E402

from jaxlm import interop, models, sample  # noqa: E402
from jaxlm.loops import writing  # noqa: E402

pytestmark = pytest.mark.slow
TEXTS = json.loads(str(GOLDEN['meta_json']))['prompts']
FRANCE = [{'role': 'user', 'content': 'What is the capital of France?'}]
PERSON = {
  'type': 'object',
  'properties': {'name': {'type': 'string', 'maxLength': 20}, 'age': {'type': 'integer', 'minimum': 0, 'maximum': 150}},
  'required': ['name', 'age'],
  'additionalProperties': False,
}


@pytest.fixture(scope='module')
def model(smollm2):
  return interop.load(str(smollm2))


@pytest.fixture(scope='module')
def server(smollm2, tmp_path_factory):
  home = tmp_path_factory.mktemp('serve')
  server = Server(smollm2, home, '--name', 'smol', '--slots', '4', '--context', '512', XLA_FLAGS='')
  yield server
  assert server.stop() == 0, server.log


@pytest.fixture(scope='module')
def client(server):
  with openai.OpenAI(base_url=server.url, api_key='any', max_retries=0, timeout=300) as client:
    yield client


def complete(client, prompt='Once upon a time', **asked):
  return client.completions.create(prompt=prompt, **{'model': 'smol', 'max_tokens': 8, 'temperature': 0.0} | asked)


def chat(client, messages=FRANCE, **asked):
  asked = {'model': 'smol', 'max_tokens': 8, 'temperature': 0.0} | asked
  return client.chat.completions.create(messages=messages, **asked)


@pytest.fixture(scope='module')
def written(model):
  """What `jaxlm generate` writes after each prompt."""
  how = {'new': 32, 'run': models.Run(), 'sampling': sample.Sampling(0.0)}
  texts = [TEXTS[name] for name in PROMPTS[1:]]
  return writing.complete(model.cfg, model.params, model.tokenizer, texts, jax.random.key(0), **how)


def test_greedy_is_what_generate_and_transformers_write(model, client, written):
  found = complete(client, [TEXTS[name] for name in PROMPTS[1:]], max_tokens=32)
  assert [choice.text for choice in found.choices] == written
  ids = complete(client, GOLDEN['chat_france_ids'].tolist(), max_tokens=32, extra_body={'ignore_eos': True})
  assert ids.choices[0].text == model.tokenizer.decode(GOLDEN['chat_france_greedy'].tolist())


def test_a_conversation(model, client):
  (choice,) = (found := chat(client, max_tokens=32)).choices
  assert (choice.message.content, choice.finish_reason) == ('The capital of France is Paris.', 'stop')
  assert found.usage.prompt_tokens == len(GOLDEN['chat_france_ids']) and found.usage.completion_tokens == 8
  chunks = list(chat(client, max_tokens=32, stream=True, stream_options={'include_usage': True}))
  assert ''.join(c.choices[0].delta.content or '' for c in chunks[:-1]) == choice.message.content
  assert chunks[-1].usage.completion_tokens == 8 and chunks[-2].choices[0].finish_reason == 'stop'
  turns = [*FRANCE, {'role': 'assistant', 'content': choice.message.content}, {'role': 'user', 'content': 'Thanks!'}]
  assert chat(client, turns).choices[0].message.content


def test_scores_are_the_models(model, client):
  """Of a prompt (`echo`) and of what follows it, and the likeliest tokens."""
  ids = model.tokenizer.encode(TEXTS['raw_once'])
  (choice,) = complete(client, TEXTS['raw_once'], max_tokens=4, echo=True, logprobs=3).choices
  ids += GOLDEN['raw_once_greedy'][:4].tolist()
  logits_1TV, _ = models.forward(model.cfg, model.params, jnp.asarray([ids]))
  logp_TV = np.asarray(jax.nn.log_softmax(logits_1TV[0], axis=-1))
  expected = [logp_TV[t, i] for t, i in enumerate(ids[1:])]
  told = choice.logprobs
  assert told.token_logprobs[0] is None and ''.join(told.tokens) == choice.text
  np.testing.assert_allclose(told.token_logprobs[1:], expected, atol=1e-3)
  best = [max(top.values()) for top in told.top_logprobs[1:]]
  np.testing.assert_allclose(best, logp_TV[:-1].max(axis=-1), atol=1e-3)
  content = chat(client, logprobs=True, top_logprobs=2, max_tokens=4).choices[0].logprobs.content
  assert [t.token for t in content] == ['The', ' capital', ' of', ' France']
  assert all(t.top_logprobs[0].logprob == t.logprob > t.top_logprobs[1].logprob for t in content)


def test_several_answers_stops_and_seeds(client):
  how = {'temperature': 1.0, 'n': 3, 'seed': 11}
  texts = [c.text for c in complete(client, **how).choices]
  assert texts == [c.text for c in complete(client, **how).choices] and len(set(texts)) == 3
  (choice,) = chat(client, stop=[' France'], max_tokens=32).choices
  assert (choice.message.content, choice.finish_reason) == ('The capital of', 'stop')
  streamed = chat(client, stop=[' France'], max_tokens=32, stream=True)
  assert ''.join(c.choices[0].delta.content or '' for c in streamed) == 'The capital of'


def test_json_by_a_schema(client):
  shape = {'type': 'json_schema', 'json_schema': {'name': 'person', 'schema': PERSON, 'strict': True}}
  asked = [{'role': 'user', 'content': 'Ada Lovelace was 36 years old. Answer in JSON.'}]
  person = json.loads(chat(client, asked, max_tokens=60, response_format=shape).choices[0].message.content)
  assert person.keys() == {'name', 'age'} and 0 <= person['age'] <= 150 and person['name']


def test_a_tool_that_has_to_be_called(client):
  tool = {'type': 'function', 'function': {'name': 'add_person', 'description': 'Adds a person.', 'parameters': PERSON}}
  asked = [{'role': 'user', 'content': 'Please add Ada Lovelace, 36 years old.'}]
  (choice,) = chat(client, asked, max_tokens=80, tools=[tool], tool_choice='required').choices
  (call,) = choice.message.tool_calls
  assert (call.function.name, choice.finish_reason) == ('add_person', 'tool_calls')
  assert json.loads(call.function.arguments).keys() == {'name', 'age'}


def kinds(i):
  """Requests that have little in common."""
  more = [{}, {'temperature': 1.0, 'top_p': 0.8}, {'temperature': 0.7, 'extra_body': {'top_k': 40}}]
  text = ('The history of the world begins with ' * (1 + 2 * (i % 3)))[i:]
  return {'prompt': text, 'max_tokens': 6 + i, 'seed': i, 'logprobs': i % 3, **more[i % 3]}


def test_eight_together_are_as_alone(client):
  """To the last bit of their log-probabilities; there are four slots, so some wait."""
  plain = lambda i: [(c.text, c.finish_reason, c.logprobs) for c in complete(client, **kinds(i)).choices]
  alone = list(map(plain, range(8)))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(plain, range(8))) == alone


@pytest.mark.parametrize(
  'asked, kind, code',
  [
    ({'model': 'gpt-4'}, openai.NotFoundError, 'model_not_found'),
    ({'max_tokens': 10**6}, openai.BadRequestError, 'context_length_exceeded'),
    ({'prompt': 'word ' * 600}, openai.BadRequestError, 'context_length_exceeded'),
    ({'temperature': -1}, openai.BadRequestError, None),
    ({'n': 1000}, openai.BadRequestError, None),
    ({'prompt': [49152]}, openai.BadRequestError, None),
  ],
  ids=['model', 'long answer', 'long prompt', 'temperature', 'n', 'token'],
)
def test_errors_are_the_clients_own(client, asked, kind, code):
  with pytest.raises(kind) as raised:
    complete(client, **asked)
  assert raised.value.code == code and raised.value.type in ('invalid_request_error', 'not_found_error')
