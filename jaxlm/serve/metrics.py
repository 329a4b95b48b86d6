"""Counters and histograms of a server, as Prometheus reads them (text format 0.0.4)."""

import bisect
import threading
from collections import defaultdict
from collections.abc import Mapping

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
HELP = {
  'requests': 'Requests by route and status.',
  'prompt_tokens': 'Tokens of prompts.',
  'cached_tokens': 'Tokens of prompts that were known from earlier prompts.',
  'generated_tokens': 'Tokens that were made.',
  'steps': 'Decoding steps.',
  'finished': 'Answers that came to their end.',
  'cancelled': 'Answers that nobody wanted any more.',
  'first_token_seconds': 'From a request to its first token.',
  'request_seconds': 'From a request to the end of its answer.',
  'live': 'Slots in use.',
  'waiting': 'Requests that wait for a slot.',
}


class Metrics:
  """What is counted, from any thread."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._counts: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
    self._seen: dict[str, list[int]] = defaultdict(lambda: [0] * (len(SECONDS) + 1))
    self._sums: dict[str, float] = defaultdict(float)

  def add(self, name: str, count: float = 1, **labels: str) -> None:
    with self._lock:
      self._counts[name, tuple(labels.items())] += count

  def observe(self, name: str, seconds: float) -> None:
    with self._lock:
      self._seen[name][bisect.bisect_left(SECONDS, seconds)] += 1
      self._sums[name] += seconds

  def count(self, name: str) -> float:
    """Of a counter, all labels together."""
    with self._lock:
      return sum(value for (found, _), value in self._counts.items() if found == name)

  def text(self, gauges: Mapping[str, float]) -> str:
    """All of it, and gauges of the moment."""
    lines: list[str] = []

    def head(name: str, kind: str, suffix: str = '') -> str:
      full = f'jaxlm_{name}{suffix}'
      lines.extend([f'# HELP {full} {HELP[name]}', f'# TYPE {full} {kind}'])
      return full

    with self._lock:
      for name in dict.fromkeys(name for name, _ in sorted(self._counts)):
        full = head(name, 'counter', '_total')
        for (found, labels), value in sorted(self._counts.items()):
          if found == name:
            shown = ','.join(f'{key}="{_quoted(label)}"' for key, label in labels)
            lines.append(f'{full}{{{shown}}} {value:.15g}' if shown else f'{full} {value:.15g}')
      for name, counts in sorted(self._seen.items()):
        full, total = head(name, 'histogram'), 0
        for edge, count in zip((*map('{:g}'.format, SECONDS), '+Inf'), counts, strict=True):
          total += count
          lines.append(f'{full}_bucket{{le="{edge}"}} {total}')
        lines.extend([f'{full}_sum {self._sums[name]:.15g}', f'{full}_count {total}'])
    for name, value in gauges.items():
      lines.append(f'{head(name, "gauge")} {value:.15g}')
    return '\n'.join(lines) + '\n'


def _quoted(label: str) -> str:
  return label.replace('\\', r'\\').replace('\n', r'\n').replace('"', r'\"')
