"""The life that README tells, from text to a model that was tuned, rewarded and judged: its commands, on tiny sizes."""

import io
import json
import re
import shutil

import pytest
from pages import PAGES, ROOT, commands

from jaxlm import cli
from jaxlm.data import sources
from jaxlm.loops import bases
from jaxlm.quickstart import SAMPLE

MODEL = {'d-model': '32', 'n-layers': '1', 'n-heads': '2', 'n-kv-heads': '1', 'd-ff': '48'}
TRAINED = {
  '--data.seq-len': '64',
  '--data.global-batch': '8',
  '--optim.warmup-steps': '1',
  '--steps': '4',
  '--watch.eval-every': '0',
  '--watch.eval-batches': '1',
  '--watch.save-every': '4',
  '--watch.sample-every': '0',
}
TUNED = TRAINED | {'--epochs': '0'}
RL = TRAINED | {'--prompts': '4', '--samples': '2', '--held-out': '2', '--max-new-tokens': '4'}
SMALLER = {
  'tokenizer': {'--vocab-size': '384'},
  'pretrain': TRAINED | {f'--model.{name}': value for name, value in MODEL.items()},
  # with its own epochs and warm-up, which are for more rows than these
  'sft': {flag: size for flag, size in TRAINED.items() if flag not in ('--steps', '--optim.warmup-steps')},
  'preference': TUNED,
  'reward': TUNED | {'--folds': '2'},
  'rl': RL,
  'distill': TUNED,
  'generate': {'--max-new-tokens': '4'},
  'chat': {'--max-new-tokens': '4'},
  'inspect': {'--seq-len': '64'},
}
COLOURS = ('red', 'green', 'blue', 'gold', 'grey', 'pink')
PAIRS = [(a, b) for a in COLOURS for b in COLOURS if a != b]


def of(title, page='README.md'):
  """The commands under a heading of a page."""
  text, found = PAGES[page].read_text(), []
  (part,) = re.findall(rf'^##+ {title}\n(.*?)(?=^##|\Z)', text, re.DOTALL | re.MULTILINE)
  for script in re.findall(r'^```bash\n(.*?)^```', part, re.DOTALL | re.MULTILINE):
    found += commands(script)
  assert found
  return found


def done(command, **more):
  """Runs a command with its sizes made small, and says which one failed."""
  sizes = SMALLER.get(command[0], {}) | more
  if '--init' in command:  # the base says what the model is
    sizes = {flag: size for flag, size in sizes.items() if not flag.startswith('--model.')}
  kept, skip = [], False
  for word in command:
    if not skip and word not in sizes:
      kept.append(word)
    skip = word in sizes
  kept += [word for pair in sizes.items() for word in pair]
  assert cli.main(kept) == 0, kept


def rows(path, found):
  path.write_text('\n'.join(map(json.dumps, found)) + '\n')


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A folder with what the reader brings along: text, questions, preferences, prompts."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('sys.stdin', io.StringIO('Hello?\n/exit\n'))
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  (tmp_path / 'my_text').mkdir()
  for i, document in enumerate(sources.documents((str(SAMPLE / 'play.jsonl'),))):
    (tmp_path / 'my_text' / f'{i}.txt').write_text(document.text[:2000])
  rows(tmp_path / 'pairs.jsonl', [{'question': f'Say {a}, {b}.', 'answer': f'{a} {b}'} for a, b in PAIRS])
  rows(tmp_path / 'medical.jsonl', [{'text': f'{a} fever with {b} spots. ' * 20} for a, b in PAIRS])
  rows(tmp_path / 'dpo.jsonl', [{'prompt': f'Say {a}.', 'chosen': f'{a} {b}', 'rejected': b} for a, b in PAIRS])
  rows(tmp_path / 'prompts.jsonl', [{'prompt': f'Say {a}, {b}.', 'answer': a} for a, b in PAIRS])
  return tmp_path


@pytest.mark.slow
def test_own_text(home, capsys):
  for command in of('Your own text'):
    done(command)
  assert bases.newest('runs/answers').step == 4
  assert (home / 'runs/answers/report.html').exists()
  assert 'Once upon a time' in capsys.readouterr().out
  for command in of('Another domain', 'docs/tuning.md'):
    done(command)
  shutil.copytree('runs/mine', 'runs/big')
  done(of('A student and its teacher')[0])
  assert [bases.newest(run).step for run in ('runs/medical', 'runs/small')] == [4, 4]


@pytest.mark.slow
def test_a_model_of_others(home):
  """The same from a model that knows a template's tokens, as imported ones do; nothing is downloaded."""
  prepare = ('prepare', 'my_text/', '--tokenizer', 'data/pairs/tokenizer.json', '--out', 'data/text')
  (first, *_), (_, *inspected) = of('Instruction data')[:1], of('Instruction data')[1:]
  tokens = ['tokenizer', 'my_text/', '--out', 'data/tokenizer.json']
  done(tokens)
  done([word.replace('runs/smol', 'data/tokenizer.json') for word in first] + ['--template', 'chatml'])
  done(prepare)
  done(('pretrain', 'configs/pretrain/small.py', '--data.path', 'data/text', '--run', 'runs/smol'))
  shutil.rmtree(home / 'data/pairs')
  done(first)
  for command in inspected:
    done(command)
  for command in of('Tuning a model') + of('Models of others'):
    if command[0] != 'import' and command[1] != 'runs/smol':
      done(command)
  for command in of('Preferences and rewards'):
    done(command)
  sums, ppo, _ = of('Learning from rewards')
  done(sums)
  done(ppo)
  done(of('Which model answers better')[0], **{'--max-new-tokens': '4'})
  for file in (
    'runs/tuned/answers.jsonl',
    'out/merged/config.json',
    'out/adapter/adapter_config.json',
    'domain/config.json',
    'runs/judge/rewards.json',
    'runs/judge/report.html',
  ):
    assert (home / file).exists(), file
  assert (home / 'runs/ppo/winrate.json').exists()
