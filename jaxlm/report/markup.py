"""Pieces of HTML that every page is made of, and the one look that pages have: light and dark, wide and narrow."""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLOURS = 10  # of curves, as --s0 to --s9

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1f2933;--soft:#f4f6f9;--line:#dde2e8;--faint:#616e7c;--link:#0b69a3;
--alert:#c81e1e;--good:#1b7a43;--s0:#0072b2;--s1:#d55e00;--s2:#00916a;--s3:#b5488a;--s4:#c98a00;--s5:#3aa0de;
--s6:#5f3dc4;--s7:#7a5230;--s8:#7b8794;--s9:#8aa800}
@media (prefers-color-scheme:dark){:root{--bg:#14181d;--fg:#e4e7eb;--soft:#1f252d;--line:#36404c;--faint:#9aa5b1;
--link:#6cb8f0;--alert:#ff7b72;--good:#5fd38d;--s0:#4ea8de;--s1:#ff8c42;--s2:#2ec4a0;--s3:#ee8fc4;--s4:#f2c14e;
--s5:#a5d8ff;--s6:#a48bff;--s7:#c9a083;--s8:#9aa5b1;--s9:#c0d838}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:1100px;margin:1.6rem auto;
padding:0 1rem}
a{color:var(--link)} h1{font-size:1.6rem;margin:0 0 .2rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--line)} h3{font-size:1rem;margin:.8rem 0 .2rem}
p{margin:.3rem 0} .faint,small{color:var(--faint)} .alert{color:var(--alert)}
.tag{font-size:.8rem;border:1px solid var(--line);border-radius:99px;padding:.05rem .6rem;color:var(--faint);
white-space:nowrap}
.figures{display:flex;flex-wrap:wrap;gap:.7rem;margin:1rem 0}
.figures div{background:var(--soft);border-radius:8px;padding:.5rem .9rem;font-size:.88rem}
.figures b{display:block;font-size:1.3rem;font-variant-numeric:tabular-nums}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:1.2rem 1rem}
figure{margin:0;min-width:0} figcaption{font-weight:600} figcaption small{font-weight:400}
svg{width:100%;height:auto;display:block}
.key{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.82rem;color:var(--faint);margin:.1rem 0}
.key b{color:var(--fg);font-weight:500;font-variant-numeric:tabular-nums}
.chip{display:inline-block;width:1.1em;border-top:3px solid;margin-right:.35em;vertical-align:middle}
.chip.dashed{border-top-style:dotted}
.spot{display:inline-block;width:.8em;height:.8em;border-radius:3px;margin-right:.35em;vertical-align:-.05em}
.wide{overflow-x:auto} table{border-collapse:collapse;margin:.4rem 0}
td,th{padding:.15rem 1.2rem .15rem 0;text-align:left;vertical-align:top} th{font-weight:600}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.ruled td,.ruled th{border-top:1px solid var(--line)}
.ruled td{overflow-wrap:anywhere;max-width:20rem}
.ruled td:not(.n){min-width:7rem} .answers td{white-space:pre-wrap} .ends td:first-child{white-space:nowrap}
.tables{display:flex;flex-wrap:wrap;gap:.5rem 2.5rem}
.tables td{overflow-wrap:anywhere}
.chapter td,.chapter th{border-top:1px solid var(--line);padding:.4rem .8rem .4rem 0;min-width:8rem;max-width:20rem;
overflow-wrap:anywhere}
.sample{background:var(--soft);border-radius:8px;padding:.5rem .9rem;margin:.5rem 0;overflow-wrap:anywhere}
.sample div{white-space:pre-wrap;margin:.25rem 0} .sample b{color:var(--link);white-space:pre-wrap}
.sample small{display:inline-block;min-width:5.2rem;margin-right:.6rem}
.bar{display:flex;height:1.5rem;border-radius:6px;overflow:hidden;margin:.5rem 0 .3rem;background:var(--soft)}
.bar i{display:block;min-width:1px}
.tree ul{list-style:none;margin:0;padding-left:1.3rem} .tree>ul{padding-left:0}
.tree li{position:relative;padding:.15rem 0} .tree li li::before{content:"";position:absolute;left:-.8rem;top:0;
width:.65rem;height:.95rem;border:solid var(--line);border-width:0 0 2px 2px;border-bottom-left-radius:5px}
.tree li li:not(:last-child)::after{content:"";position:absolute;left:-.8rem;top:.9rem;bottom:0;
border-left:2px solid var(--line)}
.tree .this{font-weight:700} details pre{background:var(--soft);padding:1rem;border-radius:8px;overflow:auto}
summary{cursor:pointer;color:var(--link)}
"""

escape = html.escape


def document(title: str, parts: Iterable[str]) -> str:
  """A whole page."""
  head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
  head += f'<title>{escape(title)}</title><style>{STYLE}</style>'
  return f'<!doctype html><html lang="en">{head}<body>{"".join(parts)}</body></html>\n'


def section(title: str, *parts: str) -> str:
  """A heading and what is below it; nothing where nothing is."""
  body = ''.join(parts)
  return f'<h2>{escape(title)}</h2>{body}' if body else ''


def number(value: float | None) -> str:
  """For a reader: whole numbers with their thousands, others to three digits behind the point, or of their own."""
  if value is None:
    return ''
  if float(value).is_integer():
    return f'{value:,.0f}'
  digits = next((f',.{n}f' for n, least in ((0, 1e3), (1, 1e2), (3, 1e-2)) if abs(value) >= least), '.2e')
  return f'{value:{digits}}'


def duration(seconds: float) -> str:
  """'3:05' or '2:03:05'."""
  whole = round(seconds)
  hours = f'{whole // 3600}:{whole // 60 % 60:02}' if whole >= 3600 else f'{whole // 60}'
  return f'{hours}:{whole % 60:02}'


def table(title: str, values: Mapping[str, Any]) -> str:
  """Two columns: names and values."""
  body = ''.join(f'<tr><td>{escape(k)}</td>{cell(v)}</tr>' for k, v in values.items())
  return f'<div><h3>{escape(title)}</h3><table>{body}</table></div>'


def cell(value: Any) -> str:
  """A value in a table: numbers to the right."""
  if isinstance(value, int | float) and not isinstance(value, bool):
    return f'<td class="n">{number(value)}</td>'
  return f'<td>{escape(str(value))}</td>'


def grid(header: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = 'ruled') -> str:
  """A table with a header, all of it escaped."""
  head = ''.join(f'<th>{escape(one)}</th>' for one in header)
  body = ''.join('<tr>' + ''.join(map(cell, row)) + '</tr>' for row in rows)
  return f'<div class="wide"><table class="{kind}"><tr>{head}</tr>{body}</table></div>' if body else ''


def chip(colour: int, dashed: bool = False) -> str:
  """A piece of a curve, for its legend."""
  look = f'class="chip{" dashed" * dashed}" style="border-top-color:var(--s{colour % COLOURS})"'
  return f'<span {look} aria-hidden="true"></span>'


def shares(values: Mapping[str, float], said: Mapping[str, str]) -> str:
  """One bar, cut by shares, and what each part is."""
  whole = sum(values.values())
  if whole <= 0:
    return ''
  bar, key = [], []
  for i, (name, value) in enumerate(values.items()):
    colour = f'background:var(--s{i})' if i < COLOURS else f'background:var(--s{i % COLOURS});opacity:.55'
    bar.append(f'<i style="width:{100 * value / whole:.3f}%;{colour}" title="{escape(name)}"></i>')
    spot = f'<span class="spot" style="{colour}"></span>'
    key.append(f'<span>{spot}{escape(name)} <b>{value / whole:.1%}</b> {escape(said[name])}</span>')
  return f'<div class="bar">{"".join(bar)}</div><div class="key">{"".join(key)}</div>'
