"""A run as two processes of four devices: the numbers of one process, its saves, its end, and the end of a peer."""

import dataclasses
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import finish, furnish, logged, saved_state

from jaxlm import config as configs
from jaxlm import hosts, peers
from jaxlm.config import Data, Optim, Pretrain, Watch
from jaxlm.data import batches
from jaxlm.errors import InputError
from jaxlm.loops import pretrain
from jaxlm.models import ModelConfig
from jaxlm.train.checkpoint import Checkpoints, verify
from jaxlm.train.metrics import read_rows

TINY = Pretrain(
  model=ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64),
  data=Data(seq_len=32, global_batch=8),
  optim=Optim(lr=3e-3, schedule='constant', warmup_steps=3),
  watch=Watch(log_every=1, eval_every=5, eval_batches=2, sample_every=7, sample_tokens=5, save_every=6, keep_last=100),
  steps=10,
)
LONG = ('--steps', '100000', '--watch.eval-every', '100000', '--watch.sample-every', '100000')
ASLEEP = """
import signal, time
signal.signal(signal.SIGUSR1, lambda *_: time.sleep(1e6))  # the main thread alone: a test's way to hang it
"""
FLAGS = '--xla_force_host_platform_device_count={} --xla_backend_optimization_level=0'
MESHES = {
  'data and fsdp': {'data': 2, 'fsdp': 4},
  'sequence and tensor': {'fsdp': 1, 'sequence': 4, 'tensor': 2},
}


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """Prepared data and the config of a tiny run."""
  home = furnish(tmp_path_factory.mktemp('hosts'), TINY)
  (home / 'tiny.py').write_text(ASLEEP + (home / 'tiny.py').read_text())
  return home


STARTED: list[subprocess.Popen] = []


@pytest.fixture(scope='module', autouse=True)
def reaped():
  """No process outlives the tests, whatever became of them."""
  yield
  for p in STARTED:
    p.kill()
    p.wait()
    p.stdout.close()


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('', 0))
    return s.getsockname()[1]


