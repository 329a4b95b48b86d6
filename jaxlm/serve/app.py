"""The web's side of serving: routes, a key, limits of size and time, streams, and a graceful end."""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import signal
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, NamedTuple

from jaxlm.errors import InputError
from jaxlm.serve import api, choices
from jaxlm.serve.answers import JSON, Answer, Chat, Completion
from jaxlm.serve.api import Asked, Limits, Refused, Served
from jaxlm.serve.choices import Choices
from jaxlm.serve.constrain import Grammars
from jaxlm.serve.engine import Ask, Closed, Engine, Full, Piece
from jaxlm.serve.page import page
from jaxlm.serve.text import Spelling

GONE = 499  # nobody reads it; it is counted
LOOPBACK = ('127.0.0.1', 'localhost', '::1')
ROUTES = ('/', '/health', '/metrics', '/v1/models', '/v1/completions', '/v1/chat/completions', '/v1/choices')
LOG = logging.getLogger('uvicorn.error')  # where uvicorn writes what a route raises
OPEN = ('/',)  # without the key: the page asks for it, and has nothing of the server in it


class Settings(NamedTuple):
  """Of a server."""

  key: str | None = None
  hosts: tuple[str, ...] | None = None  # names that requests may be sent to; None: any
  body_bytes: int = 1 << 20
  head_seconds: float = 10.0  # for the beginning of a request
  body_seconds: float = 20.0  # for a whole body to arrive
  answer_seconds: float = 600.0  # for a whole answer
  drain_seconds: float = 60.0  # for the answers that are being made when the server is asked to end
  choices: Choices | None = None  # where it is kept which answers were liked better


class Service:
  """The models that are served and the engine that answers."""

  def __init__(self, engine: Engine, models: Mapping[str, Served], limits: Limits, settings: Settings):
    self.engine, self.models, self.limits, self.settings = engine, dict(models), limits, settings
    self.spelling = {name: Spelling(model.tokenizer) for name, model in models.items()}
    self.grammars = {name: Grammars(m.tokenizer, m.vocab_size, m.ends) for name, m in models.items()}

  def asks(self, asked: Asked, deliver: Callable[[int, Piece], None]) -> list[Ask]:
    """One for each answer that is wanted. Raises Refused for a schema that cannot be followed."""
    found = []
    for prompt in asked.prompts:
      room = self.limits.context - len(prompt.ids)
      for i in range(asked.n):
        matcher = None
        if asked.grammar is not None:
          try:
            matcher = self.grammars[asked.model.name].matcher(asked.grammar)
          except InputError as error:
            raise Refused(400, str(error), 'response_format') from None
        choice = len(found)
        most = min(self.limits.tokens, room) if asked.most is None else asked.most
        found.append(
          Ask(
            prompt=prompt.ids,
            most=most,
            deliver=lambda piece, choice=choice: deliver(choice, piece),
            settings=asked.settings,
            seed=asked.seed,
            index=i if asked.seeded else choice,
            stop=asked.stop,
            stop_ids=asked.stop_ids,
            told=asked.told,
            scored=asked.scored,
            bias=asked.bias,
            matcher=matcher,
          )
        )
    return found


class Guard:
  """Lets in who has the key, and counts the answers; everything else never sees the request."""

  def __init__(self, app: Any, service: Service):
    self.app, self.service, settings = app, service, service.settings
    self._digest = hashlib.sha256(settings.key.encode()).digest() if settings.key else None

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    if scope['type'] != 'http':
      await self.app(scope, receive, send)
      return
    route = scope['path'] if scope['path'] in ROUTES else 'other'

    async def counted(message: Any) -> None:
      if message['type'] == 'http.response.start':
        self.service.engine.metrics.add('requests', route=route, status=str(message['status']))
      await send(message)

    headers = dict(scope['headers'])
    if refused := self._refused(scope['path'], headers):
      await _error(refused)(scope, receive, counted)
      return
    await self.app(scope, receive, counted)

  def _refused(self, path: str, headers: Mapping[bytes, bytes]) -> Refused | None:
    """A digest is compared, so that not even the length of the key can be measured."""
    if self._digest is not None and path not in OPEN:
      kind, _, given = headers.get(b'authorization', b'').partition(b' ')
      same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._digest)
      if not same or kind.lower() != b'bearer':
        return Refused(401, 'the API key is missing or wrong', code='invalid_api_key')
    if self.service.settings.hosts is not None:
      host = headers.get(b'host', b'').decode('latin1').rpartition(':')
      name = (host[0] if host[1] and host[2].isdigit() else ''.join(host)).strip('[]')
      if name not in self.service.settings.hosts:  # a page of another site that has its name point here
        return Refused(403, 'this server answers to its own addresses; with a key it answers to any name')
    return None


