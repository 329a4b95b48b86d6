"""A judge on a real socket, which speaks as an OpenAI-compatible server does and decides by a rule."""

import contextlib
import http.server
import json
import threading


def served(handler):
  """A server of `handler` on a free port of this machine, as a context that gives its address."""

  @contextlib.contextmanager
  def running():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
      yield f'http://127.0.0.1:{server.server_port}'
    finally:
      server.shutdown()
      server.server_close()
      thread.join()

  return running()


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
