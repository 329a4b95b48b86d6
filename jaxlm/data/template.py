"""Chat templates (Jinja) rendered apart: a child process, sandboxed, with its time, memory and output limited."""

import json
from collections.abc import Mapping
from typing import Any

from jaxlm import child
from jaxlm.errors import InputError

SECONDS = 5.0  # for one conversation
CHARS = 1 << 22  # of one conversation
MEMORY = 1 << 30  # bytes of address space
MARKS = 'generation_begins', 'generation_ends'


def worker() -> None:
  """The child: {template, variables, chars} in, the text out."""
  import datetime

  import jinja2
  import jinja2.ext
  from jinja2 import nodes
  from jinja2.sandbox import ImmutableSandboxedEnvironment

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

  def rendered(asked: Any) -> str:
    source = asked['template']
    if source not in compiled:
      compiled[source] = environment.from_string(source)
    parts, length = [], 0
    for part in compiled[source].generate(**asked['variables']):
      length += len(part)
      if length > asked['chars']:
        raise jinja2.TemplateError(f'it writes more than {asked["chars"]} characters')
      parts.append(part)
    return ''.join(parts)

  child.answer(rendered, memory=MEMORY)


class Renderer:
  """The child that renders."""

  def __init__(self, seconds: float = SECONDS, chars: int = CHARS):
    self.seconds, self.chars = seconds, chars
    self._child = child.Child('from jaxlm.data import template; template.worker()')
    self.close = self._child.close

  def __call__(self, template: str, variables: Mapping[str, Any]) -> str:
    """The text. Raises InputError for a template that fails, takes too long, or writes too much."""
    asked = {'template': template, 'variables': dict(variables), 'chars': self.chars}
    try:
      return self._child.ask(asked, self.seconds)
    except (child.Failed, OSError) as error:
      raise InputError(f'chat template: {error}') from error


render = Renderer()