def _error(refused: Refused) -> Any:
  from starlette.responses import JSONResponse

  headers = {401: {'WWW-Authenticate': 'Bearer'}, 429: {'Retry-After': '1'}, 503: {'Retry-After': '5'}}
  return JSONResponse(refused.body(), refused.status, headers.get(refused.status))


def _unforeseen() -> Refused:
  """What a client is told of an error of ours: that there was one. The traceback is the log's alone."""
  return Refused(500, 'the server failed to answer; its log says why')


async def _body(request: Any, settings: Settings) -> bytes:
  """Raises Refused for one that is too large or too slow, or not said to be JSON, as other sites' pages cannot say."""
  if request.headers.get('content-type', '').partition(';')[0].strip().lower() != 'application/json':
    raise Refused(415, 'the content type must be application/json')
  from starlette.requests import ClientDisconnect

  parts, size = [], 0
  try:
    async with asyncio.timeout(settings.body_seconds):
      async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > settings.body_bytes:
          raise Refused(413, f'the body is larger than {settings.body_bytes:,} bytes')
  except TimeoutError:
    raise Refused(408, f'the body did not arrive within {settings.body_seconds:g} seconds') from None
  except ClientDisconnect:
    raise Refused(GONE, 'the client went away') from None
  return b''.join(parts)


class Running:
  """The answers to one request, on their way from the engine's thread."""

  def __init__(self, service: Service, asked: Asked, loop: asyncio.AbstractEventLoop):
    self.service, self._loop = service, loop
    self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
    self.asks = service.asks(asked, self._deliver)
    self._name, self._left = asked.model.name, len(self.asks)

  def _deliver(self, choice: int, piece: Piece) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
      self._loop.call_soon_threadsafe(self._queue.put_nowait, (choice, piece))

  def submit(self) -> None:
    """Raises Refused where there is no room."""
    try:
      self.service.engine.submit(self._name, self.asks)
    except Full as error:
      raise Refused(429, f'{error}: try again later', code='rate_limit_exceeded') from None
    except Closed as error:
      raise Refused(503, str(error)) from None

  def cancel(self) -> None:
    """What is not complete is not wanted any more."""
    if self._left:
      self.service.engine.cancel(self.asks)

  async def pieces(self) -> AsyncGenerator[tuple[int, Piece]]:
    """All of them. Raises Refused if the engine fails, or takes too long."""
    deadline = self._loop.time() + self.service.settings.answer_seconds
    while self._left:
      try:
        async with asyncio.timeout_at(deadline):
          choice, piece = await self._queue.get()
      except TimeoutError:
        raise Refused(503, 'the answer took too long') from None
      if piece.finish == 'error':
        raise Refused(503, 'the server stopped before the answer was complete')
      self._left -= piece.finish is not None
      yield choice, piece


async def _streamed(running: Running, answer: Answer) -> AsyncGenerator[bytes]:
  """Server-sent events. What fails on the way is told by one of its own, as the status was sent long ago."""
  event = lambda told: b'data: ' + json.dumps(told, ensure_ascii=False, separators=(',', ':')).encode() + b'\n\n'
  try:
    for chunk in answer.begin():
      yield event(chunk)
    async with contextlib.aclosing(running.pieces()) as pieces:
      async for choice, piece in pieces:
        for chunk in answer.chunks(choice, piece):
          yield event(chunk)
    for chunk in answer.last():
      yield event(chunk)
  except Refused as refused:
    yield event(refused.body())
  except Exception:
    LOG.exception('a stream failed')
    yield event(_unforeseen().body())
  yield b'data: [DONE]\n\n'


