"""The host loop, the rows it writes, and the page made of them, without a model."""

import itertools
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import masked, models, report, train, tree
from jaxlm.console import Training, clock
from jaxlm.errors import InputError
from jaxlm.loops.train import evaluate, fit
from jaxlm.masked import Max, Sum
from jaxlm.train import metrics


def quadratic():
  """A state and step that pull one number towards the batch."""
  optimizer = optax.sgd(0.1)
  state = train.create_state({'x': jnp.zeros(())}, optimizer, jax.random.key(0))

  def loss_fn(params, batch, key):
    return masked.total((params['x'] - batch) ** 2, jnp.ones(batch.shape)), {}

  return state, jax.jit(train.make_train_step(loss_fn, optimizer))


def run(steps, log_every, hooks=(), slow=0.0):
  rows, (state, step) = [], quadratic()

  def batches():
    while True:
      time.sleep(slow)
      yield jnp.ones((3,))

  state = fit(
    step,
    state,
    ahead(batches()),
    steps=steps,
    log=lambda n, row: rows.append((n, row)),
    log_every=log_every,
    hooks=hooks,
  )
  return state, rows


def ahead(batches):
  """Batches that know of no state."""
  return lambda state: next(batches)


def test_logs_its_steps_in_order_and_the_last_one():
  state, rows = run(7, 3)
  assert [n for n, _ in rows] == [3, 6, 7]
  assert int(state.step) == int(state.cursor) == 7
  assert rows[0][1]['loss'] == pytest.approx(0.8**4)  # the loss of step 3, x having moved twice by 0.2 of the way


def test_hooks_come_at_their_multiples_after_the_rows_and_at_the_end():
  events = []
  hooks = ((2, lambda n, s: events.append(('two', n, int(s.step)))), (0, lambda n, s: events.append(('end', n, 0))))
  state, step = quadratic()
  log = lambda n, row: events.append(('row', n, 0))
  fit(step, state, ahead(itertools.repeat(jnp.ones((3,)))), steps=5, log=log, hooks=hooks)
  assert events == [
    ('row', 1, 0), ('row', 2, 0), ('two', 2, 2), ('row', 3, 0), ('row', 4, 0), ('two', 4, 4), ('row', 5, 0),
    ('two', 5, 5), ('end', 5, 0),
  ]  # fmt: skip


def test_time_of_hooks_is_not_the_steps_and_waiting_is_counted():
  _, rows = run(6, 1, hooks=((3, lambda n, s: time.sleep(0.3)),), slow=0.02)
  assert all(row['step_time'] < 0.25 for _, row in rows[1:])
  assert all(0 <= row['data_wait'] <= row['step_time'] for _, row in rows)
  assert sum(row['data_wait'] for _, row in rows) >= 6 * 0.02  # every wait is in some row, none twice
  assert sum(row['data_wait'] for _, row in rows) < 6 * 0.04


def test_evaluate_adds_and_does_not_divide():
  batches = [(1.0, 1.0), (8.0, 3.0)]
  fn = lambda params, b: {'mean': Sum(jnp.asarray(b[0]), jnp.asarray(b[1])), 'top': Max(jnp.asarray(b[0]))}
  assert evaluate(fn, None, batches) == {'mean': Sum(9.0, 4.0), 'top': Max(8.0)}
  assert evaluate(fn, None, []) == {}


def test_flops_match_the_shapes_of_the_parameters():
  for cfg in (
    models.ModelConfig(vocab_size=128, d_model=24, n_layers=3, n_heads=6, n_kv_heads=2, d_ff=37, tie_embeddings=False),
    models.ModelConfig(vocab_size=256, d_model=20, n_layers=2, n_heads=5, head_dim=6, d_ff=31, gated_mlp=False),
  ):
    shapes = jax.eval_shape(lambda cfg=cfg: models.init(cfg, jax.random.key(0)))
    matrices = sum(x.size for path, x in tree.items(shapes['layers']) if x.ndim == 3)
    matrices += cfg.d_model * cfg.vocab_size
    scores = 2 * 2 * cfg.n_heads * cfg.head_size * 11 * cfg.n_layers  # q k^T and the weighted values, 11 keys
    assert metrics.flops_per_token(cfg, 11) == 3 * (2 * matrices + scores)


def test_matmul_rate_is_a_rate():
  assert 1e8 < metrics.matmul_rate(256, 2) < 1e15


def test_rows_after_the_step_are_cut_and_a_torn_line_is_left_out(tmp_path):
  writer = metrics.Writer(tmp_path)
  for step in (1, 2, 3):
    writer.row(step, {'train/loss': 1.0 / step})
    writer.sample(step, 'p', f't{step}')
  writer.row(4, {'train/loss': math.nan})
  writer.close()
  assert metrics.read_rows(tmp_path / 'metrics.jsonl')[-1]['train/loss'] is None
  with (tmp_path / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 5, "train/lo')
  assert len(metrics.read_rows(tmp_path / 'metrics.jsonl')) == 4
  writer = metrics.Writer(tmp_path, 2)
  writer.row(3, {'train/loss': 9.0})
  writer.close()
  assert [(r['step'], r['train/loss']) for r in metrics.read_rows(tmp_path / 'metrics.jsonl')] == [
    (1, 1.0), (2, 0.5), (3, 9.0),
  ]  # fmt: skip
  assert [r['text'] for r in metrics.read_rows(tmp_path / 'samples.jsonl')] == ['t1', 't2']
  assert all(json.loads(line)['time'] > 0 for line in (tmp_path / 'metrics.jsonl').read_text().splitlines())


def test_report_escapes_what_a_model_writes_and_shows_baselines(tmp_path):
  writer = metrics.Writer(tmp_path)
  for step in range(1, 6):
    row = {'train/loss': 3.0, 'train/bits_per_byte': 2.0, 'train/grad_norm': 1.0, 'perf/tokens_per_s': 10.0}
    writer.row(step, row)
  writer.row(5, {'eval/loss': 2.5, 'eval/bits_per_byte': 1.875})
  writer.sample(5, 'नमस्ते ', '<script>alert(1)</script>')
  writer.close()
  (tmp_path / 'facts.json').write_text('{"held-out bits per byte": {"xz -9": 2.25, "this model": 1.875}}')
  page = report.write(tmp_path).read_text()
  assert '<script' not in page
  assert '&lt;script&gt;alert(1)' in page
  assert 'नमस्ते' in page
  assert '1.875' in page
  assert page.count('<svg') == 4


def test_report_of_an_empty_folder(tmp_path):
  with pytest.raises(InputError, match='no metrics.jsonl'):
    report.write(tmp_path)


def test_time_left_is_the_rate_so_far(capsys, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(time, 'monotonic', lambda: now[0])
  row = {'train/loss': 1, 'train/bits_per_byte': 1, 'train/grad_norm': 1, 'train/lr': 1, 'train/skipped': 0}
  shown = Training(101)
  for step in (1, 11, 21):  # 3 seconds a step, the first left out
    shown.step(step, row | {'perf/tokens_per_s': 5, 'perf/data_wait': 0})
    now[0] += 30
  lines = capsys.readouterr().out.splitlines()
  assert lines[-1].startswith('step 21/101') and lines[-1].endswith('left 4:00')
  assert (clock(61), clock(3661)) == ('1:01', '1:01:01')


def test_numpy_rows_are_not_changed_by_reading(tmp_path):
  writer = metrics.Writer(tmp_path)
  writer.row(1, {'a': np.float32(0.1)})
  writer.close()
  assert np.float32(metrics.read_rows(tmp_path / 'metrics.jsonl')[0]['a']) == np.float32(0.1)
