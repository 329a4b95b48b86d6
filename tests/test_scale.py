"""The dial: what it sets, what follows a named flag, and that the block outputs stay as the model grows."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import cli, models, program, scale, tree
from jaxlm.config import Data, Optim, Pretrain
from jaxlm.errors import InputError
from jaxlm.models import ModelConfig
from jaxlm.train import optim

SMALL = str(Path(__file__).parents[1] / 'configs/pretrain/small.py')
BASE = Pretrain(
  model=ModelConfig(vocab_size=128, d_model=96, n_layers=4, n_heads=6, n_kv_heads=2, d_ff=256),
  data=Data(seq_len=32, global_batch=16, batch_warmup=('4=10', '8=50')),
  optim=Optim(lr=4e-3, weight_decay=0.2, warmup_steps=20),
  steps=400,
)


def pretraining(capsys, *flags: str) -> tuple[Pretrain, str]:
  """The run that the flags after configs/pretrain/small.py make, and what was printed."""
  config = cli.pretraining([SMALL, *flags])
  return config, capsys.readouterr().out


def tokens(config: Pretrain) -> int:
  return config.steps * config.data.global_batch * config.data.seq_len


def factors(config: Pretrain, field: str) -> dict[str, float]:
  """Path -> what the run's groups make of each leaf."""
  table = optim.read_groups(getattr(config.optim, field), field)
  shapes = jax.eval_shape(lambda: models.init(config.model, jax.random.key(0)))
  return {path: optim.group_factor(table, path) for path, _ in tree.items(shapes)}


def with_optimizer(name) -> Pretrain:
  return dataclasses.replace(BASE, optim=dataclasses.replace(BASE.optim, name=name))


@pytest.mark.parametrize('name', ['adamw', 'muon', 'lion', 'adafactor', 'schedule_free'])
def test_at_its_own_depth_the_base_stays_what_it_is(name):
  base = with_optimizer(name)
  base = dataclasses.replace(base, optim=dataclasses.replace(base.optim, group_lr=('embed=0.5',)))
  assert scale.at_depth(base, 4) == base


def test_without_a_dial_and_at_its_own_depth_a_config_is_itself(capsys):
  alone, printed = pretraining(capsys)
  assert printed == ''
  turned, printed = pretraining(capsys, '--depth', '6')
  assert turned == alone and type(turned) is Pretrain and type(turned.model) is ModelConfig
  assert printed.startswith('depth 6 from 6: width 384') and printed.count('\n') == 1


@pytest.mark.parametrize('depth', [1, 2, 3, 5, 7, 8, 12, 24])
def test_heads_divide_at_every_depth(depth):
  model = scale.shape(BASE.model, depth)
  assert model.n_layers == depth
  assert model.n_heads % model.kv_heads == 0
  assert model.d_model == 16 * model.n_heads and model.head_size == 16
  assert abs(model.d_model / depth - 24) < 24 / depth * 2
  assert model.d_ff % 128 == 0
  alone = dataclasses.replace(BASE.model, n_kv_heads=None)
  assert scale.shape(alone, depth).n_kv_heads is None
  shared = dataclasses.replace(BASE.model, n_experts=5, shared_d_ff=BASE.model.d_ff)
  assert scale.shape(shared, depth).shared_d_ff == model.d_ff and model.shared_d_ff == 0


@pytest.mark.slow(but='muon-0.5')
@pytest.mark.parametrize('name, power', [('adamw', 1.0), ('muon', 0.5), ('lion', 1.0), ('schedule_free', 1.0)])
def test_matrices_learn_by_their_fan_in(name, power):
  wider = scale.at_depth(with_optimizer(name), 8)
  assert (wider.model.d_model, wider.model.d_ff, wider.model.n_kv_heads) == (192, 512, 4)
  matrices = {f'layers/{x}' for x in ('attn/q', 'attn/k', 'attn/v', 'attn/o', 'mlp/gate', 'mlp/up', 'mlp/down')}
  for field, expected in (('group_lr', 2**-power), ('group_decay', 2**power)):
    found = factors(wider, field)
    assert {path for path, x in found.items() if x != 1.0} == matrices
    assert [found[path] for path in matrices] == pytest.approx([expected] * 7)
  assert wider.model.residual_multiplier == 0.5 and wider.model.logits_scaling == 2.0
  assert wider.optim.eps == pytest.approx(BASE.optim.eps / 4)
  program.make_optimizer(wider).init(models.init(wider.model, jax.random.key(0)))  # every pattern is some leaf's


