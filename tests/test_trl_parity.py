"""Losses and advantages against TRL's own code on the same random log-probabilities and masks, gradients by torch.

Its trainers are made without their __init__ (data, model, optimizer), with the settings that the method read;
the forward pass is replaced by the log-probabilities or logits at hand. TRL 1.16 has CPO, SimPO, ORPO and GKD in
`trl.experimental`. What it no longer has (PPO's clip and value clip, GAE) is in test_policy.py and test_advantages.py.
"""

import os
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.losses import distill, lm, policy, preference
from jaxlm.rl import advantages

os.environ.setdefault('TRL_EXPERIMENTAL_SILENCE', '1')
torch = pytest.importorskip('torch', reason="needs pip install -e '.[parity]'")
trl = pytest.importorskip('trl', reason="needs pip install -e '.[parity]'")
accelerate = pytest.importorskip('accelerate', reason="needs pip install -e '.[parity]'")

B, T, V = 5, 7, 11
RNG = np.random.default_rng(61)


def floats(*shape, mean=0.0, spread=1.0):
  return RNG.normal(mean, spread, shape).astype(np.float32)


LENGTHS = np.array([7, 3, 5, 2, 6, 4, 7, 1, 6, 3])  # of chosen and rejected
MASK = (LENGTHS[:, None] > np.arange(T)).astype(np.float32)
LOGP = floats(2 * B, T, mean=-1.5, spread=0.6).clip(max=-0.05)
REF = (LOGP + floats(2 * B, T, spread=0.3)).astype(np.float32)


def trainer(cls, **settings):
  """One that never went through __init__, on the CPU and alone."""
  made = object.__new__(cls)
  common = {
    'accelerator': accelerate.Accelerator(cpu=True),
    'model': SimpleNamespace(training=True, is_gradient_checkpointing=False),
    'aux_loss_enabled': False,
    'use_weighting': False,
    '_metrics': {'train': defaultdict(list), 'eval': defaultdict(list)},
    '_total_train_tokens': 0,
    '_tp_size': 1,
  }
  for name, value in (common | settings).items():
    setattr(made, name, value)
  return made


def leaf(x):
  return torch.tensor(x, requires_grad=True)


def mean(loss):
  return loss.total / loss.weight


def compare(ours, theirs, *arrays):
  """Value and gradients: `ours` of jax arrays, `theirs` of torch leaves, both a number."""
  leaves = [leaf(x) for x in arrays]
  want = theirs(*leaves)
  want.backward()
  value, grads = jax.value_and_grad(ours, tuple(range(len(arrays))))(*map(jnp.asarray, arrays))
  assert float(value) == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
  for grad, x in zip(grads, leaves, strict=True):
    given = x.grad.numpy()
    assert np.abs(given).max() > 1e-5
    np.testing.assert_allclose(grad, given, rtol=1e-5, atol=1e-5 * np.abs(given).max())


# --- pairs ---------------------------------------------------------------------------------------------------------


def forward(logp, mask=MASK):
  """What TRL's fused head gives: log-probs that are 0 where nothing is predicted, and what it logs."""
  zeros = torch.zeros(logp.shape)
  return SimpleNamespace(
    log_probs=logp * torch.tensor(mask), entropy=zeros, mean_logits=zeros, is_top1=zeros > 0, log_sum_sq_probs=zeros
  )


def batch(mask):
  """Ids and masks with a prompt of one token."""
  shape = mask.shape[0], mask.shape[1] + 1
  whole = torch.tensor(np.pad(mask, ((0, 0), (1, 0))).astype(np.int64))
  return {'input_ids': torch.ones(shape, dtype=torch.long), 'attention_mask': whole, 'completion_mask': whole}


def dpo_trainer(loss_type, beta, label_smoothing=0.0):
  return trainer(
    trl.DPOTrainer,
    ld_alpha=None,
    precompute_ref_logps=True,
    f_divergence_type='reverse_kl',
    loss_types=[loss_type],
    loss_weights=[1.0],
    beta=beta,
    label_smoothing=label_smoothing,
  )


def their_dpo(logp, rows, *how):
  """Over pairs `rows`."""
  both = np.concatenate([rows, rows + B])
  ref = (torch.tensor(REF[both]) * torch.tensor(MASK[both])).sum(1).chunk(2)
  inputs = batch(MASK[both]) | {'ref_chosen_logps': ref[0], 'ref_rejected_logps': ref[1]}
  return dpo_trainer(*how)._compute_loss(lambda **_: forward(logp[both], MASK[both]), inputs, False)


