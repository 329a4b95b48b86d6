"""The pages of the project as a test sees them: fenced blocks, commands as bash would run them, links, flags."""

import dataclasses
import os
import re
import subprocess
import tempfile
import typing
from pathlib import Path
from typing import NamedTuple

from jaxlm import arguments, scale, stages

ROOT = Path(__file__).parents[1]
PAGES = {str(p.relative_to(ROOT)): p for p in (ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *ROOT.glob('docs/*.md'))}
FENCE = re.compile(r'^( *)```(\w*)\n(.*?)^\1```$', re.DOTALL | re.MULTILINE)
OPTIONAL = re.compile(r'\s\[[^\]\n]*\]$', re.MULTILINE)  # '[--steps 408]' at the end of a line of the log

# Nothing is found and so nothing runs: what bash would have started is written down, words expanded.
STUB = """
command_not_found_handle() { printf '%s\\0' "$#" "$@" >>"$CALLS"; }
cd() { :; }
enable -n kill
"""


class Block(NamedTuple):
  """A fenced block: where it stands, its language, its text."""

  page: str
  line: int
  language: str
  text: str

  @property
  def where(self) -> str:
    return f'{self.page}:{self.line}'


def blocks(page: str) -> list[Block]:
  """The fenced blocks of a page; one without a language that holds a command of ours is bash."""
  text, found = PAGES[page].read_text(), []
  for match in FENCE.finditer(text):
    body = re.sub(f'^{match[1]}', '', match[3], flags=re.MULTILINE)
    language = match[2] or ('bash' if re.search(r'^(jaxlm|python) ', body, re.MULTILINE) else '')
    found.append(Block(page, text[: match.start()].count('\n') + 2, language, body))
  return found


def prose(page: str) -> str:
  """The page without its fenced blocks."""
  return FENCE.sub('', PAGES[page].read_text())


def calls(script: str) -> list[list[str]]:
  """The commands that bash would start for a script, each as its arguments; only builtins really run."""
  with tempfile.TemporaryDirectory() as folder:
    written = Path(folder) / 'calls'
    written.touch()
    env = {'PATH': folder, 'HOME': folder, 'CALLS': str(written), 'TERM': 'dumb'}
    command = ['/bin/bash', '--noprofile', '--norc', '-c', STUB + script]
    subprocess.run(command, cwd=folder, env=env, capture_output=True, timeout=60)
    parts, found = os.fsdecode(written.read_bytes()).split('\0')[:-1], []
  while parts:
    n = int(parts[0])
    found.append(parts[1 : n + 1])
    parts = parts[n + 1 :]
  return found


def commands(script: str) -> list[list[str]]:
  """The arguments of every `jaxlm` that a script starts, itself or through ssh, srun, python -m and the like."""
  script = re.sub(r"[^\s'\"]*/bin/jaxlm\b", 'jaxlm', OPTIONAL.sub('', script))
  found = []
  for call in calls(script):
    if 'jaxlm' in call:
      found.append(call[call.index('jaxlm') + 1 :])
    for word in call:
      if re.search(r'\bjaxlm [a-z]+ ', word):
        found += commands(word.removeprefix('--command='))
  return found


def anchors(page: str) -> set[str]:
  """The names that GitHub gives to the headings of a page."""
  found: dict[str, int] = {}
  for title in re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE):
    title = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', title).lower()
    name = re.sub(r'[^\w\- ]', '', title).strip().replace(' ', '-')
    found[name if name not in found else f'{name}-{found[name]}'] = found.get(name, 0) + 1
  return set(found)


def links(page: str) -> list[str]:
  """The targets of the links and pictures of a page, without spans of code."""
  return re.findall(r'\]\(([^()\s]+)\)', re.sub(r'`[^`]*`', '', prose(page)))


def flags() -> set[str]:
  """Every flag of every verb, as '--optim.lr'."""
  kinds = [kind for kind in vars(arguments).values() if dataclasses.is_dataclass(kind)]
  short = [name for stage in stages.ABOUT for name in stages.short_names(stage)]
  names = [*short, 'help', *(name for kind in (*kinds, scale.Dialled) for name in _names(kind))]
  return {f'--{name.replace("_", "-")}' for name in names}


def _names(kind: typing.Any, before: str = '') -> list[str]:
  hints = typing.get_type_hints(kind)
  found = []
  for field in dataclasses.fields(kind):
    inner = hints[field.name]
    found += _names(inner, f'{before}{field.name}.') if dataclasses.is_dataclass(inner) else [before + field.name]
  return found + [f'no-{name}' for name in found]
