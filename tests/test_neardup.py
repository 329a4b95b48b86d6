"""Near-duplicates against the exact Jaccard similarity, on real text with edits of known size."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import jaxlm
from jaxlm.data import neardup
from jaxlm.errors import InputError

SAMPLE = Path(jaxlm.__file__).parent / 'assets' / 'sample'
WORDS = 211


@pytest.fixture(autouse=True)
def _needs_datasketch(request):
  if 'without_the_library' not in request.node.name:
    pytest.importorskip('datasketch', reason="datasketch is not installed: pip install -e '.[dedup]'")


def pieces(*names):
  """Pieces of WORDS words of real text."""
  lines = [line for name in names for line in (SAMPLE / f'{name}.jsonl').read_text('utf-8').split('\n') if line]
  words = [json.loads(line)['text'].split() for line in lines]
  return [' '.join(w[at : at + WORDS]) for w in words for at in range(0, len(w) - WORDS, 2 * WORDS)]


def edited(text, count, seed):
  """`text` with `count` of its words replaced, in one run or scattered, by turns."""
  rng, words = random.Random(seed), text.split()
  start = rng.randrange(len(words) - count + 1)
  for at in range(start, start + count) if seed % 2 else rng.sample(range(len(words)), count):
    words[at] = f'edit{rng.randrange(10**6)}'
  return ' '.join(words)


def word_runs(text):
  words = text.lower().split()
  return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def character_runs(text):
  text = ' '.join(text.lower().split())
  return {text[i : i + 5] for i in range(len(text) - 4)}


def jaccard(a, b):
  return len(a & b) / len(a | b)


def corpus():
  texts = pieces('novel', 'law', 'speeches', 'technical', 'hindi', 'scripture')
  texts = random.Random(3).sample(texts, 151)
  rng = random.Random(5)
  copies = [edited(text, rng.choice([0, 1, 2, 3, 5, 8, 13, 21, 34]), seed) for seed, text in enumerate(texts * 2)]
  mixed = texts + copies
  rng.shuffle(mixed)
  return mixed


@pytest.mark.slow(but='0.8')
@pytest.mark.parametrize('threshold', [0.6, 0.8, 0.9])
def test_decisions_agree_with_the_exact_similarity(threshold):
  near, kept, sure, wrong = neardup.NearDuplicates(threshold), [], [0, 0], 0
  for text in corpus():
    runs = word_runs(text)
    most = max((jaccard(runs, other) for other in kept), default=0.0)
    said = near.seen(text)
    if abs(most - threshold) > 0.09:  # two and a half standard deviations of the estimate
      wrong += said != (most >= threshold)
      sure[said] += 1
    if not said:
      kept.append(runs)
  assert sure[True] > 20 and sure[False] > 130
  assert wrong <= 0.01 * sum(sure)


def test_real_text_without_copies_is_kept():
  near = neardup.NearDuplicates()
  texts = pieces('novel', 'law', 'speeches', 'technical', 'hindi', 'play')
  exact = [word_runs(text) for text in texts]
  copies = sum(any(jaccard(a, b) > 0.7 for b in exact[:i]) for i, a in enumerate(exact))
  assert len(texts) > 290 and sum(map(near.seen, texts)) <= copies < 4


def test_exact_copies_case_and_spaces():
  near = neardup.NearDuplicates()
  text = pieces('novel')[2]
  assert not near.seen(text)
  assert near.seen(text) and near.seen(text.upper()) and near.seen('  ' + text.replace(' ', '\n\n'))
  assert not near.seen('') and not near.seen('') and not near.seen(' \n') and not near.seen(' \n')  # nobody's copy
  assert not near.seen('short') and near.seen('short') and not near.seen('shirt')
  assert not near.seen('\ud800 lone') and near.seen('\ud800 lone')


def test_scripts_without_spaces_are_compared_by_characters():
  near = neardup.NearDuplicates()
  line = (
    '我们认为下面这些真理是不言而喻的人人生而平等造物者赋予他们若干不可剥夺的权利其中包括生命权自由权和追求幸福的权利'
  )
  other = (
    '四年前我们的先辈们在这个大陆上创立了一个新国家它孕育于自由之中奉行一切人生来平等的原则现在我们正从事一场伟大的内战'
  )
  text = '。'.join(line[i:] + line[:i] for i in range(0, 50, 7))
  changed = text.replace('幸福', '财富', 1)
  assert jaccard(character_runs(text), character_runs(changed)) > 0.9
  assert not near.seen(text) and not near.seen('。'.join([other] * 3)) and near.seen(changed)


def test_shingles_are_runs_of_words_or_of_characters():
  assert list(neardup.shingles('A b  C\nd e f', 2)) == [b'a b', b'b c', b'c d', b'd e', b'e f']
  assert list(neardup.shingles('abc de', 5)) == [b'abc d', b'bc de']
  assert list(neardup.shingles('ab', 5)) == [b'ab'] and list(neardup.shingles('', 5)) == []
  text = pieces('novel')[0]
  assert {s.decode() for s in neardup.shingles(text)} == {' '.join(run) for run in word_runs(text.casefold())}


def test_every_process_decides_alike():
  code = (
    'import json, sys; from jaxlm.data.neardup import NearDuplicates\n'
    'near = NearDuplicates(); print([near.seen(text) for text in json.load(sys.stdin)])'
  )
  texts, said = corpus(), set()
  for seed in ('0', '1', '4242'):
    env = {**os.environ, 'PYTHONHASHSEED': seed, 'PYTHONPATH': str(Path(jaxlm.__file__).parents[1])}
    done = subprocess.run(
      [sys.executable, '-c', code], input=json.dumps(texts), capture_output=True, text=True, check=True, env=env
    )
    said.add(done.stdout)
  near = neardup.NearDuplicates()
  assert said == {f'{[near.seen(text) for text in texts]}\n'}


def test_a_long_document_is_hashed_in_parts():
  text = ' '.join(pieces('novel', 'law'))
  whole = neardup.NearDuplicates()
  assert len(text.split()) > 3 * neardup.AT_ONCE
  assert not whole.seen(text) and whole.seen(text + ' and a few words more')
  tail = ' '.join(text.split()[len(text.split()) // 2 :])
  assert not whole.seen(tail)  # half of it


@pytest.mark.parametrize('wrong', [{'threshold': 0}, {'threshold': 1.0}, {'threshold': 0.9999}, {'shingle': 0}])
def test_settings_that_make_no_sense_are_refused(wrong):
  with pytest.raises(InputError, match='^near-duplicates: threshold'):
    neardup.NearDuplicates(**wrong)


def test_without_the_library_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasketch', None)
  with pytest.raises(InputError, match=r"pip install -e '\.\[dedup\]'"):
    neardup.NearDuplicates()
