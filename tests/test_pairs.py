"""What a pair's loss depends on: its answers, and not where it stands, what is beside it, or on how many devices."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import preferred
import pytest
from conftest import LLAMA, randomized

from jaxlm import lora, models, objectives, sharding, tree
from jaxlm.config import Compute, Data, Lora, Mesh, Optim, Preference, Pretrain
from jaxlm.data import packing
from jaxlm.loops import pairing
from jaxlm.losses import lm
from jaxlm.losses import preference as losses
from jaxlm.models import Run
from jaxlm.program import build, put
from jaxlm.train import state, step

CFG = dataclasses.replace(
  LLAMA, vocab_size=300, max_seq_len=401, d_model=16, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24
)
T = 211
LOSSES = typing.get_args(typing.get_type_hints(Preference)['loss'])  # all that there are


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  home, rows = tmp_path_factory.mktemp('pairs'), preferred.rows(24)
  return {
    'pairs': preferred.folder(home, rows, 'pairs'),
    'labels': preferred.folder(home, preferred.labelled(rows), 'labels'),
  }


@pytest.fixture(scope='module')
def policy():
  """A model with adapters that do something, and a value head."""
  params = lora.init(jax.random.key(0), randomized(CFG), rank=3, alpha=8.0)
  moved = lambda path, x: x + 0.1 if path.endswith('/b') else x
  params = tree.path_map(moved, params)
  return {**params, 'value': jnp.asarray(np.random.default_rng(3).normal(size=16), jnp.float32)}


def stage(name, **how):
  if name == 'reward':
    return objectives.reward(CFG, Run(), center=0.02)
  beta = {'simpo': 2.0}.get(name, 0.3)
  return objectives.preference(CFG, Run(), loss=name, beta=beta, gamma=0.4, **how)


def rows_of(folders, name, seq_len=T, **how):
  unit = {'unit': 'single', 'apart': 1} if name == 'kto' else {}
  return preferred.stream(
    folders['labels' if name == 'kto' else 'pairs'], seq_len, ends=name == 'reward', **unit, **how
  )


def by_hand(name, logps, refs, lengths, margins):
  """The loss of the pairs as the library's function gives it, from sums of each answer alone."""
  c, r = (jnp.asarray(x) for x in logps.T)
  rc, rr = (jnp.asarray(x) for x in refs.T)
  nc, nr = (jnp.asarray(x) for x in lengths.T)
  return {
    'dpo': lambda: losses.dpo(c, r, rc, rr, beta=0.3),
    'ipo': lambda: losses.ipo(c, r, rc, rr, nc, nr, beta=0.3),
    'orpo': lambda: losses.orpo(c, r, nc, nr, beta=0.3),
    'simpo': lambda: losses.simpo(c, r, nc, nr, beta=2.0, gamma=0.4),
    'cpo': lambda: losses.cpo(c, r, nc, beta=0.3),
    'reward': lambda: losses.bradley_terry(c, r, margin_B=jnp.asarray(margins), center=0.02),
  }[name]()


@functools.partial(jax.jit, static_argnames='scored')
def alone(params, ids_BT, learned_BT, scored):
  """Answers each in a row of its own, padded on the right: log-probabilities by a plain forward pass, or scores."""
  if scored:
    last_B = ids_BT.shape[1] - 1 - jnp.argmax(learned_BT[:, ::-1], axis=1)
    values_BT = models.value(params, models.hidden(CFG, params, ids_BT).x_BTD)
    return jnp.take_along_axis(values_BT, last_B[:, None], axis=1)[:, 0]
  logits_BTV, _ = models.forward(CFG, params, ids_BT[:, :-1])
  logp_BT, _ = lm.from_logits(logits_BTV, ids_BT[:, 1:])
  return jnp.sum(jnp.where(learned_BT[:, 1:], logp_BT, 0.0), axis=1)