def test_depth_alone_changes_the_residual_alone():
  deeper = scale.transfer(BASE, dataclasses.replace(BASE.model, n_layers=12))
  assert deeper.optim.group_lr == () and deeper.optim.group_decay == ()
  assert deeper.model.residual_multiplier == pytest.approx(1 / 3) and deeper.model.logits_scaling == 1.0


def test_each_matrix_has_its_own_fan_in():
  """A d_ff that is named grows another way than the width: `down` reads from it, the others do not."""
  named = {'model.d_ff': 1024, 'model.d_model': 192}
  found = factors(scale.at_depth(BASE, 8, named=named), 'group_lr')
  assert found['layers/mlp/down'] == pytest.approx(256 / 1024)
  assert found['layers/mlp/up'] == found['layers/attn/q'] == pytest.approx(0.5)


def test_groups_of_the_base_are_multiplied_in():
  base = dataclasses.replace(BASE, optim=dataclasses.replace(BASE.optim, group_lr=('layers/mlp/*=3', 'embed=0.5')))
  found = factors(scale.at_depth(base, 8), 'group_lr')
  assert [found[p] for p in ('layers/mlp/up', 'layers/attn/q', 'embed')] == pytest.approx([1.5, 0.5, 0.5])


@pytest.mark.slow
def test_the_start_is_the_base_s_in_every_part():
  """Weights of the sub-layers' outputs start as at the base depth, up to the width; logits as at the base width."""
  base = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, tie_embeddings=False))
  big = scale.at_depth(base, 16)
  start = {n: models.init(c.model, jax.random.key(3)) for n, c in (('base', base), ('big', big))}
  rms = {n: {p: float(np.sqrt(np.mean(np.square(x)))) for p, x in tree.items(params)} for n, params in start.items()}
  for path in ('layers/attn/o', 'layers/mlp/down', 'layers/attn/q'):
    assert rms['big'][path] == pytest.approx(rms['base'][path] / 2, rel=0.02)  # 4 x the fan-in
  assert rms['big']['head'] == pytest.approx(rms['base']['head'], rel=0.05)
  assert rms['big']['embed'] == pytest.approx(rms['base']['embed'], rel=0.05)


