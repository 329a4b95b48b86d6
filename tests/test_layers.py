"""Who may import whom: imports go down the layers of the design, and importing computes nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'jaxlm'

# from the top down; a module may import its own layer and those below it
LAYERS = (
  ('cli', 'stages', '__main__'),
  ('quickstart', 'aligning', 'chapter'),
  (
    'report',
    'evals',
    'console',
    'arguments',
    'plan',
    'phases',
    'cost',
    'hlo',
    'topology',
    'inspector',
    'lessons',
    'serve',
  ),
  ('loops',),
  ('objectives', 'episodic', 'distilling', 'config', 'program', 'fitting', 'scale'),
  ('train', 'sample', 'draws', 'speculate', 'rl', 'lora', 'interop'),
  ('models', 'losses', 'data'),
  ('tree', 'masked', 'sharding', 'errors', 'files', 'hosts', 'peers', 'child'),
)
APART = {'models', 'losses', 'data'}  # neighbours that never import each other
UNSAFE = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'shelve', 'marshal', 'joblib'}


def imported(source):
  """[(line, 'a.b.c')] for all that a file imports, at any depth: `from a.b import c` gives both a.b.c."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'line {node.lineno}: imports are absolute'
      found += [(node.lineno, f'{node.module}.{alias.name}') for alias in node.names]
  return found


def layer(part):
  return next(i for i, parts in enumerate(LAYERS) if part in parts)


def complaints(part, source):
  """What is wrong with the imports and calls of a file that belongs to `part` ('models', 'cli', ...)."""
  wrong = []
  for line, name in imported(source):
    root, *below = name.split('.')
    if root == 'jaxlm' and below:
      other = below[0]
      if layer(other) < layer(part) or (other != part and {other, part} <= APART):
        wrong.append(f'{line}: {part} imports {name}')
    linen_ok = part == 'models' or (part == 'sharding' and name == 'flax.linen.LogicallyPartitioned')
    if root == 'flax' and not linen_ok and below[:1] not in (['struct'], ['core']):
      wrong.append(f'{line}: {part} imports {name}: Linen lives in models')
    if root == 'optax' and part in ('models', 'losses') or (root in UNSAFE):
      wrong.append(f'{line}: {part} imports {name}')
    if part in LAYERS[-1] and root in ('optax', 'orbax', 'grain', 'tokenizers', 'tensorflow_datasets'):
      wrong.append(f'{line}: {part} imports {name}: the ground needs jax only')
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      named = {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
      if called.endswith('import_module') and named & UNSAFE:
        wrong.append(f'{node.lineno}: imports {named & UNSAFE}')
      if called in ('eval', 'exec', 'builtins.eval', 'builtins.exec', '__import__'):
        wrong.append(f'{node.lineno}: calls {called}')
      if any(
        k.arg == 'allow_pickle' and not (isinstance(k.value, ast.Constant) and not k.value.value) for k in node.keywords
      ):
        wrong.append(f'{node.lineno}: allows pickle')
  return wrong


def part_of(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


FILES = [p for p in sorted(PACKAGE.rglob('*.py')) if p != PACKAGE / '__init__.py']


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
  assert not complaints(part_of(path), path.read_text())


@pytest.mark.parametrize(
  'part, source',
  [
    ('models', 'from jaxlm.train import step'),
    ('models', 'def f():\n  import jaxlm.losses.lm'),
    ('losses', 'from jaxlm import models'),
    ('data', 'from jaxlm.models import ModelConfig'),
    ('tree', 'from jaxlm.models import ModelConfig'),
    ('train', 'from jaxlm import config'),
    ('loops', 'from jaxlm.console import Training'),
    ('train', 'import flax.linen as nn'),
    ('train', 'from flax import linen'),
    ('sharding', 'from flax.linen import Module'),
    ('models', 'import optax'),
    ('data', 'import pickle'),
    ('data', 'import importlib\nimportlib.import_module("pickle")'),
    ('config', 'exec("x = 1")'),
    ('data', 'import numpy as np\nnp.load("x", allow_pickle=True)'),
    ('masked', 'import optax'),
  ],
)
def test_a_violation_is_seen(part, source):
  assert complaints(part, source)


def test_what_is_allowed_passes():
  assert not complaints('sharding', 'from flax.linen import LogicallyPartitioned\nfrom flax.core import FrozenDict')
  assert not complaints('train', 'from flax import struct\nfrom jaxlm import tree\nfrom jaxlm.models import Run')


def run(code):
  env = {k: v for k, v in os.environ.items() if k not in ('JAX_PLATFORMS', 'XLA_FLAGS')}
  return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout


def test_importing_jaxlm_is_lazy():
  assert run('import sys, jaxlm; print([m for m in ("jax", "flax", "numpy", "optax") if m in sys.modules])') == '[]\n'


def test_beam_is_imported_when_it_is_asked_for():
  assert run('import sys, jaxlm.data.beam; print("apache_beam" in sys.modules)') == 'False\n'


def test_importing_every_module_initialises_no_backend():
  out = run(
    'import importlib, os, pkgutil, jaxlm\n'
    'names = [m.name for m in pkgutil.walk_packages(jaxlm.__path__, "jaxlm.") if "__main__" not in m.name]\n'
    'before = dict(os.environ)\n'
    'for name in names: importlib.import_module(name)\n'
    'from jax._src import xla_bridge\n'
    'changed = {k for k in os.environ if os.environ[k] != before.get(k)} & {"JAX_PLATFORMS", "XLA_FLAGS"}\n'
    'print(len(names) > 20, dict(xla_bridge._backends), changed)'
  )
  assert out.strip().splitlines()[-1] == 'True {} set()'
