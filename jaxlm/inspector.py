"""Rows as the model will see them, as tokens and as a page, and what is wrong with the documents in them."""

import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from jaxlm.config import Pretrain
from jaxlm.data import faults
from jaxlm.data import packing as packings
from jaxlm.data.packing import Packing
from jaxlm.data.pairs import PairRows
from jaxlm.data.prepared import MARKER, Prepared, Tokens
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.errors import InputError
from jaxlm.loops import corpus, tuning

PARTS = 8  # tokens that make one character whole, at most; some stand for the end of one and the beginning of another
BAR = 40  # characters of the longest bar


class Token(NamedTuple):
  """A token of a row: its text, id, whether its prediction is learned, its segment and its position there."""

  text: str
  id: int
  loss: bool
  segment: int
  position: int


class Found(NamedTuple):
  """What was seen of a split of a prepared folder; `figures` are in words, by their names."""

  figures: dict[str, str]
  lengths: list[tuple[str, int]]  # tokens of a document, in words, and how many have that
  rows: dict[str, list[Token]]  # by their titles; the document with the fault comes first
  fault: str | None  # the first that was found


def folders(config: Pretrain, say: Callable[[str], None]) -> dict[str, Prepared]:
  """What a run would read; rows of conversations are prepared where the run would prepare them, and find them then."""
  if config.init and not (epath.Path(config.data.path) / MARKER).exists():
    config, _ = tuning.prepared(config, say)
  return corpus.load(config.data.path, config.data.mix, config.data.phases).folders


def inspect(folder: Prepared, split: str, seq_len: int, packing: Packing | None, count: int) -> Found:
  """Checks the documents of a split and takes `count` of its rows, evenly from the first to the last.

  Without a `packing`, conversations are packed by best fit. Raises InputError for a split without a row.
  """
  tokens, tokenizer = folder.split(split), folder.tokenizer
  packing = packing or ('best_fit' if folder.summary.chat else 'concat')
  paired = folder.summary.preference == 'pairs'
  rows = PairRows(tokens, seq_len, tokenizer) if paired else packings.rows(packing, tokens, seq_len, tokenizer)
  packing = 'best_fit' if paired else packing
  if not len(rows):
    raise InputError(f'{folder.path}: no row in {split!r}')
  wrong = faulty(folder, split)
  shown = dict([wrong] if wrong else [])
  numbers = dict.fromkeys(int(i) for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).round())
  for number in numbers:
    row = rows[number]
    told = (
      f'row {number}: {int((row["segment_ids"] > 0).sum())} of {seq_len} places, {int(row["loss_mask"].sum())} learned'
    )
    shown[told] = view(row, tokenizer, packing)
  lengths = np.diff(tokens.document_starts())
  return Found(_figures(folder, split, rows, packing, lengths), histogram(lengths), shown, wrong and wrong[0])


def faulty(folder: Prepared, split: str = 'train') -> tuple[str, list[Token]] | None:
  """The first document of a split that no run should learn: what is wrong with it, and its tokens."""
  fault = faults.first(folder, split)
  if fault is None:
    return None
  return fault.what, document(folder.split(split), fault.start, fault.stop, folder.tokenizer)


def view(row: Mapping[str, np.ndarray], tokenizer: Tokenizer, packing: Packing = 'concat') -> list[Token]:
  """The tokens of a packed row in reading order; what is only predicted, at the end of a segment, comes last in it."""
  found = []
  segments, size = row['segment_ids'], int((row['segment_ids'] > 0).sum())
  stored = tokenizer.inner.id_to_token
  for t in range(size):
    segment, position = int(segments[t]), int(row['positions'][t])
    if t == 0 or segments[t - 1] != segment:
      found.append(Token(stored(int(row['tokens'][t])) or '', int(row['tokens'][t]), False, segment, position))
    crosses = packing == 'concat' and t + 1 < size and segments[t + 1] != segment
    if not crosses:  # else it is the next document's first token
      target = int(row['targets'][t])
      found.append(Token(stored(target) or '', target, bool(row['loss_mask'][t]), segment, position + 1))
  return spelled(found, tokenizer)