@pytest.mark.slow
def test_tokens_follow_the_parameters_of_the_layers():
  ratio = lambda config: tokens(config) / scale.parameters(config.model)
  for depth in (2, 6, 8, 12):
    assert ratio(scale.at_depth(BASE, depth)) == pytest.approx(ratio(BASE), rel=0.05)
    assert ratio(scale.at_depth(BASE, depth, tokens_per_parameter=20)) == pytest.approx(20, rel=0.02)
  other = dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, vocab_size=4096))
  assert (
    scale.parameters(other.model) == scale.parameters(BASE.model) == 4 * (96 * 96 * 2 * 4 // 3 + 3 * 96 * 256 + 192)
  )


def test_the_batch_moves_by_doublings_and_the_rest_with_it():
  seen = set()
  for depth in (1, 2, 4, 8, 16, 24):
    config = scale.at_depth(BASE, depth)
    more, longer = config.data.global_batch / 16, config.steps / 400
    seen.add(more)
    wanted = 0.4 * math.log2(tokens(config) / tokens(BASE))
    assert math.log2(more) == round(wanted) or abs(math.log2(more) - wanted) < 0.51
    assert config.optim.lr == pytest.approx(4e-3 * more**0.5)
    assert config.optim.lr * config.optim.weight_decay * config.steps == pytest.approx(4e-3 * 0.2 * 400)
    assert config.optim.warmup_steps == int(20 * longer)
  assert {0.25, 1, 2, 4} <= seen and all(math.log2(x).is_integer() for x in seen)
  odd = dataclasses.replace(BASE, data=Data(seq_len=32, global_batch=6))
  assert scale.at_depth(odd, 1).data.global_batch == 3  # twice halved it would be no whole number


def test_the_batch_s_warm_up_keeps_its_shares():
  config = scale.at_depth(BASE, 8)
  longer = config.steps / 400
  assert config.data.global_batch == 32
  assert config.data.batch_warmup == (f'8={round(10 * longer)}', f'16={round(50 * longer)}')
  few = scale.at_depth(BASE, 4, named={'data.global_batch': 2})
  assert few.data.batch_warmup == ('1=400',) and few.steps == 3200  # half a row is none


def test_a_named_batch_is_followed(capsys):
  plain, _ = pretraining(capsys, '--depth', '12')
  named, printed = pretraining(capsys, '--depth', '12', '--data.global-batch', '64')
  assert plain.data.global_batch == 32 and named.data.global_batch == 64
  assert tokens(named) == pytest.approx(tokens(plain), rel=1e-3)
  assert named.optim.lr == pytest.approx(3e-3 * 2)
  assert named.optim.lr * named.optim.weight_decay * named.steps == pytest.approx(3e-3 * 0.1 * 2000)
  assert named.optim.warmup_steps == int(50 * named.steps / 2000)
  assert named.model == plain.model and named.optim.group_lr == plain.optim.group_lr
  assert 'batch 64' in printed
  same, _ = pretraining(capsys, '--depth', '12', '--data.global_batch=32')
  assert same == plain


def test_a_named_width_is_followed(capsys):
  named, _ = pretraining(capsys, '--depth', '12', '--model.d-model', '512')
  model = named.model
  assert (model.n_layers, model.d_model, model.n_heads, model.kv_heads, model.d_ff) == (12, 512, 8, 2, 1408)
  assert factors(named, 'group_lr')['layers/attn/q'] == pytest.approx((384 / 512) ** 0.5)
  assert factors(named, 'group_lr')['layers/mlp/down'] == pytest.approx((1024 / 1408) ** 0.5)
  assert model.logits_scaling == pytest.approx(512 / 384) and model.residual_multiplier == 0.5
  assert tokens(named) / scale.parameters(model) == pytest.approx(0.868, rel=1e-2)
  kept, _ = pretraining(capsys, '--depth', '12', '--model.d-model', '384')  # the config's own, and yet named
  assert kept.model.d_model == 384 and kept.optim.group_lr == ()


@pytest.mark.slow
def test_named_heads_are_followed(capsys):
  nine, _ = pretraining(capsys, '--depth', '12', '--model.n-heads', '9')
  assert (nine.model.n_heads, nine.model.d_model, nine.model.kv_heads) == (9, 576, 3)
  four, _ = pretraining(capsys, '--depth', '12', '--model.n-kv-heads', '5')
  assert four.model.kv_heads == 5 and four.model.n_heads % 5 == 0
  alone, _ = pretraining(capsys, '--depth', '12', '--model.n-kv-heads', 'None')
  assert alone.model.n_kv_heads is None and alone.model.n_heads == 12
  smaller, _ = pretraining(capsys, '--depth', '12', '--model.n-heads', '24', '--model.d-model', '768')
  assert smaller.model.head_size == 32 and smaller.model.attention_multiplier == pytest.approx(64**0.5 / 32)


def test_named_steps_rates_and_decay_are_followed(capsys):
  steps, _ = pretraining(capsys, '--depth', '12', '--steps', '16000')
  assert (steps.steps, steps.data.global_batch) == (16000, 64)  # 8 x the steps are 4 x the batch
  assert steps.optim.lr == pytest.approx(3e-3 * 2) and steps.optim.warmup_steps == 400
  assert steps.optim.weight_decay == pytest.approx(0.1 / 16)
  budget, _ = pretraining(capsys, '--depth', '12', '--steps', '16000', '--tokens-per-parameter', '14')
  assert budget.data.global_batch == 256 and budget.steps == 16000
  rate, _ = pretraining(capsys, '--depth', '12', '--optim.lr', '1e-3')
  assert rate.optim.lr == 1e-3 and 1e-3 * rate.optim.weight_decay * rate.steps == pytest.approx(3e-3 * 0.1 * 2000)
  decay, _ = pretraining(capsys, '--depth', '12', '--optim.lr', '1e-3', '--optim.weight-decay', '0.3')
  assert decay.optim.weight_decay == 0.3 and decay.optim.lr == 1e-3
  flags = ['--optim.warmup-steps', '7', '--model.logits-scaling', '3', '--optim.eps', '1e-6', '--model.n-layers', '9']
  others, _ = pretraining(capsys, '--depth', '12', *flags)
  assert (others.optim.warmup_steps, others.model.logits_scaling, others.optim.eps) == (7, 3.0, 1e-6)
  assert others.model.n_layers == 9 and others.model.residual_multiplier == pytest.approx(6 / 9)


def test_a_named_group_comes_before_the_dial_s(capsys):
  named, _ = pretraining(capsys, '--depth', '12', '--optim.group-lr', 'embed=0.5', 'layers/attn/q=1')
  found = factors(named, 'group_lr')
  assert [found[p] for p in ('embed', 'layers/attn/q', 'layers/attn/k')] == pytest.approx([0.5, 1.0, 0.5**0.5])


def test_flags_beside_the_dial_belong_to_the_base(capsys):
  config, _ = pretraining(capsys, '--depth', '12', '--optim.name', 'adamw', '--run', 'r', '--optim.schedule', 'cosine')
  assert (config.run, config.optim.name, config.optim.schedule) == ('r', 'adamw', 'cosine')
  assert factors(config, 'group_lr')['layers/attn/q'] == pytest.approx(0.5)  # by Adam's rule


@pytest.mark.parametrize(
  'flags, message',
  [
    ('--depth 0', 'depth=0 must be at least 1'),
    ('--depth None', 'depth needs a number'),
    ('--tokens-per-parameter 20', '--tokens-per-parameter needs --depth'),
    ('--depth 8 --tokens-per-parameter 0', 'tokens_per_parameter=0.0 must be in (0, inf)'),
    ('--depth 8 --tokens-per-parameter nan', 'tokens_per_parameter=nan must be in (0, inf)'),
    ('--depth 8 --model.d-model 385', 'd_model=385 is not a multiple of n_heads=6'),
    ('--depth 8 --model.d-model 0', 'model.d_model=0 must be at least 1'),
    ('--depth 8 --model.n-heads 0', 'model.n_heads=0 must be at least 1'),
    ('--depth 8 --model.n-heads 9 --model.n-kv-heads 2', 'n_heads=9 is not a multiple of n_kv_heads=2'),
    ('--depth 8 --optim.lr 0', 'optim.lr=0.0 must be in (0, inf)'),
    ('--depth 8 --model.residual-multiplier 0', 'residual_multiplier=0.0 must be in (0, inf)'),
    ('--depth 8 --steps 10 --data.global-batch 8 --tokens-per-parameter 2', 'name two of them'),
  ],
)
def test_what_the_dial_cannot_do_is_one_line(capsys, flags, message):
  assert cli.main(['pretrain', SMALL, *flags.split()]) == 1
  err = capsys.readouterr().err
  assert err.startswith('jaxlm: ') and err.count('\n') == 1 and message in err


def test_a_config_of_another_kind_has_no_dial(tmp_path):
  other = tmp_path / 'other.py'
  other.write_text('from jaxlm.config import Optim\nconfig = Optim()\n')
  with pytest.raises(InputError, match='is a Optim, not a Pretrain'):
    cli.pretraining([str(other), '--depth', '3'])


@pytest.fixture(scope='module')
def benchmark():
  """benchmarks/scale.py as a module."""
  path = Path(__file__).parents[1] / 'benchmarks/scale.py'
  spec = importlib.util.spec_from_file_location('scale_benchmark', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def batch(step: int) -> dict[str, np.ndarray]:
  """Rows that can be learnt: each token is followed by a fixed other one, mostly."""
  rng = np.random.default_rng(step)
  walk = np.cumsum(rng.choice([7, 7, 7, 1], size=(4, 33)), axis=1) % 128
  ones = np.ones((4, 32), np.int32)
  positions = np.broadcast_to(np.arange(32, dtype=np.int32), (4, 32))
  return {
    'tokens': walk[:, :-1].astype(np.int32),
    'targets': walk[:, 1:].astype(np.int32),
    'loss_mask': ones.astype(np.float32),
    'segment_ids': ones,
    'positions': positions,
    'target_bytes': ones,
  }


@pytest.mark.slow
@pytest.mark.parametrize(
  'optimizer, axis, lr', [('adamw', 'width', 4e-3), ('adamw', 'depth', 4e-3), ('muon', 'width', 1e-2)]
)
def test_block_outputs_stay_by_the_dial_and_by_nothing_else(benchmark, optimizer, axis, lr):
  """A small coordinate check: 4 x the size, 8 steps; the full one is `benchmarks/scale.py coordinates`."""
  base = benchmark.base(optimizer, vocab_size=128, n_layers=2, d_model=64, d_ff=128)
  base = dataclasses.replace(base, data=Data(seq_len=32, global_batch=4), optim=dataclasses.replace(base.optim, lr=lr))
  largest = {}
  for rule in ('dial', 'standard'):
    found = benchmark.slopes(base, benchmark.RULES[rule], batch, axis=axis, sizes=(1, 4), seeds=(0, 1), steps=8)
    largest[rule] = {name: float(np.abs(slope).max()) for name, (slope, _) in found.items()}
  assert max(largest['dial'].values()) < 0.07, largest
  assert max(largest['standard'].values()) > 0.12, largest
