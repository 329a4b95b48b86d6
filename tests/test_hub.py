"""Models by their name on the hub, out of its cache: offline, with no network to reach, and when they are not there."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LLAMA, randomized

from jaxlm import interop, models
from jaxlm.data import tokenizer as tok
from jaxlm.loops import writing

pytest.importorskip('huggingface_hub', reason="needs pip install -e '.[hub]'")
COMMITS = {'main': '1' * 40, 'v2': '2' * 40}
NOWHERE = {'HF_ENDPOINT': 'http://127.0.0.1:9'}  # nobody listens there
OFFLINE = {'HF_HUB_OFFLINE': '1'}


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  """A cache as the hub's own client keeps it: blobs, links to them in a snapshot for each commit, refs to commits."""
  home = tmp_path_factory.mktemp('hub')
  repo = home / 'hub' / 'models--some--tiny'
  vocabulary = tok.train(['call me Ishmael ' * 9], 280)
  for seed, (name, commit) in enumerate(COMMITS.items()):
    cfg = dataclasses.replace(LLAMA, vocab_size=vocabulary.vocab_size)
    exported = home / f'exported-{name}'
    interop.export(interop.Model(cfg, randomized(cfg, seed), vocabulary, '{{ messages }}', {}), exported)
    for file in exported.iterdir():
      blob, link = repo / 'blobs' / f'{commit}{file.name}', repo / 'snapshots' / commit / file.name
      for folder in (blob.parent, link.parent, repo / 'refs'):
        folder.mkdir(parents=True, exist_ok=True)
      blob.write_bytes(file.read_bytes())
      link.symlink_to(Path('..') / '..' / 'blobs' / blob.name)
    (repo / 'refs' / name).write_text(commit)
  return home


def run(cache, *args, **how):
  environment = {key: value for key, value in os.environ.items() if not key.startswith('HF_')}
  environment |= {'HF_HOME': str(cache), 'XLA_FLAGS': '', **how}
  began = time.monotonic()
  command = [sys.executable, '-m', 'jaxlm', *args]
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
  return done, time.monotonic() - began


def logits(model):
  ids = jnp.arange(12)[None]
  return models.forward(model.cfg, model.params, ids)[0]


@pytest.mark.slow(but='-offline')
@pytest.mark.parametrize('how', [OFFLINE, NOWHERE], ids=['offline', 'no network'])
@pytest.mark.parametrize('revision', ['', '@v2', f'@{COMMITS["v2"]}'])
def test_a_cached_model_is_imported_without_a_network(cache, tmp_path, how, revision):
  done, seconds = run(cache, 'import', f'hf://some/tiny{revision}', '--run', str(tmp_path / 'run'), **how)
  assert done.returncode == 0, done.stderr
  assert seconds < 20
  config, params, tokenizer, _ = writing.load(tmp_path / 'run')
  want = interop.load(str(cache / f'exported-{"v2" if revision else "main"}'))
  assert tokenizer.digest == want.tokenizer.digest
  np.testing.assert_array_equal(logits(want._replace(cfg=config.model, params=params)), logits(want))


@pytest.mark.slow(but='some/other-offline')
@pytest.mark.parametrize('how', [OFFLINE, NOWHERE], ids=['offline', 'no network'])
@pytest.mark.parametrize('name', ['some/other', 'some/tiny@v3', 'some/tiny/deep', '../../etc', ''])
def test_what_is_not_in_the_cache_is_one_line(cache, tmp_path, how, name):
  done, seconds = run(cache, 'import', f'hf://{name}', '--run', str(tmp_path / 'run'), **how)
  assert done.returncode == 1 and seconds < 20
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith(f'jaxlm: hf://{name}: not to be had: ')
  assert not (tmp_path / 'run' / 'checkpoints').exists()
