"""What a compiled program sends between chips, read from its text; what is in a loop counts as often as it runs."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4}
BYTES |= {'s64': 8, 'u64': 8, 'f64': 8, 'f8e4m3fn': 1, 'f8e5m2': 1}
KINDS = 'all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute|send|recv'
COLLECTIVE = re.compile(rf'(%[\w.\-]+) = (.*?) ({KINDS})(-start)?\(')
SHAPE = re.compile(r'\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]')
WHILE = re.compile(r' while\(.*condition=(%[\w.\-]+), body=(%[\w.\-]+)')

MESH = r'replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}'


class Collective(NamedTuple):
  """One collective of the program, a chip's share of it."""

  kind: str
  overlapped: bool  # beside other work, rather than waited for
  dcn: bool  # between slices
  times: int  # in a step
  bytes: int  # of output, each time

  @property
  def total(self) -> int:
    return self.times * self.bytes


def collectives(text: str, *, node: int | None = None, rounds: int = 1) -> list[Collective]:
  """Every collective of a compiled program (`compiled.as_text()`), of TPUs or, with `node` of them a machine, GPUs.

  Overlapped are those that the compiler fused with other work or turned into rings beside matmuls, and the ones that
  start and end at different places; a fusion's several steps count once. Of a ragged exchange it is the mean. GPUs
  start all of them, and so do slices what they send: there those are overlapped that have other work in between.
  A loop without a count (of tokens, until all rows have stopped) runs `rounds` times.
  """
  bodies, entry = _computations(text)
  times = _times(bodies, entry, rounds)
  found, seen = [], set()
  for name, lines in bodies.items():
    if not times[name]:
      continue
    fused_body = name.startswith('%async_collective_fusion') or any('AsyncCollective' in line for line in lines)
    for number, line in enumerate(lines):
      match = COLLECTIVE.search(line)
      if not match:
        continue
      kind, started = match[3], bool(match[4])
      fused = fused_body or 'chain_id=' in line
      channel = re.search(r'channel_id=(\d+)', line)
      if fused:
        key = kind, channel and channel[1]
        if key in seen:
          continue
        seen.add(key)
      dcn = kind in ('send', 'recv')
      overlapped = fused or 'windowed_dot' in name or (started and 'async_collective_name' not in line)
      if dcn:
        overlapped = _work_beside(match[1], lines[number + 1 :])
      if node:
        dcn, overlapped = _spans(line, node), started and _work_beside(match[1], lines[number + 1 :])
      size = _output_bytes(match[2], kind, started)
      if kind == 'ragged-all-to-all':  # the larger side is room for the worst case
        operand = re.search(r'ragged-all-to-all(?:-start)?\((%[\w.\-]+)', line)
        sent = next((other for other in lines if operand and f'{operand[1]} = ' in other), '')
        size = min(size, _output_bytes(sent.split(' = ')[-1].split('(')[0], '', False) or size)
      found.append(Collective(kind, overlapped, dcn, times[name], size))
  return found


def _work_beside(start: str, after: Sequence[str]) -> bool:
  """Whether anything that takes time lies between a start and its end, in a text that is in the order of running."""
  end = next((i for i, line in enumerate(after) if re.search(rf'-done\({re.escape(start)}[,)]', line)), 0)
  return any(re.search(r' (fusion|custom-call|while|dot|convolution)\(', line) for line in after[:end])