def document(tokens: Tokens, start: int, stop: int, tokenizer: Tokenizer) -> list[Token]:
  """A document alone, as it is stored."""
  ids, begins = tokens.read(start, stop)
  learned = tokens.learned(start, stop)
  if len(ids) < 2:
    return spelled([Token(tokenizer.inner.id_to_token(int(i)) or '', int(i), False, 1, 0) for i in ids], tokenizer)
  begins[1:] = False
  sizes = np.zeros(tokenizer.vocab_size, np.int32)
  return view(packings.pack(ids, begins, len(ids) - 1, tokenizer.pad_id, sizes, learned), tokenizer)


def spelled(tokens: Sequence[Token], tokenizer: Tokenizer) -> list[Token]:
  """The tokens with the text that each adds to those before it; control tokens keep their names.

  Of a character that is spread over several tokens the last has all of it, and the others none. What is never
  whole stays as it is stored.
  """
  decode = lambda some: tokenizer.inner.decode([token.id for token in some], skip_special_tokens=False)
  found: list[Token] = []
  parts: list[Token] = []
  before: list[Token] = []  # the last whole character: some decoders leave the space out that a text begins with

  def said(some: list[Token]) -> str:
    if not before or before[0].segment != some[0].segment:
      return decode(some)
    return decode([*before, *some]).removeprefix(decode(before))

  for token in tokens:
    if parts and (parts[0].segment != token.segment or len(parts) == PARTS):
      found += parts
      parts, before = [], []
    alone = said([token])
    if token.id in tokenizer.control_ids or (alone and '\ufffd' not in alone):
      text = token.text if token.id in tokenizer.control_ids else alone
      found += [*parts, token._replace(text=text)]
      parts, before = [], [token]
      continue
    parts.append(token)
    if (text := said(parts)) and '\ufffd' not in text:
      found += [part._replace(text='') for part in parts[:-1]] + [token._replace(text=text)]
      parts, before = [], parts
  return found + parts


def _figures(
  folder: Prepared,
  split: str,
  rows: packings.Rows | packings.BestFitRows | PairRows,
  packing: Packing,
  lengths: np.ndarray,
) -> dict[str, str]:
  summary, seq_len = folder.summary, rows.seq_len
  count, chat = summary.splits[split], summary.chat
  found = {
    'split': f'{split}, {count.documents:,} documents, {count.tokens:,} tokens',
    'rows': f'{len(rows):,} of {seq_len} by {packing}, {rows.fill:.1%} full',
    'lengths': f'{lengths.min():,} to {lengths.max():,} tokens, half of them up to {int(np.median(lengths)):,}, '
    f'{int((lengths > seq_len + 1).sum()):,} longer than a row',
  }
  if isinstance(rows, PairRows):
    found['pairs'] = f'{rows.count:,}, of which {rows.dropped:,} are longer than a row and left out'
  learned = sum(chat['learned'][split].values()) if chat else count.tokens - count.documents
  found['loss'] = f'{learned:,} tokens, {learned / max(count.tokens, 1):.1%}'
  if chat:
    found['learned'] = chat['learn']
    found['formats'] = ', '.join(f'{kind}: {form}' for kind, form in chat['formats'].items())
    found['truncated'] = f'{sum(chat["truncated"].values()):,} conversations'
  found['dropped'] = ', '.join(f'{sum(counts.values()):,} {why}' for why, counts in summary.dropped.items())
  return found


def histogram(lengths: np.ndarray) -> list[tuple[str, int]]:
  """Documents by their tokens, in powers of two."""
  powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
  counts = np.bincount(powers)
  return [(f'to {1 << power:,}', int(counts[power])) for power in range(int(powers.min()), len(counts))]


