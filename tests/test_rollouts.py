"""From answers to what is learnt from them: known answers through the loop, against the papers in NumPy."""

from typing import NamedTuple

import numpy as np
import pytest
import rl_oracle
from tiny_rl import ALIKE, CFG, LETTERS, REFERENCE, Known, N, furnish, opened

from jaxlm.loops import answers as answering
from jaxlm.rl.algorithms import ALGORITHMS
from jaxlm.train import metrics

P, G, BUFFER = 3, 5, 3  # a quarter of N, whole tokens
HOW = {'kl_coef': 0.3, 'gamma': 0.9, 'lam': 0.7}
ROUNDS, STEPS, TEMPERATURE = 2, 18, 0.7


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  return furnish(tmp_path_factory.mktemp('rollouts'))


@pytest.fixture
def known(monkeypatch):
  """Opens a run whose answers are those of `Known`."""

  def make(home, algo, **rl):
    writers = []
    monkeypatch.setattr(answering, 'engine', lambda *how: lambda *asked: writers[0](*asked))
    tiny = opened(home, algo, **rl)
    writers.append(Known(tiny.feed))
    return tiny, writers[0]

  return make


def worth(writer, asked, made, m):
  """A score as the reward's file has it, read off the tokens."""
  said = ''.join(LETTERS[list(writer.ids).index(i)] for i in made.tokens_MN[m, : made.lengths_M[m] - made.stopped_M[m]])
  alike = ALIKE in writer.words.decode(asked)
  return 0.4 if alike else (7 * said.count('a') + 3 * said.count('b')) % 11 / 7


class Answer(NamedTuple):
  """One of them, as it is to be learnt from."""

  asked: list[int]
  said: np.ndarray
  stopped: bool
  sampled: np.ndarray  # log-probabilities by the sampler
  score: float
  learnt: bool


def gathered(writer, algo):
  """The answers to learn from in their order, and of each round (rewards [P, G], which groups differ, all written)."""
  kept, rounds = [], []
  for turn, (asked, made) in enumerate(writer.calls):
    raw = np.array([worth(writer, asked[m], made, m) for m in range(len(asked))]).reshape(P, G)
    mixed = [len(set(group)) > 1 for group in raw.tolist()]
    rounds.append((raw, mixed, made))
    wanted = P - len(kept)
    chosen = range(P)
    if algo == 'dapo':
      chosen = [p for p in range(P) if mixed[p]][:wanted]
      if turn == ROUNDS - 1:
        chosen = sorted(chosen + [p for p in range(P) if not mixed[p]][: wanted - len(chosen)])
    for p in chosen:
      kept.append([])
      for m in range(p * G, p * G + G):
        n, score = int(made.lengths_M[m]), raw.reshape(-1)[m]
        score += rl_oracle.overlong(n, N, BUFFER) if algo == 'dapo' else 0.0
        written = made.tokens_MN[m, :n], bool(made.stopped_M[m]), made.logp_MN[m, :n]
        kept[-1].append(Answer(asked[m], *written, score, mixed[p] or algo != 'dapo'))
  return sum(kept, []), rounds


def mean_of(rounds, told):
  return pytest.approx(np.mean([told(*one) for one in rounds]), abs=1e-5)


def read(params, rows, width):
  """Of each answer: where its tokens are targets, their log-probabilities, and the values before them."""
  tokens = np.zeros((len(rows), width + 1), np.int32)
  for m, row in enumerate(rows):
    tokens[m, : len(row.asked) + len(row.said)] = [*row.asked, *row.said]
  _, log_all, values = rl_oracle.read(CFG, params, tokens, TEMPERATURE)
  places = [np.arange(len(row.said)) + len(row.asked) - 1 for row in rows]
  logps = [log_all[m, at, rows[m].said] for m, at in enumerate(places)]
  return places, logps, [None if values is None else values[m, at] for m, at in enumerate(places)]


