"""`jaxlm` many times over, quickly: one process imports everything, and forks one for each command.

A forked process has its own number, threads and devices, and dies alone; it saves the seconds that imports take.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

IMPORTED = (
  'jaxlm.loops.pretrain',
  'jaxlm.data.prepare',
  'orbax.checkpoint.experimental.v1',
  'grain',
  'tensorflow_datasets',
)


class Forks:
  """Runs commands of `jaxlm`, one after the other."""

  def __init__(self, **env: str):
    self._server = subprocess.Popen(
      [sys.executable, __file__], env=os.environ | env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

  def run(self, out: Path, *arguments: str, **env: str) -> tuple[int, str]:
    """(exit code, or minus a signal's number; what it printed, by way of the file `out`)."""
    assert self._server.stdin and self._server.stdout
    self._server.stdin.write(json.dumps([str(out), arguments, env]) + '\n')
    self._server.stdin.flush()
    code = int(self._server.stdout.readline())
    return code, out.read_text()

  def close(self) -> None:
    """Ends the process that forks."""
    self._server.communicate()


def serve() -> int:
  """Forks for each line of standard input, and writes the exit code of each."""
  import importlib

  from jaxlm import cli

  for name in IMPORTED:
    importlib.import_module(name)
  while line := sys.stdin.readline():
    out, arguments, env = json.loads(line)
    if not (child := os.fork()):
      os.environ.update(env)
      for target, path, flags in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        os.dup2(os.open(path, flags, 0o644), target)
      os.dup2(1, 2)
      return cli.main(arguments)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(serve())
