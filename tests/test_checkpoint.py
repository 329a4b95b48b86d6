"""Checkpoints: what is acknowledged can be trusted, what is damaged is named, what was interrupted does not count."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import train
from jaxlm.errors import InputError
from jaxlm.train.checkpoint import DIGEST, Checkpoints, retained, verify


def make_state(width: int = 7) -> train.State:
  params = {'w': jnp.arange(3.0 * width).reshape(3, width), 'stack': {'b': jnp.ones((5,))}}
  return train.create_state(params, optax.adamw(1e-2), jax.random.key(11))


def abstract(state: train.State) -> train.State:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same(a, b) -> bool:
  raw = lambda x: np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
  return all(np.array_equal(raw(x), raw(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture
def saved(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'checkpoints')
  state = make_state()
  checkpoints.save(3, state, {'tokenizer': 'abc', 'config': {'steps': 5}})
  checkpoints.wait()
  yield checkpoints, state
  checkpoints.close()


def test_comes_back_bitwise_with_what_was_saved_beside_it(saved):
  checkpoints, state = saved
  assert checkpoints.steps() == [3]
  assert checkpoints.meta(3) == {'tokenizer': 'abc', 'config': {'steps': 5}, 'step': 3}
  restored = checkpoints.restore(3, abstract(state))
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert same(restored, state)
  assert jax.random.key_impl(restored.key) == jax.random.key_impl(state.key)


def test_all_files_are_on_disk_before_the_save_counts(tmp_path, monkeypatch):
  settled, fsync = [], os.fsync

  def recorded(file):
    settled.append(str(Path(f'/proc/self/fd/{file}').readlink()))
    fsync(file)

  monkeypatch.setattr(os, 'fsync', recorded)
  checkpoints = Checkpoints(tmp_path / 'checkpoints')
  checkpoints.save(3, make_state(), {})
  checkpoints.close()
  folder = checkpoints.path(3)
  before = settled[: settled.index(f'{folder / DIGEST}.part')]
  below = [path for path in Path(folder).rglob('*') if path.name != DIGEST]
  assert len(below) > 5 and {str(path) for path in (*below, folder, folder.parent)} <= set(before)


def test_a_relative_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  checkpoints = Checkpoints('run/checkpoints')
  checkpoints.save(1, make_state(), {})
  checkpoints.close()
  assert same(Checkpoints('run/checkpoints').restore(1, abstract(make_state())), make_state())


def test_parameters_alone(saved):
  checkpoints, state = saved
  params = checkpoints.restore(3, {'params': abstract(state).params}, partial=True)
  assert same(params, {'params': state.params})


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  state = {'x': jnp.arange(2_000_003.0)}
  expected = np.array(state['x'])
  like = abstract(state)
  checkpoints.save(1, state, {})
  for _ in range(3):
    state = jax.jit(lambda s: {'x': s['x'] * 0.5 - 1.0}, donate_argnums=0)(state)
  checkpoints.close()
  np.testing.assert_array_equal(Checkpoints(tmp_path).restore(1, like)['x'], expected)


def test_keeps_the_newest(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep_last=2)
  for step in (1, 5, 9, 13):
    checkpoints.save(step, make_state(), {})
  checkpoints.close()
  assert checkpoints.steps() == [9, 13]
  assert sorted(p.name for p in tmp_path.iterdir()) == ['00000009', '00000013']


def files(path):
  return sorted(p for p in Path(os.fspath(path)).rglob('*') if p.is_file() and p.name != DIGEST)


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'delete', 'add'])
def test_damage_to_any_file_is_named(saved, damage):
  checkpoints, state = saved
  folder = checkpoints.path(3)
  assert verify(folder) == []
  for i in range(len(files(folder))):
    file = files(folder)[i]
    before = file.read_bytes()
    if damage == 'flip' and before:
      file.write_bytes(before[:-1] + bytes([before[-1] ^ 4]))
    elif damage == 'truncate' and before:
      file.write_bytes(before[: len(before) // 2])
    elif damage == 'delete':
      file.unlink()
    else:
      file = file.with_name('foreign')
      file.write_text('x')
    name = str(file.relative_to(os.fspath(folder)))
    with pytest.raises(InputError, match=name.replace('.', r'\.')):
      checkpoints.restore(3, abstract(state))
    file.unlink(missing_ok=True)
    if file.name != 'foreign':
      file.write_bytes(before)
  assert same(checkpoints.restore(3, abstract(state)), state)


def test_a_damaged_digest_is_named(saved):
  checkpoints, state = saved
  (checkpoints.path(3) / DIGEST).write_text('{')
  with pytest.raises(InputError, match='digest.json'):
    checkpoints.restore(3, abstract(state))


def test_an_interrupted_save_does_not_count_and_is_cleared(saved):
  checkpoints, state = saved
  checkpoints.save(8, state, {})
  checkpoints.wait()
  (checkpoints.path(8) / DIGEST).unlink()
  (checkpoints.directory / '00000009.orbax-checkpoint-tmp').mkdir()
  assert checkpoints.steps() == [3]
  checkpoints.save(8, state, {})
  checkpoints.wait()
  assert checkpoints.steps() == [3, 8]
  assert sorted(p.name for p in checkpoints.directory.iterdir()) == ['00000003', '00000008']


def test_what_a_killed_deletion_left_is_removed(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep_last=9)
  for step in (1, 2, 3, 4):
    checkpoints.save(step, make_state(), {})
  checkpoints.close()
  (checkpoints.path(1) / DIGEST).unlink()  # killed behind this, or, with step 2, before
  checkpoints = Checkpoints(tmp_path, keep_last=2)
  checkpoints.tidy()
  assert sorted(p.name for p in tmp_path.iterdir()) == ['00000003', '00000004']


def test_another_shape_is_refused_by_name(saved):
  checkpoints, _ = saved
  with pytest.raises(InputError, match=r'params/w is \(3, 7\) in the checkpoint and \(3, 11\) in this config'):
    checkpoints.restore(3, abstract(make_state(width=11)))


def test_a_failed_save_is_raised_and_older_steps_stay(saved):
  checkpoints, state = saved
  checkpoints.save(4, state, {'bad': {1, 2}})  # a set is no JSON
  with pytest.raises(TypeError, match='set'):
    checkpoints.wait()
  assert checkpoints.steps() == [3]
  assert json.loads((checkpoints.path(3) / DIGEST).read_text())


# Orbax closes its event loop at a save's first error, and TensorStore may still call back into it for another array
@pytest.mark.filterwarnings('ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning')
def test_a_full_disk_costs_the_save_and_its_space_comes_back(disk):
  said, free = [], lambda: shutil.disk_usage(disk).free
  checkpoints = Checkpoints(disk / 'checkpoints', say=said.append)
  state = {'x': jax.random.normal(jax.random.key(0), (100_000,)), 'y': jnp.arange(7)}
  checkpoints.save(1, state, {})
  checkpoints.wait()
  for number, room in enumerate((0, 8192, 50_000, 300_000, 380_000), 1):  # refused in the first folder, ..., the digest
    filler = disk / 'filler'
    filler.write_bytes(bytes(free() - room))
    before = free()
    checkpoints.save(2, state, {})
    with pytest.raises(OSError, match='step 2 could not be saved: No space left on device'):
      checkpoints.wait()
    assert checkpoints.failed == len(said) == number
    assert free() == before
    filler.unlink()
  assert checkpoints.steps() == [1] and verify(checkpoints.path(1)) == []
  filler.write_bytes(bytes(free()))
  checkpoints.save(2, state, {})
  time.sleep(0.5)
  filler.unlink()
  checkpoints.save(3, state, {})  # what came before was told, and stands in nobody's way
  checkpoints.close()
  assert checkpoints.steps() == [1, 3]


def test_rows_that_cannot_be_written_fail_the_save(saved):
  checkpoints, state = saved

  def refused():
    raise OSError(errno.EDQUOT, 'Disk quota exceeded', 'metrics.jsonl')

  checkpoints.save(4, state, {}, first=refused)
  with pytest.raises(OSError, match='step 4 could not be saved: Disk quota exceeded'):
    checkpoints.wait()
  checkpoints.wait()
  assert checkpoints.steps() == [3]


def test_what_stays():
  scores = {2: 3.0, 4: 1.0, 6: None, 8: 2.0, 10: 1.0, 12: None}
  assert retained(scores, last=2, every=0, best=0) == {10, 12}
  assert retained(scores, last=1, every=4, best=0) == {4, 8, 12}
  assert retained(scores, last=1, every=0, best=2) == {4, 10, 12}
  assert retained(scores, last=0, every=0, best=1) == {10, 12}  # of equal scores the newer; the newest always stays
  assert retained({}, last=3, every=2, best=1) == set()


def test_the_best_stays_through_saves(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=1)
  for step, score in ((1, 3.0), (2, 2.0), (3, 2.5), (4, None)):
    checkpoints.save(step, make_state(), {'score': score})
  checkpoints.close()
  assert checkpoints.steps() == [2, 4]


def damage(checkpoints, step):
  target = max(files(checkpoints.path(step)), key=lambda p: p.stat().st_size)
  content = target.read_bytes()
  target.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])
  return target.name


def test_a_damaged_newest_step_is_named_and_the_one_before_used(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  for step in (1, 2, 3):
    checkpoints.save(step, make_state(), {})
  checkpoints.wait()
  assert checkpoints.newest_sound(print) == 3
  names, said = [damage(checkpoints, 2), damage(checkpoints, 3)], []
  assert checkpoints.newest_sound(said.append) == 1
  assert checkpoints.steps() == [1]
  assert checkpoints.path(3).exists()
  assert all(name in line for name, line in zip(reversed(names), said, strict=True))
  checkpoints.save(2, make_state(), {})  # trained again up to there
  checkpoints.close()
  assert checkpoints.steps() == [1, 2]
  assert checkpoints.newest_sound(said.append) == 2


def test_no_sound_step_is_an_error_and_not_a_fresh_start(saved):
  checkpoints, _ = saved
  damage(checkpoints, 3)
  with pytest.raises(InputError, match='no checkpoint is sound: .*00000003'):
    checkpoints.newest_sound(print)
  assert checkpoints.steps() == [3]