async def _whole(request: Any, running: Running, answer: Answer) -> JSON | None:
  """The answer; None if the client went away before."""

  async def collect() -> JSON:
    async with contextlib.aclosing(running.pieces()) as pieces:
      async for choice, piece in pieces:
        answer.keep(choice, piece)
    return answer.whole()

  async def gone() -> None:
    while (await request.receive())['type'] != 'http.disconnect':
      pass

  tasks = [asyncio.create_task(collect()), asyncio.create_task(gone())]
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return tasks[0].result() if tasks[0].done() else None
  finally:
    running.cancel()
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def application(service: Service) -> Any:
  """The ASGI application. Its lifespan starts the engine and ends it."""
  from starlette.applications import Starlette
  from starlette.concurrency import run_in_threadpool
  from starlette.exceptions import HTTPException
  from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
  from starlette.routing import Route

  engine, metrics = service.engine, service.engine.metrics

  class Stream(StreamingResponse):
    """One that cancels what nobody reads any more, even before it began."""

    def __init__(self, running: Running, answer: Answer):
      headers = {'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'}
      super().__init__(_streamed(running, answer), media_type='text/event-stream', headers=headers)
      self.running = running

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
      try:
        await super().__call__(scope, receive, send)
      finally:
        self.running.cancel()

  def route(read: Any, form: type[Answer]) -> Any:
    async def handle(request: Any) -> Any:
      raw = await _body(request, service.settings)
      if engine.closed:
        raise Refused(503, 'the server is stopping')

      loop = asyncio.get_running_loop()

      def ready() -> tuple[Asked, Answer, Running]:
        asked = read(api.parse(raw), service.models, service.limits)
        return asked, form(asked, service.spelling[asked.model.name]), Running(service, asked, loop)

      asked, answer, running = await run_in_threadpool(ready)  # templates and grammars may take seconds
      running.submit()
      if asked.stream:
        return Stream(running, answer)
      told = await _whole(request, running, answer)
      return Response(status_code=GONE) if told is None else JSONResponse(told)

    return handle

  async def health(request: Any) -> Any:
    state = 'failed' if engine.failed else 'stopping' if engine.closed else 'ok'
    return JSONResponse({'status': state}, 200 if state == 'ok' else 503)

  async def shown(request: Any) -> Any:
    return PlainTextResponse(metrics.text({'live': engine.live(), 'waiting': engine.waiting()}))

  async def models(request: Any) -> Any:
    return JSONResponse(api.listing(list(service.models.values())))

  async def model(request: Any) -> Any:
    name = request.path_params['name']
    if name not in service.models:
      raise Refused(404, f'there is no model {name[:200]!r}', 'model', 'model_not_found')
    return JSONResponse(api.entry(service.models[name]))

  async def shell(request: Any) -> Any:
    text, headers = page()
    return Response(text, headers=headers)

  async def kept(request: Any) -> Any:
    return JSONResponse({'kept': service.settings.choices is not None})

  async def chosen(request: Any) -> Any:
    raw = await _body(request, service.settings)
    file = service.settings.choices
    if file is None:
      raise Refused(404, 'choices are not kept: the server was started without --choices FILE')
    await run_in_threadpool(lambda: file.append(choices.row(api.parse(raw), service.models)))
    return JSONResponse({'kept': True}, 201)

  @contextlib.asynccontextmanager
  async def lifespan(app: Any) -> AsyncGenerator[None]:
    yield
    engine.close()

  def refused(request: Any, error: Any) -> Any:
    return _error(error)

  def other(request: Any, error: Any) -> Any:
    return _error(Refused(error.status_code, str(error.detail)))

  def failed(request: Any, error: Any) -> Any:
    return _error(_unforeseen())  # starlette raises the error again, and uvicorn logs it

  routes = [
    Route('/', shell),
    Route('/health', health),
    Route('/metrics', shown),
    Route('/v1/models', models),
    Route('/v1/models/{name:path}', model),
    Route('/v1/choices', kept),
    Route('/v1/choices', chosen, methods=['POST']),
    Route('/v1/completions', route(api.completion, Completion), methods=['POST']),
    Route('/v1/chat/completions', route(api.conversation, Chat), methods=['POST']),
  ]
  handlers: Any = {Refused: refused, HTTPException: other, Exception: failed}
  app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
  return Guard(app, service)


