"""lm-eval's scores of a model by our adapter against those by its own `hf` backend on the same files, in float32."""

import json

import jax
import numpy as np
import pytest

from jaxlm import cli, interop, models
from jaxlm.data import sources, tokenizer
from jaxlm.errors import InputError
from jaxlm.evals import harness, subject
from jaxlm.models import ModelConfig
from jaxlm.quickstart import SAMPLE

lm_eval = pytest.importorskip('lm_eval', reason="needs pip install -e '.[parity]'")
pytest.importorskip('torch', reason="needs pip install -e '.[parity]'")
pytest.importorskip('transformers', reason="needs pip install -e '.[parity]'")
pytestmark = pytest.mark.filterwarnings('ignore')  # theirs

TASKS = {
  'choices': {
    'output_type': 'multiple_choice',
    'doc_to_text': '{{prompt}}',
    'doc_to_choice': '{{choices}}',
    'doc_to_target': 'answer',
    'fewshot_split': 'train',
    'num_fewshot': 2,
    'metric_list': [{'metric': name} for name in ('acc', 'acc_norm', 'acc_bytes')],
  },
  'continuations': {
    'output_type': 'loglikelihood',
    'doc_to_text': '{{prompt}}',
    'doc_to_target': '{{continuation}}',
    'target_delimiter': '',
    'metric_list': [{'metric': name} for name in ('acc', 'perplexity')],
  },
  'texts': {
    'output_type': 'loglikelihood_rolling',
    'doc_to_text': '',
    'doc_to_target': '{{text}}',
    'metric_list': [{'metric': name} for name in ('word_perplexity', 'byte_perplexity', 'bits_per_byte')],
  },
  'answers': {
    'output_type': 'generate_until',
    'doc_to_text': "{{prompt or 'It'}}",  # of none the hf backend reads nothing but padding
    'doc_to_target': '{{continuation}}',
    'generation_kwargs': {'until': ['\n', 'th'], 'max_gen_toks': 13, 'do_sample': False},
    'metric_list': [{'metric': 'exact_match'}],
  },
}


def cut(text, rng, words):
  """Neighbouring words of a text, with the white space that parts them."""
  parts = text.split(' ')
  at = rng.integers(0, max(1, len(parts) - words))
  return ' '.join(parts[at : at + words])


