"""README and docs: commands go through the parser of their verb, blocks are run or compiled, links lead somewhere."""

import ast
import contextlib
import importlib
import io
import json
import re
import shutil
import subprocess
import tomllib

import pytest
import yaml
from pages import PAGES, ROOT, anchors, blocks, calls, commands, flags, links, prose

from jaxlm import arguments, cli, config, scale, stages, topology
from jaxlm.errors import InputError
from jaxlm.rl import algorithms

ALL = [block for page in PAGES for block in blocks(page)]
BASH = [block for block in ALL if block.language == 'bash']
LANGUAGES = {'bash', 'python', 'yaml', 'json', 'toml', 'text', ''}
OWN_TEST = {
  'docs/new-algorithm.md',
  'docs/adding-a-model.md',
  'docs/serving.md',
}  # whose code is run by a test of its own
# what was printed, what others published, what a cloud asks for
OWN_FIGURES = {'docs/log.md', 'docs/quickstart.md', 'docs/comparison.md', 'docs/pods.md'}
STAND_INS = ('my_config.py', 'MY_CONFIG.py')  # configs of the reader's
OTHER_FLAGS = {
  '--xla_gpu_deterministic_ops',
  '--num-nodes',
  '--ntasks-per-node',
  '--gpus-per-task',
  '--signal',
  '--setup_file',
  '--xla_force_host_platform_device_count',
}
OURS = re.compile(r'(?<![\w/.-])((?:jaxlm|configs|tests|benchmarks|docs|notebooks|\.ci)/[\w./*-]+)')


class Understood(Exception):
  """Raised in place of the work, with what the arguments were understood as."""


