"""The quality filter: each fault by a text made for it, in several scripts; prose of any of them has none."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxlm
from jaxlm.data import prepare, quality
from jaxlm.data import tokenizer as tok
from jaxlm.data.quality import Thresholds, fault
from jaxlm.errors import InputError

SAMPLE = Path(jaxlm.__file__).parent / 'assets' / 'sample'
# one thought in several scripts, long enough for every check
PROSE = {
  'english': (
    'The sea was calm that morning, and the old fishermen sat on the wall to mend their nets. Children ran along the '
    'beach looking for shells while their mothers talked about the wedding in the next village. Nobody had seen the '
    'ship yet, which lay behind the island, waiting for the tide. When the bells of the church rang at noon, its white '
    'sails came round the cape, and everybody stood up to look.'
  ),
  'hindi': (
    'उस सुबह समुद्र शांत था और बूढ़े मछुआरे दीवार पर बैठकर अपने जाल ठीक कर रहे थे। बच्चे सीपियाँ खोजते हुए किनारे पर दौड़ रहे थे जबकि '
    'उनकी माताएँ पड़ोस के गाँव में होने वाली शादी की बातें कर रही थीं। किसी ने अब तक वह जहाज़ नहीं देखा था जो द्वीप के पीछे ज्वार की '
    'प्रतीक्षा में खड़ा था। जब दोपहर को मंदिर की घंटियाँ बजीं तो उसके सफ़ेद पाल दिखाई दिए और सब लोग देखने के लिए खड़े हो गए।'
  ),
  'chinese': (
    '那天早晨大海很平静，老渔夫们坐在墙上修补渔网。孩子们沿着沙滩奔跑寻找贝壳，母亲们谈论着邻村的婚礼。'
    '还没有人看见那艘停在岛屿后面等待涨潮的船。中午教堂的钟声响起时，白色的船帆绕过海角，所有人都站起来观看。'
  ),
  'japanese': (
    'その朝、海は穏やかで、年老いた漁師たちは石垣に腰を下ろして網を繕っていた。子供たちは貝殻を探して浜辺を走り、'
    '母親たちは隣村の結婚式について話していた。島の陰で潮を待つ船にはまだ誰も気づいていなかった。'
  ),
  'thai': (
    'เช้าวันนั้นทะเลสงบ ชาวประมงสูงอายุนั่งซ่อมแหอยู่บนกำแพง เด็กๆ วิ่งหาเปลือกหอยตามชายหาด ส่วนแม่ๆ '
    'คุยกันเรื่องงานแต่งงานที่หมู่บ้านข้างเคียง ยังไม่มีใครเห็นเรือที่จอดรอน้ำขึ้นอยู่หลังเกาะ'
  ),
  'arabic': (
    'كان البحر هادئا في ذلك الصباح، وجلس الصيادون المسنون على الجدار يصلحون شباكهم. وركض الأطفال على الشاطئ بحثا عن '
    'الأصداف بينما تحدثت الأمهات عن العرس في القرية المجاورة. ولم ير أحد بعد السفينة التي كانت تنتظر المد خلف الجزيرة. '
    'وعندما دقت الأجراس عند الظهر ظهرت أشرعتها البيضاء حول الرأس فوقف الجميع لينظروا إليها من بعيد.'
  ),
  'malayalam': (
    'അന്നു രാവിലെ കടൽ ശാന്തമായിരുന്നു, പ്രായമായ മത്സ്യത്തൊഴിലാളികൾ മതിലിലിരുന്ന് വലകൾ നന്നാക്കുകയായിരുന്നു. കുട്ടികൾ '
    'ചിപ്പികൾ തേടി കടൽത്തീരത്തിലൂടെ ഓടുമ്പോൾ അമ്മമാർ അയൽഗ്രാമത്തിലെ വിവാഹത്തെക്കുറിച്ചു സംസാരിച്ചുകൊണ്ടിരുന്നു.'
  ),
  'finnish': (
    'Meri oli sinä aamuna tyyni, ja vanhat kalastajat istuivat muurilla paikkaamassa verkkojaan. Lapset juoksivat '
    'pitkin hiekkarantaa etsimässä simpukankuoria äitien keskustellessa naapurikylän hääjuhlista. Kukaan ei ollut '
    'vielä huomannut saaren takana nousuvettä odottavaa purjelaivaa, jonka valkoiset purjeet ilmestyivät keskipäivällä.'
  ),
}


def words(count):
  """Prose-like words, no two the same."""
  syllables = ('ka', 'le', 'mi', 'no', 'pu', 'ra', 'se')
  return [''.join(syllables[n // 7**k % 7] for k in range(3)) for n in range(count)]


@pytest.mark.parametrize('script', PROSE)
def test_prose_of_any_script_has_no_fault(script):
  assert fault(PROSE[script]) is None


def test_prose_of_all_scripts_together_has_no_fault():
  assert fault('\n\n'.join(PROSE.values())) is None


@pytest.mark.parametrize(
  'reason, text',
  [
    ('few words', 'Click here to read more of it now.'),
    ('few words', '※ * - ' * 99),
    ('few words', '点击这里阅读'),
    ('word length', ' '.join('ab' * 10 + str(n) for n in range(60))),
    ('word length', ' '.join('a' for _ in range(60))),
    ('few letters', ' '.join(f'{n}.{n} {word}' for n, word in enumerate(words(60)))),
    ('symbols', ' '.join(f'#{word}' for word in words(60))),
    ('ellipses', ' ... '.join(words(60))),
    ('ellipses', '\n'.join(' '.join(words(60)[n : n + 12]) + '…' for n in range(0, 60, 12))),
    ('bullets', '\n'.join(f'• {" ".join(words(60)[n : n + 6])}' for n in range(0, 60, 6))),
    ('repeated lines', '\n'.join([' '.join(words(30))] * 3)),
    ('repeated lines', '\n'.join([PROSE['hindi']] * 2)),
    ('repeated lines', '\n'.join([PROSE['chinese']] * 2)),
    ('repeated paragraphs', '\n\n'.join([f'{" ".join(words(60))}\nof {n // 2}\nat {n}' for n in (0, 1)] * 2)),
    ('repeated phrases', ' '.join(f'{word} the same old thing' for word in words(20))),
    ('repeated phrases', ' '.join(f'{word} वही पुरानी बात फिर' for word in PROSE['hindi'].split()[:20])),
  ],
)
def test_faults(reason, text):
  expected = ('repeated lines', 'repeated paragraphs') if reason == 'repeated paragraphs' else (reason,)
  assert fault(text) in expected


def test_thresholds_are_where_they_say():
  ten = ' '.join(words(10))
  assert fault(ten) is None and fault(' '.join(words(9))) == 'few words'
  assert fault(ten, Thresholds(least_words=11)) == 'few words'
  numbers = lambda count: ' '.join([*words(100 - count), *map(str, range(count))])
  assert fault(numbers(20)) is None and fault(numbers(21)) == 'few letters'
  hashes = lambda count: ' '.join([*words(100), *['#'] * count])
  assert fault(hashes(10)) is None and fault(hashes(11)) == 'symbols'
  again = lambda count: '\n'.join([*words(100 - count), *words(count)])
  limits = Thresholds(most_repeated_characters=1.0)
  assert fault(again(30), limits) is None and fault(again(31), limits) == 'repeated lines'
  assert fault(again(20)) is None and fault(again(21)) == 'repeated lines'
  said = lambda count: ' '.join(word + ' pa ti' * (n < count) for n, word in enumerate(words(64)))
  assert fault(said(24)) is None and fault(said(25)) == 'repeated phrases'  # 4 n of 6 * 64 + 4 n characters: a fifth


def test_marks_belong_to_letters_and_layout_is_no_word():
  marks = 'क्षि' * 3  # three letters of four characters
  assert quality._length(marks) == 6 and quality._has_letter('ि') and not quality._has_letter('१२')
  assert fault('\n'.join(['*', '>', '|'] * 50 + [PROSE['english']])) is None


@pytest.mark.slow
def test_a_long_book_is_not_worse_for_its_length():
  lines = [' '.join(words(343)[n % 300 : n % 300 + 9]) + f' {n}' for n in range(30_000)]
  assert fault('\n'.join(lines)) is None


@settings(deadline=None)
@given(
  st.text(st.characters(), max_size=400)
  | st.lists(st.sampled_from(['a', '#', '...', '\n', 'क', '中', ' '])).map(''.join)
)
def test_it_never_raises(text):
  for limits in (Thresholds(), Thresholds(least_words=0, least_judged=0)):
    assert fault(text, limits) is None or isinstance(fault(text, limits), str)


@pytest.mark.parametrize('name', ['novel', 'scripture', 'hindi', 'law', 'speeches'])
def test_the_sample_keeps_its_prose(name):
  texts = [json.loads(line)['text'] for line in (SAMPLE / f'{name}.jsonl').read_text('utf-8').split('\n') if line]
  assert sum(fault(text) is not None for text in texts) <= 0.03 * len(texts)


def test_preparing_counts_what_it_dropped_and_knows_the_option(tmp_path):
  t = tok.train(list(PROSE.values()), 300)
  poor, good = ['too short'] * 2, [PROSE['english'], PROSE['hindi']]
  path = tmp_path / 'a.jsonl'
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in [*poor, '', *good, good[0]]))
  summary = prepare.prepare([str(path)], t, tmp_path / 'out', val_fraction=0, quality=True)
  assert summary.dropped == {'duplicate': {'a': 1}, 'empty': {'a': 1}, 'quality': {'a': 2}, 'bad': {}}
  assert list(prepare.load(tmp_path / 'out').texts('train')) == good
  assert summary.inputs['quality']['least_words'] == 10
  without = prepare.prepare([str(path)], t, tmp_path / 'out', val_fraction=0)
  assert without.splits['train'].documents == 3 and 'quality' not in without.inputs | without.dropped


def test_nothing_good_is_said(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "too short"}\n')
  t = tok.train(list(PROSE.values()), 300)
  with pytest.raises(InputError, match='no document is left, 1 have a fault: prepare it without --quality'):
    prepare.prepare([str(tmp_path / 'a.jsonl')], t, tmp_path / 'out', quality=True)