def rows_of(texts, count, longest, seed=0):
  """Rows for all tasks: prompts with and without white space at their end, too long ones, and none."""
  rng, rows = np.random.default_rng(seed), []
  for i in range(count):
    piece = cut(texts[i % len(texts)], rng, int(rng.integers(4, longest)))
    at = int(rng.integers(len(piece) // 2, len(piece) - 1))
    at = {0: piece.rindex(' ') + 1, 1: piece.rindex(' ')}.get(i % 4, at)  # after and before a space, or in a word
    prompt, said = piece[:at] + {0: ' \n', 5: '  '}.get(i % 7, ''), piece[at : at + 15].rstrip() or 'end'
    others = [cut(texts[(i + j) % len(texts)], rng, int(rng.integers(1, 4)))[:15].strip() or 'x' for j in (1, 2, 3)]
    choices = [*others, said.strip() or 'y']
    order = rng.permutation(4).tolist()
    row = {
      'prompt': '' if i % 11 == 3 or not prompt.strip() else prompt,
      'continuation': said,
      'text': piece,
      'index': i,
    }
    rows.append(row | {'choices': [choices[j] for j in order], 'answer': order.index(3)})
  return rows


def furnish(home, count, longest, asked):
  """A folder with the tasks' YAML files and their rows; of some the model itself says what follows."""
  texts = [d.text for d in sources.documents([str(SAMPLE / f'{name}.jsonl') for name in ('novel', 'hindi', 'code')])]
  for split, seed in (('train', 1), ('test', 0)):
    rows = rows_of(texts, count, longest, seed)
    for row, own in zip(rows, subject.continued(asked, [row['prompt'] for row in rows[:8]], new=3), strict=False):
      row['continuation'] = own.rstrip() or row['continuation']
    (home / f'{split}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  for name, task in TASKS.items():
    data = {'data_files': {split: str(home / f'{split}.jsonl') for split in ('train', 'test')}}
    data['cache_dir'] = str(home / 'cache')
    whole = {'task': f'local_{name}', 'dataset_path': 'json', 'dataset_kwargs': data, 'test_split': 'test'} | task
    (home / f'{name}.yaml').write_text(json.dumps(whole))  # JSON is YAML
  return home


def theirs(folder, home, names, templated=False, **more):
  from lm_eval.tasks import TaskManager

  manager = TaskManager(include_path=str(home), include_defaults=False)
  given = {'pretrained': str(folder), 'dtype': 'float32'}
  how = {'device': 'cpu', 'batch_size': 4, 'task_manager': manager, 'apply_chat_template': templated}
  return lm_eval.simple_evaluate('hf', given, names, **how, **more)


class Silent:
  def __init__(self, what):
    del what

  def __enter__(self):
    return None

  def __exit__(self, *_):
    pass


def agree(ours, want):
  """Every score within 0.1 points (of shares; else 1e-3 of the value), each log-likelihood to 1e-3, texts the same."""
  for task, figures in want['results'].items():
    for name, value in figures.items():
      if isinstance(value, float) and 'stderr' not in name:
        assert ours['results'][task][name] == pytest.approx(value, rel=1e-3, abs=1e-3), (task, name)
    for mine, their in zip(ours['samples'][task], want['samples'][task], strict=True):
      assert mine['arguments'] == their['arguments']
      for a, b in zip(mine['resps'], their['resps'], strict=True):
        a, b = a[0], b[0]
        if isinstance(b, str):
          assert a == b
        elif isinstance(b, float):
          assert a == pytest.approx(b, abs=1e-3)
        else:
          assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1], (task, mine['arguments'])


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  """A random model with a tokenizer that puts a BOS first, as a Hugging Face folder."""
  home = tmp_path_factory.mktemp('tiny')
  texts = [d.text for d in sources.documents([str(SAMPLE / 'novel.jsonl')])]
  vocabulary = tokenizer.train(texts, 401)
  sizes = {'d_model': 42, 'n_layers': 3, 'n_heads': 3, 'd_ff': 53, 'max_seq_len': 61}
  cfg = ModelConfig(vocab_size=vocabulary.vocab_size, **sizes)
  params = jax.tree.map(lambda x: 1.5 * x, models.init(cfg, jax.random.key(3)))
  interop.export(interop.Model(cfg, params, vocabulary, None, {}), home / 'model')
  return home / 'model'


@pytest.fixture(scope='module')
def tasks(tiny, tmp_path_factory):
  return furnish(tmp_path_factory.mktemp('tasks'), 53, 40, subject.opened(str(tiny), batch=8))


@pytest.mark.slow
def test_smollm2_scores_as_by_the_hf_backend(smollm2, tmp_path):
  """It puts no token before a text, and names one for where nothing stands before; prompts in its template too."""
  interop.export(interop.load(str(smollm2)), tmp_path / 'model')
  asked, names = subject.opened(str(tmp_path / 'model'), batch=8), [f'local_{name}' for name in TASKS]
  home = furnish(tmp_path, 20, 12, asked)
  for templated in (False, True):
    ours = harness.evaluate(asked, names, include=str(home), shots=0, templated=templated, bar=Silent)
    agree(ours, theirs(tmp_path / 'model', home, names, templated, num_fewshot=0))
    names = ['local_answers']


@pytest.mark.slow
def test_a_tiny_model_scores_as_by_the_hf_backend(tiny, tasks):
  names = [f'local_{name}' for name in TASKS]
  ours = harness.evaluate(subject.opened(str(tiny), batch=7), names, include=str(tasks), bar=Silent)
  agree(ours, theirs(tiny, tasks, names))
  assert {row['resps'][0][0][1] for row in ours['samples']['local_continuations']} == {True, False}
  lengths = {len(row['resps'][0][0]) for row in ours['samples']['local_answers']}
  assert len(lengths) > 3  # some answers end before their room does


@pytest.mark.slow
def test_the_command_writes_tables_and_rows(tiny, tasks, tmp_path, capsys):
  other = tmp_path / 'other'
  other.symlink_to(tiny)
  command = ['eval', str(tiny), '--lm-eval', 'local_texts,local_choices', '--include_path', str(tasks), '--limit', '5']
  assert cli.main([*command, '--against', str(other), '--out', str(tmp_path / 'out.json')]) == 0
  out = capsys.readouterr().out
  assert 'bits_per_byte' in out and f'{tiny} - {other} ' in out
  found = json.loads((tmp_path / 'out.json').read_text())[str(tiny)]['results']
  assert found['local_texts']['byte_perplexity,none'] > 1 and (tmp_path / 'out.md').exists()
  lines = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert len(lines) == 20 and {line['task'] for line in lines} == {'local_texts', 'local_choices'}


def test_a_task_that_is_not_there_is_named(tiny, tasks):
  with pytest.raises(InputError, match="no task 'local_none'"):
    harness.evaluate(subject.opened(str(tiny)), ['local_none'], include=str(tasks), bar=Silent)
