"""A run as several processes: how they find each other, what process 0 alone does, which rows each one makes.

Where there is one process, nothing is started and every function here is a plain call.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxlm.errors import InputError, Stopped
from jaxlm.peers import Watch, last_line, on_abort

T = TypeVar('T')

EXPLICIT = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')
TPU_FILES = ('/dev/accel0', '/dev/vfio/0')
WITHIN = 300  # seconds for all processes to come
LONGEST = 24 * 3600 * 1000  # milliseconds: what waits for another process ends with the watch, not with a clock

_watch: Watch | None = None
_numbers: dict[str, Any] = {}


def count() -> int:
  """How many processes the run has."""
  return _watch.count if _watch else 1


def first() -> bool:
  """Whether this is process 0, which alone writes what there is once."""
  return not _watch or _watch.rank == 0


def explicit(env: Mapping[str, str]) -> dict[str, Any] | None:
  """What `jax.distributed.initialize` is to be given, if the environment says it; {} for a single process.

  In an indexed job of Kubernetes JOB_COMPLETION_INDEX stands for JAX_PROCESS_ID. Raises InputError if it says half.
  """
  values = {name: env[name] for name in EXPLICIT if env.get(name)}
  if values.get('JAX_NUM_PROCESSES') == '1':
    return {}
  if len(values) == 2 and 'JAX_PROCESS_ID' not in values and env.get('JOB_COMPLETION_INDEX'):
    values['JAX_PROCESS_ID'] = env['JOB_COMPLETION_INDEX']
  if not values:
    return None
  missing = [name for name in EXPLICIT if name not in values]
  if missing:
    raise InputError(
      f'{", ".join(values)} set and {", ".join(missing)} not: several processes need all three (HOST:PORT of '
      'process 0, how many, which one), a single one none'
    )
  address, number, rank = (values[name] for name in EXPLICIT)
  if not re.fullmatch(r'.+:\d+', address):
    raise InputError(f'JAX_COORDINATOR_ADDRESS={address} is not HOST:PORT')
  if not (number.isdigit() and rank.isdigit() and int(rank) < int(number)):
    raise InputError(f'JAX_PROCESS_ID={rank} is not one of JAX_NUM_PROCESSES={number}: 0 to one less')
  return {'coordinator_address': address, 'num_processes': int(number), 'process_id': int(rank)}


def scheduled(env: Mapping[str, str]) -> bool:
  """Whether a scheduler that JAX knows has started this process as one of several, or may have (a Cloud TPU)."""
  if all(env.get(name) for name in SLURM):
    return int(env['SLURM_NTASKS']) > 1
  if env.get('OMPI_MCA_orte_hnp_uri'):
    return int(env.get('OMPI_COMM_WORLD_SIZE', 1)) > 1
  if env.get('JAX_PLATFORMS', 'tpu').startswith('tpu') and any(Path(path).exists() for path in TPU_FILES):
    workers = env.get('TPU_PROCESS_ADDRESSES') or env.get('TPU_WORKER_HOSTNAMES')
    return workers is None or ',' in workers or int(env.get('MEGASCALE_NUM_SLICES') or 1) > 1
  if env.get('KUBERNETES_SERVICE_HOST') and env.get('JOB_COMPLETION_INDEX'):
    import importlib.util

    return importlib.util.find_spec('kubernetes') is not None
  return False


def local_gpus(env: Mapping[str, str]) -> list[int] | None:
  """The GPUs that a task of Slurm is to use, where JAX's choice, the one of its number on the node, would be wrong."""
  named = env.get('CUDA_VISIBLE_DEVICES')
  there = len(named.split(',')) if named else len([p for p in Path('/dev').glob('nvidia*') if p.name[6:].isdigit()])
  tasks = env.get('SLURM_STEP_TASKS_PER_NODE', '')
  alone = bool(re.fullmatch(r'1(\(x\d+\))?(,1(\(x\d+\))?)*', tasks))
  return list(range(there)) if there and (alone or there == 1) else None


def start(step_timeout: float) -> None:
  """Joins the other processes of the run, if there are any; to be called before a device is touched.

  Raises InputError where the environment says half of what is needed, or the others are not found.
  """
  global _watch
  told = explicit(os.environ)
  if told == {} or (told is None and not scheduled(os.environ)):
    return
  import jax

  jax.config.update('jax_enable_preemption_service', False)  # SIGTERM is answered here (see `peers`)
  if jax.config.values['jax_cpu_collectives_implementation'] in (None, 'none'):  # not one that was asked for
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  if told is None:
    told = {'local_device_ids': local_gpus(os.environ) if os.environ.get('SLURM_PROCID') else None}
  elif told:
    told['cluster_detection_method'] = 'deactivate'
  where = told.get('coordinator_address', 'the coordinator')
  on_abort(lambda: last_line(f'not all processes of the run came to {where} within {WITHIN} s'))
  try:
    jax.distributed.initialize(**told, initialization_timeout=WITHIN, shutdown_timeout_seconds=60)  # ty: ignore
  except Exception as error:
    if str(error).startswith('coordinator_address should be defined'):
      return  # a TPU that belongs to no cluster
    line = str(error).splitlines()[0]
    raise InputError(f'the processes did not find each other: {line}; {", ".join(EXPLICIT)} may say where') from error
  finally:
    on_abort(None)
  from jax._src.distributed import global_state as joined_state  # as Orbax does: there is no public way to the client

  if joined_state.num_processes > 1:
    who = joined_state.process_id, joined_state.num_processes, str(joined_state.coordinator_address)
    _watch = Watch(joined_state.client, *who, step_timeout)
    _watch.begin()


