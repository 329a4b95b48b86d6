"""Eight virtual CPU devices, shapes checked at every call, strict dtypes; tiny models that the tests share."""

import functools
import importlib.metadata
import os
import shutil
import subprocess

FLAGS = (
  '--xla_force_host_platform_device_count=8',
  '--xla_backend_optimization_level=0',  # tests compile much and compute little: this halves their time
  '--xla_llvm_disable_expensive_passes=true',
)
if importlib.metadata.version('jaxlib') == '0.10.2':  # half the time again; other versions may not know this flag
  FLAGS += ('--xla_cpu_use_fusion_emitters=false',)
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *FLAGS]).strip()
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import beartype  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

CHECKED = ['jaxlm.models', 'jaxlm.losses', 'jaxlm.masked', 'jaxlm.train.step', 'jaxlm.sample']


def check(fn):
  """beartype for functions; records are left out, since JAX rebuilds them with leaves of any kind."""
  return fn if fn.__qualname__.endswith('.__init__') else beartype.beartype(fn)


jaxtyping.install_import_hook(CHECKED, 'conftest.check')  # before jaxlm is imported: it works on the source


from jaxlm import models  # noqa: E402
from jaxlm.models import ModelConfig  # noqa: E402

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


@pytest.fixture(params=['llama', 'gpt2'])
def cfg(request):
  """One model of each style."""
  return {'llama': LLAMA, 'gpt2': GPT2}[request.param]


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
