"""Folders of conversations: masks reach the rows of every packing, and `inspect` shows them and finds what is wrong."""

import html
import json
import os
import re
import time

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders

from jaxlm import cli, inspector
from jaxlm.data import chat, faults, packing, prepare, prepared, records, turns
from jaxlm.data import tokenizer as tok
from jaxlm.data.conversations import Conversation
from jaxlm.errors import InputError

TEXTS = ['user assistant call me Ishmael, what is it? two four नमस्ते\n' * 9]
TALKS = [
  [
    {'role': 'user', 'content': f'What is {i}?' * (1 + i % 3)},
    {'role': 'assistant', 'content': f'It is {i}.' * (1 + i % 5)},
    *([{'role': 'user', 'content': 'And?'}, {'role': 'assistant', 'content': '<b> नमस्ते'}] if i % 4 == 0 else []),
  ]
  for i in range(60)
]


@pytest.fixture(scope='module')
def t() -> tok.Tokenizer:
  return tok.train(TEXTS, 300).with_controls(turns.BUILT_IN['chatml'])


CHATML = turns.choose('chatml', None)[1]


def jsonl(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  os.utime(path, (time.time() - 100,) * 2)
  return str(path)


def made(tmp_path, t, talks=TALKS, out='out', **how):
  source = jsonl(tmp_path / 'talks.jsonl', [{'messages': talk} for talk in talks])
  given = {'chat': prepare.Chat(CHATML), 'val_fraction': 0.0} | how
  prepare.prepare([source], t, tmp_path / out, **given)
  return prepared.load(tmp_path / out)


def encoded(t, talks=TALKS, **how):
  return [turns.encode(CHATML, Conversation(talk), t, **how) for talk in talks]


def test_any_window_has_the_mask_of_its_tokens(tmp_path, t, monkeypatch):
  monkeypatch.setattr(records, 'RECORD_TOKENS', 13)
  tokens = made(tmp_path, t).split('train')
  ids, learned = (np.concatenate(parts) for parts in list(zip(*encoded(t), strict=True))[:2])
  assert len(tokens) == len(ids) and 0 < learned.sum() < len(ids)
  for start, stop in [(0, len(ids)), (12, 14), (13, 26), (5, 101), (len(ids) - 3, len(ids) + 9), (7, 7)]:
    np.testing.assert_array_equal(tokens.read(start, stop)[0], ids[start:stop])
    got = tokens.learned(start, stop)
    assert got.dtype == np.bool_
    np.testing.assert_array_equal(got, learned[start:stop])


def test_the_mask_of_one_kind(tmp_path, t, monkeypatch):
  monkeypatch.setattr(records, 'RECORD_TOKENS', 11)
  sources = [
    f'{kind}={jsonl(tmp_path / f"{kind}.jsonl", [{"messages": talk} for talk in part])}'
    for kind, part in (('a', TALKS[:20]), ('b', TALKS[20:45]), ('c', TALKS[45:]))
  ]
  summary = prepare.prepare(sources, t, tmp_path / 'out', val_fraction=0.2, chat=prepare.Chat(CHATML))
  folder = prepared.load(tmp_path / 'out')
  for split in ('train', 'validation'):
    for kind in 'abc':
      tokens = folder.split(split, kind)
      learned = tokens.learned(0, len(tokens))
      assert len(learned) == len(tokens) and learned.sum() == summary.chat['learned'][split][kind]
      for (start, ids, bits), text in zip(faults.documents(tokens), folder.texts(split, kind), strict=True):
        assert t.decode(ids.tolist()) == text and tokens.learned(start + 1, start + 9).tolist() == bits[1:9].tolist()
        assert t.decode(ids[bits].tolist()) == ''.join(re.findall(r'(?:It is \d+\.)+|<b> नमस्ते', text))


@pytest.mark.parametrize('how', ['concat', 'best_fit'])
def test_every_learned_token_is_a_target_once(tmp_path, t, how):
  tokens = made(tmp_path, t).split('train')
  rows = packing.rows(how, tokens, 67, t)
  expected = sorted(i for one in encoded(t) for i in one.ids[one.learned].tolist())
  got = [i for row in map(rows.__getitem__, range(len(rows))) for i in row['targets'][row['loss_mask'] > 0].tolist()]
  assert sorted(got) == expected
  assert all((row['target_bytes'][row['loss_mask'] == 0] == 0).all() for row in map(rows.__getitem__, range(len(rows))))


@pytest.mark.parametrize('how', ['concat', 'best_fit'])
def test_a_row_is_shown_as_it_is(tmp_path, t, how):
  tokens = made(tmp_path, t).split('train')
  rows = packing.rows(how, tokens, 4000, t)
  assert len(rows) == 1
  seen = inspector.view(rows[0], t, how)
  by_segment = {token.segment: [] for token in seen}
  for token in seen:
    by_segment[token.segment].append(token)
  got = sorted(([x.id for x in part], [x.loss for x in part]) for part in by_segment.values())
  assert got == sorted((one.ids.tolist(), one.learned.tolist()) for one in encoded(t))
  for part in by_segment.values():
    assert [token.position for token in part] == list(range(len(part)))
  assert ''.join(token.text for token in by_segment[2]).startswith('<|bos|><|im_start|>user\n')


def test_words_keep_the_space_that_their_decoder_strips():
  """As Llama 2's and Mistral's do of whatever a text begins with."""
  pieces = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256)), '▁call', '▁me', '▁']
  inner = tokenizers.Tokenizer(tokenizers.models.Unigram([(piece, -1.0) for piece in pieces], 0, True))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  parts = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
  inner.decoder = decoders.Sequence(parts)
  llama = tok.Tokenizer(inner, {'bos': '<s>', 'eos': '</s>', 'unk': '<unk>'})
  ids = [*llama.encode('call me é'), llama.eos_id]
  tokens = [inspector.Token(llama.inner.id_to_token(i), i, True, 1, n) for n, i in enumerate(ids)]
  assert ''.join(one.text for one in inspector.spelled(tokens, llama)) == 'call me é</s>'


