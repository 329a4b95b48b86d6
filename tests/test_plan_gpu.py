"""Plans for GPUs that are not here: machines and GPUs by name, what a program's text says of both, a small step."""

import importlib.util
import json

import pytest
from test_plan import planned

from jaxlm import hlo, topology
from jaxlm.errors import InputError

needs_plugin = pytest.mark.skipif(
  importlib.util.find_spec('jax_cuda13_plugin') is None, reason="needs JAX's CUDA plugin: pip install -e '.[cuda]'"
)


@pytest.mark.parametrize(
  'name, shape', [('h100:8x8', (8, 8)), ('h100-64', (8, 8)), ('h200-4', (1, 4)), ('h100:2x4', (2, 4))]
)
def test_machines_and_gpus_by_name(name, shape):
  found = topology.parse(name)
  assert (found.shape, found.chip.kind) == (shape, 'gpu')


def test_the_limit_is_the_share_that_a_process_takes(monkeypatch):
  monkeypatch.delenv('XLA_PYTHON_CLIENT_MEM_FRACTION', raising=False)
  assert topology.parse('h100-8').limit_gib == pytest.approx(0.75 * 79.1)
  monkeypatch.setenv('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.9')
  assert topology.parse('h100-8').limit_gib == pytest.approx(0.9 * 79.1)
  assert topology.parse('v5e-8').limit_gib == 15.75


def test_gpus_have_no_slices():
  with pytest.raises(InputError, match='GPUs have machines, not slices: h100:2x8'):
    topology.parse('h100-8', slices=2)


def test_without_the_plugin_it_is_one_line(monkeypatch):
  monkeypatch.setattr(topology.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(InputError, match=r"pip install -e '\.\[cuda\]'"):
    topology.devices(topology.parse('h100-8'))


@pytest.mark.parametrize(
  'groups, dcn',
  [
    ('replica_groups={{0,1,2,3},{4,5,6,7}}', False),
    ('replica_groups={{0,4},{1,5},{2,6},{3,7}}', True),
    ('replica_groups=[2,4]<=[8]', False),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', True),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", False),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", True),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x", False),
    ("replica_groups=mesh['a'=8] {'a':(2)4}, x", True),  # parts of an axis are not read: said to be the slower
    ('source_target_pairs={{0,1},{1,2},{2,3},{3,0}}', False),
    ('source_target_pairs={{0,1},{3,4}}', True),
    ('', True),
  ],
)
def test_which_groups_span_machines(groups, dcn):
  text = f'ENTRY %main (p: f32[4]) -> f32[4] {{\n  %g = f32[8]{{0}} all-gather(%p), {groups}, dimensions={{0}}\n}}\n'
  (found,) = hlo.collectives(text, node=4)
  assert found.dcn == dcn and found.total == 32 and not found.overlapped


@pytest.mark.parametrize('between, overlapped', [('%f = f32[4] fusion(%p)', True), ('%b = f32[4] bitcast(%p)', False)])
def test_what_runs_between_start_and_end(between, overlapped):
  lines = ['%s = (f32[4]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[1,2]<=[2]', between]
  lines += ['%d = f32[8]{0} all-gather-done(%s)', '%e = f32[8] fusion(%d)']
  text = 'ENTRY %main (p: f32[4]) -> f32[4] {\n  ' + '\n  '.join(lines) + '\n}\n'
  (found,) = hlo.collectives(text, node=8)
  assert found.overlapped == overlapped and found.total == 32


@needs_plugin
def test_a_small_step_on_two_machines(tmp_path):
  """FSDP inside of a machine and data across, against FSDP over both."""
  found = {}
  for data in ('2', '1'):
    args = ('--topology', 'h100:2x2', '--mesh.data', data, '--json', '--hlo', str(tmp_path / 'text'))
    done = planned(tmp_path, *args)
    assert done.returncode == 0, done.stderr
    found[data] = json.loads(done.stdout.splitlines()[-1])
  assert all(one['fits'] and one['tokens_per_s_bound'] > 0 for one in found.values())
  assert 0 < found['2']['dcn_gib'] < found['1']['dcn_gib']
  assert found['2']['optimizer_gib'] == pytest.approx(2 * found['1']['optimizer_gib'], rel=0.01)
  assert '__cudnn$fmha' in (tmp_path / 'text').read_text()
