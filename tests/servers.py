"""Servers on real sockets: a judge that decides by a rule, and our own sampler behind the protocol of vLLM."""

import contextlib
import http.server
import json
import threading
from pathlib import Path

import jax
import numpy as np

from jaxlm import interop, sample
from jaxlm.sample import Sampling


def served(handler):
  """A server of `handler` on a free port of this machine, as a context that gives its address."""

  @contextlib.contextmanager
  def running():
    server = Patient(('127.0.0.1', 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
      yield f'http://127.0.0.1:{server.server_port}'
    finally:
      server.shutdown()
      server.server_close()
      thread.join()

  return running()


class Patient(http.server.ThreadingHTTPServer):
  request_queue_size = 128  # of connections that wait: past the five of the library they are reset


class Json(http.server.BaseHTTPRequestHandler):
  """Answers of JSON; nothing is logged."""

  def body(self):
    return json.loads(self.rfile.read(int(self.headers.get('Content-Length') or 0)) or b'{}')

  def answer(self, value, status=200):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    self.send_response(status)
    self.send_header('Content-Length', str(len(raw)))
    self.end_headers()
    self.wfile.write(raw)

  def log_message(self, *args):
    pass


def judge(rule):
  """`rule(a, b)` says a letter, or whatever else. The context gives (address, the bodies and keys it was sent)."""
  seen = []

  class Handler(Json):
    def do_POST(self):
      asked = self.body()
      seen.append((self.path, asked['model'], self.headers.get('Authorization')))
      a, b = asked['messages'][0]['content'].split('Answer A:\n')[1].split('\n\nAnswer B:\n')
      self.answer({'choices': [{'message': {'content': rule(a, b.removesuffix('\n'))}}]})

  @contextlib.contextmanager
  def running():
    with served(Handler) as url:
      yield f'{url}/v1', seen

  return running()


class Vllm:
  """Another engine: weights of its own, read from the folder that it was told of last; `seen` are its requests."""

  def __init__(self):
    self.seen, self.path, self.model, self.lock = [], None, None, threading.Lock()
    self.changed = lambda path, reply: reply  # what a test makes of (path, (reply, status))

  def reload(self, body):
    assert body['method'] == 'reload_weights'
    self.path = Path(body['kwargs']['weights_path'])
    assert self.path.is_absolute()
    self.model = interop.load(str(self.path))
    return {'results': [None]}

  def complete(self, body):
    how = {'temperature_B': body['temperature'], 'top_p_B': body['top_p'], 'min_p_B': body['min_p']}
    sampling = Sampling(**how, top_k_B=body['top_k'] or None, seed_B=np.array([body['seed']]))
    asked = {'max_new_tokens': body['max_tokens'], 'sampling': sampling, 'stop_ids': tuple(body['stop_token_ids'])}
    with self.lock:
      out = sample.generate(self.model.cfg, self.model.params, [body['prompt']], jax.random.key(0), **asked)
    n, stopped = int(out.lengths_B[0]), bool(out.stopped_B[0])
    logps = np.asarray(out.sampled_logp_BN)[0, :n].tolist()
    one = {'token_ids': np.asarray(out.tokens_BN)[0, :n].tolist(), 'logprobs': {'token_logprobs': logps}}
    return {'choices': [one | {'finish_reason': 'stop' if stopped else 'length'}]}

  @contextlib.contextmanager
  def running(self):
    acts = {'/collective_rpc': self.reload, '/v1/completions': self.complete, '/reset_prefix_cache': lambda body: b''}

    class Handler(Json):
      def do_POST(handler):
        body = handler.body()
        self.seen.append((handler.path, body))
        handler.answer(*self.changed(handler.path, (acts[handler.path](body), 200)))

      def do_GET(handler):
        assert handler.path == '/v1/models'
        handler.answer(*self.changed(handler.path, ({'data': [{'id': 'served'}]}, 200)))

    with served(Handler) as url:
      yield url