def _spans(line: str, node: int) -> bool:
  """Whether a collective's first group, or any pair of it, has devices of several machines; what is not known has."""
  whole = lambda text: [int(n) for n in re.findall(r'\d+', text or '')]
  if pairs := re.search(r'source_target_pairs=\{(.*?)\}\}', line):
    return any(int(a) // node != int(b) // node for a, b in re.findall(r'(\d+),(\d+)', pairs[1]))
  if listed := re.search(r'replica_groups=\{\{([\d,]*)\}', line):
    group = whole(listed[1])
  elif tiled := re.search(r'replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line):
    group = _ids(whole(tiled[2]), whole(tiled[3])).reshape(-1)[: int(tiled[1])]
  elif named := re.search(
    r'replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}', line
  ):
    axes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
    if named[4].replace("'", '').replace(' ', '').split(',') != (over := re.findall(r"'(\w+)'", named[4])):
      return True
    sizes = list(axes.values())
    ids = _ids(whole(named[2]) or sizes, whole(named[3])).reshape(sizes)
    group = ids[tuple(slice(None) if name in over else 0 for name in axes)].reshape(-1)
  else:
    return True
  return len({int(n) // node for n in group}) > 1


def _ids(dims: list[int], order: list[int]) -> np.ndarray:
  """0, 1, ... laid out in `dims`, their axes in another order."""
  ids = np.arange(math.prod(dims)).reshape(dims)
  return ids.transpose(order) if order else ids


def _output_bytes(type_: str, kind: str, started: bool) -> int:
  """A start has inputs and outputs in its type: the larger half is meant, of a permute, which has flags, the first."""
  parts = [BYTES.get(d, 0) * math.prod(int(n) for n in shape.split(',') if n) for d, shape in SHAPE.findall(type_)]
  if not started:
    return sum(parts)
  half = len(parts) // 2
  return sum(parts) // 2 if kind == 'collective-permute' else max(sum(parts[:half]), sum(parts[half:]))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  bodies: dict[str, list[str]] = {}
  current, entry = None, ''
  for line in text.splitlines():
    match = re.match(r'^(ENTRY )?(%[\w.\-]+) \(', line)
    if match and line.rstrip().endswith('{'):
      current = match[2]
      bodies[current] = []
      entry = current if match[1] else entry
    elif line.rstrip() == '}':
      current = None
    elif current is not None:
      bodies[current].append(line)
  return bodies, entry


def _times(bodies: dict[str, list[str]], entry: str, rounds: int) -> Counter[str]:
  """How often each computation runs in a step."""
  times: Counter[str] = Counter()

  def walk(name: str, n: int) -> None:
    times[name] += n
    for line in bodies.get(name, ()):
      if loop := WHILE.search(line):
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        trips = int(known[1]) if known else _trips(bodies[loop[1]], bodies[loop[2]], rounds)
        walk(loop[1], n * trips)
        walk(loop[2], n * trips)
        continue
      called = re.findall(r'(?:calls|to_apply)=(%[\w.\-]+)', line)
      for branches in re.findall(r'branch_computations=\{([^}]*)\}', line):
        called += [branch.strip() for branch in branches.split(',')]
      for other in called:
        walk(other, n)

  walk(entry, 1)
  return times


def _trips(condition: Sequence[str], body: Sequence[str], uncounted: int) -> int:
  """Rounds of a counted loop: its bound over the counter's step (rings are unrolled twice: it is 2 there).

  Of one that asks for something else than a number they are `uncounted`.
  """
  text = '\n'.join(condition)
  constants = {name: int(n) for name, n in re.findall(r'(%[\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)', text)}
  for line in condition:
    compared = re.search(r'ROOT .*compare\((%[\w.\-]+), (%[\w.\-]+)\)', line)
    if compared and compared[2] in constants:
      index = re.search(re.escape(compared[1]) + r' = .*get-tuple-element\(.*index=(\d+)', text)
      return -(-constants[compared[2]] // (_step(body, int(index[1])) if index else 1))
  root = next((line for line in condition if line.lstrip().startswith('ROOT ')), '')
  bound = [n for name, n in constants.items() if re.search(re.escape(name) + r'[,)]', root)]
  return bound[0] if len(bound) == 1 else uncounted


def _step(body: Sequence[str], index: int) -> int:
  """What is added to the element of the loop's state that counts."""
  text = '\n'.join(body)
  constants = {name: int(n) for name, n in re.findall(r'(%[\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)', text)}
  root = next((line for line in body if line.lstrip().startswith('ROOT ')), '')
  match = re.search(r' tuple\((.*?)\)(?:, metadata|, backend|, sharding|$)', root)
  elements = [x.strip() for x in re.sub(r'/\*.*?\*/', '', match[1]).split(',')] if match else []
  if index >= len(elements):
    return 1
  name = elements[index].split()[-1]
  added = re.search(re.escape(name) + r' = .*? add\((%[\w.\-]+), (%[\w.\-]+)\)', text)
  return next((constants[x] for x in added.groups() if x in constants), 1) if added else 1