def _hasty(seconds: float) -> Any:
  """A protocol that closes connections whose next request does not begin in time, or begins and goes on slowly.

  Those whose client reads nothing of what lies there for it in that time are cut off.
  """
  from uvicorn.protocols.http.h11_impl import H11Protocol

  class Hasty(H11Protocol):
    def connection_made(self, transport: Any) -> None:
      super().connection_made(transport)
      self._seen: Any = self
      self._unsent = 0
      self._look()

    def _look(self) -> None:
      cycle, unsent, closing = self.cycle, self.transport.get_write_buffer_size(), self.transport.is_closing()
      if unsent and unsent == self._unsent:  # closed, it would wait for what nobody reads, and the system after it
        lingering = struct.pack('ii', 1, 0)
        self.transport.get_extra_info('socket').setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, lingering)
        self.transport.abort()
        return
      if closing and not unsent:
        return
      if not closing and cycle is self._seen and (cycle is None or cycle.response_complete):
        self.transport.close()
      self._seen, self._unsent = cycle, unsent
      self.loop.call_later(seconds, self._look)

  return Hasty


def run(service: Service, host: str, port: int, say: Callable[[str], None]) -> None:
  """Serves until SIGTERM or SIGINT: then no more is taken, and what was is answered. Raises InputError."""
  import sys

  import uvicorn

  sys.setswitchinterval(0.0002)  # the thread that computes waits no longer for one that reads a large request
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  try:
    listening = socket.create_server((host, port), family=family, backlog=1024)
  except OSError as error:
    raise InputError(f'{host}:{port}: {error.strerror or error}') from error
  # its connections have it too; asyncio sets it for its own sockets alone, and without it answers wait 40 ms for an ack
  listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

  class Server(uvicorn.Server):
    """Tells the engine at once that it ends, and leaves with its exit code rather than by the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
      ends = (signal.SIGTERM, signal.SIGINT)
      before = {sig: signal.signal(sig, self.handle_exit) for sig in ends}
      try:
        yield
      finally:
        for sig, handler in before.items():
          signal.signal(sig, handler)

    async def on_tick(self, counter: int) -> bool:
      """Whether to end: also where nothing can be answered any more, so that somebody starts it again."""
      return await super().on_tick(counter) or service.engine.failed is not None

    def handle_exit(self, sig: int, frame: Any) -> None:
      service.engine.drain()
      super().handle_exit(sig, frame)

  config = uvicorn.Config(
    application(service),
    loop='asyncio',
    http=_hasty(service.settings.head_seconds),
    timeout_keep_alive=5,
    ws='none',
    lifespan='on',
    log_level='warning',
    access_log=False,
    server_header=False,
    limit_concurrency=1024,
    timeout_graceful_shutdown=int(service.settings.drain_seconds),
  )
  shown = f'[{host}]' if ':' in host else host
  service.engine.start()
  address = f'http://{shown}:{listening.getsockname()[1]}'
  say(f'a page to talk to them: {address}/')
  say(f'serving {", ".join(service.models)} at {address}/v1')
  server = Server(config)
  try:
    server.run(sockets=[listening])
  finally:
    service.engine.close()
    listening.close()
  if service.engine.failed is not None:
    raise InputError(f'the engine has failed: {service.engine.failed}')