@contextlib.contextmanager
def joined(step_timeout: float) -> Generator[None]:
  """`start`, and at the end of the block, however it comes, what the other processes have to know of it."""
  start(step_timeout)
  if not _watch:
    yield
    return
  try:
    yield
  except Stopped as stopped:
    stopped.code = 130 if _watch.signal == signal.SIGINT else stopped.code
    _end(_watch)
    raise
  except (InputError, OSError, KeyboardInterrupt) as error:
    blame(error)
    _watch.fail(str(error) or 'interrupted')
    raise
  except BaseException as error:
    blame(error)
    _watch.fail(f'{type(error).__name__}: {[*str(error).splitlines(), ""][0]}')
    traceback.print_exc()
    leave(1)
  else:
    _end(_watch)


def _end(watch: Watch) -> None:
  global _watch
  import jax

  watch.end()
  jax.distributed.shutdown()
  _watch = None


def leave(code: int) -> None:
  """Ends this process where others are still joined to it: the usual end of Python would wait for them."""
  if _watch:
    _watch.finish()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def agreed(asked: Callable[[], int]) -> Callable[[], bool]:
  """What to ask after every step: true after the same step in all processes once `asked()` is so in one of them."""
  return _watch.listen(asked) if _watch else lambda: bool(asked())


def mark(place: str, *, slow: bool = False) -> None:
  """Says where the main thread is (see `peers.Watch.mark`)."""
  if _watch:
    _watch.mark(place, slow=slow)


@contextlib.contextmanager
def last_act(act: Callable[[], None]) -> Generator[None]:
  """Within the block `act` is done where this process is ended because of another one."""
  if not _watch:
    yield
    return
  _watch.last_acts.append(act)
  try:
    yield
  finally:
    if _watch:
      _watch.last_acts.remove(act)


def from_first(make: Callable[[], T], channel: str = 'main') -> T:
  """`make()` of process 0, for all: a value that JSON can hold, or the InputError or OSError that it raises.

  All processes call it in the same order within a channel; a thread has its own channel.
  """
  if not _watch:
    return make()
  key = f'jaxlm/{channel}/{next(_numbers.setdefault(channel, itertools.count()))}'
  client = _client()
  if first():
    try:
      told: dict[str, Any] = {'value': make()}
    except InputError as error:
      told = {'input': str(error)}
    except OSError as error:
      told = {'os': [error.errno, error.strerror or str(error), error.filename and str(error.filename)]}
    client.key_value_set(key, json.dumps(told))
  else:
    told = json.loads(client.blocking_key_value_get(key, LONGEST))
  if 'input' in told:
    raise InputError(told['input'])
  if 'os' in told:
    raise OSError(*told['os'])
  return told['value']


def blame(error: BaseException) -> None:
  """Where `error` is of a broken connection between processes, waits; if another process is at fault, does not return.

  Orbax makes a TimeoutError of it, which is an OSError as those of a disk are, but without their number.
  """
  chain: BaseException | None = error
  while _watch and chain:
    timed_out = isinstance(chain, TimeoutError) and chain.errno is None
    if timed_out or (type(chain).__name__ == 'JaxRuntimeError' and not str(chain).startswith('RESOURCE_EXHAUSTED')):
      _watch.suspect()
      return
    chain = chain.__cause__ or chain.__context__


def broken(line: str) -> None:
  """Ends this process for what it alone met and the others cannot go on without; where there are no others, nothing."""
  if _watch:
    _watch.fail(line)
    print(f'jaxlm: {line}', file=sys.stderr, flush=True)
    leave(1)


def _client() -> Any:
  from jax._src.distributed import global_state as joined_state

  return joined_state.client


def read(x: Any) -> Any:
  """An array as the host's, of whatever devices it is; all processes call it."""
  import numpy as np

  if _watch and not (x.is_fully_addressable or x.is_fully_replicated):
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)


def held(size: int, like: Mapping[str, Any]) -> list[slice]:
  """The runs of rows that devices of this process hold of arrays of `size` rows, laid out as `like` says."""
  shards = ((spec.sharding, (size, *spec.shape[1:])) for spec in like.values())
  indices = (index for sharding, shape in shards for index in sharding.addressable_devices_indices_map(shape).values())
  return [slice(*rows) for rows in sorted({index[0].indices(size)[:2] for index in indices})]


def place(size: int, make: Callable[[slice], Mapping[str, Any]], like: Mapping[str, Any]) -> dict[str, Any]:
  """Global arrays of `size` rows, laid out as `like` says.

  `make(rows)` is asked once for each run of rows that devices of this process hold, and for no others.
  """
  import jax

  made: dict[tuple[int, int], Mapping[str, Any]] = {}

  def one(name: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
    def part(index: Any) -> Any:
      rows = index[0].indices(size)[:2]
      if rows not in made:
        made[rows] = make(slice(*rows))
      return made[rows][name][:, *index[1:]]

    return jax.make_array_from_callback((size, *spec.shape[1:]), spec.sharding, part)

  return {name: one(name, spec) for name, spec in like.items()}
