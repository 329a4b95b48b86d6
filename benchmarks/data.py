"""How fast text becomes batches: `jaxlm prepare` and its loader beside datasets + TRL's packing, in a Markdown table.

python benchmarks/data.py 'corpus/*.jsonl' --tokenizer data/tokenizer.json [--training-rate 2000]

Without `datasets` and `trl` installed only jaxlm's row is printed. Both sides tokenize the same files with the same
tokenizer (jaxlm drops exact duplicates, as always) and give shuffled batches of packed rows with positions as NumPy
arrays; rates of loading are of the process's CPU time, so that other work on the machine does not count.
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from typing import Any

from jaxlm.console import table
from jaxlm.data import batches, packing, prepare, sources, tokenizer


def loading_rate(batch: Callable[[int], Any], rows: int, seq_len: int, count: int = 200) -> float:
  """Tokens a CPU second of `count` batches, after the first."""
  batch(0)
  began = time.process_time()
  for cursor in range(1, count + 1):
    batch(cursor)
  return count * rows * seq_len / (time.process_time() - began)


def ours(specs: list[str], path: str, seq_len: int, rows: int, folder: str) -> tuple[Any, ...]:
  """(name, seconds to prepare, tokens, seconds to pack, share of the rows filled, tokens a second)."""
  began = time.perf_counter()
  prepare.prepare(specs, tokenizer.load(path), folder, val_fraction=0.0)
  prepared = time.perf_counter()
  ready = prepare.load(folder)
  packed = packing.rows('best_fit', ready.split('train'), seq_len, ready.tokenizer)
  stream = batches.Batches(packed, rows, seed=0)
  ended = time.perf_counter()
  rate = loading_rate(stream, rows, seq_len)
  tokens = ready.summary.splits['train'].tokens
  return 'jaxlm, best_fit', prepared - began, tokens, ended - prepared, packed.fill, rate


def theirs(specs: list[str], path: str, seq_len: int, rows: int, folder: str) -> tuple[Any, ...]:
  """The same of datasets and TRL, best-fit decreasing, caches in `folder`."""
  import datasets
  import numpy as np
  import transformers
  import trl

  vocabulary = transformers.PreTrainedTokenizerFast(tokenizer_file=path)
  files = [str(file.path) for file in sources.files(specs)]
  began = time.perf_counter()
  texts = datasets.load_dataset('json', data_files=files, split='train', cache_dir=folder).select_columns(['text'])
  encode = lambda some: {'input_ids': vocabulary(some['text'])['input_ids']}
  encoded = texts.map(encode, batched=True, remove_columns=['text'])
  prepared = time.perf_counter()
  packed = trl.pack_dataset(encoded, seq_len, strategy='bfd_split').with_format('numpy')
  ended = time.perf_counter()
  order = np.random.default_rng(0).permutation(len(packed))
  batch = lambda cursor: packed[order[cursor * rows : (cursor + 1) * rows]]
  tokens = sum(map(len, encoded['input_ids']))
  fill = sum(map(len, packed['input_ids'])) / (len(packed) * seq_len)
  name = f'datasets {datasets.__version__} + TRL {trl.__version__}, bfd_split'
  return name, prepared - began, tokens, ended - prepared, fill, loading_rate(batch, rows, seq_len)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('sources', nargs='+')
  parser.add_argument('--tokenizer', required=True)
  parser.add_argument('--seq-len', type=int, default=256)
  parser.add_argument('--rows', type=int, default=8)
  parser.add_argument('--training-rate', type=float, help='tokens/s that a run trains at: shows how many times faster')
  args = parser.parse_args()
  sides = [ours]
  if importlib.util.find_spec('trl') and importlib.util.find_spec('datasets'):
    sides.append(theirs)
  lines = []
  for side in sides:
    with tempfile.TemporaryDirectory() as folder:
      found = side(args.sources, args.tokenizer, args.seq_len, args.rows, folder)
    lines.append((*found, found[-1] / args.training_rate) if args.training_rate else found)
  header = ('loader', 'prepare s', 'tokens', 'pack s', 'fill', 'loads tokens/s')
  print(table((*header, 'x training')[: len(lines[0])], lines))


if __name__ == '__main__':
  main()
