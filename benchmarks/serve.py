"""How fast servers answer: tokens a second and seconds to the first token, by clients at once, in a Markdown table.

jaxlm serve MODEL --slots 32 &
python benchmarks/serve.py http://127.0.0.1:8000/v1 [others, as of `transformers serve` or llama.cpp's server]

Every client asks for one answer after another, each with a prompt of its own, and reads it as it streams. Servers that
are to be compared are asked in turn, `--rounds` times, so that other work on the machine meets all of them. With
`--wait` a client lets some time pass before it asks, as people do: what it then waits for its first token is what
others cost it, not that all ask in the same moment.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from typing import Any, NamedTuple

import httpx

from jaxlm.console import table

WORDS = 'the of and to in is that for it as was with be by on not he this are or his from at which but have an had they'


class Answer(NamedTuple):
  first: float  # seconds to the first token
  whole: float
  tokens: int


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Answer:
  """One streamed answer."""
  began, first, tokens, pieces = time.perf_counter(), None, 0, 0
  async with client.stream('POST', f'{url}/completions', json=body) as response:
    if response.status_code != 200:
      raise SystemExit(f'{url}: {response.status_code}: {(await response.aread()).decode()[:300]}')
    async for line in response.aiter_lines():
      if not line.startswith('data: {'):
        continue
      told = json.loads(line[6:])
      if told.get('choices'):
        first = first or time.perf_counter() - began
        pieces += 1
      if told.get('usage'):
        tokens = told['usage']['completion_tokens']
  whole = time.perf_counter() - began
  return Answer(first or whole, whole, tokens or pieces)


def prompt(number: int, words: int) -> str:
  """No two are alike, from their first word on."""
  known = WORDS.split()
  return f'{number} ' + ' '.join(known[(number * 7 + i * i) % len(known)] for i in range(words))


async def measure(url: str, options: argparse.Namespace, clients: int, turn: int) -> tuple[float, list[float]]:
  """Tokens a second of all clients together, and the seconds to each first token."""
  async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
    name = options.model or (await client.get(f'{url}/models')).json()['data'][0]['id']
    usual = {'model': name, 'max_tokens': options.tokens, 'temperature': 0, 'stream': True}
    usual |= {'stream_options': {'include_usage': True}} | ({'ignore_eos': True} if options.ignore_eos else {})

    async def one(who: int) -> list[Answer]:
      number = (turn * 1000 + who) * options.asks
      rng, answers = random.Random(number), []
      for i in range(options.asks):
        await asyncio.sleep(rng.uniform(0, 2 * options.wait))
        answers.append(await ask(client, url, usual | {'prompt': prompt(number + i, options.words)}))
      return answers

    await ask(client, url, usual | {'prompt': prompt(10**6 + turn, options.words)})
    began = time.perf_counter()
    answers = [a for found in await asyncio.gather(*map(one, range(clients))) for a in found]
    return sum(a.tokens for a in answers) / (time.perf_counter() - began), [a.first for a in answers]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('urls', nargs='+')
  parser.add_argument('--model', default='', help='by default the first that a server lists')
  parser.add_argument('--clients', type=int, nargs='+', default=[1, 8, 32])
  parser.add_argument('--asks', type=int, default=2, help='answers that each client asks for')
  parser.add_argument('--tokens', type=int, default=64, help='of an answer')
  parser.add_argument('--words', type=int, default=40, help='of a prompt')
  parser.add_argument('--wait', type=float, default=0.0, help='seconds in the mean before a client asks (again)')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--ignore-eos', action='store_true', help='answers of one length, where a server knows how')
  options = parser.parse_args()
  found: dict[tuple[str, int], list[tuple[float, list[float]]]] = {}
  for turn in range(options.rounds):
    for clients in options.clients:
      for url in options.urls:
        rate, firsts = asyncio.run(measure(url, options, clients, turn))
        found.setdefault((url, clients), []).append((rate, firsts))
        print(f'{url}, {clients} clients: {rate:.1f} tokens/s, {statistics.median(firsts):.3f} s', file=sys.stderr)
  rows = []
  for (url, clients), measured in found.items():
    rate = statistics.median(rate for rate, _ in measured)
    alone = statistics.median(rate for rate, _ in found[url, options.clients[0]])
    firsts = sorted(first for _, some in measured for first in some)
    late = firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))]
    shown = f'{rate:.1f}', f'{rate / alone:.2f}', f'{statistics.median(firsts):.3f}', f'{late:.3f}'
    rows.append((url, str(clients), *shown))
  header = ('server', 'clients', 'tokens/s', f'x {options.clients[0]} client', 'first token, s', 'p95')
  print(table(header, sorted(rows, key=lambda row: (row[0], int(row[1])))))


if __name__ == '__main__':
  main()
