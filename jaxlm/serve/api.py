"""What clients ask for in OpenAI's JSON, checked and made ready for the engine. Nothing here waits or computes."""

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.data import chat
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.serve import tools
from jaxlm.serve.engine import Settings
from jaxlm.serve.slots import TOP

DEPTH = 64  # of JSON
GREEDY = 1e-3  # temperatures below it are 0, as in vLLM (where it is 1e-5)
STOPS, STOP_LENGTH = 16, 256
BIASES = 1024
TOOLS = 128
SEED = (-(2**63), 2**63 - 1)
ROLES = {'developer': 'system'} | {role: role for role in ('system', 'user', 'assistant', 'tool')}
WITHOUT_EFFECT = {'user', 'metadata', 'store', 'service_tier', 'safety_identifier', 'prompt_cache_key'}


class Refused(Exception):
  """An answer with an error in OpenAI's form."""

  def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code

  def body(self) -> dict[str, Any]:
    kinds = {401: 'authentication_error', 404: 'not_found_error', 429: 'rate_limit_error'}
    kind = kinds.get(self.status, 'invalid_request_error' if self.status < 500 else 'server_error')
    return {'error': {'message': self.message, 'type': kind, 'param': self.param, 'code': self.code}}


class Limits(NamedTuple):
  """What one request may ask for."""

  answers: int = 16  # n times its prompts
  context: int = 2048  # tokens of prompt and answer
  tokens: int = 2048  # new ones


class Served(NamedTuple):
  """A model that clients may name."""

  name: str
  tokenizer: Tokenizer
  template: str | None
  vocab_size: int
  ends: frozenset[int]  # of an answer in a conversation
  defaults: Settings  # where a request says nothing
  created: int


class Prompt(NamedTuple):
  ids: list[int]
  text: str


class Asked(NamedTuple):
  """A request."""

  model: Served
  prompts: list[Prompt]
  n: int
  most: int | None  # new tokens; None: as many as there is room for
  settings: Settings
  seed: int
  seeded: bool  # by who asks: the same prompt then has the same answers, wherever it stands
  stop: tuple[str, ...]
  stop_ids: frozenset[int]
  told: int | None
  bias: dict[int, float]
  stream: bool
  include_usage: bool
  echo: bool = False
  grammar: str | None = None  # llguidance's, that the answer has to obey
  functions: frozenset[str] = frozenset()  # that may be called

  @property
  def scored(self) -> bool:
    return self.echo and self.told is not None


def parse(raw: bytes) -> dict[str, Any]:
  """The object of a request's body. Raises Refused."""
  try:
    text = raw.decode()  # json.loads itself lets half a pair of surrogates through
  except UnicodeDecodeError:
    raise Refused(400, 'the body is no text in UTF-8') from None
  return json_object(text, 'the body')


def json_object(text: str, what: str, where: str | None = None) -> dict[str, Any]:
  """The JSON object of a text: numbers that JSON has, strings that UTF-8 has, nested up to DEPTH. Raises Refused."""

  def no_number(name: str) -> Any:
    raise ValueError(f'{name} is no JSON')

  try:
    found = json.loads(text, parse_constant=no_number)
  except RecursionError:
    raise Refused(400, f'{what} is nested more than {DEPTH} deep', where) from None
  except ValueError as error:
    raise Refused(400, f'{what} is no JSON: {str(error)[:200]}', where) from None
  if not isinstance(found, dict):
    raise Refused(400, f'{what} is no JSON object', where)
  if _depth(found) > DEPTH:
    raise Refused(400, f'{what} is nested more than {DEPTH} deep', where)
  if '\\ud' in text.lower():
    try:
      json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
      reason = 'a string is no text in UTF-8: it has the half of a pair of surrogates'
      raise Refused(400, reason, where) from None
  return found


def _depth(value: Any) -> int:
  """How deep a value is nested; it stops counting past DEPTH."""
  level, depth = [value], 0
  while level and depth <= DEPTH:
    inner = [x for x in level if isinstance(x, (dict, list))]
    level = [y for x in inner for y in (x.values() if isinstance(x, dict) else x)]
    depth += bool(inner)
  return depth


