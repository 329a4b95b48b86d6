"""What holds for every algorithm of `jaxlm rl`, through the objective itself and a real policy over five tokens.

All answers that the policy can give are enumerated and weighed by their probability, so that means are exact. What is
asked of an algorithm follows from its row of the table: a new one is covered by being there.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LLAMA, randomized

from jaxlm import episodic, masked
from jaxlm.losses import policy as losses
from jaxlm.models import Run
from jaxlm.rl import algorithms, episodes
from jaxlm.rl.algorithms import ALGORITHMS
from jaxlm.rl.rollout import Completions

V, LONGEST, END, G, KL_COEF = 5, 2, 0, 2, 0.3
CFG = dataclasses.replace(LLAMA, vocab_size=V, n_layers=1, max_seq_len=16)
PROMPT = [3, 1]
ANSWERS = [(END,), *itertools.product(range(1, V), range(V))]  # all of up to two tokens, stopped at END or cut
RNG = np.random.default_rng(83)
REWARD = RNG.normal(size=len(ANSWERS)).astype(np.float32)
HOW = {'gamma': 1.0, 'lam': 1.0}


@functools.cache
def policies():
  """(policy with a value head of zeros, reference)."""
  first, other = (jax.tree.map(lambda x: 2.0 * x, randomized(CFG, seed)) for seed in (0, 1))
  return {**first, 'value': jnp.zeros(CFG.d_model)}, other


def batch_of(answers):
  """Rows of the prompt and an answer, as rollouts make them."""
  lengths = np.array([len(a) for a in answers], np.int32)
  tokens = np.zeros((len(answers), LONGEST), np.int32)
  for row, answer in enumerate(answers):
    tokens[row, : len(answer)] = answer
  stopped = np.array([a[-1] == END for a in answers])
  blank = np.zeros(tokens.shape, np.float32)
  made = Completions(tokens, lengths, blank, blank, stopped)
  batch = episodes.batch_of([PROMPT] * len(answers), made, limit=len(PROMPT) + LONGEST - 1, pad_id=0)
  return {name: jnp.asarray(x) for name, x in batch.items()}, jnp.asarray(stopped)


READ = jax.jit(episodic.read(CFG, Run(), temperature=1.0, valued=True, compared=True))


def logps(params, batch):
  return episodic.read(CFG, Run(), temperature=1.0)(params, batch)['old_logp'] * batch['loss_mask']


def estimated(how, batch, stopped, scores, kl_coef=0.0, values=None):
  """The batch with what rollouts add to it, and the log-ratios to the reference."""
  policy, reference = policies()
  seen = READ(policy, batch, reference)
  kl = (seen['old_logp'] - seen['ref_logp']) * batch['loss_mask']
  values = seen['values'] if values is None else values
  given = how, scores.reshape(-1, G), batch['loss_mask'], kl, values, stopped
  found = algorithms.estimate(*given, kl_coef=kl_coef, **HOW)
  return batch | found | {'values': values, 'ref_logp': seen['ref_logp']}


def learnt(how, kl_coef=0.0, value_coef=0.0):
  """Value (total / weight) and gradient of the algorithm's own loss over a batch."""
  loss = episodic.learn(CFG, Run(), how, temperature=1.0, longest=LONGEST, kl_coef=kl_coef, value_coef=value_coef)
  return jax.jit(jax.value_and_grad(lambda params, batch: masked.value(loss(params, batch, None)[0])))


def flattened(grads):
  """Of the trunk, as one vector."""
  return np.concatenate([np.asarray(g, np.float64).ravel() for g in jax.tree.leaves({**grads, 'value': None})])


def summed(how):
  """Whether each token counts the same, however long its answer is."""
  return how.ratio == 'product' or how.per != 'sequence'


PENALISED = [(name, KL_COEF) for name, how in ALGORITHMS.items() if how.kl == 'reward']


@pytest.mark.slow(but='grpo-0.0')
@pytest.mark.parametrize('name, kl_coef', [*((name, 0.0) for name in ALGORITHMS), *PENALISED])
def test_the_mean_gradient_is_that_of_the_expected_reward(name, kl_coef):
  """And of E[reward] - c KL where the penalty is in the reward, over all groups of answers.

  Dividing by a group's spread or by an answer's length turns it, which is seen too.
  """
  how, (policy, reference) = ALGORITHMS[name]._replace(mixed=False), policies()
  groups = np.array(list(itertools.product(range(len(ANSWERS)), repeat=G))).reshape(-1)
  each, _ = batch_of(ANSWERS)
  chance = np.exp(np.asarray(logps(policy, each)).sum(-1))
  assert chance.sum() == pytest.approx(1, rel=1e-5)
  batch, stopped = batch_of([ANSWERS[i] for i in groups])
  batch = estimated(how, batch, stopped, jnp.asarray(REWARD[groups]), kl_coef)
  weight = np.repeat(chance[groups].reshape(-1, G).prod(-1), G)
  batch['advantages'] = batch['advantages'] * jnp.asarray(weight * len(weight), jnp.float32)[:, None]
  got = flattened(learnt(how)(policy, batch)[1])

  def objective(params):
    logp, ref = logps(params, each), logps(reference, each)
    return jnp.sum(jnp.exp(logp.sum(-1)) * (REWARD - kl_coef * (logp - ref).sum(-1)))

  want = -flattened(jax.grad(objective)(policy))
  cosine = got @ want / np.linalg.norm(got) / np.linalg.norm(want)
  exact = summed(how) and how.advantage != 'group'
  assert cosine > 1 - 1e-5 if exact else 0.5 < cosine < 1 - 1e-4