def test_characters_of_several_tokens_are_shown_once(t):
  text = 'है ✓ no 😀'
  ids = t.inner.encode(text, add_special_tokens=False).ids
  tokens = [inspector.Token(t.inner.id_to_token(i), i, True, 1, n) for n, i in enumerate([t.bos_id, *ids])]
  shown = inspector.spelled(tokens, t)
  assert [one.id for one in shown] == [t.bos_id, *ids] and ''.join(one.text for one in shown) == '<|bos|>' + text
  assert sum(not one.text for one in shown) >= 5  # parts of the characters that the tokenizer never saw
  torn = inspector.spelled(tokens[:-1], t)  # the last character is never whole: as it is stored
  assert ''.join(one.text for one in torn).startswith('<|bos|>है ✓ no ') and torn[-1].text == tokens[-2].text


def test_text_folders_are_what_they_were(tmp_path, t):
  source = jsonl(tmp_path / 'a.jsonl', [{'text': f'the whale {i}'} for i in range(9)])
  prepare.prepare([source], t, tmp_path / 'out', val_fraction=0.0)
  folder = prepared.load(tmp_path / 'out')
  assert folder.split('train').learned(0, 99) is None
  assert 'chat' not in json.loads((tmp_path / 'out' / 'prepared.json').read_text())
  names = {p.name for p in (tmp_path / 'out').iterdir()}
  assert not {name for name in names if 'learned' in name or 'template' in name}
  found = inspector.inspect(folder, 'train', 8, None, 2)
  assert found.fault is None and len(found.rows) == 2


