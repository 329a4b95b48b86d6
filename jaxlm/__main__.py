"""`jaxlm`, and `python -m jaxlm`."""

import os
import sys
from pathlib import Path

from jaxlm.cli import main

HUGE = Path('/sys/kernel/mm/transparent_hugepage/enabled')


def run() -> int:
  """The command line, its memory in pages of 2 MiB where Linux leaves that to each program.

  XLA asks for the temporaries of a step anew each time, and on a CPU up to a quarter of a step was the system handing
  them out by 4 KiB. The C library reads this once, so the program begins again; who set it, or `always`, is left alone.
  """
  if 'GLIBC_TUNABLES' not in os.environ and HUGE.exists() and '[madvise]' in HUGE.read_text():
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
  return main()


if __name__ == '__main__':
  raise SystemExit(run())
