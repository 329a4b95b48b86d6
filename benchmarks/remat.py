"""What each remat policy costs a token at the batch that fills 90 % of the memory of chips that are not here.

JAX_PLATFORMS=cpu python benchmarks/remat.py configs/pods/llama3_8b_v5e_256.py --topology v5e-256
"""

import argparse
import dataclasses
import sys

from jaxlm import config as configs
from jaxlm import plan, topology
from jaxlm.console import table

POLICIES = ('full', 'attn_values,attn_out,mlp_out', 'attn_values,attn_out,mlp_out,mlp_up,mlp_gate', 'dots', 'none')
HEADER = (
  'remat',
  'rows a chip',
  'peak GiB',
  'waited for, bytes/token',
  'beside work, bytes/token',
  'again, MFLOP/token',
)


def filled(config, on, remat: str, share: float):
  """(rows, plan) of the most rows a chip within `share` of the memory; 0 and that of one row if that is not."""
  tried: dict[int, plan.Plan] = {}

  def at(rows: int) -> plan.Plan:
    if rows not in tried:
      data = dataclasses.replace(config.data, global_batch=rows * on.size)
      compute = dataclasses.replace(config.compute, remat=remat, accum=1)
      tried[rows] = plan.plan(dataclasses.replace(config, data=data, compute=compute), on)
      print(f'{remat}: {rows} rows a chip, {tried[rows].peak_gib:.2f} GiB', file=sys.stderr, flush=True)
    return tried[rows]

  fits = lambda rows: at(rows).peak_gib <= share * on.limit_gib
  if not fits(1):
    return 0, at(1)
  low, high = 1, 2
  while fits(high):
    slope = (at(high).peak_gib - at(low).peak_gib) / (high - low)
    low, high = high, max(high + 1, int(high + (share * on.limit_gib - at(high).peak_gib) / slope))
  while high - low > 1:
    slope = (at(high).peak_gib - at(low).peak_gib) / (high - low)
    guess = int(low + (share * on.limit_gib - at(low).peak_gib) / slope) if at(high).fits else (low + high) // 2
    middle = min(max(guess, low + 1), high - 1)
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low, at(low)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('config')
  parser.add_argument('--topology', required=True)
  parser.add_argument('--policies', nargs='*', default=POLICIES)
  parser.add_argument('--share', type=float, default=0.9)
  args = parser.parse_args()
  config, on = configs.load(args.config), topology.parse(args.topology)
  once, rows = None, []
  for remat in reversed(args.policies):
    n, one = filled(config, on, remat, args.share)
    tokens = one.tokens_per_step / one.chips
    flops = one.flops_per_chip / tokens
    once = once or flops
    sent = (one.exposed_gib * 2**30 / tokens, one.overlapped_gib * 2**30 / tokens) if n else ('', '')
    again = round((flops - once) / 1e6)
    rows.append((remat, n, one.peak_gib, *(x and round(x) for x in sent), again))
  print(table(HEADER, rows))


if __name__ == '__main__':
  main()
