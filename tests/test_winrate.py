"""Win-rates: intervals, scores, and a judge on a real socket that is asked in both orders."""

import http.server
import json
import threading

import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.evals import winrate

PROMPTS, A, B = ['p', 'q', 'r'], ['long one', 'x', 'same'], ['short', 'yy', 'same']


def test_the_interval_of_a_rate():
  results = np.array([1.0] * 30 + [0.0] * 10 + [0.5] * 7)
  found = winrate.rate(results)
  assert found[3:] == (30, 7, 10) and found.rate == pytest.approx(33.5 / 47)
  spread = 1.96 * results.std() / np.sqrt(47)
  assert found.low == pytest.approx(found.rate - spread, abs=0.02)
  assert found.high == pytest.approx(found.rate + spread, abs=0.02)
  assert '30 wins, 7 ties, 10 losses' in found.said
  with pytest.raises(InputError, match='at least one'):
    winrate.rate(np.zeros(0))


def test_by_scores():
  longer = lambda prompts, said, rows: [len(text) for text in said]
  assert winrate.by_reward(longer)(PROMPTS, A, B, [{}] * 3).tolist() == [1, 0, 0.5]


@pytest.fixture
def judge():
  """A server that prefers the longer answer, and of equal ones the first; or says what it is told to."""

  class Handler(http.server.BaseHTTPRequestHandler):
    said = None

    def do_POST(self):
      asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))['messages'][0]['content']
      a, b = asked.split('Answer A:\n')[1].split('\n\nAnswer B:\n')
      letter = self.said or ('A' if len(a) >= len(b.strip()) else 'B')
      body = json.dumps({'choices': [{'message': {'content': f' {letter}.'}}]}).encode()
      self.send_response(200)
      self.send_header('Content-Length', str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield Handler, f'http://127.0.0.1:{server.server_port}/v1'
  server.shutdown()
  server.server_close()


def test_a_judge_is_asked_in_both_orders(judge):
  """What it prefers for its place alone is a tie."""
  handler, url = judge
  assert winrate.by_judge(url, 'm')(PROMPTS, A, B, [{}] * 3).tolist() == [1, 0, 0.5]
  handler.said = 'hm'
  with pytest.raises(InputError, match='none of A, B and C'):
    winrate.by_judge(url, 'm')(PROMPTS, A, B, [{}] * 3)
  with pytest.raises(InputError, match='judge http://127.0.0.1:9'):
    winrate.by_judge('http://127.0.0.1:9/v1', 'm', timeout=2)(PROMPTS, A, B, [{}] * 3)
