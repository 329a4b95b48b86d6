"""Warnings of a run that collapses: each on metrics that have it, none on those of a sound run."""

import pytest

from jaxlm.rl import collapse

SOUND = {
  'policy/kl': 0.02,
  'train/policy/entropy': 1.3,
  'reward/equal_groups': 0.4,
  'answers/length': 31.0,
  'answers/truncated': 0.1,
  'train/policy/sampler_gap': 1e-6,
}
BROKEN = {
  'kl': {'policy/kl': 1.7},
  'entropy': {'train/policy/entropy': 0.003},
  'equal': {'reward/equal_groups': 0.97},
  'length': {'answers/length': 80.0, 'answers/truncated': 0.8},  # 2.6 times: told as so many are cut
  'gap': {'train/policy/sampler_gap': 0.3},
}


def test_a_sound_run_is_not_warned_of():
  assert collapse.warnings([SOUND] * 7) == {}
  assert collapse.warnings([{}] * 7) == {} and collapse.warnings([SOUND]) == {}


@pytest.mark.parametrize(
  ('name', 'values'),
  [
    ('length', {'answers/length': 130.0}),  # none is cut
    ('entropy', {'train/policy/entropy': 0.12}),  # a tenth of 1.3, though above 0.05
  ],
)
def test_much_is_told_whatever_else(name, values):
  assert list(collapse.warnings([SOUND] * 7 + [SOUND | values] * 5)) == [name]


BARS = [  # (of which warning, values at first, last values just within the bar, and just beyond it)
  ('kl', {}, {'policy/kl': 0.99}, {'policy/kl': 1.01}),
  ('entropy', {'train/policy/entropy': 0.2}, {'train/policy/entropy': 0.051}, {'train/policy/entropy': 0.049}),
  ('entropy', {'train/policy/entropy': 0.04}, {'train/policy/entropy': 0.021}, {'train/policy/entropy': 0.019}),
  ('entropy', {}, {'train/policy/entropy': 0.131}, {'train/policy/entropy': 0.129}),
  ('equal', {}, {'reward/equal_groups': 0.89}, {'reward/equal_groups': 0.91}),
  ('length', {}, {'answers/length': 123.0}, {'answers/length': 125.0}),
  (
    'length',
    {},
    {'answers/length': 61.0, 'answers/truncated': 0.8},
    {'answers/length': 63.0, 'answers/truncated': 0.8},
  ),
  (
    'length',
    {},
    {'answers/length': 80.0, 'answers/truncated': 0.49},
    {'answers/length': 80.0, 'answers/truncated': 0.51},
  ),
  ('gap', {}, {'train/policy/sampler_gap': 0.049}, {'train/policy/sampler_gap': 0.051}),
]


@pytest.mark.parametrize(('name', 'first', 'within', 'beyond'), BARS)
def test_bars_are_where_they_are_said_to_be(name, first, within, beyond):
  begun = [SOUND | first] * 7
  assert collapse.warnings(begun + [SOUND | first | within] * 5) == {}
  assert list(collapse.warnings(begun + [SOUND | first | beyond] * 5)) == [name]


def test_five_values_are_looked_at_together():
  far = [SOUND | {'policy/kl': 1.01}]
  assert collapse.warnings([SOUND] * 7 + far * 4) == {} and collapse.warnings(far * 4) == {}
  assert list(collapse.warnings(far * 5)) == ['kl']


@pytest.mark.parametrize('name', BROKEN)
def test_each_collapse_is_told_and_nothing_else(name):
  found = collapse.warnings([SOUND] * 7 + [SOUND | BROKEN[name]] * 5)
  assert list(found) == [name] and len(found[name].splitlines()) == 1


@pytest.mark.parametrize('name', ['kl', 'entropy', 'equal', 'length'])
def test_one_step_is_noise(name):
  almost = {key: (SOUND[key] + value) / 2 for key, value in BROKEN[name].items()} if name != 'entropy' else {}
  assert collapse.warnings([SOUND] * 9 + [SOUND | almost]) == {}


def test_the_target_of_the_distance_is_the_runs_own():
  rows = [SOUND] * 7
  assert list(collapse.warnings(rows, kl_target=0.01)) == ['kl'] and not collapse.warnings(rows, kl_target=0.03)
  assert 'above 0.01' in collapse.warnings(rows, kl_target=0.01)['kl']


def test_a_sampler_that_computes_otherwise_is_told_at_the_first_step():
  assert list(collapse.warnings([SOUND | BROKEN['gap']])) == ['gap']
