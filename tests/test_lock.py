"""One writer a folder: refused while the owner lives, taken over when it is dead, and only once."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from jaxlm.errors import InputError
from jaxlm.train import lock

HOLD = """
import sys, time
from jaxlm.train import lock
with lock.hold(sys.argv[1]):
  print('held', flush=True)
  time.sleep(float(sys.argv[2]))
"""
TRY = """
import sys, time
from jaxlm.errors import InputError
from jaxlm.train import lock
while time.time() < float(sys.argv[2]): pass
try:
  with lock.hold(sys.argv[1]):
    print('held', flush=True)
    time.sleep(2)
except InputError:
  print('refused', flush=True)
"""


def start(code, *args):
  return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdout=subprocess.PIPE, text=True)


def test_refused_while_the_owner_lives_and_free_after(tmp_path):
  with start(HOLD, tmp_path, 60) as owner:
    assert owner.stdout.readline() == 'held\n'
    began = time.monotonic()
    with pytest.raises(InputError, match=f'process {owner.pid} on {socket.gethostname()}'), lock.hold(tmp_path):
      pass
    assert time.monotonic() - began < 1.0
    owner.kill()
    owner.wait()
  with lock.hold(tmp_path):  # the dead owner's is taken over
    assert len(list(tmp_path.glob('lock-*'))) == 1
  assert not list(tmp_path.glob('lock-*'))


def test_of_several_that_take_over_one_succeeds(tmp_path):
  (tmp_path / 'lock-000004').write_text(json.dumps({'host': socket.gethostname(), 'pid': 2**22 + 1, 'started': '1'}))
  at = time.time() + 2
  tries = [start(TRY, tmp_path, at) for _ in range(4)]
  answers = sorted(p.communicate()[0].strip() for p in tries)
  assert answers == ['held', 'refused', 'refused', 'refused']


def test_a_lock_that_came_while_one_looked_away_is_seen(tmp_path, monkeypatch):
  """One looks, sees a dead owner's lock 4 and will make lock 5; before it does, 4 goes and another process holds 1."""
  dead = tmp_path / 'lock-000004'
  dead.write_text(json.dumps({'host': socket.gethostname(), 'pid': 2**22 + 1, 'started': '1'}))
  others = []

  def create(path, text):
    if not others:
      dead.unlink()
      others.append(start(HOLD, tmp_path, 60))
      assert others[0].stdout.readline() == 'held\n' and (tmp_path / 'lock-000001').exists()
    whole(path, text)

  whole = lock.files.create
  monkeypatch.setattr(lock.files, 'create', create)
  try:
    with pytest.raises(InputError, match='is being written by process'), lock.hold(tmp_path):
      pass
    assert [path.name for path in tmp_path.glob('lock-*')] == ['lock-000001']
  finally:
    for other in others:
      other.kill()
      other.communicate()


def test_a_pid_used_again_is_not_its_first_owner(tmp_path):
  (tmp_path / 'lock-000001').write_text(json.dumps({'host': socket.gethostname(), 'pid': os.getpid(), 'started': '1'}))
  with lock.hold(tmp_path):
    pass


def test_an_owner_elsewhere_lives_as_long_as_it_beats(tmp_path):
  path = tmp_path / 'lock-000001'
  path.write_text(json.dumps({'host': 'another', 'pid': 1, 'started': '1'}))
  with pytest.raises(InputError, match='process 1 on another'), lock.hold(tmp_path):
    pass
  os.utime(path, (time.time() - 2 * lock.STALE,) * 2)
  with lock.hold(tmp_path):
    pass


@pytest.mark.parametrize('text', ['', '{"host": "some'])
def test_one_killed_while_it_wrote_the_lock_is_waited_out(tmp_path, text):
  (tmp_path / 'lock-000001').write_text(text)
  with lock.hold(tmp_path):
    assert [path.name for path in tmp_path.glob('lock-*')] == ['lock-000002']