def test_the_folder_says_what_it_was_made_with(tmp_path, t):
  folder = made(tmp_path, t, max_bad=0, chat=prepare.Chat(CHATML, 'last', 60))
  found = encoded(t, learn='last', limit=60)
  summary = folder.summary
  assert summary.chat['truncated'] == {'talks': sum(one is not None and one.dropped > 0 for one in found)}
  assert summary.dropped['too long'] == {'talks': sum(one is None for one in found)}
  assert 0 < summary.chat['truncated']['talks'] < 15 and 0 < summary.dropped['too long']['talks'] < 30
  kept = [one for one in found if one]
  assert summary.splits['train'].documents == len(kept)
  assert summary.chat['learned']['train'] == {'talks': sum(int(one.learned.sum()) for one in kept)}
  assert summary.chat['end'] == [t.control_id('<|im_end|>')]
  assert (folder.path / 'chat_template.jinja').read_text() == folder.chat_template == CHATML
  for template, same in ((CHATML, True), (CHATML + ' ', False)):
    other = prepare.Chat(template, 'last', 60)
    job = prepare.job([str(tmp_path / 'talks.jsonl')], t, folder.path, val_fraction=0.0, chat=other)
    assert prepare.finished(job) == (summary if same else None)


def test_other_masks_are_other_contents(tmp_path, t):
  one, other = made(tmp_path, t), made(tmp_path, t, out='other', chat=prepare.Chat(CHATML, 'last'))
  assert one.summary.contents != other.summary.contents
  np.testing.assert_array_equal(one.split('train').read(0, 10**6)[0], other.split('train').read(0, 10**6)[0])


def test_a_mask_that_was_changed_is_refused(tmp_path, t):
  folder = made(tmp_path, t)
  bits = np.load(folder.path / 'train.learned.npy')
  bits[3] ^= 8
  np.save(folder.path / 'train.learned.npy', bits)
  assert prepared.verify(folder.path) == ['train.learned.npy has changed']
  with pytest.raises(InputError, match=r'train\.learned\.npy'):
    prepared.load(folder.path)


def test_the_page_and_the_terminal_show_every_token(tmp_path, t, capsys):
  made(tmp_path, t)
  page = tmp_path / 'page.html'
  assert (
    cli.main(['inspect', str(tmp_path / 'out'), '--seq-len', '5000', '--rows', '1', '--html', str(page), '--ids']) == 0
  )
  out = capsys.readouterr().out
  (document,) = [one for one in encoded(t, TALKS[:1])]
  lines = re.findall(r'^ *(\d+) +(\d+) (loss|    )  ', out, re.M)
  assert len(lines) == sum(len(one.ids) for one in encoded(t))
  stored = [(str(i), 'loss' if on else '    ') for i, on in zip(document.ids, document.learned, strict=True)]
  assert ' '.join(map(str, stored)) in ' '.join(str(line[1:]) for line in lines)
  assert '60 documents' in out and '100.0% full' not in out and 'tokens of a document:' in out
  text = page.read_text()
  assert not re.search(r'(?:src|href)\s*=|@import|url\(|<script', text)
  assert text.count('<span class="t') == len(lines) + 2  # the legend
  assert text.count('<span class="t on"') == sum(int(one.learned.sum()) for one in encoded(t)) + 1
  assert html.escape('<|im_end|>') in text and '<b>' not in text


FAULTS = {
  'all of it is learned': (
    '{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>{% endgeneration %}'
  ),
  'no token ends the turn': '{% for m in messages %}{{ m.role }}: {{ m.content }} .{% endfor %}',
}


@pytest.mark.parametrize('why, template', FAULTS.items(), ids=FAULTS.keys())
def test_a_fault_is_shown_and_fails(tmp_path, t, why, template, capsys):
  made(tmp_path, t, talks=[TALKS[4], *TALKS[:3]], chat=prepare.Chat(template))
  assert cli.main(['inspect', str(tmp_path / 'out'), '--rows', '0']) == 1
  out, err = capsys.readouterr()
  assert re.search(rf'^jaxlm: {re.escape(str(tmp_path / "out"))}: document 0 of train: {why}', err)
  assert out.count('-- segment') == 1 and 'What is 4?' in out


