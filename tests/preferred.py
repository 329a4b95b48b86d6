"""Small prepared folders of preferences, and batches of their rows."""

import json
import random
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxlm.data import pairs, prepare, prepared, tokenizer

TEXT = 'red green blue apples are the sea is so grey elephants walk slowly over hills and far away'
WORDS = TEXT.split()


def rows(count: int, seed: int = 0) -> list[dict]:
  """Pairs of answers of various lengths, with margins."""
  draw = random.Random(seed)
  said = lambda most: ' '.join(draw.choices(WORDS, k=draw.randint(1, most)))
  return [
    {'prompt': f'{i} {said(5)}?', 'chosen': f'{said(7)}.', 'rejected': f'{said(9)}!', 'margin': draw.randint(0, 8) / 8}
    for i in range(count)
  ]


def labelled(found: list[dict]) -> list[dict]:
  """The answers of pairs, apart."""
  return [
    {'prompt': row['prompt'], 'completion': row[side], 'label': side == 'chosen'}
    for row in found
    for side in ('chosen', 'rejected')
  ]


def write(path: Path, found: list[dict]) -> str:
  path.write_text('\n'.join(map(json.dumps, found)))
  return str(path)


def vocabulary() -> tokenizer.Tokenizer:
  return tokenizer.train([f'{TEXT} ### Instruction: Response: ? . !'] * 9, 300)


def folder(home: Path, found: list[dict], name: str = 'data', **how) -> prepared.Prepared:
  """Rows in the plain template, whose answers end with the end of a text."""
  _, known, chat = prepare.chat_of('plain', None, vocabulary(), preference=True, max_len=how.pop('max_len', None))
  given = [write(home / f'{name}.jsonl', found)], known, home / name
  prepare.prepare(*given, chat=chat, **({'val_fraction': 0.0} | how))
  return prepared.load(home / name)


def stream(of: prepared.Prepared, seq_len: int, split: str = 'train', **how) -> pairs.PairRows:
  return pairs.PairRows(of.split(split), seq_len, of.tokenizer, **how)


def batch_of(some, numbers=None) -> dict:
  """Rows as one batch."""
  found = [some[i] for i in (range(len(some)) if numbers is None else numbers)]
  return {name: jnp.asarray(np.stack([row[name] for row in found])) for name in found[0]}