@pytest.fixture
def parsed(monkeypatch, tmp_path):
  """arguments of `jaxlm` -> what its own parser makes of them; nothing is done. Anything wrong fails."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  for name in STAND_INS:
    shutil.copy(ROOT / 'configs' / 'pretrain' / 'small.py', name)
  real = arguments.parse

  def parse(kind, args, *more):
    found = real(kind, args, *more)
    if kind in (config.Pretrain, scale.Dialled):
      return found  # a verb that trains checks more before it begins
    raise Understood(found)

  def begin(options, *_, **how):
    raise Understood(options)

  monkeypatch.setattr(arguments, 'parse', parse)
  monkeypatch.setattr(stages, '_trained', begin)
  monkeypatch.setattr(stages, '_begun', begin)
  return understood


def understood(args):
  verb, *rest = args
  assert verb in cli.VERBS, f'there is no verb {verb!r}'
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
      if verb == 'plan':
        options, rest = arguments.parse_some(arguments.Plan, rest, 'plan')
        topology.parse(options.topology, options.slices)
        return stages.pretraining(rest)
      if verb == 'inspect':
        options, rest = arguments.parse_some(arguments.Inspect, rest, 'inspect')
        assert options.source.endswith('.py') or not rest, rest
        return stages.pretraining([options.source, *rest]) if rest else options
      cli.VERBS[verb](rest)
  except Understood as found:
    return checked(found.args[0])
  except (InputError, SystemExit) as e:
    pytest.fail(f'jaxlm {" ".join(args)}: {e}\n{said.getvalue()}')
  raise AssertionError(f'{verb} ended before it was stopped')


def checked(options):
  """Names that are looked up when a run begins."""
  if isinstance(options, config.Pretrain) and options.rl.algo and '.py' not in options.rl.algo:
    algorithms.by_name(options.rl.algo)
  return options


def started(block):
  """The commands of a block: of bash as it expands them, of YAML the lists that are one."""
  if block.language == 'bash':
    return commands(block.text)
  found, left = [], [yaml.safe_load(block.text)] if block.language == 'yaml' else []
  while left:
    one = left.pop()
    if isinstance(one, list) and 'jaxlm' in one:
      found.append(one[one.index('jaxlm') + 1 :])
    elif isinstance(one, dict | list):
      left += one.values() if isinstance(one, dict) else one
  return found


COMMANDS = [(block.where, command) for block in ALL for command in started(block)]


@pytest.mark.parametrize('where, command', COMMANDS, ids=[f'{where} {" ".join(c[:2])}' for where, c in COMMANDS])
def test_the_command_is_understood(parsed, where, command):
  parsed(command)


def test_commands_are_found():
  """As many as there are lines that begin with one; those in YAML, behind ssh and behind srun are there too."""
  lines = [line for block in BASH for line in block.text.splitlines() if re.match(r'(\w+=\S+ )*jaxlm ', line)]
  assert len(COMMANDS) >= len(lines) > 60
  of_pods = [command[1] for where, command in COMMANDS if where.startswith('docs/pods.md')]
  assert of_pods.count('configs/pods/llama3_8b_v5e_256.py') == 2 and of_pods.count('MY_CONFIG.py') == 3


@pytest.mark.parametrize(
  'command',
  [
    'jaxlm sft --init a --data.path b --optim.rl 1e-3',  # no such flag
    'jaxlm tokenizer text --out',  # no value
    'jaxlm pretrain configs/pretrain/tiny.py',  # no such config
    'jaxlm pretrain configs/pretrain/small.py --optim.name sgd',  # none of the choices
    'jaxlm pretrain configs/pretrain/small.py --tokens-per-parameter 20',  # without the dial
    'jaxlm rl --init a --data.path b --algo pppo --reward exact:answer',
    'jaxlm distill --init a --data.path b',  # no teacher
    'jaxlm eval a --judge exact:answer',  # nobody to compare with
    'jaxlm plan configs/pretrain/small.py --topology v9-4',
    'jaxlm trian a',
    'srun --wait=60 jaxlm verify a b',
    'ssh host --command="cd ~/x && ~/venv/bin/jaxlm verify --deep a"',
  ],
)
def test_a_wrong_command_is_seen(parsed, command):
  (args,) = commands(command)
  with pytest.raises((pytest.fail.Exception, AssertionError, InputError)):
    parsed(args)


@pytest.mark.parametrize('block', BASH, ids=[block.where for block in BASH])
def test_bash_reads_it(block):
  done = subprocess.run(['bash', '-n'], input=block.text, capture_output=True, text=True)
  assert not done.returncode, done.stderr


@pytest.mark.parametrize('block', ALL, ids=[block.where for block in ALL])
def test_the_block_is_of_its_language(block):
  assert block.language in LANGUAGES, f'{block.where}: {block.language}'
  match block.language:
    case 'python':
      compile(block.text, block.where, 'exec')
    case 'yaml':
      assert isinstance(yaml.safe_load(block.text), dict)
    case 'json':
      [json.loads(line) for line in block.text.splitlines()]
    case 'toml':
      tomllib.loads(block.text)


PYTHON = {page: [b for b in ALL if b.page == page and b.language == 'python'] for page in PAGES}


@pytest.mark.parametrize('page', [page for page, found in PYTHON.items() if found and page not in OWN_TEST])
def test_its_python_runs(page, monkeypatch, tmp_path):
  """All blocks of a page, one after another, as in a notebook."""
  monkeypatch.chdir(tmp_path)
  names = {}
  for block in PYTHON[page]:
    exec(compile(block.text, block.where, 'exec'), names)


def test_pages_with_a_test_of_their_own_have_it():
  for page in OWN_TEST & set(PAGES):
    name = f'test_docs_{page[len("docs/") : -len(".md")].replace("-", "_")}.py'
    assert page.removeprefix('docs/') in (ROOT / 'tests' / name).read_text()


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
  for target in links(page):
    if '://' in target or target.startswith('mailto:'):
      continue
    path, _, anchor = target.partition('#')
    there = (PAGES[page].parent / path).resolve() if path else PAGES[page]
    assert there.exists(), f'{page}: {target}'
    if anchor:
      assert anchor in anchors(str(there.relative_to(ROOT))), f'{page}: {target}'


def test_every_page_is_led_to():
  """From README, by links alone."""
  found, left = set(), ['README.md']
  while left:
    page = left.pop()
    found.add(page)
    there = {(PAGES[page].parent / target.partition('#')[0]).resolve() for target in links(page) if '://' not in target}
    left += [name for name, path in PAGES.items() if path in there and name not in found]
  assert found == set(PAGES)


@pytest.mark.parametrize('page', PAGES)
def test_files_that_are_named_exist(page):
  """Paths into the repository, anywhere on the page; patterns match something."""
  for name in OURS.findall(re.sub(r'https?://\S+', '', PAGES[page].read_text())):
    name = name.rstrip('.')
    assert list(ROOT.glob(name)) if '*' in name else (ROOT / name).exists(), f'{page}: {name}'


@pytest.mark.parametrize('page', PAGES)
def test_names_of_the_package_are_there(page):
  """`jaxlm.sharding.RULES` and the like."""
  for name in re.findall(r'`(jaxlm(?:\.\w+)+)', prose(page)):
    if name.endswith(('.py', '.json')):
      continue
    module, rest = name, []
    while True:
      try:
        found = importlib.import_module(module)
        break
      except ModuleNotFoundError:
        module, _, last = module.rpartition('.')
        rest.insert(0, last)
    for part in rest:
      found = getattr(found, part)


@pytest.mark.parametrize('page', [page for page in PAGES if page != 'docs/log.md'])
def test_flags_in_the_text_are_flags(page):
  """Those in spans of code; and a span that is a command of ours begins with a verb."""
  known = flags() | OTHER_FLAGS
  starts = {f'{flag.partition(".")[0]}.' for flag in known if '.' in flag}
  for span in re.findall(r'`([^`]+)`', prose(page)):
    if re.match(r'(gcloud|pip|python|pytest|srun|on_all) ', span):
      continue
    for flag in re.findall(r'(?<![\w-])--[a-z][\w.-]*', span):
      assert flag in known or flag in starts, f'{page}: {flag} in {span}'
    if found := re.match(r'jaxlm ([a-z]+)\b(?!\.)', span):
      assert found[1] in cli.VERBS, f'{page}: {span}'


def test_scripts_that_are_started_exist():
  for block in BASH:
    for call in calls(block.text):
      if call[0] == 'python' and len(call) > 1 and call[1].endswith('.py'):
        assert (ROOT / call[1]).exists(), f'{block.where}: {call[1]}'


def said():
  """Every text of the package, what is filled in as '\\0', adjacent pieces joined."""
  found = []
  for path in sorted(ROOT.glob('jaxlm/**/*.py')):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.JoinedStr):
        found.append(''.join(part.value if isinstance(part, ast.Constant) else '\0' for part in node.values))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(node.value)
  return found


def test_extras_are_installed_from_a_clone():
  """The package is on no index: pages and messages say `pip install -e '.[EXTRA]'`, of extras that there are."""
  named_there = re.findall(r'^EXTRAS = (.*?^\})', (ROOT / 'setup.py').read_text(), re.DOTALL | re.MULTILINE)
  extras, count = ast.literal_eval(named_there[0]), 0
  for text in [*said(), *(path.read_text() for path in [*PAGES.values(), *ROOT.glob('notebooks/*.py')])]:
    assert not re.search(r"['\"` ]jaxlm\[[\w,-]+\]", text), text
    for named in re.findall(r"pip install [^\n]*?-e '\.\[([^\]\0]+)\]'", text):
      assert set(named.split(',')) <= set(extras), text
      count += 1
  assert count > 30


def test_messages_that_are_quoted_are_said():
  """Tables of what goes wrong: each line's parts between '...' stand in one text of the package."""
  texts, count = said(), 0
  for page, path in PAGES.items():
    for message in re.findall(
      r'^\| `([^`]+)` \| [^|]+ \|$', part_of(path.read_text(), 'What goes wrong'), re.MULTILINE
    ):
      parts = [part.strip(' :(),;') for part in message.split('...')]
      parts = [part for part in parts if len(part) > 3]
      assert parts and any(all(part in text for part in parts) for text in texts), f'{page}: {message}'
      count += 1
  assert count > 60