def test_faults_of_single_documents(t):
  chat_of = lambda learn: {'learn': learn, 'end': [t.control_id('<|im_end|>')]}
  good = turns.encode(CHATML, Conversation(TALKS[0]), t)
  fault = lambda ids, learned, learn='assistant': faults.of(np.array(ids), learned, t, chat_of(learn))
  assert fault(good.ids, good.learned) is None
  assert fault(good.ids, good.learned & False) == 'nothing of it is learned'
  assert 'all of it' in fault(good.ids, good.learned | True) and fault(good.ids, good.learned | True, 'all') is None
  assert fault([t.bos_id, *good.ids], np.append(False, good.learned)) == 'begins with two <|bos|>'
  end = np.flatnonzero(good.ids == t.control_id('<|im_end|>'))[1]
  keep = np.arange(len(good.ids)) != end
  assert 'no token ends the turn' in fault(good.ids[keep], good.learned[keep])
  plain = lambda ids: faults.of(np.array(ids), None, t, None)
  assert plain([t.bos_id, *t.encode('a'), t.eos_id]) is None
  assert plain([t.bos_id, *t.encode('a')]) == 'does not end with <|eos|>'
  assert plain([t.bos_id, t.bos_id, t.eos_id]) == 'begins with two <|bos|>'


def test_a_config_is_inspected_as_it_would_run(tmp_path, t, capsys):
  folder = made(tmp_path, t)
  config = tmp_path / 'config.py'
  config.write_text('from jaxlm.config import Pretrain\nconfig = Pretrain()\n')
  given = ['--data.path', str(folder.path), '--data.seq-len', '97', '--data.packing', 'best_fit']
  assert cli.main(['inspect', str(config), *given]) == 0
  assert 'of 97 by best_fit' in capsys.readouterr().out
  assert cli.main(['inspect', str(folder.path), '--data.seq-len', '97']) == 1
  assert cli.main(['inspect', str(tmp_path)]) == 1


def test_rows_that_a_config_names_are_prepared_for_its_run(tmp_path, capsys):
  model = tmp_path / 'model'
  tok.train(TEXTS, 300).save(model / 'tokenizer.json')
  source = jsonl(tmp_path / 'talks.jsonl', [{'messages': talk} for talk in TALKS])
  config = tmp_path / 'config.py'
  config.write_text('from jaxlm.config import SFT\nconfig = SFT\n')
  given = ['--init', str(model), '--data.path', source, '--data.seq-len', '80', '--run', str(tmp_path / 'run')]
  assert cli.main(['inspect', str(config), *given]) == 0
  out = capsys.readouterr().out
  assert 'template: chatml' in out and 'talks: messages (messages)' in out and 'of 80 by best_fit' in out
  assert prepared.load(tmp_path / 'run' / 'data').summary.chat


def test_the_command_prepares_and_says_what_it_found(tmp_path, capsys):
  tok.train(TEXTS, 300).save(tmp_path / 't' / 'tokenizer.json')
  (tmp_path / 't' / 'chat_template.jinja').write_text('{% for m in messages %}{{ m.content }}{% endfor %}')
  rows = [{'q': talk[0]['content'], 'a': talk[1]['content']} for talk in TALKS]
  source = jsonl(tmp_path / 'pairs.jsonl', rows)
  args = ['prepare', source, '--tokenizer', str(tmp_path / 't'), '--out', str(tmp_path / 'out'), '--chat']
  assert cli.main(args) == 1
  assert 'the columns q, a' in capsys.readouterr().err
  args += ['--columns', 'prompt=q,response=a', '--template', 'chatml', '--max-len', '60']
  assert cli.main(args) == 0
  first = capsys.readouterr().out
  assert 'template: chatml' in first and 'pairs: prompt and response (prompt=q, response=a)' in first
  assert all(word in first for word in ('too long', 'truncated', 'train learned', 'validation learned'))
  folder = prepared.load(tmp_path / 'out')
  assert folder.tokenizer.vocab_size == 302
  assert cli.main(args) == 0 and capsys.readouterr().out == first
  assert cli.main(['prepare', source, '--tokenizer', 't', '--out', 'o', '--learn', 'last']) == 1
  assert 'need --chat' in capsys.readouterr().err
  ids = folder.split('train').read(0, 40)[0].tolist()
  begun = chat.encode(CHATML, [{'role': 'user', 'content': rows[0]['q']}], folder.tokenizer, generation=True)
  assert ids[: len(begun)] == begun or folder.summary.splits['validation'].documents