@pytest.mark.slow(but='cispo')
@pytest.mark.parametrize('name', [name for name, how in ALGORITHMS.items() if how.kl == 'loss'])
def test_a_penalty_in_the_loss_is_the_mean_of_k3(name):
  """Value and gradient of k3 by hand over answers with no score, averaged as the loss averages."""
  how, (policy, _) = ALGORITHMS[name], policies()
  batch, stopped = batch_of([*ANSWERS, ANSWERS[0]])  # 22, which divides into groups
  batch = estimated(how, batch, stopped, jnp.zeros(len(ANSWERS) + 1))
  value, grad = learnt(how, kl_coef=1.0)(policy, batch)
  mask = batch['loss_mask']

  def by_hand(params):
    gap = batch['ref_logp'] * mask - logps(params, batch)
    k3 = (jnp.exp(gap) - gap - 1) * mask
    if how.per == 'sequence':
      return jnp.mean(k3.sum(-1) / mask.sum(-1))
    return k3.sum() / (mask.sum() if how.per == 'token' else LONGEST * len(mask))

  want, want_grad = jax.value_and_grad(by_hand)(policy)
  assert float(value) == pytest.approx(float(want), rel=1e-5)
  np.testing.assert_allclose(flattened(grad), flattened(want_grad), atol=1e-5 * np.abs(flattened(want_grad)).max())


def padded(x, left, right, fill=0):
  return jnp.pad(x, ((0, 0), (left, right)), constant_values=fill)


@pytest.mark.slow(but='cispo')
@pytest.mark.parametrize('name', ALGORITHMS)
def test_padding_and_repeated_groups_change_nothing(name):
  """From scores to the gradient, off the policy that wrote, with both penalties and a value function."""
  how, (policy, _) = ALGORITHMS[name], policies()
  policy = policy | {'value': jnp.asarray(RNG.normal(size=CFG.d_model), jnp.float32)}
  batch, stopped = batch_of([ANSWERS[i] for i in (0, 7, 12, 3, 0, 20)])
  scores = jnp.asarray(RNG.normal(size=6), jnp.float32)
  moved = jnp.asarray(0.3 * RNG.normal(size=batch['loss_mask'].shape), jnp.float32)
  run = learnt(how, kl_coef=KL_COEF, value_coef=0.5)

  def of(batch, stopped, scores, moved):
    values = 0.3 + moved
    batch = estimated(how, batch, stopped, scores, KL_COEF, values)
    return run(policy, batch | {'old_logp': READ(policy, batch)['old_logp'] + moved})

  value, grad = of(batch, stopped, scores, moved)
  assert np.isfinite(value) and np.abs(flattened(grad)).max() > 1e-3
  changes = {f'{left} and {right}': ((left, right), 1) for left, right in ((3, 0), (0, 2), (1, 4))} | {
    'twice': ((0, 0), 2)
  }
  for change, (pads, times) in changes.items():
    again = lambda x, pads=pads, times=times: jnp.concatenate([padded(x, *pads)] * times)
    twice = lambda x, times=times: jnp.concatenate([x] * times)
    got = of({n: again(x) for n, x in batch.items()}, twice(stopped), twice(scores), again(moved))
    assert float(got[0]) == pytest.approx(float(value), rel=2e-5, abs=1e-6), change
    np.testing.assert_allclose(
      flattened(got[1]), flattened(grad), atol=3e-5 * np.abs(flattened(grad)).max(), err_msg=change
    )


@pytest.mark.parametrize('name', ALGORITHMS)
def test_what_a_token_counts_by_the_length_of_its_answer(name):
  """Two answers as wrong as each other, of 2 and of 7 tokens, by the logits: the same, or 7 / 2 of it."""
  how, longest = ALGORITHMS[name], 7
  on = (jnp.arange(longest) < jnp.array([[2], [7]])).astype(jnp.float32)
  logp, per = jnp.full((2, longest), -1.0), 7.0 if how.per == 'longest' else how.per
  clips = {'clip_low': how.clip_low, 'clip_high': how.clip_high, 'ratio': how.ratio, 'per': per}
  grad = jax.grad(lambda x: masked.value(getattr(losses, how.loss)(x, logp, -jnp.ones((2, 1)), on, **clips)))(logp)
  assert float(grad[0, 0] / grad[1, 0]) == pytest.approx(1.0 if summed(how) else 3.5)
  assert float(grad[0, 0]) > 0