@pytest.mark.slow(but='dpo')
@pytest.mark.parametrize('name', [*LOSSES, 'reward'])
def test_a_batch_is_its_pairs_alone(folders, policy, name):
  """Against every answer in a forward pass of its own, the reference read without adapters."""
  some = rows_of(folders, name)
  packed = max(range(len(some)), key=lambda i: len(some.units_of(i)))
  numbers = [packed, (packed + 1) % len(some)]
  units = np.concatenate([some.units_of(i) for i in numbers])
  assert len(some.units_of(packed)) >= 2
  segments = [some._segments(int(u)) for u in units]
  ids_BT, learned_BT = (
    jnp.asarray([packing.padded(segment[n], 127, dtype) for pair in segments for segment in pair])
    for n, dtype in enumerate((np.int32, np.bool_))
  )
  both = lambda params, scored=False: np.asarray(alone(params, ids_BT, learned_BT, scored)).reshape(-1, 2)
  logps, refs = both(policy, name == 'reward'), both(lora.base(policy))
  lengths = np.array([[on.sum() for _, on in pair] for pair in segments], np.float32)
  found, metrics = jax.jit(stage(name))(policy, preferred.batch_of(some, numbers), jax.random.key(0))
  assert float(found.weight) == len(units)
  if name == 'kto':
    good = some._labels[units].astype(np.float32)
    kl = losses.kto_baseline(jnp.asarray(logps[:, 1]), jnp.asarray(refs[:, 1]))
    wanted = losses.kto(jnp.asarray(logps[:, 0]), jnp.asarray(refs[:, 0]), jnp.asarray(good), kl, beta=0.3)
    assert float(metrics['kl'].total) == pytest.approx(float(kl) * len(units), rel=1e-4)
  else:
    wanted = by_hand(name, logps, refs, lengths, some._margins[::2][units])
  assert float(found.total) == pytest.approx(float(wanted.total), rel=2e-5)
  if name in ('dpo', 'ipo'):
    gaps = 0.3 * ((logps - refs)[:, 0] - (logps - refs)[:, 1])
    assert float(metrics['rewards/margins'].total) == pytest.approx(gaps.sum(), rel=1e-3, abs=1e-4)
    assert float(metrics['rewards/accuracies'].total) == (gaps > 0).sum()
    assert float(metrics['nll'].total) == pytest.approx(-logps[:, 0].sum(), rel=1e-5)
    assert float(metrics['nll'].weight) == lengths[:, 0].sum()


@pytest.mark.slow(but='1-dpo')
@pytest.mark.parametrize('name', ['dpo', 'kto'])
@pytest.mark.parametrize('chunks', [1, 3])
def test_logits_of_answers_alone_give_the_same(folders, policy, name, chunks):
  some = rows_of(folders, name)
  assert 0 < pairing.placed([some]) < T and some.places >= some.learnt == max(
    int(some[i]['loss_mask'].sum()) for i in range(len(some))
  )
  batch = preferred.batch_of(some, [0, 1, 2])
  picked, rest = tree.split(policy, lora.is_adapter)
  how = stage(name, chunks=chunks)
  fn = jax.jit(jax.value_and_grad(lambda p, batch: how(tree.combine(p, rest), batch, None)[0].total))
  whole = {k: x for k, x in batch.items() if k != 'places'}
  (got, got_grads), (want, want_grads) = fn(picked, batch), fn(picked, whole)
  assert float(got) == pytest.approx(float(want), rel=1e-5)
  for (path, a), (_, b) in zip(tree.items(got_grads), tree.items(want_grads), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()) + 1e-7, err_msg=path)
  made = lambda batch: f'{T}x{CFG.vocab_size}xf32' in fn.lower(picked, batch).as_text()
  assert (made(whole), made(batch)) == (chunks == 1, False)


def elsewhere(some, unit, seq_len, before, after):
  """A row with a unit and others around it, as `PairRows` makes rows, padded to `seq_len`."""
  units = [*before, unit, *after]
  parts = [some._packed(*segment) for u in units for segment in some._segments(u)]
  row = packing.joined(parts, seq_len, some.pad_id)
  row['margins'] = packing.padded(np.repeat(some._margins[::2][units], 2), seq_len, np.float32)
  row['labels'] = packing.padded(np.tile([1, 0], len(units)), seq_len, np.int32)
  return {name: jnp.asarray(x)[None] for name, x in row.items()}


# all but kto, whose baseline is the whole batch's
@pytest.mark.slow(but='reward')
@pytest.mark.parametrize('name', [n for n in (*LOSSES, 'reward') if n != 'kto'])
def test_a_pair_is_worth_the_same_anywhere(folders, policy, name):
  """Alone, behind and before others, in longer rows: with the others alone taken off, loss and gradients stay."""
  some = rows_of(folders, name, 401)
  learns = lambda path, leaf: lora.is_adapter(path, leaf) or path == 'value'
  picked, rest = tree.split(policy, learns)

  @jax.jit
  def found(batch):
    return jax.value_and_grad(lambda p: stage(name)(tree.combine(p, rest), batch, None)[0].total)(picked)

  loss = lambda *where: found(elsewhere(some, *where))
  one, other = int(some.units[0]), int(some.units[1])
  want, other_alone = loss(one, 150, [], []), loss(other, 150, [], [])
  minus = lambda a, b: jax.tree.map(jnp.subtract, a, b)
  for got in (
    loss(one, 401, [], []),
    minus(loss(one, 401, [other], []), other_alone),
    minus(loss(one, 397, [], [other]), other_alone),
  ):
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-4, abs=1e-5)
    for (path, a), (_, b) in zip(tree.items(got[1]), tree.items(want[1]), strict=True):
      np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max()) + 1e-6, err_msg=path)


def config(name, **how):
  preference = Preference(stage='reward' if name == 'reward' else 'preference', loss=name if name in LOSSES else 'dpo')
  data = Data(seq_len=T + 1, packing='best_fit', global_batch=8)
  given = {'lora': Lora(rank=3, alpha=8.0), 'compute': Compute(), 'mesh': Mesh()} | how
  return Pretrain(model=CFG, data=data, optim=Optim(lr=1e-2, warmup_steps=0), steps=3, preference=preference, **given)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['dpo', 'kto', 'reward'])