@pytest.mark.slow(but='grpo')
@pytest.mark.parametrize('algo', ALGORITHMS)
def test_what_is_learnt_from_known_answers(known, home, algo):
  """The whole buffer, and what is told of it, over rollouts in which every case is met."""
  tiny, writer = known(home, algo, temperature=TEMPERATURE, rounds=ROUNDS, **HOW)
  how, feed, seen = ALGORITHMS[algo], tiny.feed, set()
  for number in range(5):
    writer.calls.clear()
    _, told = feed._roll(tiny.state, number)
    buffer = feed._buffer
    rows, rounds = gathered(writer, algo)
    assert len(rows) == P * G
    places, logps, values = read(tiny.state.params, rows, buffer['tokens'].shape[1])
    _, refs, _ = read(REFERENCE, rows, buffer['tokens'].shape[1])
    kls = [logp - ref for logp, ref in zip(logps, refs, strict=True)]
    scores, stopped = [row.score for row in rows], [row.stopped for row in rows]
    advs, returns = rl_oracle.advantages(algo, scores, kls, values, stopped, G, **HOW)
    want = {'targets': [row.said for row in rows], 'sampled_logp': [row.sampled for row in rows], 'old_logp': logps}
    want |= {'advantages': advs, 'loss_mask': [np.full(len(row.said), row.learnt) for row in rows]}
    if how.valued:
      want |= {'values': values, 'returns': returns}
    if how.kl == 'loss':
      want['ref_logp'] = refs
    for name, parts in want.items():
      for m, (part, at) in enumerate(zip(parts, places, strict=True)):
        np.testing.assert_allclose(buffer[name][m, at], part, rtol=2e-4, atol=2e-4, err_msg=f'{name} of {m}')
    assert buffer['loss_mask'].sum() == sum(len(row.said) for row in rows if row.learnt)
    assert told['policy/kl'] == pytest.approx(np.concatenate(kls).mean(), rel=1e-4)
    assert told['reward/mean'] == mean_of(rounds, lambda raw, mixed, made: raw.mean())
    assert told['answers/length'] == mean_of(rounds, lambda raw, mixed, made: made.lengths_M.mean())
    assert told['answers/truncated'] == mean_of(rounds, lambda raw, mixed, made: 1 - made.stopped_M.mean())
    assert told['reward/std'] == pytest.approx(np.std(scores), rel=1e-4, abs=1e-6)
    assert told['reward/rounds'] == len(rounds) and (len(rounds) == 1 or how.mixed)
    if how.grouped:
      assert told['reward/equal_groups'] == mean_of(rounds, lambda raw, mixed, made: 1 - np.mean(mixed))
    seen |= {'stopped' if row.stopped else 'cut' for row in rows} | {f'rounds {len(rounds)}'}
    seen |= {'group differs' if one else 'group alike' for _, mixed, _ in rounds for one in mixed}
    masked = [rows[m : m + G] for m in range(0, P * G, G) if not rows[m].learnt]
    seen |= {'alike but for lengths' for group in masked if len({row.score for row in group}) > 1}
  sampled = {'rounds 1', 'rounds 2', 'alike but for lengths'} if how.mixed else set()
  assert seen >= {'stopped', 'cut', 'group alike', 'group differs'} | sampled


@pytest.mark.slow(but='grpo')
@pytest.mark.parametrize('algo', ['ppo', 'grpo', 'dapo'])
def test_the_steps_of_a_rollout(known, home, algo):
  """Each loss of the program that a config makes, at the weights of the moment, is NumPy's on its batch."""
  weights = {'entropy_coef': 0.17, 'value_coef': 0.7, 'value_clip': 0.01}
  tiny, _ = known(home, algo, lr=3e-3, temperature=TEMPERATURE, rounds=ROUNDS, epochs=2, **weights, **HOW)
  state, after = tiny.state, tiny.feed.stream(tiny.state, 6, metrics.Unwritten())
  for _ in range(6):
    batch = after(state)
    host = {name: np.asarray(x) for name, x in batch.items()}
    _, log_all, values = rl_oracle.read(CFG, state.params, host['tokens'], TEMPERATURE)
    want, *_ = rl_oracle.loss(algo, log_all, values, host, longest=N, kl_coef=HOW['kl_coef'], **weights)
    state, found = tiny.built.step(state, batch)
    assert float(found['loss']) == pytest.approx(want, rel=1e-4, abs=1e-5)


SAMPLINGS = {
  'cold': {'temperature': 0.7},
  'top_k': {'top_k': 7},
  'top_p': {'top_p': 0.8},
  'min_p': {'min_p': 0.05},
  'all': {'temperature': 1.3, 'top_k': 17, 'top_p': 0.9, 'min_p': 0.01},
}
EACH = [(algo, name) for algo in ALGORITHMS for name in SAMPLINGS]


@pytest.mark.slow(but='ppo-cold')
@pytest.mark.parametrize('algo, sampling', EACH)
def test_with_frozen_weights_the_ratio_is_one(home, algo, sampling):
  """Trap 7 through the loop: what training reads is what the sampler said, at every step while no weight moves."""
  tiny = opened(home, algo, 'letters', lr=0.0, steps=3, rounds=1, decode_rows=15, **SAMPLINGS[sampling])
  state, after = tiny.state, tiny.feed.stream(tiny.state, 3, metrics.Unwritten())
  for _ in range(3):
    batch = after(state)
    on = np.asarray(batch['loss_mask']) > 0
    assert on.any()
    np.testing.assert_allclose(np.exp(np.asarray(batch['old_logp'] - batch['sampled_logp'])[on]), 1.0, atol=1e-5)
    state, found = tiny.built.step(state, batch)
    assert float(found['policy/ratio_min']) == pytest.approx(1, abs=1e-5)
    assert float(found['policy/ratio_max']) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_ppo_raises_the_reward(home):
  """Small letters in three tokens: from one in seven answers to more than one in each."""
  how = {'prompts': 8, 'samples': 4, 'max_new_tokens': 3, 'decode_rows': 32, 'kl_coef': 0.01, 'entropy_coef': 0.001}
  tiny = opened(home, 'ppo', 'letters', lr=0.1, steps=STEPS, batch=32, head_scale=0.0, **how)
  state, after, rewards = tiny.state, tiny.feed.stream(tiny.state, STEPS, metrics.Unwritten()), []
  for _ in range(STEPS):
    state, _ = tiny.built.step(state, after(state))
    rewards.append(tiny.feed.told()['reward/mean'])
  assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 1, rewards