class Fields:
  """The fields of a body, taken one by one, each of a type and within its limits; null is as if it were not there."""

  def __init__(self, body: Mapping[str, Any]):
    self.left = {name: value for name, value in body.items() if value is not None}

  def take(self, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
    value = self.left.pop(name, None)
    if value is None:
      return default
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
      named = kinds if isinstance(kinds, tuple) else (kinds,)
      shown = {'str': 'a string', 'list': 'an array', 'dict': 'an object', 'bool': 'a boolean', 'int': 'an integer'}
      raise Refused(400, f'{name} must be {" or ".join(shown.get(k.__name__, "a number") for k in named)}', name)
    return value

  def number(self, name: str, low: float, high: float, default: float) -> float:
    value = self.take(name, (int, float), default)
    if not low <= value <= high or not math.isfinite(value):
      raise Refused(400, f'{name} must be from {low:g} to {high:g}', name)
    return float(value)

  def integer(self, name: str, low: int, high: int, default: Any = None) -> Any:
    value = self.take(name, int, default)
    if value is not None and not low <= value <= high:
      raise Refused(400, f'{name} must be from {low} to {high}', name)
    return value

  def end(self) -> None:
    """Raises Refused if anything is left that has a meaning we do not know."""
    if unknown := sorted(self.left.keys() - WITHOUT_EFFECT):
      raise Refused(400, f'unknown field: {unknown[0][:64]}', unknown[0][:64])


def completion(body: Mapping[str, Any], models: Mapping[str, Served], limits: Limits) -> Asked:
  """`/v1/completions`. Raises Refused."""
  fields = Fields(body)
  model = _model(fields, models)
  given = fields.take('prompt', (str, list), '')
  best_of = fields.integer('best_of', 1, limits.answers)
  echo, told = fields.take('echo', bool, False), fields.integer('logprobs', 0, TOP)
  asked = _shared(fields, model, limits, told)._replace(echo=echo, stop_ids=frozenset([model.tokenizer.eos_id]))
  if best_of not in (None, asked.n):
    raise Refused(400, 'best_of other than n is not supported', 'best_of')
  asked = _finish(fields, asked, body, most=16)
  return _checked(asked._replace(prompts=_prompts(given, model, limits)), limits)


def _prompts(given: Any, model: Served, limits: Limits) -> list[Prompt]:
  """A string, strings, token ids or lists of these."""
  several = given if isinstance(given, list) and given and isinstance(given[0], (str, list)) else [given]
  if len(several) > limits.answers:
    raise Refused(400, f'prompt has {len(several)} prompts; the limit is {limits.answers}', 'prompt')
  return [_prompt(one, model) for one in several]


def _prompt(given: Any, model: Served) -> Prompt:
  tokenizer = model.tokenizer
  if isinstance(given, list):
    if not all(type(i) is int and 0 <= i < model.vocab_size for i in given):
      raise Refused(400, f'prompt must be strings or arrays of token ids below {model.vocab_size}', 'prompt')
    ids = list(given)
    text = tokenizer.decode(ids)
  elif isinstance(given, str):
    try:
      ids, text = tokenizer.prefix_ids + tokenizer.encode(given), given
    except InputError as error:
      raise Refused(400, str(error), 'prompt') from None
  else:
    raise Refused(400, 'prompt must be strings or arrays of token ids', 'prompt')
  return Prompt(ids or [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id], text)


def conversation(body: Mapping[str, Any], models: Mapping[str, Served], limits: Limits) -> Asked:
  """`/v1/chat/completions`. Raises Refused. The template runs in a process of its own, which may take seconds."""
  fields = Fields(body)
  model = _model(fields, models)
  if not model.template:
    raise Refused(400, f'{model.name} has no chat template: use /v1/completions', 'messages')
  messages = _messages(fields.take('messages', list, []))
  wanted, top = fields.take('logprobs', bool, False), fields.integer('top_logprobs', 0, TOP, 0)
  if top and not wanted:
    raise Refused(400, 'top_logprobs needs logprobs', 'top_logprobs')
  asked = _shared(fields, model, limits, top if wanted else None)._replace(stop_ids=model.ends)
  given, functions, forced = _tools(fields)
  shape = _shape(fields.take('response_format', dict, {}))
  fields.take('parallel_tool_calls', bool)
  longest = fields.integer('max_completion_tokens', 1, limits.tokens)
  asked = _finish(fields, asked, body, most=longest)
  try:
    ids, tagged = _conversed(model.template, messages, model.tokenizer, given)
  except InputError as error:
    raise Refused(400, str(error), 'messages') from None
  grammar = tools.grammar(forced, tagged) if forced else shape
  return _checked(asked._replace(prompts=[Prompt(ids, '')], functions=functions, grammar=grammar), limits)


def _conversed(
  template: str, messages: list[dict[str, Any]], tokenizer: Tokenizer, given: list[Any]
) -> tuple[list[int], bool]:
  """The ids of a conversation, and whether calls stand between tags. Raises InputError as `chat.encode` does."""
  encode = lambda told, **more: chat.encode(template, told, tokenizer, generation=True, **more)
  if not given:
    return encode(messages), False
  ids = encode(messages, tools=given) if 'tools' in template else None
  if ids is None or ids == encode(messages):  # the template does not tell of them, or not here
    return encode(tools.instructed(messages, given)), True
  return ids, tools.OPEN in template


def _model(fields: Fields, models: Mapping[str, Served]) -> Served:
  name = fields.take('model', str)
  if name is None:
    raise Refused(400, 'model is missing', 'model')
  if name not in models:
    raise Refused(404, f'there is no model {name[:200]!r}; /v1/models lists them', 'model', 'model_not_found')
  return models[name]


def _shared(fields: Fields, model: Served, limits: Limits, told: int | None) -> Asked:
  """What both kinds of requests have; without prompts yet."""
  usual = model.defaults
  settings = Settings(
    temperature=_warm(fields.number('temperature', 0, 100, usual.temperature)),
    top_k=fields.integer('top_k', 0, 2**31 - 1, usual.top_k) or None,
    top_p=_positive('top_p', fields.number('top_p', 0, 1, usual.top_p)),
    min_p=fields.number('min_p', 0, 1, usual.min_p),
    repetition=fields.number('repetition_penalty', 0.01, 100, usual.repetition),
    presence=fields.number('presence_penalty', -2, 2, 0.0),
    frequency=fields.number('frequency_penalty', -2, 2, 0.0),
  )
  seed = fields.integer('seed', *SEED)
  stream, options = fields.take('stream', bool, False), fields.take('stream_options', dict)
  if options is not None and not stream:
    raise Refused(400, 'stream_options needs stream', 'stream_options')
  within = Fields(options or {})
  usage = within.take('include_usage', bool, False)
  within.take('include_obfuscation', bool)
  within.end()
  n, bias = fields.integer('n', 1, limits.answers, 1), _bias(fields.take('logit_bias', dict, {}), model.vocab_size)
  stop = _stop(fields.take('stop', (str, list), []))
  seeds = (secrets.randbits(63), False) if seed is None else (seed, True)
  return Asked(model, [], n, None, settings, *seeds, stop, frozenset(), told, bias, stream, usage)


def _warm(temperature: float) -> float:
  """0, the likeliest token, for any below GREEDY: clients that want 0 send such, and divided logits stay finite."""
  return temperature if temperature >= GREEDY else 0.0


def _positive(name: str, value: float) -> float:
  if value <= 0:
    raise Refused(400, f'{name} must be more than 0', name)
  return value


def _finish(fields: Fields, asked: Asked, body: Mapping[str, Any], most: int | None) -> Asked:
  """With the number of new tokens, and the control tokens among the stop strings as ids; no field may be left."""
  least = 0 if asked.echo else 1
  found = fields.integer('max_tokens', least, 2**31, most)
  ignored = fields.take('ignore_eos', bool, False)
  fields.end()
  control = (asked.model.tokenizer.control_id(text) for text in asked.stop)
  ends = (frozenset() if ignored else asked.stop_ids) | {i for i in control if i is not None}
  return asked._replace(most=found, stop_ids=ends)


def _stop(given: Any) -> tuple[str, ...]:
  stops = [given] if isinstance(given, str) else given
  if len(stops) > STOPS or not all(isinstance(s, str) and 0 < len(s) <= STOP_LENGTH for s in stops):
    raise Refused(400, f'stop must be up to {STOPS} strings of 1 to {STOP_LENGTH} characters', 'stop')
  return tuple(stops)


def _bias(given: Mapping[str, Any], vocab: int) -> dict[int, float]:
  found = {}
  if len(given) > BIASES:
    raise Refused(400, f'logit_bias may have {BIASES} tokens', 'logit_bias')
  for token, value in given.items():
    if not (token.isascii() and token.isdigit() and len(token) < 9 and int(token) < vocab):
      raise Refused(400, f'logit_bias: {token[:32]!r} is no token id below {vocab}', 'logit_bias')
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -100 <= value <= 100:
      raise Refused(400, 'logit_bias: values must be numbers from -100 to 100', 'logit_bias')
    found[int(token)] = float(value)
  return found


def _messages(given: list[Any]) -> list[dict[str, Any]]:
  if not given:
    raise Refused(400, 'messages must have one message at least', 'messages')
  return [_message(one, f'messages[{i}]') for i, one in enumerate(given)]


def _message(given: Any, where: str) -> dict[str, Any]:
  if not isinstance(given, dict):
    raise Refused(400, f'{where} must be an object', where)
  role = given.get('role')
  if not isinstance(role, str) or role not in ROLES:
    raise Refused(400, f'{where}.role must be one of {", ".join(ROLES)}', where)
  message: dict[str, Any] = {'role': ROLES[role], 'content': _content(given.get('content'), where)}
  if role == 'assistant' and given.get('tool_calls') is not None:
    message['tool_calls'] = _calls(given['tool_calls'], where)
  for key in ('name', 'tool_call_id'):
    if given.get(key) is not None:
      if not isinstance(given[key], str):
        raise Refused(400, f'{where}.{key} must be a string', where)
      message[key] = given[key]
  if message['content'] is None:
    if role != 'assistant' or not message.get('tool_calls'):
      raise Refused(400, f'{where}.content is missing', where)
    message['content'] = ''
  return message


def _content(given: Any, where: str) -> str | None:
  """A string, or text parts; other kinds are refused."""
  if given is None or isinstance(given, str):
    return given
  parts: list[Any] = given if isinstance(given, list) else [None]
  if all(isinstance(p, dict) and p.get('type') == 'text' and isinstance(p.get('text'), str) for p in parts):
    return ''.join(p['text'] for p in parts)
  raise Refused(400, f'{where}.content must be a string or text parts', where)


def _calls(given: Any, where: str) -> list[dict[str, Any]]:
  """Earlier calls as templates read them: with their arguments as an object."""
  found = []
  calls: list[Any] = given if isinstance(given, list) else [None]
  for call in calls:
    function = call.get('function') if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get('name'), str):
      raise Refused(400, f'{where}.tool_calls must have functions with names', where)
    arguments = function.get('arguments', '{}')
    if isinstance(arguments, str):
      arguments = json_object(arguments, f"{where}.tool_calls: a call's arguments", where)
    if not isinstance(arguments, dict):
      raise Refused(400, f'{where}.tool_calls: arguments must be an object', where)
    found.append({'id': str(call.get('id', '')), 'type': 'function', 'function': {**function, 'arguments': arguments}})
  return found


