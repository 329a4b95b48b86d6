"""Compression baselines: the n-gram against a plain dictionary version, and xz against what is known of it."""

import hashlib
import json
import lzma
import random
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.evals import compression

SAMPLE = Path(compression.__file__).parents[1] / 'assets' / 'sample'
TEXT = b'abracadabra, abracadabra! bad cab, dab a crab. ' * 2 + b'a bra, a car, a cadaver'


def slow_prob(train: bytes, context: bytes, byte: int, order: int) -> float:
  """Modified Kneser-Ney by the book: p(byte | the last order - 1 bytes of context), with dictionaries."""
  context = context[max(0, len(context) - order + 1) :]

  def table(n: int) -> Counter[bytes]:
    grams = [train[i : i + n] for i in range(len(train) - n + 1)]
    if n == order:
      return Counter(grams)
    before = defaultdict(set)
    for i in range(1, len(train) - n + 1):
      before[train[i : i + n]].add(train[i - 1])
    return Counter({gram: len(bytes_before) for gram, bytes_before in before.items()})

  def prob(h: bytes, n: int) -> float:
    if n == 0:
      return 1 / 256
    c = table(n)
    ones, twos, threes, fours = (sum(v == k for v in c.values()) for k in (1, 2, 3, 4))
    y = ones / max(1, ones + 2 * twos)
    d = [0, 1 - 2 * y * twos / max(1, ones), 2 - 3 * y * threes / max(1, twos), 3 - 4 * y * fours / max(1, threes)]
    d = [0, *(min(max(d[k], 0.1), k) for k in (1, 2, 3))]
    after = {gram: count for gram, count in c.items() if gram[:-1] == h}
    lower = prob(h[1:], n - 1)
    if not after:
      return lower
    own = c[h + bytes([byte])]
    kept_back = sum(d[min(count, 3)] for count in after.values())
    return (own - d[min(own, 3)] + kept_back * lower) / sum(after.values())

  return prob(context, len(context) + 1)


def learnable_text(size: int, seed: int) -> bytes:
  """Words drawn with Zipf-like weights from a fixed small vocabulary."""
  rng = random.Random(11)
  words = [bytes(rng.choices(b'abcdefg', k=rng.randint(1, 6))) for _ in range(60)]
  draw = random.Random(seed)
  text = b' '.join(draw.choices(words, [1 / (k + 1) for k in range(60)], k=size))
  return text[:size]


def test_ngram_equals_the_plain_version():
  train, heldout = learnable_text(2000, 1), learnable_text(31, 2) + b'zab\x00a'
  for order in (1, 2, 3):
    got = compression.ngram_probs(train, heldout, order)
    want = [slow_prob(train, heldout[:i], byte, order) for i, byte in enumerate(heldout)]
    np.testing.assert_allclose(got, want, rtol=1e-12)
  assert compression.ngram_probs(b'ab', b'ab', 2)[1] == pytest.approx(slow_prob(b'ab', b'a', ord('b'), 2))


@pytest.mark.slow(but='1-train0')
@pytest.mark.parametrize('train', [TEXT, b'aaaaaaaa', b'ab', b'a', b'', bytes(range(256)) * 3])
@pytest.mark.parametrize('order', [1, 2, 5, 8])
def test_probabilities_sum_to_one(train, order):
  for context in (b'', b'a', b'abr', b'abracad', b'\xff\xfe\x00zzzzzz'):
    probs = [compression.ngram_probs(train, context + bytes([b]), order)[-1] for b in range(256)]
    assert min(probs) > 0
    assert sum(probs) == pytest.approx(1, abs=1e-12)


def test_ngram_learns_from_train_and_not_from_heldout():
  train, same, other = learnable_text(20_000, 3), learnable_text(4000, 4), bytes(range(128, 256)) * 8
  assert compression.ngram_bits_per_byte(train, same) < 2.4 < 7 < compression.ngram_bits_per_byte(train, other)
  assert compression.ngram_bits_per_byte(b'', same) == 8
  short = compression.ngram_probs(train, same[:100])
  np.testing.assert_array_equal(short, compression.ngram_probs(train, same)[:100])
  assert compression.ngram_bits_per_byte(train, same, 5) < compression.ngram_bits_per_byte(train, same, 2)


def test_ngram_keys_do_not_collide():
  """Eight bytes fill the integer: the two contexts differ in their first byte alone."""
  train = b'A234567x' * 50 + b'B234567y' * 50
  got = compression.ngram_probs(train, b'A234567x' + b'B234567y', 8)
  assert got[7] > 0.9 and got[15] > 0.9


def test_xz_alone_and_given_train():
  train, heldout = learnable_text(30_000, 5), learnable_text(5000, 6)
  alone = compression.xz_bits_per_byte(heldout)
  assert alone == pytest.approx(8 * len(lzma.compress(heldout, preset=9)) / 5000, abs=0.02)
  given = compression.xz_conditional_bits_per_byte(train, heldout)
  assert 0 < given < alone
  assert compression.xz_conditional_bits_per_byte(b'', heldout) == pytest.approx(alone, abs=0.2)


def test_xz_window_covers_the_whole_train():
  """Random bytes at the far end of the training text are still found."""
  noise = random.Random(0).randbytes(3000)
  train = noise + learnable_text(300_000, 7)
  assert compression.xz_conditional_bits_per_byte(train, noise) < 0.5
  assert compression.xz_bits_per_byte(noise) > 8


def test_errors():
  for function in (
    compression.xz_bits_per_byte,
    lambda h: compression.xz_conditional_bits_per_byte(b'a', h),
    lambda h: compression.ngram_bits_per_byte(b'a', h),
  ):
    with pytest.raises(InputError, match='empty'):
      function(b'')
  for order in (0, 9):
    with pytest.raises(InputError, match=f'order {order}'):
      compression.ngram_probs(b'abc', b'abc', order)


def test_sample_text():
  """The shipped sample's figures, which the README's comparison rests on; renew them when the sample changes."""
  train, heldout = bytearray(), bytearray()
  lines = [line for file in sorted(SAMPLE.glob('*.jsonl')) for line in file.read_text('utf-8').strip().split('\n')]
  documents = [json.loads(line)['text'] for line in lines]
  for text in documents:
    held = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 < 0.06
    (heldout if held else train).extend(text.encode())
  assert (len(documents), len(train), len(heldout)) == (256, 954_102, 73_202)
  start = time.perf_counter()
  assert compression.ngram_bits_per_byte(bytes(train), bytes(heldout)) == pytest.approx(2.4527, abs=1e-4)
  assert time.perf_counter() - start < 10
  assert compression.xz_bits_per_byte(bytes(heldout)) == pytest.approx(2.941, abs=0.01)
  assert compression.xz_conditional_bits_per_byte(bytes(train), bytes(heldout)) == pytest.approx(2.372, abs=0.01)