def lines(found: Found) -> list[str]:
  """The figures and the lengths, for the terminal."""
  wide, most = max(len(name) for name, _ in found.lengths), max(n for _, n in found.lengths)
  bars = [
    f'  {name.rjust(wide)} {"█" * round(BAR * n / most) or "▏" * bool(n)} {n:,}'.rstrip() for name, n in found.lengths
  ]
  return [f'{name}: {said}' for name, said in found.figures.items()] + ['tokens of a document:', *bars]


STYLE = """
:root { color-scheme: light dark; --on: #0a7a33; --onbg: #d9f2e1; --off: #666; --line: #ccc }
@media (prefers-color-scheme: dark) { :root { --on: #8be0a8; --onbg: #123d22; --off: #999; --line: #444 } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h2 { font-size: 1rem; margin: 2rem 0 .5rem } .fault { color: #c22 }
dl { display: grid; grid-template-columns: 8rem 1fr }
dd { margin: 0 } .bar { background: var(--on); display: inline-block; height: .7rem; margin-right: .5rem }
td { padding: 0 .6rem 0 0; font-variant-numeric: tabular-nums } td:first-child { text-align: right }
.segment { border-left: 4px solid #57c; margin: .5rem 0; padding-left: .6rem; line-height: 2.4 }
.segment:nth-child(even) { border-color: #c75 } .name { font-size: .75rem; color: var(--off); line-height: 1.2 }
.t { display: inline-block; min-width: .7em; font: 13px/1.2 ui-monospace, monospace; white-space: pre;
  vertical-align: top;
  border-bottom: 2px solid var(--line); margin: 0 1px .3rem 0; color: var(--off) }
.t.on { background: var(--onbg); border-color: var(--on); color: var(--on) }
.t small { display: block; font-size: 9px; opacity: .75 }
"""


def page(found: Mapping[str, Found]) -> str:
  """One HTML page with all of it, on which nothing is loaded from elsewhere."""
  parts = []
  for name, one in found.items():
    parts.append(f'<h1>{html.escape(name)}</h1>')
    if one.fault:
      parts.append(f'<p class="fault">{html.escape(one.fault)}</p>')
    parts.append('<dl>' + ''.join(f'<dt>{k}</dt><dd>{html.escape(v)}</dd>' for k, v in one.figures.items()) + '</dl>')
    most = max(n for _, n in one.lengths)
    bars = (
      f'<tr><td>{label}</td><td><span class="bar" style="width:{20 * n / most:.2f}rem"></span>{n:,}</td></tr>'
      for label, n in one.lengths
    )
    parts.append(f'<h2>tokens of a document</h2><table>{"".join(bars)}</table>')
    parts += [f'<section><h2>{html.escape(title)}</h2>{_segments(row)}</section>' for title, row in one.rows.items()]
  legend = '<p><span class="t on">learned<small>id</small></span> <span class="t">only read<small>id</small></span></p>'
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    f'<title>jaxlm inspect</title><style>{STYLE}</style><body>{legend}{"".join(parts)}</body></html>\n'
  )


def _segments(row: Sequence[Token]) -> str:
  found = []
  for segment, tokens in itertools.groupby(row, lambda token: token.segment):
    spans = ''.join(map(_span, tokens))
    found.append(f'<div class="segment"><div class="name">segment {segment}</div>{spans}</div>')
  return f'<div>{"".join(found)}</div>'


def _span(token: Token) -> str:
  told = f'id {token.id}, segment {token.segment}, position {token.position}, loss {"on" if token.loss else "off"}'
  text = html.escape(token.text.replace('\n', '⏎').replace('\t', '⇥'))
  on, after = ' on' if token.loss else '', '<br>' * token.text.endswith('\n')
  return f'<span class="t{on}" title="{told}">{text}<small>{token.id}</small></span>{after}'