def _tools(fields: Fields) -> tuple[list[Any], frozenset[str], dict[str, Any]]:
  """The tools, the functions that may be called, and the parameters of those of which one has to be."""
  given, choice = fields.take('tools', list, []), fields.take('tool_choice', (str, dict), 'auto')
  if len(given) > TOOLS:
    raise Refused(400, f'tools: the limit is {TOOLS}', 'tools')
  schemas: dict[str, Any] = {}
  for i, tool in enumerate(given):
    function = tool.get('function') if isinstance(tool, dict) and tool.get('type') == 'function' else None
    if not isinstance(function, dict) or not isinstance(function.get('name'), str) or not function['name']:
      raise Refused(400, f'tools[{i}] must be a function with a name', 'tools')
    if not isinstance(function.get('parameters', {}), dict):
      raise Refused(400, f'tools[{i}]: parameters must be an object', 'tools')
    schemas[function['name']] = function.get('parameters') or {'type': 'object'}
  if isinstance(choice, dict):
    function = choice.get('function')
    wanted = function.get('name') if isinstance(function, dict) else None
    if not isinstance(wanted, str) or wanted not in schemas:
      raise Refused(400, 'tool_choice names none of the tools', 'tool_choice')
    forced = {wanted: schemas[wanted]}
  elif choice not in ('auto', 'none', 'required'):
    raise Refused(400, "tool_choice must be 'auto', 'none', 'required' or a function", 'tool_choice')
  else:
    forced = schemas if choice == 'required' else {}
  if choice == 'required' and not schemas:
    raise Refused(400, 'tool_choice needs tools', 'tool_choice')
  if choice == 'none' or not given:
    return [], frozenset(), {}
  return given, frozenset(schemas), forced


