"""The command line as a newcomer meets it: help, devices, and one clear line for whatever is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm import __main__, cli, stages
from jaxlm.errors import InputError


def run(capsys, *args: str) -> tuple[int, str, str]:
  try:
    code = cli.main(args)
  except SystemExit as e:
    code = e.code
  out, err = capsys.readouterr()
  return code, out, err


def one_line(capsys, *args: str) -> str:
  """The single line that a refused command prints, on a non-zero exit."""
  code, _, err = run(capsys, *args)
  err = ''.join(line for line in err.splitlines(True) if not line.startswith('devices: '))
  assert code == 1
  assert err.count('\n') == 1
  assert err.startswith('jaxlm: ')
  return err


def test_help_is_quick_and_lists_every_verb():
  times = []
  for _ in range(5):
    start = time.perf_counter()
    out = subprocess.run([sys.executable, '-m', 'jaxlm', '--help'], capture_output=True, text=True, check=True).stdout
    times.append(time.perf_counter() - start)
  assert min(times) < 0.5
  assert all(f'\n  {verb} ' in out for verb in cli.VERBS)


def test_unknown_verb_names_the_nearest(capsys):
  assert 'did you mean `jaxlm pretrain`' in one_line(capsys, 'pretrian')


@pytest.mark.parametrize('verb', list(cli.VERBS))
def test_every_verb_explains_itself(capsys, verb):
  code, out, _ = run(capsys, verb, '--help')
  assert code == 0
  assert f'usage: jaxlm {verb}' in out


@pytest.mark.parametrize('stage', list(stages.ABOUT))
def test_help_of_a_stage_is_its_own_and_lists_short_names(capsys, monkeypatch, stage):
  monkeypatch.setenv('COLUMNS', '200')
  _, out, _ = run(capsys, stage, '--help')
  assert stages.ABOUT[stage] in out and 'A pre-training run' not in out
  listed = dict(re.findall(r'--(\S+) is --(\S+)', out))
  first = {'sft': None, 'reward': 'folds', 'preference': 'loss', 'rl': 'algo', 'distill': 'teacher'}[stage]
  assert list(listed)[:1] == [first] * bool(first)
  for short, long in listed.items():  # each is read as the long one: what is wrong with it is said of that
    _, *texts = run(capsys, stage, f'--{short}')
    assert f'--{long}' in ''.join(texts)


def test_text_too_small_for_what_was_asked_is_told(capsys, tmp_path):
  source, vocabulary = tmp_path / 'a.jsonl', tmp_path / 't.json'
  source.write_text(''.join(json.dumps({'text': f'{i} abcab'}) + '\n' for i in range(5)))
  train = 'tokenizer', str(source), '--val-fraction', '0', '--out', str(vocabulary), '--vocab-size'
  out = run(capsys, *train, '3000')[1].splitlines()
  assert out[-1].startswith('fewer tokens than --vocab-size 3000: ') and int(out[-2].split()[1]) < 300
  assert run(capsys, *train, '260')[1].splitlines()[-1].startswith(f'{vocabulary}: 260 tokens')
  prepare = 'prepare', str(source), '--tokenizer', str(vocabulary), '--out', str(tmp_path / 'out'), '--val-fraction'
  assert (
    run(capsys, *prepare, '0.001')[1]
    .splitlines()[-1]
    .startswith('nothing is held out: val_fraction is 0.001, none of 5 documents fell into it: ')
  )
  assert all('nothing is held out' not in run(capsys, *prepare, share)[1] for share in ('0', '0.5'))


def test_unknown_flag_names_the_nearest(capsys):
  code, out, err = run(capsys, 'pretrain', '--optim.lrr', '1')
  assert code == 2
  assert '--optim.lr' in out + err


def test_devices_line_refuses_an_idle_accelerator(tmp_path, monkeypatch):
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  device = tmp_path / 'accel0'
  assert cli.devices_line({str(device): 'tpu'}).startswith('devices: 8 x cpu')
  device.touch()
  with pytest.raises(InputError, match=r"pip install -e '\.\[tpu\]'"):
    cli.devices_line({str(device): 'tpu'})
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert cli.devices_line({str(device): 'tpu'}).startswith('devices: 8 x cpu')


def test_a_missing_plugin_names_its_pip_line(tmp_path):
  env = os.environ | {'JAX_PLATFORMS': 'cuda'}
  command = [sys.executable, '-m', 'jaxlm', 'quickstart', '--run', str(tmp_path / 'run')]
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == 1
  assert "pip install -e '.[cuda]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize('verb, goes_on', [('sft', True), ('pretrain', True), ('quickstart', True), ('eval', False)])
def test_interrupted_runs_say_that_they_go_on(verb, goes_on, monkeypatch, capsys):
  def interrupted(args):
    raise KeyboardInterrupt

  monkeypatch.setitem(cli.VERBS, verb, interrupted)
  assert cli.main([verb]) == 130
  assert ('goes on from the last saved step' in capsys.readouterr().err) == goes_on


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """A tokenizer and prepared data made by the verbs, from one JSONL and one text file."""
  home = tmp_path_factory.mktemp('cli')
  text = home / 'text'
  text.mkdir()
  lines = [{'text': f'{i}: the quick brown fox jumps over {i * i} lazy dogs. नमस्ते दुनिया ' * 3} for i in range(97)]
  (text / 'a.jsonl').write_text('\n'.join(json.dumps(line, ensure_ascii=False) for line in lines))
  (text / 'b.txt').write_text('Plain text is one document. ' * 50)
  assert cli.main(['tokenizer', str(text), '--out', str(home / 'tokenizer.json'), '--vocab-size', '300']) == 0
  prepare = ['prepare', str(text), '--tokenizer', str(home / 'tokenizer.json'), '--out', str(home / 'data')]
  assert cli.main([*prepare, '--val-fraction', '0.1']) == 0
  return home


SIZES = [
  '--steps', '3',
  '--model.d-model', '32',
  '--model.n-layers', '2',
  '--model.n-heads', '2',
  '--model.d-ff', '48',
  '--data.seq-len', '16',
  '--data.global-batch', '8',
  '--optim.warmup-steps', '1',
  '--watch.sample-tokens', '3',
  '--watch.log-every', '1',
]  # fmt: skip


@pytest.fixture(scope='module')
def trained(prepared):
  """A run of three steps."""
  run = prepared / 'run'
  assert cli.main(['pretrain', '--run', str(run), '--data.path', str(prepared / 'data'), *SIZES]) == 0
  return run


@pytest.mark.slow
def test_the_verbs_in_a_row(trained, capsys, tmp_path):
  rows = [json.loads(line) for line in (trained / 'metrics.jsonl').read_text().splitlines()]
  assert {'train/loss', 'train/grad_norm', 'train/lr', 'perf/tokens_per_s', 'perf/mfu'} <= rows[0].keys()
  assert {'eval/loss', 'eval/bits_per_byte'} <= rows[-1].keys()
  assert any(path.name.startswith('events.') for path in trained.iterdir())
  code, out, _ = run(capsys, 'generate', str(trained), '--prompt', 'the quick', '--max-new-tokens', '5', '--seed', '3')
  assert code == 0
  assert out.startswith('the quick')
  again = run(capsys, 'generate', str(trained), '--prompt', 'the quick', '--max-new-tokens', '5', '--seed', '3')
  assert again[1] == out
  greedy = ['generate', str(trained), '--prompt', 'the quick', '--max-new-tokens', '9', '--temperature', '0']
  code, out, _ = run(capsys, *greedy)
  for draft in ('lookup', str(trained)):
    assert run(capsys, *greedy, '--draft', draft)[1] == out
  more = out.removeprefix('the quick').strip()
  stopped = run(capsys, *greedy, '--stop', more[2], '--min-p', '0.1', '--repetition-penalty', '1.0')[1]
  assert stopped.strip('\n') == out[: out.index(more[2], len('the quick'))].strip('\n')
  code, out, _ = run(capsys, 'report', str(trained))
  assert code == 0
  page = (trained / 'report.html').read_text()
  assert out.strip() == str(trained / 'report.html')
  code, out, _ = run(capsys, 'report', str(trained), '--out', str(tmp_path / 'one.html'))
  assert code == 0 and out.strip() == str(tmp_path / 'one.html') and (tmp_path / 'one.html').read_text() == page
  assert page.count('<svg') >= 5
  assert 'http' not in page.replace('http://www.w3.org', '').replace('http://purl.org', '').replace(
    'http://creativecommons.org', ''
  ).replace('https://matplotlib.org', '')
  assert '<script' not in page


@pytest.mark.slow
def test_a_run_says_what_happened_what_it_held_and_what_it_read(trained, capsys, tmp_path):
  timeline = [json.loads(line) for line in (trained / 'timeline.jsonl').read_text().splitlines()]
  assert [(one['what'], one['step']) for one in timeline] == [
    ('start', 0), ('evaluation', 3), ('samples', 3), ('save', 3),
  ]  # fmt: skip
  assert all(one['seconds'] > 0 for one in timeline[1:]) and timeline == sorted(timeline, key=lambda one: one['time'])
  rows = [json.loads(line) for line in (trained / 'metrics.jsonl').read_text().splitlines()]
  assert 0.05 < rows[0]['perf/host_gib'] < 100 and rows[0]['data/epochs'] > 0  # what JAX alone takes, and no more
  facts = json.loads((trained / 'facts.json').read_text())
  kinds = facts['training tokens by kind']
  assert len(kinds) == 2 and sum(kinds.values()) == facts['data']['train'] and all(kinds.values())
  again = tmp_path / 'again'
  shutil.copytree(trained, again)
  code, out, _ = run(capsys, 'report', str(trained), str(again), '--out', str(tmp_path / 'both.html'))
  assert code == 0 and out.strip() == str(tmp_path / 'both.html')
  assert '<h1>2 runs</h1>' in (tmp_path / 'both.html').read_text()


def test_bad_text(capsys, tmp_path, prepared):
  tokenizer = ['--tokenizer', str(prepared / 'tokenizer.json'), '--out', str(tmp_path / 'out')]
  empty = tmp_path / 'empty.txt'
  empty.write_text(' \n')
  assert 'empty.txt' in one_line(capsys, 'prepare', str(empty), *tokenizer)
  latin = tmp_path / 'latin.txt'
  latin.write_bytes('fine\ncaf\xe9'.encode('latin-1'))
  assert 'latin.txt:2' in one_line(capsys, 'prepare', str(latin), *tokenizer)
  shape = tmp_path / 'shape.jsonl'
  shape.write_text('{"text": "good"}\n{"txt": "bad"}\n')
  assert 'shape.jsonl:2' in one_line(capsys, 'prepare', str(shape), *tokenizer)
  assert 'nowhere' in one_line(capsys, 'tokenizer', str(tmp_path / 'nowhere'))
  assert not (tmp_path / 'out' / 'prepared.json').exists()


def test_data_that_is_not_prepared(capsys, tmp_path):
  assert 'jaxlm prepare' in one_line(capsys, 'pretrain', '--data.path', str(tmp_path), '--run', str(tmp_path / 'run'))


@pytest.mark.slow
def test_configs_that_do_not_hold_together(capsys, tmp_path, prepared):
  bad = tmp_path / 'bad.py'
  bad.write_text('from jaxlm.config import Optim, Pretrain\nconfig = Pretrain(optim=Optim(learning=1))\n')
  line = one_line(capsys, 'pretrain', str(bad))
  assert "Optim has no field 'learning'" in line
  bad.write_text('from jaxlm.config import Pretrain\nconfig = Pretrain(stepz=1)\n')
  assert "did you mean 'steps'" in one_line(capsys, 'pretrain', str(bad))
  bad.write_text('x = 1\n')
  assert 'defines no `config' in one_line(capsys, 'pretrain', str(bad))
  bad.write_text('x = = 1\n')
  assert 'bad.py:1' in one_line(capsys, 'pretrain', str(bad))
  assert 'no such config' in one_line(capsys, 'pretrain', str(tmp_path / 'none.py'))
  data = ['--data.path', str(prepared / 'data'), '--run', str(tmp_path / 'run')]
  assert 'is not a multiple of n_heads=5' in one_line(capsys, 'pretrain', *data, *SIZES, '--model.n-heads', '5')
  assert 'global_batch=9' in one_line(capsys, 'pretrain', *data, *SIZES, '--data.global-batch', '9')
  assert 'mesh' in one_line(capsys, 'pretrain', *data, *SIZES, '--mesh.tensor', '3')
  assert 'warmup_steps' in one_line(capsys, 'pretrain', *data, *SIZES, '--optim.warmup-steps', '7')
  assert 'vocab_size=99 is less' in one_line(capsys, 'pretrain', *data, *SIZES, '--model.vocab-size', '99')
  larger = ['--model.vocab-size', '999', '--steps', '1', '--optim.warmup-steps', '0']  # as published models have it
  assert run(capsys, 'pretrain', *data, *SIZES, *larger)[0] == 0


@pytest.mark.parametrize(
  'text, message',
  [
    ("Pretrain(optim=Optim(name='sgd'))", "optim: name='sgd' is not"),
    ("Pretrain(steps='100')", "'100'"),
    ("Pretrain(optim={'lr': 1})", "optim={'lr': 1} is not Optim"),
    ("Pretrain(optim=Optim(lr='fast'))", "lr='fast' is not float"),
    ("Pretrain(model=ModelConfig(norm='batchnorm'))", "norm='batchnorm'"),
    ('Pretrain(steps=True)', 'steps=True is not int'),
    ('Pretrain(seeds)', "NameError: name 'seeds'"),
    ('__import__("no_such_module")', 'ModuleNotFoundError'),
    ('Pretrain(data=Data(seq_len=0))', 'seq_len=0 must be at least 1'),
  ],
)
def test_config_values_of_the_wrong_kind(capsys, tmp_path, text, message):
  bad = tmp_path / 'bad.py'
  lines = 'from jaxlm.config import Data, Optim, Pretrain\nfrom jaxlm.models import ModelConfig\n'
  bad.write_text(f'{lines}config = {text}\n')
  line = one_line(capsys, 'pretrain', str(bad))
  assert message in line and 'bad.py' in line


@pytest.mark.slow
def test_no_prompts_means_no_samples_and_the_last_step_is_saved(capsys, tmp_path, prepared):
  flags = ['--data.path', str(prepared / 'data'), '--run', str(tmp_path / 'run'), *SIZES]
  code, _, err = run(capsys, 'pretrain', *flags, '--watch.prompts')
  assert code == 0, err
  assert (tmp_path / 'run' / 'checkpoints' / '00000003' / 'digest.json').exists()
  learned = ['--model.positions', 'learned', '--model.max-seq-len', '16', '--watch.sample-tokens', '64']
  assert 'positions' in one_line(capsys, 'pretrain', *flags, *learned, '--run', str(tmp_path / 'other'))


def test_a_run_that_does_not_fit_the_folder_loses_nothing(capsys, tmp_path, prepared, trained):
  before = {p: p.read_bytes() for p in trained.rglob('*') if p.is_file()}
  other = tmp_path / 'other'
  text = [str(prepared / 'text')]
  assert cli.main(['tokenizer', *text, '--out', str(tmp_path / 't.json'), '--vocab-size', '310']) == 0
  assert cli.main(['prepare', *text, '--tokenizer', str(tmp_path / 't.json'), '--out', str(other)]) == 0
  capsys.readouterr()
  run_flags = ['--run', str(trained), *SIZES]
  assert 'another tokenizer' in one_line(capsys, 'pretrain', *run_flags, '--data.path', str(other))
  again = ['prepare', f'{prepared}/text', '--tokenizer', f'{prepared}/tokenizer.json', '--out', str(tmp_path / 'less')]
  assert cli.main([*again, '--val-fraction', '0.5']) == 0  # the same tokenizer, another split of the same text
  capsys.readouterr()
  assert 'on other data' in one_line(capsys, 'pretrain', *run_flags, '--data.path', str(tmp_path / 'less'))
  wide = ['--data.path', str(prepared / 'data'), '--model.d-model', '64']
  assert 'params/embed is (384, 32)' in one_line(capsys, 'pretrain', *run_flags, *wide)
  assert {p: p.read_bytes() for p in trained.rglob('*') if p.is_file()} == before


def test_a_damaged_checkpoint_is_named_and_stays(capsys, prepared, trained):
  target = next(p for p in (trained / 'checkpoints' / '00000003').rglob('*') if p.is_file() and p.stat().st_size > 9999)
  good = target.read_bytes()
  target.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
  try:
    flags = ['--run', str(trained), '--data.path', str(prepared / 'data'), *SIZES, '--steps', '5']
    assert target.name in one_line(capsys, 'pretrain', *flags)
    assert target.name in one_line(capsys, 'generate', str(trained))
  finally:
    target.write_bytes(good)


@pytest.mark.slow
def test_numbers_out_of_range(capsys, tmp_path, prepared):
  data = ['--data.path', str(prepared / 'data'), '--run', str(tmp_path / 'run')]
  for flag, value in (
    ('--steps', '0'),
    ('--data.seq-len', '0'),
    ('--data.global-batch', '0'),
    ('--compute.accum', '0'),
  ):
    name = flag[2:].replace('-', '_')
    assert f'{name}={value} must be at least 1' in one_line(capsys, 'pretrain', *data, *SIZES, flag, value)
  for flag, value in (
    ('--optim.lr', 'nan'),
    ('--optim.lr', '-0.001'),
    ('--optim.lr', 'inf'),
    ('--optim.clip-norm', '-1.0'),
    ('--optim.weight-decay', '-0.1'),
    ('--optim.final-ratio', '-0.1'),
    ('--optim.decay-fraction', '1.5'),
    ('--optim.b1', '1.0'),
    ('--optim.b2', '-0.5'),
    ('--watch.keep-last', '-1'),
    ('--watch.keep-every', '-1'),
    ('--watch.keep-best', '-1'),
    ('--watch.most-rewinds', '-1'),
    ('--watch.spike', '-2.0'),
    ('--watch.spike', '0.5'),
    ('--watch.eval-batches', '0'),
    ('--model.norm-eps', '-1.0'),
    ('--model.rope-theta', '0.0'),
    ('--z-loss', '-1.0'),
  ):
    name = flag[2:].replace('-', '_')
    assert f'{name}={value} must be ' in one_line(capsys, 'pretrain', *data, *SIZES, flag, value)
  assert 'batch=0 must be' in one_line(capsys, 'eval', 'somewhere', '--batch', '0')
  assert 'seq_len=0 must be' in one_line(capsys, 'eval', 'somewhere', '--seq-len', '0')
  prepare = ['prepare', 'x.txt', '--tokenizer', 't.json', '--out', str(tmp_path / 'out')]
  assert 'max_bad=-1 must be' in one_line(capsys, *prepare, '--max-bad', '-1')
  assert not (tmp_path / 'run').exists() and not (tmp_path / 'out').exists()
  assert 'loss_chunks=7' in one_line(capsys, 'pretrain', *data, *SIZES, '--compute.loss-chunks', '7')
  assert "remat 'foo'" in one_line(capsys, 'pretrain', *data, *SIZES, '--compute.remat', 'foo')
  learned = ['--model.positions', 'learned', '--model.max-seq-len', '8']
  assert 'max_seq_len=8' in one_line(capsys, 'pretrain', *data, *SIZES, *learned)
  for flags in (
    '--temperature -1',
    '--temperature nan',
    '--top-k 0',
    '--top-p 0',
    '--min-p 2',
    '--max-new-tokens 0',
    '--max-new-tokens 99999999999',
    '--top-k 99999999999',
    '--seed 9999999999999999999999',
    '--repetition-penalty 0',
  ):
    assert 'must be' in one_line(capsys, 'generate', 'somewhere', *flags.split())


@pytest.mark.slow
def test_data_that_were_damaged_are_named_before_or_in_training(capsys, tmp_path, prepared):
  def refused(way, pattern):
    data = tmp_path / way
    shutil.copytree(prepared / 'data', data)
    path = next((data / 'records').glob(pattern))
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] if way == 'cut' else raw[:200] + bytes(b ^ 1 for b in raw[200:]))
    if way == 'gone':
      path.unlink()
    line = one_line(capsys, 'pretrain', '--data.path', str(data), '--run', str(tmp_path / f'run-{way}'), *SIZES)
    assert line.startswith(f'jaxlm: {data}') and 'run `jaxlm prepare` again' in line
    assert f'{path.relative_to(data)} ' + ('is missing' if way == 'gone' else 'has changed') in line

  for way in ('cut', 'flipped', 'gone'):
    refused(way, 'tokens-train*')
  refused('info', 'dataset_info.json')


def test_a_run_folder_that_cannot_be(capsys, tmp_path, prepared):
  file = tmp_path / 'file'
  file.write_text('x')
  line = one_line(capsys, 'pretrain', '--data.path', str(prepared / 'data'), '--run', str(file), *SIZES)
  assert str(file) in line
  assert file.read_text() == 'x'


def test_an_error_of_an_object_store_names_the_place(capsys, monkeypatch):
  def unreachable(args):
    raise OSError('Cannot connect to host storage.googleapis.com')  # as its client does, without a file's name

  monkeypatch.setitem(cli.VERBS, 'report', unreachable)
  assert one_line(capsys, 'report', 'gs://bucket/run') == (
    'jaxlm: gs://bucket/run: Cannot connect to host storage.googleapis.com\n'
  )


def test_generate_and_report_without_a_run(capsys, tmp_path):
  assert 'no finished checkpoint' in one_line(capsys, 'generate', str(tmp_path))
  assert 'no metrics.jsonl' in one_line(capsys, 'report', str(tmp_path))


@pytest.mark.parametrize('given', [None, 'glibc.malloc.check=0'])
def test_large_pages_are_asked_for_where_they_are_left_to_programs(tmp_path, given):
  """By a program of this name alone: another that calls it would begin again where it is."""
  env = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'}
  env |= {'GLIBC_TUNABLES': given} if given else {}
  mode = Path('/sys/kernel/mm/transparent_hugepage/enabled')
  left = mode.exists() and '[madvise]' in mode.read_text()
  ours = 'from jaxlm import __main__ as m; m.main = lambda: print(m.sys._xoptions) or 0; m.run()'
  code = f'print("begins", flush=True); {ours}'
  for name in ('jaxlm', 'other'):
    (tmp_path / name).write_text(code)
    said = subprocess.run(
      [sys.executable, name, 'x'], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    again = name == 'jaxlm' and left and not given
    assert said.stdout.split() == (['begins', 'begins', "{'jaxlm_again':", 'True}'] if again else ['begins', '{}'])


def test_whose_command_line_it_is():
  ours = __main__.ours
  assert ours(['python', '/bin/jaxlm', 'rl'], ['/bin/jaxlm', 'rl']) and ours(['python', '-m', 'jaxlm'], ['/m.py'])
  assert ours(['python', '-P', '-m', 'jaxlm', 'rl', '-x'], ['/m.py', 'rl', '-x'])
  assert not ours(['python', '-'], ['-']) and not ours(['python', '-c', 'x'], ['-c'])
  assert not ours(['python', '-m', 'ipykernel_launcher', '-f', 'k'], ['/m.py', 'rl'])
  assert not ours(['python', 'mine.py', 'jaxlm', 'rl'], ['jaxlm', 'rl', 'x'])


def test_both_ways_to_call_it(tmp_path):
  installed = Path(sys.executable).parent / 'jaxlm'
  for command in ([str(installed)], [sys.executable, '-m', 'jaxlm']):
    found = subprocess.run([*command, 'pretain'], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 1 and 'did you mean `jaxlm pretrain`?' in found.stderr