def summed(logp):
  """(log-probs of chosen, of rejected), references, lengths."""
  logp_B, length_B = preference.summed(logp, jnp.asarray(MASK))
  ref_B, _ = preference.summed(jnp.asarray(REF), jnp.asarray(MASK))
  return (logp_B[:B], logp_B[B:]), (ref_B[:B], ref_B[B:]), (length_B[:B], length_B[B:])


def test_dpo():
  def ours(logp):
    both, refs, _ = summed(logp)
    return mean(preference.dpo(*both, *refs, beta=0.3))

  compare(ours, lambda logp: their_dpo(logp, np.arange(B), 'sigmoid', 0.3), LOGP)


def test_dpo_smoothed():
  """TRL's `aot` sorts a batch; of one pair at a time it is conservative DPO."""

  def ours(logp):
    both, refs, _ = summed(logp)
    return mean(preference.dpo(*both, *refs, beta=0.3, label_smoothing=0.15))

  compare(ours, lambda x: sum(their_dpo(x, np.array([b]), 'aot', 0.3, 0.15) for b in range(B)) / B, LOGP)


def test_ipo():
  def ours(logp):
    both, refs, lengths = summed(logp)
    return mean(preference.ipo(*both, *refs, *lengths, beta=0.4))

  compare(ours, lambda logp: their_dpo(logp, np.arange(B), 'ipo', 0.4), LOGP)


@pytest.mark.parametrize('shift', [-9.0, 3.0])
def test_kto(shift):
  """With a KL estimate that is below 0 and one above."""
  label = np.array([1, 0, 0, 1, 1, 0, 1, 0, 1, 1])
  mask_kl = np.roll(MASK[:, : T - 1], 1, axis=0)
  kl, kl_ref = floats(2 * B, T - 1, mean=-1.5, spread=0.5), floats(2 * B, T - 1, mean=-1.5, spread=0.5) - shift / T
  kl_ref = kl_ref.astype(np.float32)
  weights = {'desirable_weight': 1.3, 'undesirable_weight': 0.7}

  def theirs(logp):
    made = trainer(trl.KTOTrainer, calculate_KL=True, precompute_ref_logps=True, loss_type='kto', beta=0.2, **weights)
    other = batch(mask_kl)
    inputs = batch(MASK) | {f'KL_{name}': x for name, x in other.items()} | {'label': torch.tensor(label)}
    inputs |= {'ref_logps': torch.tensor((REF * MASK).sum(1)), 'ref_KL_logps': torch.tensor((kl_ref * mask_kl).sum(1))}
    model = lambda input_ids, **_: forward(logp) if input_ids.shape[1] == T + 1 else forward(torch.tensor(kl), mask_kl)
    return made._compute_loss(model, inputs, False)

  def ours(logp):
    both, refs, _ = summed(logp)
    z = preference.kto_baseline(*(preference.summed(*map(jnp.asarray, (x, mask_kl)))[0] for x in (kl, kl_ref)))
    assert (z > 0) == (shift > 0)
    args = jnp.concatenate(both), jnp.concatenate(refs), jnp.asarray(label, jnp.float32)
    return mean(preference.kto(*args, z, beta=0.2, **weights))

  compare(ours, theirs, LOGP)


@pytest.mark.parametrize('with_margin', [False, True])
def test_reward_model(with_margin):
  margin = RNG.random(B).astype(np.float32)

  def theirs(rewards):
    made = trainer(trl.RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=0.02))
    inputs = {'attention_mask': torch.ones(2 * B, T)} | ({'margin': torch.tensor(margin)} if with_margin else {})
    return made.compute_loss(lambda **_: SimpleNamespace(logits=rewards[:, None]), inputs)

  def ours(rewards):
    how = {'margin_B': jnp.asarray(margin)} if with_margin else {}
    return mean(preference.bradley_terry(rewards[:B], rewards[B:], center=0.02, **how))

  compare(ours, theirs, floats(2 * B))