def test_eight_devices_and_micro_batches_are_one_device(folders, policy, name):
  """Three steps, the rows cut over data and fsdp, heads over tensor, the sequence over a ring."""
  some = rows_of(folders, name, T + 1)
  places = 0 if name == 'reward' else pairing.placed([some])
  batches = [
    {k: np.asarray(v) for k, v in preferred.batch_of(some, [(i + j) % len(some) for j in range(8)]).items()}
    for i in range(3)
  ]
  results = []
  meshes = [{'fsdp': 1}, {'data': 2, 'fsdp': 2, 'tensor': 2}, {'fsdp': 4, 'sequence': 2}]
  for sizes in meshes[: 3 if name == 'dpo' else 2]:
    accum = 2 if len(sizes) > 1 and name != 'kto' else 1  # the baseline of kto is a micro-batch's own
    one = config(name, mesh=Mesh(**sizes), compute=Compute(accum=accum))
    devices = jax.devices()[: 1 if len(sizes) == 1 else 8]
    mesh = sharding.make_mesh(**sizes, devices=devices)
    built = build(one, mesh, places=places if len(sizes) > 1 else 0)
    assert ('places' in built.batch) == bool(places and len(sizes) == 3)  # not where rows are cut over devices
    with jax.set_mesh(mesh):
      now, seen = built.around(jax.device_put(jax.tree.map(jnp.copy, randomized(CFG)), _layout(built))), []
      for batch in batches:
        now, metrics = built.step(now, put(batch, built.batch))
        seen.append([float(metrics[k]) for k in ('loss', 'weight', 'grad_norm', 'rewards/chosen')])
      held = built.evaluate(now.params, put(batches[0], built.held_out))
      seen.append([float(held['loss'].total), float(held['loss'].weight), 0, 0])
    results.append(np.array(seen))
  for other in results[1:]:
    np.testing.assert_allclose(other, results[0], rtol=3e-4, atol=1e-5)
  assert results[0][1, 0] != results[0][0, 0]


def _layout(built):
  return jax.tree.map(lambda x: x.sharding, lora.base({k: v for k, v in built.abstract.params.items() if k != 'value'}))


def test_a_cached_reference_is_the_one_in_the_step(folders, policy):
  some = rows_of(folders, 'dpo')
  fn = jax.jit(objectives.answers(CFG, Run(), scored=False))
  refs = np.full((some.count, 2), np.nan, np.float32)
  for number in range(len(some)):
    first, second = fn(lora.base(policy), preferred.batch_of(some, [number]))
    units = some.units_of(number)
    refs[units] = np.stack([first[: len(units)], second[: len(units)]], 1)
  cached = rows_of(folders, 'dpo', reference=refs)
  batch = preferred.batch_of(cached, [0, 2])
  for name in ('dpo', 'ipo'):
    in_step, _ = jax.jit(stage(name, reference='adapters'))(policy, batch, None)
    kept, _ = jax.jit(stage(name, reference='cached'))(policy, batch, None)
    none, _ = jax.jit(stage(name, reference='none'))(policy, batch, None)
    assert float(kept.total) == pytest.approx(float(in_step.total), rel=1e-5)
    assert abs(float(none.total) - float(in_step.total)) > 1e-2
  assert (
    rows_of(folders, 'dpo', 401, reference=refs)[0]['ref_logps'][1]
    == refs[rows_of(folders, 'dpo', 401).units_of(0)][0, 1]
  )


def test_padded_rows_and_empty_ones_have_no_weight(folders, policy):
  some = rows_of(folders, 'dpo')
  batch = preferred.batch_of(some, [0, 1])
  want, _ = jax.jit(stage('dpo'))(policy, batch, None)
  with_empty = {k: jnp.concatenate([v, jnp.zeros_like(v)]) for k, v in batch.items()}
  got, metrics = jax.jit(stage('dpo'))(policy, with_empty, None)
  assert float(got.weight) == float(want.weight) and float(got.total) == pytest.approx(float(want.total), rel=1e-6)
  assert np.isfinite([float(m.total) for m in metrics.values()]).all()


def test_a_value_head_begins_at_zero_and_learns(folders):
  params = models.with_value(CFG, randomized(CFG))
  assert models.with_value(CFG, params) is params
  learner = optax.adam(1e-2)
  train = jax.jit(step.make_train_step(stage('reward'), learner))
  now, batch = (
    state.create(params, learner, jax.random.key(0)),
    preferred.batch_of(rows_of(folders, 'reward'), [0, 1, 2]),
  )
  losses_ = []
  for _ in range(12):
    now, metrics = train(now, batch)
    losses_.append(float(metrics['loss']))
  there = np.asarray(batch['labels'])[:, ::2] > 0
  margins = np.asarray(batch['margins'])[:, ::2][there]
  assert losses_[0] == pytest.approx(np.log1p(np.exp(margins)).mean(), rel=1e-5) and margins.any()
  assert losses_[-1] < 0.75 * losses_[0] and float(jnp.abs(now.params['value']).max()) > 0
