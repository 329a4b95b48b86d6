"""Rollouts by a server behind vLLM's protocol: its weights are the newest, its answers ours, its faults told."""

import dataclasses
import json
import time

import jax
import numpy as np
import pytest
from conftest import LLAMA, randomized
from servers import Vllm
from tiny_run import furnish

from jaxlm import cli, interop, lora, models, tree
from jaxlm.data import tokenizer
from jaxlm.errors import InputError
from jaxlm.loops import bases
from jaxlm.rl import rollout, vllm
from jaxlm.sample import Sampling
from jaxlm.train import metrics

CFG = dataclasses.replace(LLAMA, vocab_size=263)
N, STOP = 7, tuple(range(0, 263, 6))
PROMPTS = [[5, 6, 7], [8], [9, 9, 40, 41], [50, 51], [3, 3, 3, 3, 3, 3, 3]]
SEEDS = np.arange(20, 20 + len(PROMPTS))
HOW = {'max_new_tokens': N, 'stop_ids': STOP, 'rows': 3}


@pytest.fixture(scope='module')
def words():
  return tokenizer.train(['a few words to begin with'], CFG.vocab_size)


@pytest.fixture
def server():
  made = Vllm()
  with made.running() as made.url:
    yield made


def client(server, tmp_path, words, **how):
  return vllm.Server(server.url, str(tmp_path / 'engine'), CFG, words, dtype='float32', **how)


@pytest.mark.slow(but='plain')
@pytest.mark.parametrize(
  'sampling', [Sampling(temperature_B=0.0), Sampling(0.8), Sampling(1.3, 9, 0.9, 0.01)], ids=['greedy', 'plain', 'cut']
)
def test_the_answers_are_those_of_the_engine_at_home(server, tmp_path, words, sampling):
  """With the sampler's own random numbers behind the protocol even the drawn ones."""
  params = randomized(CFG)
  found = client(server, tmp_path, words).engine(sampling=sampling, **HOW)(params, PROMPTS, SEEDS)
  want = rollout.engine(CFG, sampling=sampling, **HOW)(params, PROMPTS, SEEDS)
  np.testing.assert_array_equal(found.tokens_MN, want.tokens_MN)
  np.testing.assert_array_equal(found.lengths_M, want.lengths_M)
  np.testing.assert_array_equal(found.stopped_M, want.stopped_M)
  np.testing.assert_allclose(found.sampled_logp_MN, want.sampled_logp_MN, atol=2e-5)
  assert set(want.stopped_M.tolist()) == {False, True}  # some are cut off, some stop


def without_padding(params, cfg):
  """By path, the vocabulary cut to the tokens that there are."""
  cut = {'embed': lambda x: x[: cfg.vocab_size], 'head': lambda x: x[:, : cfg.vocab_size]}
  return {path: cut.get(path, lambda x: x)(np.asarray(x)) for path, x in tree.items(params)}


def test_the_newest_weights_are_handed_over(server, tmp_path, words):
  engine = client(server, tmp_path, words).engine(sampling=Sampling(temperature_B=0.0), **HOW)
  old = engine(randomized(CFG), PROMPTS, SEEDS)
  other = jax.tree.map(lambda x: -x, randomized(CFG))
  new = engine(other, PROMPTS, SEEDS)
  assert (old.tokens_MN != new.tokens_MN).any()
  for path, x in without_padding(server.model.params, CFG).items():
    np.testing.assert_array_equal(x, without_padding(other, CFG)[path], err_msg=path)
  assert [path.name for path in (tmp_path / 'engine').iterdir()] == ['2'] == [server.path.name]  # the old one is gone
  paths = [path for path, _ in server.seen]
  once = ['/collective_rpc', '/reset_prefix_cache'] + ['/v1/completions'] * len(PROMPTS)
  assert paths == 2 * once
  engine(other, PROMPTS[:1], SEEDS[:1])
  assert [path for path, _ in server.seen[len(paths) :]] == ['/v1/completions']  # it has them already
  seeds = [body['seed'] for path, body in server.seen[: len(paths)] if path == '/v1/completions']
  assert sorted(seeds) == sorted([*SEEDS, *SEEDS])


NONE = {'token_ids': [6], 'logprobs': {'token_logprobs': [-1.0]}, 'finish_reason': 'stop'}