def pair_batch(ids, mask):
  """As CPO's and ORPO's collator makes it: a prompt of one token, labels -100 where nothing is learned."""
  whole = np.pad(mask, ((0, 0), (1, 0)), constant_values=1).astype(np.int64)
  labels = np.where(np.pad(mask, ((0, 0), (1, 0))) > 0, ids, -100)
  found = {}
  for name, rows in (('chosen', slice(B)), ('rejected', slice(B, None))):
    found |= {f'{name}_input_ids': torch.tensor(ids[rows]), f'{name}_attention_mask': torch.tensor(whole[rows])}
    found |= {f'{name}_labels': torch.tensor(labels[rows])}
  return found


@pytest.mark.parametrize('name', ['orpo', 'cpo', 'simpo'])
def test_losses_without_reference_from_logits(name):
  """Through TRL's own forward pass and sum of terms. Chosen answers have one length, where its token mean is ours."""
  from trl.experimental.cpo import CPOTrainer
  from trl.experimental.orpo import ORPOTrainer

  ids, mask = RNG.integers(0, V, (2 * B, T + 1)), MASK.copy()
  mask[:B] = np.arange(T) < 5
  settings = {'beta': 0.4, 'is_encoder_decoder': False, 'pad_token_id': 0, 'padding_value': 0, 'alpha': 0.0}
  settings |= {'label_smoothing': 0.0 if name == 'orpo' else 0.1, 'simpo_gamma': 0.5}
  settings |= {'loss_type': {'cpo': 'sigmoid'}.get(name, name), 'cpo_alpha': 0.8 if name == 'cpo' else 0.0}

  def theirs(logits):
    made = trainer(ORPOTrainer if name == 'orpo' else CPOTrainer, **settings)
    model = lambda ids, **_: SimpleNamespace(logits=logits)
    return made.get_batch_loss_metrics(model, pair_batch(ids, mask))[0]

  def ours(logits):
    logp, _ = lm.from_logits(logits[:, :-1], jnp.asarray(ids[:, 1:], jnp.int32))
    logp_B, length_B = preference.summed(logp, jnp.asarray(mask))
    args = logp_B[:B], logp_B[B:], length_B[:B], length_B[B:]
    if name == 'orpo':
      return mean(preference.orpo(*args, beta=0.4))
    if name == 'simpo':
      return mean(preference.simpo(*args, beta=0.4, gamma=0.5, label_smoothing=0.1))
    return mean(preference.cpo(*args[:3], beta=0.4, sft=0.8, label_smoothing=0.1))

  compare(ours, theirs, floats(2 * B, T + 1, V, spread=1.5))


# --- policies ------------------------------------------------------------------------------------------------------

OLD = (LOGP + floats(2 * B, T, spread=0.2)).astype(np.float32)
ADV = floats(2 * B)
LIMIT = 9


def answers(mask, **more):
  """A batch of prompts of one token and answers."""
  shape, prompt = torch.ones(mask.shape, dtype=torch.long), torch.ones((len(mask), 1), dtype=torch.long)
  inputs = {'prompt_ids': prompt, 'prompt_mask': prompt, 'completion_ids': shape}
  inputs |= {'completion_mask': torch.tensor(mask), 'num_items_in_batch': torch.tensor(mask.sum())}
  return inputs | {name: torch.tensor(x) for name, x in more.items()}


def grpo_trainer(loss_type, level='token', beta=0.0, weigh=False, **settings):
  return trainer(
    trl.GRPOTrainer,
    loss_type=loss_type,
    importance_sampling_level=level,
    beta=beta,
    epsilon_low=0.1,
    epsilon_high=2.0 if loss_type == 'cispo' else 0.15,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
    use_vllm=weigh,
    vllm_importance_sampling_correction=weigh,
    current_gradient_accumulation_steps=1,
    max_completion_length=LIMIT,
    _entropy_bonus_enabled=False,
    **settings,
  )


def ours_grpo(logp, per, ratio='token', kl_coef=0.0, weight=1.0):
  args = jnp.asarray(OLD), weight * jnp.asarray(ADV)[:, None], jnp.asarray(MASK)
  loss = policy.ppo(logp, *args, clip_low=0.1, clip_high=0.15, ratio=ratio, per=per)
  kl = policy.average(policy.kl(logp, jnp.asarray(REF), args[2]), args[2], per=per)
  assert float(kl.weight) == float(loss.weight)
  return (loss.total + kl_coef * kl.total) / loss.weight


