"""Pages of runs: what is said of one, and of several beside each other, from what their folders hold."""

import dataclasses
import html.parser
import json
import re

import pytest

from jaxlm import config, report
from jaxlm.config import Preference, Pretrain, Rl
from jaxlm.errors import InputError
from jaxlm.report import curves, lineage, page, runs
from jaxlm.train import metrics

NOT_CLOSED = {'meta', 'use'}


class Balanced(html.parser.HTMLParser):
  """Fails where a tag is closed that is not the one that is open."""

  def __init__(self):
    super().__init__()
    self.open, self.ids, self.text = [], [], ''

  def handle_starttag(self, tag, attrs):
    self.ids += [value for name, value in attrs if name == 'id']
    if tag not in NOT_CLOSED:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.ids += [value for name, value in attrs if name == 'id']

  def handle_endtag(self, tag):
    if tag not in NOT_CLOSED:
      assert self.open.pop() == tag, tag

  def handle_data(self, data):
    self.text += data


def read(path):
  """A page's source and its text, once it is seen to be whole and to need nothing else."""
  source, seen = path.read_text(), Balanced()
  seen.feed(source)
  assert seen.open == [], seen.open
  bare = source.replace('http://www.w3.org/2000/svg', '').replace('http://www.w3.org/1999/xlink', '')
  assert 'http' not in bare and '<script' not in source and '<link' not in source and '<img' not in source
  assert set(re.findall(r'url\(#(.*?)\)', source)) <= set(seen.ids)
  assert 'fe01' not in source  # a colour that stands in for one of the page
  return source, seen.text


