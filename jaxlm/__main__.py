"""`jaxlm`, and `python -m jaxlm`."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxlm.cli import main

HUGE = Path('/sys/kernel/mm/transparent_hugepage/enabled')
TUNED, LARGE, AGAIN = 'GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1', 'jaxlm_again'


def run() -> int:
  """The command line, its memory in pages of 2 MiB where Linux leaves that to each program.

  XLA asks for the temporaries of a step anew each time, and on a CPU up to a quarter of a step was the system handing
  them out by 4 KiB. The C library reads this once, so the program begins again, if it is this one and no other that
  calls it; who set it, or `always`, is left alone.
  """
  if AGAIN in sys._xoptions:
    os.environ.pop(TUNED, None)  # it was read: programs that are started from here have what they would have had
  elif TUNED not in os.environ and sys.executable and ours(sys.orig_argv, sys.argv) and _left_to_programs():
    os.environ[TUNED] = LARGE
    os.execv(sys.executable, [sys.executable, '-X', AGAIN, *sys.orig_argv[1:]])
  return main()


def ours(whole: Sequence[str], given: Sequence[str]) -> bool:
  """Whether a process's own command line is `... jaxlm ARGUMENTS` or `python ... -m jaxlm ARGUMENTS`."""
  head, arguments = list(whole[: len(whole) - len(given) + 1]), list(given[1:])
  if [*head, *arguments] != list(whole) or len(head) < 2:
    return False
  return head[-2:] == ['-m', 'jaxlm'] or Path(head[-1]).name == 'jaxlm'


def _left_to_programs() -> bool:
  with contextlib.suppress(OSError):
    return '[madvise]' in HUGE.read_text()
  return False


if __name__ == '__main__':
  raise SystemExit(run())