@pytest.mark.parametrize('beta', [0.0, 0.07])
@pytest.mark.parametrize('ratio', ['token', 'sequence'])
@pytest.mark.parametrize(
  'loss_type, per', [('grpo', 'sequence'), ('bnpo', 'token'), ('dapo', 'token'), ('dr_grpo', LIMIT)]
)
def test_grpo_and_its_variants(loss_type, per, ratio, beta):
  """Sequence level is GSPO's."""

  def theirs(logp):
    made = grpo_trainer(loss_type, ratio, beta)
    made._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros(logp.shape), None)
    inputs = answers(MASK, advantages=ADV, old_per_token_logps=OLD, ref_per_token_logps=REF)
    return made._compute_loss(None, inputs)

  compare(lambda logp: ours_grpo(logp, per, ratio, beta), theirs, LOGP)


def test_cispo():
  def theirs(logp):
    made = grpo_trainer('cispo')
    made._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros(logp.shape), None)
    return made._compute_loss(None, answers(MASK, advantages=ADV, old_per_token_logps=OLD))

  args = jnp.asarray(OLD), jnp.asarray(ADV)[:, None], jnp.asarray(MASK)
  compare(lambda logp: mean(policy.cispo(logp, *args, clip_high=1.0)), theirs, LOGP)


def test_clip_fractions():
  made = grpo_trainer('dapo')
  made._get_per_token_logps_and_entropies = lambda *_, **__: (torch.tensor(LOGP), torch.zeros(LOGP.shape), None)
  made._compute_loss(None, answers(MASK, advantages=ADV, old_per_token_logps=OLD))
  args = map(jnp.asarray, (LOGP, OLD, ADV[:, None], MASK))
  got = policy.ratio_stats(*args, clip_low=0.1, clip_high=0.15)
  for ours, theirs in (('clip_low', 'low_mean'), ('clip_high', 'high_mean'), ('clip_fraction', 'region_mean')):
    (want,) = made._metrics['train'][f'clip_ratio/{theirs}']
    assert want > 0 and float(mean(got[ours])) == pytest.approx(want, rel=1e-6)


def test_rloo():
  """Its ratio is that of the whole answer."""

  def theirs(logp):
    made = trainer(trl.RLOOTrainer, epsilon_low=0.3, epsilon_high=0.4)
    made._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros(logp.shape), None)
    return made._compute_loss(None, answers(MASK, advantages=ADV, old_logps=(OLD * MASK).sum(1)))

  args = jnp.asarray(OLD), jnp.asarray(ADV)[:, None], jnp.asarray(MASK)
  how = {'clip_low': 0.3, 'clip_high': 0.4, 'ratio': 'product', 'per': 'sequence'}
  compare(lambda logp: mean(policy.ppo(logp, *args, **how)), theirs, LOGP)


# --- advantages ----------------------------------------------------------------------------------------------------

REWARDS = np.round(floats(2, B), 1)
REWARDS[1] = 0.3  # a group that teaches nothing


def scored(cls, **settings):
  """The batch that a trainer makes of answers of MASK's lengths and REWARDS, two prompts with five answers each."""

  def reward(prompts, completions, **_):
    return REWARDS.reshape(-1).tolist()

  made = trainer(
    cls,
    args=SimpleNamespace(
      steps_per_generation=1,
      gradient_accumulation_steps=1,
      per_device_train_batch_size=2 * B,
      gradient_checkpointing_kwargs=None,
      report_to=[],
    ),
    _tokenizer=SimpleNamespace(pad_token_id=0),
    environment_factories=None,
    environments=None,
    tools=None,
    pad_to_multiple_of=None,
    mask_truncated_completions=False,
    gradient_accumulation_steps=1,
    num_iterations=1,
    num_generations=B,
    ref_model=object(),
    reward_funcs=[reward],
    reward_processing_classes=[None],
    reward_func_names=['reward'],
    reward_weights=torch.ones(1),
    reward_clip_range=None,
    multi_objective_aggregation='sum_then_normalize',
    state=SimpleNamespace(global_step=0),
    _logs=defaultdict(list) | {'rewards': defaultdict(list), 'extra': defaultdict(list)},
    _pending_extra_logs=defaultdict(list),
    _pending_metrics=defaultdict(list),
    **settings,
  )
  made._get_per_token_logps_and_entropies = lambda model, *_, **__: (
    torch.tensor(REF if model is made.ref_model else OLD),
    None,
    None,
  )
  ids, texts = [[1] * n for n in LENGTHS], ['x'] * 2 * B
  sampled = [row[:n].tolist() for row, n in zip(LOGP, LENGTHS, strict=True)]
  grpo = cls is trl.GRPOTrainer
  made._generate = lambda prompts: (
    ([[1]] * 2 * B, ids, None, texts, sampled, {}, None, None) if grpo else ([[1]] * 2 * B, ids, texts)
  )
  return made._generate_and_score_completions([{'prompt': 'p'}] * 2 * B)


