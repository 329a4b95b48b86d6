"""A real chat model from its GGUF file against transformers: logits, greedy tokens, likelihood, memory, an answer.

golden/smollm2.npz was made with transformers 5.23.0 and torch 2.13.0 on the same file, dequantized, in float32; its
`meta_json` says what is in it. To renew it, run transformers on the file that the fixture downloads.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_interop import peak_of_import

from jaxlm import interop, models, sample
from jaxlm.data import chat
from jaxlm.loops import chatting, writing

pytestmark = pytest.mark.slow
GOLDEN = np.load(Path(__file__).parent / 'golden' / 'smollm2.npz')
PROMPTS = ('chat_france', 'raw_once', 'raw_unicode')


@pytest.fixture(scope='module')
def model(smollm2):
  return interop.load(str(smollm2))


@pytest.fixture(scope='module')
def forward(model):
  return jax.jit(lambda params, ids: models.forward(model.cfg, params, ids)[0])


@pytest.mark.parametrize('name', PROMPTS)
def test_logits_and_likelihood_are_those_of_transformers(model, forward, name):
  ids = GOLDEN[f'{name}_ids']
  logits = np.asarray(forward(model.params, jnp.asarray(np.pad(ids, (0, 64 - len(ids))))[None]))[0, : len(ids)]
  last = logits[-4:]
  np.testing.assert_allclose(
    np.take_along_axis(last, GOLDEN[f'{name}_top_ids'], axis=1), GOLDEN[f'{name}_top_logits'], atol=2e-3
  )
  np.testing.assert_allclose(last[:, GOLDEN['vocab_sample_ids']], GOLDEN[f'{name}_sample_logits'], atol=2e-3)
  lse = np.asarray(jax.nn.logsumexp(logits.astype(np.float64), axis=-1), np.float64)
  nll = np.sum(lse[:-1] - logits[np.arange(len(ids) - 1), ids[1:]])
  assert abs(nll - float(GOLDEN[f'{name}_nll'])) < 1e-3


@pytest.mark.parametrize('draft', [None, sample.Lookup()], ids=['plain', 'look-up'])
def test_all_greedy_tokens_are_those_of_transformers(model, draft):
  prompts = [GOLDEN[f'{name}_ids'].tolist() for name in PROMPTS]
  out = sample.generate(
    model.cfg, model.params, prompts, jax.random.key(0), max_new_tokens=32, sampling=sample.Sampling(0.0), draft=draft
  )
  for row, name in zip(np.asarray(out.tokens_BN), PROMPTS, strict=True):
    np.testing.assert_array_equal(row, GOLDEN[f'{name}_greedy'], err_msg=name)


def test_a_raw_prompt_is_continued_as_transformers_does(model):
  """It names a token for beginnings, and puts it before no text."""
  prompts = json.loads(str(GOLDEN['meta_json']))['prompts']
  assert model.tokenizer.bos_id is not None and model.tokenizer.prefix_ids == []
  for name in ('raw_once', 'raw_unicode'):
    assert model.tokenizer.encode(prompts[name]) == GOLDEN[f'{name}_ids'].tolist()
    greedy = GOLDEN[f'{name}_greedy'].tolist()
    ends = greedy.index(model.tokenizer.eos_id) if model.tokenizer.eos_id in greedy else len(greedy)
    (text,) = writing.complete(
      model.cfg,
      model.params,
      model.tokenizer,
      [prompts[name]],
      jax.random.key(0),
      new=32,
      run=models.Run(),
      sampling=sample.Sampling(0.0),
    )
    assert text == model.tokenizer.decode(greedy[:ends])


def test_its_template_gives_the_same_ids_and_it_knows_paris(model):
  text = json.loads(str(GOLDEN['meta_json']))['prompts']['chat_france']
  system, user = text.split('<|im_end|>')[0].split('system\n')[1], 'What is the capital of France?'
  messages = [{'role': 'system', 'content': system}, {'role': 'user', 'content': user}]
  assert (
    chat.encode(model.chat_template, messages, model.tokenizer, generation=True) == GOLDEN['chat_france_ids'].tolist()
  )
  pieces = chatting.answer(model, messages[1:], jax.random.key(0), sampling=sample.Sampling(0.0), max_new_tokens=24)
  assert 'Paris' in ''.join(pieces)


def test_the_command_answers_with_paris_and_needs_no_torch(smollm2):
  code = "import sys; from jaxlm import cli; assert not cli.main(sys.argv[1:]) and 'torch' not in sys.modules"
  command = [sys.executable, '-c', code, 'chat', str(smollm2), '--temperature', '0', '--max-new-tokens', '24']
  environment = os.environ | {'XLA_FLAGS': ''}
  done = subprocess.run(
    command, input='What is the capital of France?\n/reset\n\n/exit\n', capture_output=True, text=True, env=environment
  )
  assert done.returncode == 0, done.stderr
  assert 'Paris' in done.stdout


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_importing_never_holds_a_second_copy(smollm2, dtype):
  """Its tokenizer, of some 50 MB, is counted too."""
  assert 1.0 < peak_of_import(smollm2, dtype) < 1.3