def process(home: Path, command: list[str], devices: int = 4, **env: str) -> subprocess.Popen:
  cache = {'JAX_COMPILATION_CACHE_DIR': str(home / 'cache'), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  env = os.environ | cache | {'XLA_FLAGS': FLAGS.format(devices), 'JAX_PLATFORMS': 'cpu'} | env
  STARTED.append(
    subprocess.Popen([sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  )
  return STARTED[-1]


def two(home: Path, command: list[str], last: tuple[str, ...] = ()) -> list[subprocess.Popen]:
  """Rank 0 and rank 1; `last` are arguments of rank 1 alone."""
  shared = {'JAX_COORDINATOR_ADDRESS': f'localhost:{free_port()}', 'JAX_NUM_PROCESSES': '2'}
  return [process(home, [*command, *last * rank], **shared, JAX_PROCESS_ID=str(rank)) for rank in (0, 1)]


def training(home: Path, run: Path, *flags: str) -> list[str]:
  return ['-m', 'jaxlm', 'pretrain', str(home / 'tiny.py'), '--run', str(run), *flags]


def flags_of(mesh: dict[str, int]) -> list[str]:
  return [part for name, size in mesh.items() for part in (f'--mesh.{name}', str(size))]


def alone(home: Path, run: Path, mesh: dict[str, int], steps: int) -> None:
  """The run in this process, which has eight devices."""
  config = configs.from_json(Pretrain, (home / 'settings.json').read_text())
  pretrain.pretrain(dataclasses.replace(config, run=str(run), mesh=configs.Mesh(**mesh), steps=steps))


def rows(run: Path, name: str = 'train/loss') -> dict[int, float]:
  return {row['step']: row[name] for row in read_rows(run / 'metrics.jsonl') if name in row}


def assert_same(found: Path, expected: Path, step: int) -> None:
  for name in ('train/loss', 'train/grad_norm', 'eval/loss'):
    assert rows(found, name).keys() == rows(expected, name).keys() != set()
    for at, value in rows(expected, name).items():
      assert rows(found, name)[at] == pytest.approx(value, rel=1e-5), (name, at)
  states = saved_state(found, step), saved_state(expected, step)
  for name in ('step', 'cursor', 'key'):
    np.testing.assert_array_equal(states[0][name], states[1][name])
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, states[0]['params'], states[1]['params'])


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
def test_two_processes_give_what_one_gives(home, mesh):
  many, one = home / f'two {mesh}', home / f'one {mesh}'
  outs = [finish(p) for p in two(home, training(home, many, *flags_of(MESHES[mesh])))]
  alone(home, one, MESHES[mesh], 10)
  assert_same(many, one, 10)
  assert 'devices: 8 x cpu (cpu), in 2 processes' in outs[0] and 'step 10' in outs[0]
  assert not re.search('devices: |loss|step 10|rows', outs[1])  # gloo and XLA say something of their own
  assert sorted(path.name for path in (many / 'checkpoints').iterdir()) == ['00000006', '00000010']
  assert verify(Checkpoints(many / 'checkpoints').path(6)) == []
  assert len([path for path in many.iterdir() if path.name.startswith('events')]) == 1
  assert len(read_rows(many / 'samples.jsonl')) == len(read_rows(one / 'samples.jsonl')) == 2


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(home):
  expected, saved = home / 'ten', {'two': home / 'six by two', 'one': home / 'six by one'}
  mesh = {'data': 2, 'fsdp': 4}
  for p in two(home, training(home, saved['two'], *flags_of(mesh), '--steps', '6')):
    finish(p)
  alone(home, saved['one'], mesh, 6)
  alone(home, expected, mesh, 10)
  single = shutil.copytree(saved['two'], home / 'by one device')
  finish(process(home, training(home, single, '--steps', '10'), devices=1))
  alone(home, saved['two'], {'fsdp': 8}, 10)
  outs = [finish(p) for p in two(home, training(home, saved['one'], *flags_of({'fsdp': 8})))]
  assert 'continues from step 6 of 10' in outs[0]
  for run in (single, *saved.values()):
    found, want = rows(run), rows(expected)
    assert found.keys() == want.keys()
    assert [found[step] for step in want] == pytest.approx(list(want.values()), rel=1e-5)
    for name in ('step', 'cursor', 'key'):
      np.testing.assert_array_equal(saved_state(run, 10)[name], saved_state(expected, 10)[name])


def until(processes: list[subprocess.Popen], moment) -> None:
  deadline = time.monotonic() + 400  # on a machine that does much else
  while not moment():
    for p in processes:
      assert p.poll() is None, p.communicate()[0]
    assert time.monotonic() < deadline, 'the moment never came'
    time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_to_one_process_stops_all_after_the_same_step(home, number, code):
  run = home / number.name
  both = two(home, training(home, run, *LONG, '--watch.save-every', '100000'))
  until(both, lambda: logged(run) >= 3)
  both[1].send_signal(number)
  outs = [finish(p, code) for p in both]
  (step,) = Checkpoints(run / 'checkpoints').steps()
  for out in outs:
    assert f'stopped and saved at step {step} of 100000' in out
  assert verify(Checkpoints(run / 'checkpoints').path(step)) == []
  assert logged(run) == step
  assert not list(run.glob('lock-*'))


def wreck(home: Path, name: str, rank: int, number: int, *flags: str):
  """(run, survivor, the one that gets a signal, a list that gets the seconds between that and the survivor's end)."""
  run = home / name
  both = two(home, training(home, run, *LONG, *flags))
  until(both, lambda: logged(run) >= 3 and Checkpoints(run / 'checkpoints').steps())
  both[rank].send_signal(number)
  when, survivor, seconds = time.monotonic(), both[1 - rank], []
  threading.Thread(target=lambda: (survivor.wait(), seconds.append(time.monotonic() - when)), daemon=True).start()
  return run, survivor, both[rank], seconds


WRECKS = {
  'rank 1 killed': (1, signal.SIGKILL),
  'rank 0 killed': (0, signal.SIGKILL),
  'rank 1 stopped': (1, signal.SIGSTOP),
  'rank 0 stopped': (0, signal.SIGSTOP),
  'rank 1 asleep': (1, signal.SIGUSR1),
  'rank 0 asleep': (0, signal.SIGUSR1),
}


@pytest.fixture(scope='module')
def wrecks(home):
  """{name: (run, seconds until the survivor left, its exit code, its output)}; they wait at the same time."""
  every = {'asleep': ('--watch.save-every', '3', '--watch.step-timeout', '5')}
  wrecked = {
    name: wreck(home, name, *how, *every.get(name[7:], ('--watch.save-every', '1'))) for name, how in WRECKS.items()
  }
  deadline, found = time.monotonic() + 60, {}
  for name, (run, survivor, other, seconds) in wrecked.items():
    while not seconds and time.monotonic() < deadline:
      time.sleep(0.05)
    survivor.kill()
    other.kill()
    out, _ = survivor.communicate()
    found[name] = run, *(seconds or [math.inf]), survivor.returncode, out
  return found


@pytest.mark.slow
@pytest.mark.parametrize('name', WRECKS)
def test_when_a_peer_dies_or_hangs_the_other_leaves_and_names_it(wrecks, name):
  run, seconds, code, out = wrecks[name]
  print(f'{name}: {seconds:.1f} s: {out.strip().splitlines()[-1]}')
  assert code == peers.CODE, out
  assert seconds < 30
  last = out.strip().splitlines()[-1]
  assert last.startswith(f'jaxlm: {name[:6]} ({socket.gethostname()})') and 'the last save' in last
  checkpoints = Checkpoints(run / 'checkpoints')
  assert checkpoints.steps() and not [line for step in checkpoints.steps() for line in verify(checkpoints.path(step))]


ABORTED = """
import jax, socket, sys, threading
from jaxlm import peers
from jaxlm.peers import Watch
peers.BROKEN = 0.0
port = socket.create_server(('127.0.0.1', 0))
address = '127.0.0.1:%d' % port.getsockname()[1]
if sys.argv[1] == 'alive':
  port.close()
  jax.distributed.initialize(address, 1, 0)
elif sys.argv[1] == 'gone':
  port.close()
Watch(None, 1, 2, address, 5.0)._aborted()
"""


@pytest.mark.parametrize('coordinator, code', [('gone', peers.CODE), ('dying', peers.CODE), ('alive', 0)])
def test_an_abort_is_told_as_the_loss_of_process_0_where_that_one_is_gone_or_dying(coordinator, code):
  """The port of a killed process takes connections until the last of its sockets is given back, but says nothing."""
  done = subprocess.run([sys.executable, '-c', ABORTED, coordinator], capture_output=True, text=True, timeout=60)
  assert done.returncode == code, done.stderr
  assert ('jaxlm: rank 0, the coordinator, is gone' in done.stderr) == bool(code)


FAILING = """
import os, threading, time
from jaxlm import peers
watch = peers.Watch(None, 1, 2, 'localhost:9', 5.0)
peers.on_abort(watch._aborted)
threading.Timer(0.3, os.abort).start()
watch.fail('its disk is full')
time.sleep(1)
os._exit(1)
"""


def test_a_process_that_fails_keeps_its_own_code_through_an_abort():
  assert subprocess.run([sys.executable, '-c', FAILING], timeout=60).returncode == 1


def barrier(said: str) -> TimeoutError:
  """What Orbax makes of a barrier that could not be waited at."""
  try:
    try:
      raise jax.errors.JaxRuntimeError(said)
    except jax.errors.JaxRuntimeError as error:
      raise TimeoutError('Timeout waiting at barrier') from error
  except TimeoutError as error:
    return error


@pytest.mark.parametrize(
  'error, between',
  [
    (barrier('UNAVAILABLE: Failed to send RPC'), True),
    (TimeoutError('Timeout waiting at barrier'), True),
    (TimeoutError(110, 'Connection timed out'), False),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory'), False),
    (jax.errors.JaxRuntimeError('UNKNOWN: Gloo all-reduce failed'), True),
    (OSError(28, 'No space left on device'), False),
  ],
)
def test_what_broke_between_processes_is_not_taken_for_a_fault_of_its_own(error, between, monkeypatch):
  watch = peers.Watch(None, 1, 2, 'localhost:9', 5.0)
  monkeypatch.setattr(hosts, '_watch', watch)
  monkeypatch.setattr(peers, 'BROKEN', 0.0)
  monkeypatch.setattr(peers, 'BEAT', 0.0)
  hosts.blame(error)
  assert watch._own['broken'] == between


@pytest.mark.slow
def test_what_a_wreck_had_saved_goes_on(home, wrecks):
  run = shutil.copytree(wrecks['rank 1 killed'][0], home / 'mended')
  step = Checkpoints(run / 'checkpoints').steps()[-1]
  alone(home, run, {'fsdp': 8}, step + 5)
  assert rows(run).keys() == set(range(1, step + 6))


@pytest.mark.slow
def test_a_process_that_leaves_on_its_own_takes_the_others_along(home):
  both = two(home, training(home, home / 'unlike'), last=('--optim.lr', '0.5'))
  outs = [finish(p, code) for p, code in zip(both, (peers.CODE, 1), strict=True)]
  assert 'jaxlm: not what process 0 was given: config.optim.lr is 0.5, not 0.003' in outs[1]
  assert f'jaxlm: rank 1 ({socket.gethostname()}) left: not what process 0 was given' in outs[0]


PLACED = """
from jaxlm import hosts, sharding
import jax, numpy as np, os, pathlib, sys
with hosts.joined(60.0):
  asked, lines = [], []
  def make(rows):
    asked.append((rows.start, rows.stop))
    return {'tokens': np.arange(8 * 16).reshape(8, 16)[rows]}
  for sizes in ({'fsdp': 8}, {'data': 2, 'fsdp': 1, 'sequence': 4}, {'fsdp': 1, 'sequence': 8}):
    like = {'tokens': jax.ShapeDtypeStruct((99, 16), int)}
    mesh = sharding.make_mesh(**sizes)
    layout = sharding.batch_shardings(like, mesh)
    like = {'tokens': jax.ShapeDtypeStruct((99, 16), int, sharding=layout['tokens'])}
    placed = hosts.place(8, make, like)['tokens']
    lines.append(f'{sorted(asked)} held {sum(s.data.size for s in placed.addressable_shards)}')
    np.testing.assert_array_equal(hosts.read(placed), np.arange(8 * 16).reshape(8, 16))
    asked.clear()
  pathlib.Path(sys.argv[1] + os.environ['JAX_PROCESS_ID']).write_text(' / '.join(lines))
"""


@pytest.mark.slow
def test_a_process_makes_the_rows_of_its_devices_alone(home):
  for p in two(home, ['-c', PLACED, str(home / 'placed')]):
    finish(p)
  for rank in (0, 1):
    mine = [(4 * rank + i, 4 * rank + i + 1) for i in range(4)]
    lines = (home / f'placed{rank}').read_text().split(' / ')
    assert lines == [f'{mine} held 64', f'[({4 * rank}, {4 * rank + 4})] held 64', '[(0, 8)] held 64']


class Counted:
  """Rows that say when they are read."""

  def __init__(self):
    self.read = []

  def __len__(self):
    return 13

  def __getitem__(self, row):
    self.read.append(row)
    return {'x': np.full(3, row)}


def test_some_rows_of_a_batch_are_read_without_the_others():
  counted = Counted()
  stream, fixed = batches.Batches(counted, 6, seed=3), batches.in_order(counted, 6)
  for make in (lambda rows: stream(5, rows), lambda rows: fixed.part(2, rows)):
    whole = make(slice(None))['x']
    assert len(whole) == 6
    for rows in (slice(0, 2), slice(2, 6), slice(4, 6)):
      counted.read.clear()
      np.testing.assert_array_equal(make(rows)['x'], whole[rows])
      assert len(counted.read) <= rows.stop - rows.start


SET = {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '4', 'JAX_PROCESS_ID': '3'}


@pytest.mark.parametrize('name', SET)
def test_a_half_set_environment_is_one_line(name, home):
  with pytest.raises(InputError, match=f'and {name} not: several processes need all three'):
    hosts.explicit({key: value for key, value in SET.items() if key != name})
  with pytest.raises(InputError):
    hosts.explicit({name: SET[name]})


@pytest.mark.slow
def test_a_half_set_environment_ends_the_command(home):
  out = finish(process(home, training(home, home / 'half'), JAX_NUM_PROCESSES='2'), 1)
  assert out.splitlines()[-1].startswith('jaxlm: JAX_NUM_PROCESSES set and JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID not')
  assert not (home / 'half').exists()


@pytest.mark.slow
def test_a_process_whose_others_never_come_says_so(home):
  command = ['-c', 'from jaxlm import hosts; hosts.WITHIN = 3; hosts.start(1.0)']
  address = f'localhost:{free_port()}'
  env = {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': '2'}
  out = finish(process(home, command, **env, JAX_PROCESS_ID='0'), peers.CODE)
  assert out.splitlines()[-1] == f'jaxlm: not all processes of the run came to {address} within 3 s'


def test_what_the_environment_says():
  explicit = {'coordinator_address': 'a:1', 'num_processes': 4, 'process_id': 3}
  assert hosts.explicit(SET) == explicit
  assert hosts.explicit({}) is None
  assert hosts.explicit({'JAX_NUM_PROCESSES': '1'}) == {}
  indexed = {name: SET[name] for name in list(SET)[:2]} | {'JOB_COMPLETION_INDEX': '3'}
  assert hosts.explicit(indexed) == explicit
  for name, value in (('JAX_PROCESS_ID', '4'), ('JAX_NUM_PROCESSES', 'four'), ('JAX_COORDINATOR_ADDRESS', 'a')):
    with pytest.raises(InputError, match=f'{name}={value}|={value}:'):
      hosts.explicit(SET | {name: value})


def test_a_scheduler_is_seen():
  slurm = dict.fromkeys(hosts.SLURM, '0') | {'SLURM_STEP_NODELIST': 'gpu[01-02]', 'SLURM_NTASKS': '2'}
  assert hosts.scheduled(slurm)
  assert not hosts.scheduled(slurm | {'SLURM_NTASKS': '1'})
  assert not hosts.scheduled({name: value for name, value in slurm.items() if name != 'SLURM_STEP_NODELIST'})
  assert not hosts.scheduled({'HOME': '/root', 'JAX_PLATFORMS': 'cpu'})


@pytest.mark.parametrize(
  'tasks, visible, ids',
  [('1', '0,1,2,3', [0, 1, 2, 3]), ('1(x2)', '0,1', [0, 1]), ('4(x2)', '0,1,2,3', None), ('4', '2', [0])],
)
def test_the_gpus_of_a_slurm_task(tasks, visible, ids):
  assert hosts.local_gpus({'CUDA_VISIBLE_DEVICES': visible, 'SLURM_STEP_TASKS_PER_NODE': tasks}) == ids


def test_one_process_starts_nothing():
  with hosts.joined(1.0):
    assert hosts.count() == 1 and hosts.first() and not jax.distributed.is_initialized()
    assert hosts.from_first(lambda: 3) == 3
    asked = []
    assert not hosts.agreed(lambda: len(asked))() and hosts.agreed(lambda: 15)()
