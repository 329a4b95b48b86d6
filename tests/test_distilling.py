"""The stage `distill`: its objective alone, and tiny runs on data and on the student's own answers."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GPT2, LLAMA, randomized
from tiny_run import furnish, saved_state

from jaxlm import cli, distilling, lora, masked, models, program, sharding, tree
from jaxlm import config as configs
from jaxlm.config import Pretrain
from jaxlm.loops import bases, feeds
from jaxlm.losses import distill, lm
from jaxlm.models import Run
from jaxlm.train import metrics, state, step

B, T = 3, 13
TEACHER = dataclasses.replace(GPT2, vocab_size=131)
RNG = np.random.default_rng(71)


def batch_of(lengths=(13, 7, 4)):
  """Rows of one document each, of these lengths, and padding; the last two thirds are learned."""
  tokens = RNG.integers(1, 131, (len(lengths), T + 1))
  n = np.array(lengths)[:, None]
  at = np.arange(T)
  return {
    'tokens': jnp.asarray(np.where(at < n, tokens[:, :-1], 0), jnp.int32),
    'targets': jnp.asarray(np.where(at < n, tokens[:, 1:], 0), jnp.int32),
    'loss_mask': jnp.asarray((at < n) & (at >= n // 3), jnp.float32),
    'segment_ids': jnp.asarray(at < n, jnp.int32),
    'positions': jnp.asarray(np.where(at < n, at, 0), jnp.int32),
    'target_bytes': jnp.asarray((at < n) & (at >= n // 3), jnp.int32),
  }


def objective(student=LLAMA, teacher=TEACHER, *, loss='jensen_shannon', beta=0.3, temperature=1.5, **how):
  apart = distilling.divergence(loss, beta=beta, temperature=temperature)
  return distilling.learn(student, Run(), teacher, Run(), apart, **how)


STUDENT, SHOWN, BATCH = randomized(LLAMA, 0), randomized(TEACHER, 1), batch_of()


def both(loss_fn, batch, params=STUDENT):
  """(value, gradient) of the mean."""
  mean = lambda params: masked.value(loss_fn(params, batch, None)[0])
  return jax.jit(jax.value_and_grad(mean))(params)


def assert_close(got, want):
  """Values, and gradients within 1e-5 of the largest."""
  assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-5)
  most = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want[1]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * most), got[1], want[1])


def test_the_loss_is_the_weighted_sum_of_its_terms():
  batch = BATCH | {'teacher': SHOWN}
  loss, told = objective(alpha=0.7)(STUDENT, batch, None)
  where = {'positions_BT': batch['positions'], 'segment_ids_BT': batch['segment_ids']}
  own, shown = (models.forward(c, p, batch['tokens'], **where)[0] for c, p in ((LLAMA, STUDENT), (TEACHER, SHOWN)))
  apart = distill.jensen_shannon(own, shown, batch['loss_mask'], beta=0.3, temperature=1.5)
  named = lm.next_token(own, batch['targets'], batch['loss_mask'])
  assert float(loss.total) == pytest.approx(float(0.7 * apart.total + 0.3 * named.total), rel=1e-6)
  assert float(loss.weight) == float(batch['loss_mask'].sum()) == float(apart.weight)
  assert float(told['distill/divergence'].total) == pytest.approx(float(apart.total), rel=1e-6)
  assert float(told['distill/nll'].total) == pytest.approx(float(named.total), rel=1e-6)
  own_answers = objective(alpha=0.7)(STUDENT, batch | {'data_mask': jnp.zeros((B, T))}, None)[0]
  assert float(own_answers.total) == pytest.approx(float(0.7 * apart.total), rel=1e-6)


@pytest.mark.slow(but='2')
@pytest.mark.parametrize('chunks', [2, 5])
def test_parts_of_the_sequence_give_the_same(chunks):
  batch = BATCH | {'teacher': SHOWN}
  assert_close(both(objective(alpha=0.6, chunks=chunks), batch), both(objective(alpha=0.6), batch))


def test_parts_of_the_sequence_are_all_that_is_there():
  """Temporaries of the gradient fall with the parts: the logits of both models are the most of them."""
  wide = [dataclasses.replace(cfg, vocab_size=8192) for cfg in (LLAMA, TEACHER)]
  params, shown = (jax.eval_shape(lambda c=c: models.init(c, jax.random.key(0))) for c in wide)
  rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((16, 48), x.dtype), BATCH) | {'teacher': shown}

  def bytes_(chunks):
    loss = objective(*wide, chunks=chunks)
    total = lambda params, batch: loss(params, batch, None)[0].total
    return jax.jit(jax.grad(total)).lower(params, rows).compile().memory_analysis().temp_size_in_bytes

  logits = 16 * 48 * 8192 * 4
  assert bytes_(1) > 2 * logits and bytes_(8) < 1.2 * logits


@pytest.mark.parametrize('loss', ['forward_kl', 'reverse_kl', 'jensen_shannon'])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(loss):
  most = lambda grad: max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grad))
  value, grad = both(objective(LLAMA, LLAMA, loss=loss), BATCH | {'teacher': STUDENT})
  other, wanted = both(objective(LLAMA, LLAMA, loss=loss), BATCH | {'teacher': randomized(LLAMA, 7)})
  # not 0: of both programs each sum may be taken in another order
  assert float(other) > 1e-3 and abs(float(value)) < 1e-4 * float(other)
  assert most(wanted) > 1e-3 and most(grad) < 1e-4 * most(wanted)


def test_the_teacher_gets_no_gradient():
  total = lambda shown: objective(alpha=0.5)(STUDENT, BATCH | {'teacher': shown}, None)[0].total
  assert all(not np.any(g) for g in jax.tree.leaves(jax.grad(total)(SHOWN)))


@pytest.mark.slow
def test_padding_and_packing_change_nothing():
  loss, given = objective(alpha=0.6), {'teacher': SHOWN}
  want = both(loss, BATCH | given)
  wider = {name: jnp.pad(x, ((0, 2), (0, 4))) for name, x in BATCH.items()}
  assert_close(both(loss, wider | given), want)
  twice = {name: jnp.concatenate([x, x]) for name, x in BATCH.items()}
  assert_close(both(loss, twice | given), want)
  first, rest = ({name: x[rows] for name, x in BATCH.items()} for rows in (slice(0, 1), slice(1, 3)))
  packed = {name: jnp.concatenate([x[:1, :7], x[1:, :4]], axis=1) for name, x in rest.items()}
  packed['segment_ids'] = packed['segment_ids'].at[:, 7:].multiply(2)
  parts = [loss(STUDENT, rows | given, None)[0] for rows in (first, packed)]
  whole = loss(STUDENT, BATCH | given, None)[0]
  assert float(sum(part.total for part in parts)) == pytest.approx(float(whole.total), rel=1e-5)
  assert float(sum(part.weight for part in parts)) == float(whole.weight)


def test_a_teacher_with_more_rows_than_tokens():
  """Logits past the smaller vocabulary stand for no token of the tokenizer."""
  bigger = dataclasses.replace(TEACHER, vocab_size=139)
  shown = jax.tree.map(jnp.array, randomized(bigger, 1))
  assert shown['embed'].shape == SHOWN['embed'].shape  # both padded to a multiple of 128
  want, got = (both(objective(LLAMA, cfg), BATCH | {'teacher': shown}) for cfg in (TEACHER, bigger))
  assert_close(got, want)


def config_of(**how):
  given = {'data': configs.Data(seq_len=16, global_batch=8), 'model': LLAMA}
  return Pretrain(**given, distill=configs.Distill(teacher='x', architecture=TEACHER, alpha=0.6), **how)


def rows(mesh_batch):
  rng = np.random.default_rng(3)
  made = {name: rng.integers(1, 100, spec.shape) for name, spec in mesh_batch.items() if name != 'teacher'}
  made |= {name: np.ones((8, 16)) for name in ('loss_mask', 'segment_ids') if name in made}
  made['loss_mask'] *= rng.random((8, 16)) < 0.7
  made['positions'] = np.tile(np.arange(16), (8, 1))
  return made


def stepped(config, mesh):
  mesh = sharding.make_mesh(**mesh, devices=jax.devices()[: int(np.prod(list(mesh.values())))])
  with jax.set_mesh(mesh):
    built = program.build(config, mesh)
    batch = program.put(
      {name: x.astype(built.batch[name].dtype) for name, x in rows(built.batch).items()},
      {name: spec for name, spec in built.batch.items() if name != 'teacher'},
    )
    place = lambda x, spec: jax.device_put(x, spec.sharding)
    batch['teacher'] = jax.tree.map(place, SHOWN, built.batch['teacher'])
    before = jax.tree.map(np.array, batch['teacher'])
    new, told = built.step(built.create(), batch)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, batch['teacher']), before)
    assert jax.tree.structure(new) == jax.tree.structure(built.abstract)
    return jax.tree.map(np.asarray, new.params), {name: float(x) for name, x in told.items()}, new


@pytest.mark.slow
def test_micro_batches_and_meshes_make_the_same_step():
  """The teacher is whole for each micro-batch, laid out on a mesh as a model is, and the optimizer knows none of it."""
  one = {'data': 1, 'fsdp': 1}
  want, told, new = stepped(config_of(), one)
  assert tree.size(new.opt_state) < 2.1 * tree.size(new.params)
  assert not any('teacher' in path for path, _ in tree.items(new))
  cases = (
    (config_of(compute=configs.Compute(accum=4)), one),
    (config_of(compute=configs.Compute(loss_chunks=2)), one),
    (config_of(compute=configs.Compute(accum=2)), {'data': 2, 'fsdp': 1, 'tensor': 1}),
  )
  for config, mesh in cases:
    got, also, _ = stepped(config, mesh)
    assert also['loss'] == pytest.approx(told['loss'], rel=1e-5)
    assert also['grad_norm'] == pytest.approx(told['grad_norm'], rel=1e-4)
    for name, x in tree.items(want):
      np.testing.assert_allclose(dict(tree.items(got))[name], x, atol=3e-5, err_msg=name)


def test_adapters_learn_alone():
  params = lora.init(jax.random.key(4), STUDENT, rank=2, alpha=4.0, where='attention')
  optimizer = optax.sgd(0.1)
  train = jax.jit(step.make_train_step(objective(), optimizer, trainable=lora.is_adapter))
  now = state.create(params, optimizer, jax.random.key(0), trainable=lora.is_adapter)
  new, _ = train(now, BATCH | {'teacher': SHOWN})
  for path, x in tree.items(new.params):
    same = np.array_equal(x, dict(tree.items(params))[path])
    assert same != path.endswith('/b'), path  # at first a learns nothing: b is 0


# --- runs ----------------------------------------------------------------------------------------------------------

SMALL = ('--model.d-model', '48', '--model.n-layers', '2', '--model.n-heads', '2', '--model.d-ff', '65')
QUICK = ('--data.seq-len', '61', '--data.global-batch', '8', '--optim.warmup-steps', '0', '--optim.lr', '3e-3')
QUICK += (
  '--epochs',
  '0',
  '--watch.eval-every',
  '4',
  '--watch.save-every',
  '4',
  '--watch.log-every',
  '1',
  '--watch.sample-every',
  '0',
)
OWN = ('--on-policy', '1', '--rl.max-new-tokens', '9', '--rl.decode-rows', '5')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  home = furnish(tmp_path_factory.mktemp('distill'))
  given = ('--run', str(home / 'base'), '--steps', '40', '--data.global-batch', '8')
  assert cli.main(['pretrain', str(home / 'tiny.py'), *given]) == 0
  found = [{'prompt': f'What is {a} and {b}?', 'response': f'{a} {b}.'} for a in ('red', 'blue') for b in range(17)]
  (home / 'rows.jsonl').write_text('\n'.join(map(json.dumps, found)))
  return home


def ran(home, name, *args, data='data', student=SMALL):
  given = ('--teacher', str(home / 'base'), '--data.path', str(home / data), '--run', str(home / name))
  return cli.main(['distill', *given, '--chat.template', 'plain', *student, *QUICK, *args])


def series(home, name, what):
  return [row[what] for row in metrics.read_rows(home / name / 'metrics.jsonl') if what in row]


def assert_same_runs(home, one, other, step):
  first, second = (saved_state(home / name, step) for name in (one, other))
  jax.tree.map(np.testing.assert_array_equal, first, second)
  for what in ('train/loss', 'eval/loss', 'eval/distill/divergence', 'answers/length'):
    assert series(home, one, what) == series(home, other, what), what


@pytest.mark.slow
def test_a_fresh_student_learns_from_plain_text(home, capsys):
  before = dict(tree.items(bases.read(bases.newest(home / 'base'))[1]))
  how = ('--steps', '24', '--alpha', '0.8', '--loss', 'jensen_shannon', '--beta', '0.3', '--temperature', '1.5')
  assert ran(home, 'text', *how) == 0
  assert 'learns from' in capsys.readouterr().out
  apart, nll = (series(home, 'text', f'train/distill/{name}') for name in ('divergence', 'nll'))
  np.testing.assert_allclose(series(home, 'text', 'train/loss'), 0.8 * np.array(apart) + 0.2 * np.array(nll), rtol=1e-5)
  watched = series(home, 'text', 'eval/distill/divergence')
  assert watched[-1] < 0.8 * watched[0] and len(series(home, 'text', 'eval/bits_per_byte')) == len(watched)
  student = bases.read(bases.newest(home / 'text'))[1]
  assert student['embed'].shape[1] == 48 and 'teacher' not in student
  after = dict(tree.items(bases.read(bases.newest(home / 'base'))[1]))
  assert all(np.array_equal(x, after[path]) for path, x in before.items())
  assert cli.main(['generate', str(home / 'text'), '--prompt', 'The ', '--max-new-tokens', '3']) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
  'how', [(), OWN, ('--on-policy', '0.5', '--alpha', '0.5', *OWN[2:])], ids=['data', 'own', 'half']
)
def test_it_goes_on_bitwise(home, how):
  names = [f'{name}{len(how)}' for name in ('whole', 'parts')]
  for name in names:
    assert ran(home, name, '--steps', '8', *how, data='rows.jsonl') == 0
  newest = bases.newest(home / names[1])
  shutil.rmtree(newest.checkpoints.path(8))
  assert ran(home, names[1], '--steps', '8', *how, data='rows.jsonl') == 0
  assert_same_runs(home, *names, 8)
  told = len(series(home, names[0], 'answers/length'))
  assert (told == 8) if how == OWN else (0 < told < 8) if how else not told


@pytest.mark.slow
def test_adapters_on_a_base_that_is_its_own_teacher(home):
  given = ('--init', str(home / 'base'), '--lora.rank', '3', '--steps', '4', '--optim.lr', '1e-9')
  assert ran(home, 'adapters', *given, data='rows.jsonl', student=()) == 0
  assert max(map(abs, series(home, 'adapters', 'train/loss'))) < 1e-6
  assert max(map(abs, series(home, 'adapters', 'eval/distill/divergence'))) < 1e-6
  assert max(series(home, 'adapters', 'train/grad_norm')) < 1e-5


@pytest.mark.slow
def test_answers_are_those_of_the_student_of_the_moment(home):
  """A batch is what the engine writes with the parameters at hand: others write another one."""
  assert ran(home, 'now', '--steps', '2', *OWN, data='rows.jsonl') == 0
  found = bases.newest(home / 'now')
  config, feed = feeds.open_feed(dataclasses.replace(found.config, epochs=0.0))
  mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
  with jax.set_mesh(mesh):
    built = program.build(config, mesh, groups=feed.groups)
    now, told = built.create(), []
    feed.attach(built, now, lambda line: None)
    after = feed.stream(now, 8, SimpleNamespace(row=lambda step, row: told.append((step, row))))
    batch, other = after(now), after(dataclasses.replace(now, params=jax.tree.map(lambda x: 2.0 * x, now.params)))
    again = after(now)
    rows_ = lambda batch: {name: np.asarray(x) for name, x in batch.items() if name != 'teacher'}
    jax.tree.map(np.testing.assert_array_equal, rows_(batch), rows_(again))
    assert not np.array_equal(batch['tokens'], other['tokens']) and not np.any(batch['data_mask'])
    assert np.sum(batch['loss_mask']) == pytest.approx(8 * told[0][1]['answers/length'])
    prompts = {tuple(feed.prompts[i]['ids'].tolist()) for i in range(len(feed.prompts))}
    for ids, mask in zip(np.asarray(batch['tokens']), np.asarray(batch['loss_mask']), strict=True):
      assert tuple(ids[: int(np.argmax(mask)) + 1].tolist()) in prompts
    new, report = built.step(now, batch)
    assert np.isfinite(report['loss']) and int(new.cursor) == 1


@pytest.mark.slow
def test_bad_input_is_one_line(home, capsys):
  other = furnish_other(home)
  cases = (
    (('--teacher', str(other)), 'has another vocabulary'),
    (('--teacher', str(home / 'nowhere')), 'nowhere'),
    (('--on-policy', '0.5'), 'has no prompts'),
    (('--on-policy', '1.5'), 'on_policy'),
    (('--rl.algo', 'grpo'), 'a run has one stage'),
  )
  for args, why in cases:
    try:
      assert ran(home, 'bad', '--steps', '2', *args) == 1
    except SystemExit as e:
      assert e.code == 2
    told = capsys.readouterr()
    assert why in (told.err.strip().splitlines() or [''])[-1] or why in told.err, (args, told.err)
  assert ran(home, 'bad', '--steps', '2', '--on-policy', '1', '--rl.max-new-tokens', '60', data='rows.jsonl') == 1
  assert 'no room for rl.max_new_tokens=60' in capsys.readouterr().err
  assert cli.main(['distill', '--data.path', str(home / 'data')]) == 1
  assert 'needs --teacher' in capsys.readouterr().err


def furnish_other(home):
  """A run's folder with another tokenizer."""
  from jaxlm.data import tokenizer

  other = home / 'other'
  shutil.copytree(home / 'base', other)
  tokenizer.train(['another text altogether'] * 5, 270).save(other / 'tokenizer.json')
  return other


@pytest.mark.slow
def test_another_teacher_is_refused(home, capsys):
  assert ran(home, 'moved', '--steps', '4') == 0
  assert ran(home, 'moved', '--steps', '6', '--teacher', str(home / 'moved')) == 1
  assert 'is not the teacher that the run began with' in capsys.readouterr().err