@pytest.mark.parametrize('page', [page for page in PAGES if page not in OWN_FIGURES])
def test_figures_are_those_of_the_log(page):
  """Decimals and grouped thousands of the text stand in the log too, or in what the quickstart printed."""
  known = PAGES['docs/log.md'].read_text() + PAGES['docs/quickstart.md'].read_text()
  text = re.sub(r'`[^`]*`|\]\([^)]*\)|[Pp]ython 3\.\d+|Llama [\d.]+|Qwen [\d.]+|arXiv:\S+', '', prose(page))
  for figure in re.findall(r'(?<![\w.,])(?:\d[\d,]*\.\d+|\d{1,3}(?:,\d{3})+)(?![\w.])', text):
    assert figure in known, f'{page}: {figure}'


def part_of(text, title):
  """A section of a page; '' where it has none."""
  return (re.findall(rf'^## {title}\n(.*?)(?=^## |\Z)', text, re.DOTALL | re.MULTILINE) or [''])[0]


def test_configs_say_their_commands(parsed):
  """The first lines of every config."""
  found = 0
  for path in sorted(ROOT.glob('configs/*/*.py')):
    said = ast.get_docstring(ast.parse(path.read_text()))
    lines = re.sub(r'\\\n\s*', '', said).splitlines()
    for line in lines:
      if re.match(r'\s*(jaxlm|set) ', line):
        script = 'set -- a=b.jsonl;' + line.partition(' (')[0].split(': peak')[0]
        for command in commands(script):
          parsed(command)
          found += 1
  assert found > 50


@pytest.mark.parametrize('path', sorted(ROOT.glob('notebooks/*.ipynb')), ids=lambda path: path.stem)
def test_notebooks_are_kept_as_they_ran(path):
  """With all outputs, a picture among them, and without an error."""
  cells = [cell for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == 'code']
  outputs = [output for cell in cells for output in cell['outputs']]
  assert all(cell['execution_count'] for cell in cells) and cells
  assert not [output for output in outputs if output['output_type'] == 'error']
  assert any('image/png' in output.get('data', {}) for output in outputs)
