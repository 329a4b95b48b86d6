"""Which of two answers somebody liked better, appended to a JSONL that `jaxlm preference` and `jaxlm reward` load."""

import fcntl
import json
import os
import threading
import time
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxlm.data import preferences
from jaxlm.errors import InputError
from jaxlm.serve.api import DEPTH, SEED, Fields, Refused, json_object

SECOND, BURST = 2.0, 20.0  # choices a second, and at once after a rest: people are slower
FULL = 1 << 30  # bytes of a file that takes no more
FINISHES = ('stop', 'length', 'tool_calls')


def row(body: Mapping[str, Any], models: Collection[str]) -> dict[str, Any]:
  """What is written of a choice, checked by what loads it. Raises Refused.

  `body` has the messages of `prompt`, the last one the user's, the texts `chosen` and `rejected`, and of each by whom
  it was said: `chosen_by` and `rejected_by`, a model and its settings.
  """
  fields = Fields(body)
  found: dict[str, Any] = {'prompt': fields.take('prompt', list, [])}
  texts = [fields.take(side, str, '') for side in preferences.SIDES]
  said = [_by(fields.take(f'{side}_by', dict, {}), models, f'{side}_by') for side in preferences.SIDES]
  fields.end()
  if texts[0].strip() == texts[1].strip():
    raise Refused(400, 'both answers are the same', 'rejected')
  for side, text in zip(preferences.SIDES, texts, strict=True):
    found[side] = [{'role': 'assistant', 'content': text}]
  try:
    chosen, _ = preferences.checked(preferences.guess(list(found)).read(found)).answers
    found['prompt'] = chosen.messages[:-1]
    json_object(json.dumps(found), 'the choice', 'prompt')  # arguments of calls were JSON in a string until now
  except InputError as error:
    raise Refused(400, str(error), 'prompt') from None
  except RecursionError:
    raise Refused(400, f'the choice is nested more than {DEPTH} deep', 'prompt') from None
  if not found['prompt'] or found['prompt'][-1]['role'] != 'user':
    raise Refused(400, 'prompt must end with a message of the user', 'prompt')
  found |= {f'{side}_by': by for side, by in zip(preferences.SIDES, said, strict=True)}
  return found | {'time': datetime.now(UTC).isoformat(timespec='seconds')}


def _by(given: Mapping[str, Any], models: Collection[str], where: str) -> dict[str, Any]:
  fields = Fields(given)
  name = fields.take('model', str, '')
  if name not in models:
    raise Refused(400, f'{where}.model must be one of the models', where)
  found: dict[str, Any] = {'model': name}
  for key, low, high in (('temperature', 0, 100), ('top_p', 0, 1)):
    if key in fields.left:
      found[key] = fields.number(key, low, high, low)
  for key, low, high in (('max_tokens', 1, 2**31), ('seed', *SEED)):
    if key in fields.left:
      found[key] = fields.integer(key, low, high)
  finish = fields.take('finish_reason', str, 'stop')
  if finish not in FINISHES:
    raise Refused(400, f'{where}.finish_reason must be one of {", ".join(FINISHES)}', where)
  fields.end()
  return found | {'finish_reason': finish}


class Choices:
  """A file of choices, one a line. A line that could not be written whole is taken back."""

  def __init__(self, path: str):
    """Raises InputError where it cannot be written."""
    if '://' in path:
      raise InputError(f'--choices {path}: a file of this machine is needed, that lines can be appended to')
    self.path = Path(path)
    self._lock, self._left, self._seen = threading.Lock(), BURST, time.monotonic()
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      with self.path.open('ab'):
        pass
    except OSError as error:
      raise InputError(f'--choices {path}: {error.strerror or error}') from error

  def append(self, found: Mapping[str, Any]) -> None:
    """On the disk when it returns. Raises Refused: 429 for too many in a short time, 503 where there is no room."""
    line = json.dumps(found, ensure_ascii=False).encode() + b'\n'
    with self._lock:
      now = time.monotonic()
      self._left, self._seen = min(BURST, self._left + (now - self._seen) * SECOND), now
      if self._left < 1:
        raise Refused(429, 'too many choices in a short time: try again later', code='rate_limit_exceeded')
      self._left -= 1
      try:
        self._write(line)
      except OSError as error:
        raise Refused(503, f'the choice could not be written: {error.strerror or error}') from None

  def _write(self, line: bytes) -> None:
    """Opens the file anew, as somebody may have moved it away; other servers may append to it too."""
    file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
      fcntl.flock(file, fcntl.LOCK_EX)
      size = os.fstat(file).st_size
      if size + len(line) > FULL:
        raise Refused(503, f'the file of choices would have more than {FULL:,} bytes')
      if size and os.pread(file, 1, size - 1) != b'\n':
        line = b'\n' + line
      try:
        if os.write(file, line) < len(line):
          raise OSError('no room for all of it')
        os.fsync(file)
      except OSError:
        os.ftruncate(file, size)
        raise
    finally:
      os.close(file)
