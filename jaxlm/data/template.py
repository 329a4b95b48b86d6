"""Chat templates (Jinja) rendered apart: a child process, sandboxed, with its time, memory and output limited."""

import atexit
import json
import select
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from jaxlm.errors import InputError

SECONDS = 5.0  # for one conversation
START = 60.0  # until the child is there, which says nothing of a template
CHARS = 1 << 22  # of one conversation
MEMORY = 1 << 30  # bytes of address space
MARKS = 'generation_begins', 'generation_ends'


def worker() -> None:
  """The child: 'ready', then for each line of JSON ({template, variables, chars}) one out ({text} or {error})."""
  import datetime
  import resource

  import jinja2
  import jinja2.ext
  from jinja2 import nodes
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

  class Generation(jinja2.ext.Extension):
    """{% generation %}: what the assistant wrote, between the variables MARKS where they are given."""

    tags = {'generation'}

    def parse(self, parser: Any) -> Any:
      line = next(parser.stream).lineno
      body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
      begin, end = (nodes.Output([nodes.Name(name, 'load')], lineno=line) for name in MARKS)
      return [begin, *body, end]

  def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)

  def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

  environment: Any = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  environment.filters['tojson'] = tojson
  environment.globals['raise_exception'] = refuse
  environment.globals['strftime_now'] = lambda format: datetime.datetime.now().strftime(format)
  compiled: dict[str, jinja2.Template] = {}
  print('ready', flush=True)
  for line in sys.stdin:
    asked = json.loads(line)
    try:
      source = asked['template']
      if source not in compiled:
        compiled[source] = environment.from_string(source)
      parts, length = [], 0
      for part in compiled[source].generate(**asked['variables']):
        length += len(part)
        if length > asked['chars']:
          raise jinja2.TemplateError(f'it writes more than {asked["chars"]} characters')
        parts.append(part)
      found = {'text': ''.join(parts)}
    except Exception as error:  # whatever a template can do
      found = {'error': f'{type(error).__name__}: {error}'.splitlines()[0][:300]}
    print(json.dumps(found), flush=True)


class Renderer:
  """The child that renders, started when it is first needed and again after one that had to be killed."""

  def __init__(self, seconds: float = SECONDS, chars: int = CHARS):
    self.seconds, self.chars = seconds, chars
    self._child: subprocess.Popen | None = None
    self._lock = threading.Lock()
    atexit.register(self.close)

  def __call__(self, template: str, variables: Mapping[str, Any]) -> str:
    """The text. Raises InputError for a template that fails, takes too long, or writes too much."""
    asked = json.dumps({'template': template, 'variables': dict(variables), 'chars': self.chars})
    with self._lock:
      try:
        child = self._running()
        child.stdin.write(f'{asked}\n'.encode())  # ty: ignore
        child.stdin.flush()  # ty: ignore
        line = _line(child, self.seconds)
      except OSError:
        line = b''
      except BaseException:  # interrupted: what the child still says would be taken for its next answer
        self.close()
        raise
      if not line:
        self.close()
        why = 'ran out of memory or died' if line == b'' else f'took more than {self.seconds:g} seconds'
        raise InputError(f'chat template: {why}')
    found = json.loads(line)
    if 'error' in found:
      raise InputError(f'chat template: {found["error"]}')
    return found['text']

  def _running(self) -> subprocess.Popen:
    if self._child is None or self._child.poll() is not None:
      code = 'from jaxlm.data import template; template.worker()'
      command, pipe = [sys.executable, '-c', code], subprocess.PIPE
      self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)  # out of ctrl-c's reach
      if not _line(self._child, START):
        raise InputError(f'chat template: the process that renders it did not start within {START:g} seconds')
    return self._child

  def close(self) -> None:
    """Ends the child."""
    child, self._child = self._child, None
    if child is not None:
      child.kill()
      for pipe in (child.stdin, child.stdout):
        pipe.close()  # ty: ignore
      child.wait()


def _line(child: subprocess.Popen, seconds: float) -> bytes | None:
  """What the child says next: b'' if it is gone, None if nothing comes in that time."""
  return child.stdout.readline() if select.select([child.stdout], [], [], seconds)[0] else None  # ty: ignore


render = Renderer()