def _shape(given: Mapping[str, Any]) -> str | None:
  """The grammar of a response_format."""
  kind = given.get('type', 'text')
  if kind == 'text':
    return None
  if kind == 'json_object':
    return tools.json_grammar({'type': 'object'})
  wrapped = given.get('json_schema')
  schema = wrapped.get('schema') if isinstance(wrapped, dict) else None
  if kind != 'json_schema' or not isinstance(schema, dict):
    raise Refused(400, 'response_format must be text, json_object, or json_schema with a schema', 'response_format')
  return tools.json_grammar(schema)


def _checked(asked: Asked, limits: Limits) -> Asked:
  """Raises Refused for more than there is room for."""
  if (count := asked.n * len(asked.prompts)) > limits.answers:
    raise Refused(400, f'{count} answers in one request; the limit is {limits.answers}', 'n')
  longest = max(len(prompt.ids) for prompt in asked.prompts)
  if longest + max(asked.most or 1, asked.most is None) > limits.context + (asked.most == 0):
    most = '' if asked.most is None else f' and {asked.most} new ones'
    raise Refused(
      400,
      f'the prompt has {longest} tokens{most}; the context is {limits.context}',
      'max_tokens' if longest < limits.context else 'messages',
      'context_length_exceeded',
    )
  if asked.most is not None and asked.most > limits.tokens:
    raise Refused(400, f'max_tokens must be at most {limits.tokens}', 'max_tokens')
  return asked


def listing(models: Sequence[Served]) -> dict[str, Any]:
  """`/v1/models`."""
  return {'object': 'list', 'data': [entry(model) for model in models]}


def entry(model: Served) -> dict[str, Any]:
  return {'id': model.name, 'object': 'model', 'created': model.created, 'owned_by': 'jaxlm'}