GRPO = {'beta': 0.0, 'use_vllm': False, 'vllm_importance_sampling_correction': False}


@pytest.mark.parametrize('scale', ['group', 'none', 'batch'])
def test_group_advantages(scale):
  """'batch' is the group's mean taken off, then one spread for all (with another epsilon and N - 1)."""
  want = scored(trl.GRPOTrainer, scale_rewards=scale, **GRPO)['advantages'].numpy()
  got = advantages.group_advantages(jnp.asarray(REWARDS), normalize=scale == 'group')
  if scale == 'batch':
    got = got / (np.std(REWARDS, ddof=1) + 1e-4)
  np.testing.assert_allclose(got.reshape(-1), want, rtol=1e-5, atol=2e-6 if scale == 'none' else 1e-3)
  np.testing.assert_allclose(got[0], want[:B], rtol=1e-5)
  assert not np.any(got[1])  # theirs are rounding, blown up
  assert np.abs(want[B:]).max() < 1e-3


@pytest.mark.parametrize('beta', [0.0, 0.2])
def test_leave_one_out(beta):
  """With the KL to the reference, k1 and summed, taken off the reward."""
  want = scored(trl.RLOOTrainer, beta=beta, normalize_advantages=False)['advantages'].numpy()
  kl_BT = policy.kl(*map(jnp.asarray, (OLD, REF, MASK)), kind='k1')
  rewards_BT = advantages.kl_rewards(jnp.asarray(REWARDS.reshape(-1)), kl_BT, jnp.asarray(MASK), kl_coef=beta)
  got = advantages.leave_one_out(jnp.sum(rewards_BT, axis=-1).reshape(2, B))
  np.testing.assert_allclose(got.reshape(-1), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('level', ['token', 'sequence'])
def test_importance_weights(level):
  """TRL's for answers of vLLM, and the loss that they weigh."""
  vllm = {'use_vllm': True, 'vllm_importance_sampling_correction': True}
  mode = {'vllm_importance_sampling_mode': f'{level}_truncate', 'vllm_importance_sampling_clip_max': 1.2}
  mode |= {'vllm_importance_sampling_clip_min': None}
  ready = scored(trl.GRPOTrainer, scale_rewards='group', beta=0.0, **vllm, **mode)
  want = ready['importance_sampling_ratio'].numpy() * MASK
  got = policy.importance_weights(*map(jnp.asarray, (OLD, LOGP, MASK)), level=level, cap=1.2)
  np.testing.assert_allclose(got, want, rtol=2e-6)
  assert np.any(want == np.float32(1.2)) and np.any((want > 0) & (want < 1.19))

  def theirs(logp):
    made = grpo_trainer('dapo', weigh=True)
    made._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros(logp.shape), None)
    inputs = answers(MASK, advantages=ADV, old_per_token_logps=OLD)
    return made._compute_loss(None, inputs | {'importance_sampling_ratio': ready['importance_sampling_ratio']})

  compare(lambda logp: ours_grpo(logp, 'token', weight=got), theirs, LOGP)


# --- distillation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('temperature', [1.0, 2.5])
@pytest.mark.parametrize('beta', [0.0, 0.1, 0.5, 0.9, 1.0])
def test_generalised_jensen_shannon(beta, temperature):
  from trl.experimental.gkd import GKDTrainer

  teacher = floats(2 * B, T, V, spread=2.0)
  labels = torch.tensor(np.where(MASK > 0, 1, -100))
  how = {'beta': beta, 'temperature': temperature}
  compare(
    lambda student: mean(distill.jensen_shannon(student, *map(jnp.asarray, (teacher, MASK)), **how)),
    lambda student: GKDTrainer.generalized_jsd_loss(student, torch.tensor(teacher), labels, **how),
    floats(2 * B, T, V, spread=2.0),
  )