@pytest.mark.parametrize(
  'path, reply, why',
  [
    ('/v1/models', ({'data': []}, 200), 'names no model'),
    ('/v1/models', (b'<html>', 200), 'JSONDecodeError'),
    ('/collective_rpc', (b'Not Found', 404), 'VLLM_SERVER_DEV_MODE=1'),
    ('/collective_rpc', (b'reload_weights() got an unexpected keyword', 500), '500 .*unexpected keyword'),
    ('/v1/completions', ({'choices': [{'text': 'a'}]}, 200), 'no answer of token_ids and logprobs'),
    ('/v1/completions', ({'choices': [NONE | {'token_ids': [7]}]}, 200), 'no answer of'),  # stopped by no stop id
    ('/v1/completions', ({'choices': [NONE | {'token_ids': [6, 6]}]}, 200), 'no answer of'),
    ('/v1/completions', ({'choices': [NONE | {'finish_reason': 'length'}]}, 200), 'no answer of'),
    ('/v1/completions', ({'choices': [NONE | {'finish_reason': 'abort'}]}, 200), 'no answer of'),
    ('/v1/completions', ({'choices': [NONE | {'logprobs': {'token_logprobs': [None]}}]}, 200), 'no answer of'),
    ('/v1/completions', ({'choices': [NONE | {'token_ids': [600]}]}, 200), 'no answer of'),
    ('/v1/completions', ({'error': {'message': 'too long'}}, 400), '400 .*too long'),
  ],
)
def test_nonsense_is_one_line(server, tmp_path, words, path, reply, why):
  server.changed = lambda asked, real: reply if asked == path else real
  with pytest.raises(InputError, match=f'rl.engine {server.url}{path}: .*{why}'):
    client(server, tmp_path, words).engine(sampling=Sampling(), **HOW)(randomized(CFG), PROMPTS, SEEDS)


def test_a_server_that_is_slow_or_gone(tmp_path, words):
  server = Vllm()
  with server.running() as server.url:
    made = client(server, tmp_path, words, timeout=0.2)
    server.changed = lambda path, real: (time.sleep(0.6), real)[1] if path == '/reset_prefix_cache' else real
    with pytest.raises(InputError, match='(TimeoutError|URLError).*timed out'):
      made._call('/reset_prefix_cache', {})
  with pytest.raises(InputError, match=f'rl.engine {server.url}/v1/models: URLError'):
    client(server, tmp_path, words)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  home = furnish(tmp_path_factory.mktemp('vllm'))
  args = ('--run', str(home / 'base'), '--steps', '4', '--data.global-batch', '8', '--watch.eval-every', '0')
  assert cli.main(['pretrain', str(home / 'tiny.py'), *args, '--watch.sample-every', '0']) == 0
  rows = [{'prompt': f'What is {a} and {b}?'} for a in ('red', 'green', 'blue') for b in range(7)]
  (home / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (home / 'own.py').write_text('def e(prompts, said, rows):\n  return [text.count("e") / 7 for text in said]\n')
  return home


SMALL = ('--prompts', '4', '--samples', '4', '--max-new-tokens', '5', '--held-out', '3', '--chat.template', 'plain')
SMALL += ('--data.seq-len', '64', '--data.global-batch', '8', '--optim.warmup-steps', '0', '--optim.lr', '1e-2')
SMALL += ('--watch.eval-every', '4', '--watch.save-every', '4', '--steps', '4')


def rl(home, name, *args):
  given = ('--init', str(home / 'base'), '--data.path', str(home / 'rows.jsonl'), '--run', str(home / name))
  return cli.main(['rl', *given, '--algo', 'grpo', '--reward', f'python:{home / "own.py"}:e', *SMALL, *args])


@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 2])
def test_a_run_with_such_an_engine(home, server, rank):
  """Full tuning and adapters, two updates a rollout: the curves of the engine at home, importance about 1."""
  how = ('--lora.rank', str(rank), '--importance', 'token', '--importance-cap', '1.5', '--temperature', '0.8')
  assert rl(home, f'there{rank}', *how, '--engine', server.url) == 0
  assert rl(home, f'here{rank}', *how) == 0
  there, here = (metrics.read_rows(home / f'{name}{rank}' / 'metrics.jsonl') for name in ('there', 'here'))
  for name in ('reward/mean', 'answers/length', 'answers/truncated', 'train/loss', 'eval/reward/mean'):
    a, b = ([row[name] for row in rows if name in row] for rows in (there, here))
    np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)
    assert len(a) >= 2
  trained = [row for row in there if 'train/loss' in row]
  assert all(row['train/policy/importance_mean'] == pytest.approx(1, abs=1e-4) for row in trained)
  assert all(row['train/policy/sampler_gap_max'] < 1e-4 for row in trained)
  handed = [body['kwargs']['weights_path'] for path, body in server.seen if path == '/collective_rpc']
  assert len(handed) == len(set(handed)) == 4  # two evaluations, two rollouts
  last = lora.merge(bases.read(bases.newest(home / f'there{rank}'))[1])
  cfg = server.model.cfg
  for path, x in without_padding(server.model.params, cfg).items():
    np.testing.assert_allclose(x, without_padding(last, cfg)[path], atol=1e-6, err_msg=path)


def test_faults_of_the_engine_end_a_run(home, capsys):
  assert rl(home, 'down', '--engine', 'http://127.0.0.1:9') == 1
  assert 'rl.engine http://127.0.0.1:9/v1/models: URLError' in capsys.readouterr().err.strip().splitlines()[-1]
  assert rl(home, 'wrong', '--engine', 'localhost:8000') == 1
  assert 'http://HOST:PORT' in capsys.readouterr().err.strip().splitlines()[-1]


def test_what_is_exported_is_the_model(server, tmp_path, words):
  made = client(server, tmp_path, words)
  made.hand_over(randomized(CFG))
  back = interop.load(str(server.path))
  assert back.tokenizer.digest == words.digest and models.abstract(back.cfg).keys() == models.abstract(CFG).keys()