def make(folder, rows, *, timeline=(), facts=None, samples=(), **settings):
  """A run's folder."""
  (folder / 'checkpoints').mkdir(parents=True)
  (folder / 'config.json').write_text(config.to_json(Pretrain(run=settings.pop('run', str(folder)), **settings)))
  (folder / 'facts.json').write_text(json.dumps(facts or {}))
  for name, lines in (('metrics', rows), ('timeline', timeline), ('samples', samples)):
    (folder / f'{name}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return folder


def losses(steps=5, **more):
  return [{'step': step, 'train/loss': 3.0 / step, 'train/nll': 3.0 / step, **more} for step in range(1, steps + 1)]


@pytest.mark.parametrize(
  'names, said',
  [
    (['train/loss', 'eval/loss'], ['train', 'eval']),
    (['train/policy/ratio_min', 'train/policy/ratio_max'], ['ratio_min', 'ratio_max']),
    (['train/rewards/chosen', 'eval/rewards/rejected'], ['train chosen', 'eval rejected']),
    (['eval/code/bits_per_byte', 'eval/law/bits_per_byte'], ['code', 'law']),
    (['reward/mean', 'eval/reward/mean'], ['train', 'eval']),
    (['policy/kl', 'train/policy/kl'], ['rollouts', 'train']),
    (['answers/truncated', 'reward/equal_groups'], ['answers truncated', 'reward equal_groups']),
    (['train/lr'], ['']),
  ],
)
def test_a_label_is_what_tells_a_curve_apart(names, said):
  assert curves.labels(names) == said


def test_chosen_answers_are_those_of_preferences(tmp_path):
  plain = read(report.write(make(tmp_path / 'plain', losses())))[1]
  assert 'Loss' in plain and 'Chosen answers' not in plain
  pairs = losses(**{'train/rewards/margins': 0.5})
  assert 'Chosen answers' in read(report.write(make(tmp_path / 'dpo', pairs, preference=Preference('preference'))))[1]


def test_events_are_marked(tmp_path):
  rows = [{'step': s, 'train/loss': 1.0, 'train/skipped': float(s >= 3) + float(s >= 5)} for s in range(1, 9)]
  rows.insert(4, {'step': 4, 'eval/loss': 2.0})
  timeline = [
    {'step': step, 'time': 1.0, 'what': what}
    for step, what in ((0, 'start'), (2, 'save'), (4, 'save'), (4, 'start'), (6, 'start'))
  ]
  run = make(tmp_path / 'run', rows, timeline=timeline)
  (run / 'rewinds.json').write_text('[{"step": 4, "spike": 7, "cursor": 8}]')
  events = runs.events(runs.read(run))
  assert events == {'save': [2, 4], 'evaluation': [4], 'skipped step': [3, 5], 'rewind': [7], 'start': [6]}
  text = read(report.write(run))[1]
  assert 'saves 2' in text and 'skipped steps 2' in text and 'back to step 4' in text and 'continued 1' in text
  picture = curves.of_run(curves.LEARNING, runs.read(run))[0]
  marked = lambda **some: curves.draw(picture, some).count('<use')
  assert marked(save=[2, 4]) == marked() + 2 and marked(save=[2, 400]) == marked() + 1
  assert 'var(--alert)' in curves.draw(picture, {'skipped step': [3]}) and 'var(--alert)' not in curves.draw(picture)
  assert len(curves.few(range(1000))) <= curves.MARKS


def test_saves_of_a_run_without_a_timeline_are_those_that_it_kept(tmp_path):
  run = make(tmp_path / 'old', losses())
  for step in (3, 5, 9):
    (run / 'checkpoints' / f'{step:08}').mkdir()
  assert runs.events(runs.read(run))['save'] == [3, 5]


def test_a_long_curve_keeps_its_spikes(tmp_path):
  values = [1.0] * 50_000
  values[31_234], values[77] = 99.0, -7.0
  steps, kept = curves.thinned(range(50_000), values)
  assert len(steps) <= curves.POINTS and steps == sorted(steps) and (steps[0], steps[-1]) == (0, 49_999)
  assert dict(zip(steps, kept, strict=True))[31_234] == 99.0 and min(kept) == -7.0


def test_where_the_time_went(tmp_path):
  row = lambda step, time, seconds, wait: {'step': step, 'time': time, 'perf/step_s': seconds, 'perf/data_wait': wait}
  happened = lambda step, time, what, seconds=0.0: {'step': step, 'time': time, 'what': what, 'seconds': seconds}
  rows = [row(10, 130.0, 2.0, 0.25), row(20, 160.0, 1.0, 0.5)]
  timeline = [happened(0, 100.0, 'start'), happened(10, 140.0, 'evaluation', 4.0), happened(10, 145.0, 'save', 3.0)]
  timeline += [happened(10, 900.0, 'start'), happened(20, 915.0, 'save', 1.0)]
  rows[1]['time'] = 912.0
  run = runs.read(make(tmp_path / 'run', rows, timeline=timeline))
  assert runs.clock(run) == pytest.approx(45 + 15)  # not the pause between
  found = runs.spent(run)
  assert found == pytest.approx(
    {'steps': 20.0, 'waiting for data': 10.0, 'evaluations': 4.0, 'saves': 4.0, 'start and else': 22.0}
  )
  text = read(report.write(run.path))[1]
  assert 'evaluations 6.7% 0:04' in text and 'time at work1:00' in text


def test_a_rollout_is_no_wait_for_data(tmp_path):
  rows = [{'step': 1, 'time': 9.0, 'perf/rollout_s': 5.0, 'perf/scoring_s': 1.0, 'perf/reading_s': 2.0}]
  rows.append({'step': 1, 'time': 10.0, 'perf/step_s': 10.0, 'perf/data_wait': 0.85})
  found = runs.spent(runs.read(make(tmp_path / 'ppo', rows, rl=Rl(algo='ppo'))))
  assert found['steps'] == pytest.approx(1.5) and found['waiting for data'] == pytest.approx(0.5)
  assert [found[f'{part} {them}'] for part, them in (('writing', 'answers'), ('scoring', 'them'))] == [5.0, 1.0]


@pytest.fixture
def life(tmp_path):
  """base -> sft -> reward, ppo, as runs that were written in one place and moved to another together."""
  home = tmp_path / 'moved'
  make(home / 'runs/base', losses(), run='runs/base')
  make(home / 'runs/base/sft', losses(), run='runs/base/sft', init='runs/base', steps=77)
  reward = {'run': 'runs/base/reward/folds/0', 'init': 'runs/base/sft', 'preference': Preference('reward')}
  make(home / 'runs/base/reward/folds/0', losses(), **reward)
  rl = Rl(algo='ppo', reward='run:runs/base/reward/folds/0*0.5 + exact')
  ppo = make(home / 'runs/base/ppo', losses(), run='runs/base/ppo', init='runs/base/sft', rl=rl)
  (ppo / 'chapter.md').write_text('| stays |')
  return home / 'runs'


def test_lineage_of_runs_that_were_moved(life):
  for name in ('base/sft', 'base/reward/folds/0', 'base/ppo'):
    report.write(life / name)
  source, _ = read(report.write(life / 'base'))
  tree = source[source.index('<div class="tree">') : source.index('</div>', source.index('<div class="tree">'))]
  assert re.sub(r'<(?!/?ul|/?li)[^>]*>', '', tree).replace('<ul>', '(').replace('</ul>', ')') == (
    '(<li>base pre-training(<li>sft fine-tuning'
    '(<li>ppo PPO reward model: reward/folds/0</li><li>reward/folds/0 reward model</li>)</li>)</li>)'
  )
  assert 'href="sft/report.html"' in tree and 'href="reward/folds/0/report.html"' in tree
  source, text = read(report.write(life / 'base/ppo'))
  assert 'href="../report.html"' in source and 'href="../sft/report.html"' in source
  assert '<td>rl.algo</td><td></td><td>ppo</td>' in source and '<td>steps</td><td class="n">' not in source
  assert '<td>steps</td><td>77</td><td>1000</td>' in source
  assert '3 settings are not those of its parent, sft' in text and 'seed' not in text[: text.index('Configuration')]
  assert (life / 'base/ppo/chapter.md').read_text() == '| stays |'


def test_a_link_is_to_what_is_there(life):
  source, text = read(report.write(life / 'base/sft'))
  assert '<a ' not in source and 'base' in text
  (life / 'base' / 'config.json').unlink()
  text = read(report.write(life / 'base/sft'))[1]
  assert 'runs/base a model of others, or a run that is not there' in text and 'its parent' not in text


def test_the_run_beside_it_is_meant_and_not_one_of_that_name_here(life, tmp_path, monkeypatch):
  make(tmp_path / 'here/runs/base', losses(), run='runs/base')
  monkeypatch.chdir(tmp_path / 'here')
  sft = runs.config(life / 'base/sft')
  assert lineage.place(life / 'base/sft', sft, 'runs/base') == life / 'base'
  (life / 'base' / 'config.json').unlink()
  assert str(lineage.place(life / 'base/sft', sft, 'runs/base')) == 'runs/base'
  assert lineage.place(life / 'base/sft', sft, 'hf://org/runs') is None


def test_a_circle_of_runs_ends(tmp_path):
  make(tmp_path / 'a', losses(), init=str(tmp_path / 'b'))
  make(tmp_path / 'b', losses(), init=str(tmp_path / 'a'))
  make(tmp_path / 'self', losses(), init=str(tmp_path / 'self'))
  assert 'a fine-tuningb fine-tuning' in read(report.write(tmp_path / 'a'))[1]
  assert 'self' in read(report.write(tmp_path / 'self'))[1]


def test_samples_stand_by_prompt_and_in_time(tmp_path):
  sample = lambda step, prompt, text: {'step': step, 'prompt': prompt, 'text': text}
  samples = [sample(step, prompt, f'<{prompt}{step}>') for step in range(1, 21) for prompt in ('one', 'two')]
  samples += [sample(step, f'once {step}', 'x') for step in range(9)]
  _, text = read(report.write(make(tmp_path / 'run', losses(), samples=samples)))
  assert (
    text.index('<one1>') < text.index('<one20>') < text.index('<two1>') < text.index('once 8') < text.index('once 0')
  )
  assert '14 between' in text and '3 more earlier ones' in text


def test_samples_stand_in_a_table_with_their_rewards(tmp_path):
  """The newest step's first, and of a step the best."""
  worth = {(1, 'a'): -0.25, (1, 'b'): 0.5, (3, 'c'): -0.75, (3, 'd'): 2.5}
  samples = [{'step': n, 'prompt': f'<{x}>?', 'text': f'<{x}>', 'reward': r} for (n, x), r in worth.items()]
  samples.insert(1, {'step': 1, 'prompt': 'Once', 'text': ' upon a time'})  # of --watch.prompts
  _, text = read(report.write(make(tmp_path / 'run', losses(), samples=samples)))
  rows = (r'3 <d>\? <d> 2\.500', r'3 <c>\? <c> -0\.750', r'1 <b>\? <b> 0\.500', r'1 <a>\? <a> -0\.250')
  assert re.search(' '.join(('step prompt answer reward', *rows)).replace(' ', r'\s*'), text), text
  assert 'earlier ones' not in text and 'upon a time' in text
  more = [{'step': n, 'prompt': 'one', 'text': f'<{n}>', 'reward': 1.0} for n in range(1, 51)]
  _, text = read(report.write(make(tmp_path / 'more', losses(), samples=more)))
  assert text.index('<50>') < text.index('<31>') < text.index('30 earlier ones') < text.index('<30>')


def test_the_data_is_drawn(tmp_path):
  facts = {metrics.COMPOSITION: {'हिन्दी': 300, '<code>': 100}}
  rows = losses(**{'data/<code>/epochs': 1.5, 'eval/हिन्दी/bits_per_byte': 2.0, 'eval/<code>/bits_per_byte': 1.0})
  source, text = read(report.write(make(tmp_path / 'run', rows, facts=facts)))
  assert 'हिन्दी 75.0% 300 tokens' in text and '<code> 25.0% 100 tokens, read 1.50 times' in text
  assert 'width:75.000%' in source


@pytest.fixture
def three(tmp_path):
  """Runs of one stage with other rates and losses."""
  folders = []
  for name, lr, end in (('a<b', 1e-3, 2.0), ('c', 2e-3, 1.5), ('d', 3e-3, 1.75)):
    rows = [*losses(), {'step': 5, 'eval/loss': end, 'eval/bits_per_byte': end, 'eval/rewards/accuracies': end / 4}]
    made = make(tmp_path / name, rows, facts={'environment': {'dtype': 'float32', 'devices': name}})
    settings = config.from_json(Pretrain, (made / 'config.json').read_text())
    settings = dataclasses.replace(settings, optim=dataclasses.replace(settings.optim, lr=lr))
    (made / 'config.json').write_text(config.to_json(settings))
    folders.append(made)
  return folders


def test_runs_beside_each_other(three, tmp_path):
  out = report.compare(three, tmp_path / 'out' / 'page.html')
  source, text = read(out)
  assert all((folder / 'report.html').exists() for folder in three)
  assert 'href="../a&lt;b/report.html"' in source and 'a<b' in text
  line = lambda name: re.search(rf'<tr><td>{name}</td>(.*?)</tr>', source)[1]
  cells = lambda name: re.findall(r'<td class="n">(.*?)</td>', line(name))
  assert cells('eval/loss') == ['2', '<b>1.500</b>', '1.750']  # less is better
  assert cells('eval/rewards/accuracies') == ['<b>0.500</b>', '0.375', '0.438']  # more is
  assert line('optim.lr') == '<td>0.001</td><td>0.002</td><td>0.003</td>'
  assert line('on devices') == '<td>a&lt;b</td><td>c</td><td>d</td>'
  assert '<td>optim.name' not in source and '<td>on dtype' not in source and '<td>run<' not in source
  drawn = source[source.index('Loss <small>') :]
  legend = re.sub('<[^>]*>', '', drawn[drawn.index('class="key">') + 12 : drawn.index('</div>')])
  assert legend.startswith('a&lt;b 0.600a&lt;b, held out 2c 0.600c, held out 1.500d')
  picture = drawn[: drawn.index('</svg>')]
  assert all(f'stroke: var(--s{i})' in picture for i in range(3)) and 'var(--s3)' not in picture


def test_losses_of_different_stages_are_not_ranked(life, tmp_path):
  out = report.compare([life / 'base', life / 'base/sft', life / 'base/ppo'], tmp_path / 'page.html')
  source, text = read(out)
  ends = source[source.index('At the end') : source.index('<h2>Curves')]
  assert '<b>' not in ends and 'Chosen answers' not in text
  assert source.count('class="this"') == 3 and '>reward/folds/0</a>' not in source  # which has no page


def test_every_run_that_is_compared_is_marked(life, tmp_path, monkeypatch):
  monkeypatch.chdir(life / 'base')
  source = report.compare(
    ['ppo', 'reward/folds/0'], 'page.html'
  ).read_text()  # the one is met first as the other's judge
  tree = source[source.index('<div class="tree">') : source.index('At the end')]
  assert 'var(--s0)' in tree and 'var(--s1)' in tree and tree.count('class="this"') == 2 + 1


def test_comparing_is_refused(three):
  with pytest.raises(InputError, match='named twice'):
    report.compare([three[1], three[2], str(three[1]) + '/.'])
  with pytest.raises(InputError, match='no metrics.jsonl'):
    report.compare([three[1], three[1].parent])


def test_short_names_tell_folders_apart():
  assert runs.called(['/x/a/sft', '/x/b/sft', '/x/b']) == ['a/sft', 'b/sft', 'b']
  assert runs.called(['/x/reward/folds/0']) == ['reward/folds/0']
  assert runs.called(['gs://bucket/runs/a', 'gs://bucket/runs/b']) == ['a', 'b']


@pytest.mark.parametrize(
  'settings, said',
  [
    ({}, 'pre-training'),
    ({'init': 'x'}, 'fine-tuning'),
    ({'init': 'x', 'lora': config.Lora(rank=4)}, 'fine-tuning (LoRA)'),
    ({'preference': Preference('preference', loss='orpo')}, 'ORPO'),
    ({'preference': Preference('reward')}, 'reward model'),
    ({'rl': Rl(algo='mine.py:dr_best')}, 'DR BEST'),
    ({'distill': config.Distill(teacher='x')}, 'distillation'),
  ],
)
def test_stages_have_names(settings, said):
  assert runs.stage(json.loads(config.to_json(Pretrain(**settings)))) == said


def test_numbers_are_for_readers():
  assert [page.markup.number(x) for x in (3, 1234567, 0.0001234, -0.5, 1234.5, 123.45, None)] == (
    ['3', '1,234,567', '1.23e-04', '-0.500', '1,234', '123.5', '']
  )
