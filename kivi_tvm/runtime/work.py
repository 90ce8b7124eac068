"""The work list of `attend`: which splits of which rows, in an order that balances threads."""

from __future__ import annotations

import torch
from torch import Tensor

from kivi_tvm.runtime.checks import outside_inference_mode

IDLE = (-1, 0)  # an item that is skipped
Item = tuple[int, int]


@outside_inference_mode
def work_list(packed: list[int], split: int, heads: int, threads: int) -> Tensor:
    """Work items `int32 [n, 2]` of (row, split) over the packed tokens of every row.

    A split never depends on other rows; only the order does. The kernel's parallel loop runs over
    items x heads and gives every thread one contiguous part of equal count. In their natural order
    the items of a ragged batch may cost one thread far more than another; dealt out by cost, with
    idle items to make the parts equal, a few items may balance worse than if a thread could stop
    between two heads of one. The better of the two is taken.

    Parameters
    ----------
    packed : list of int
        Packed tokens of each row.
    split : int
        Tokens per item.
    heads, threads : int
        KV heads and threads of the loop.
    """
    cost = {
        (row, first // split): min(split, tokens - first)
        for row, tokens in enumerate(packed)
        for first in range(0, tokens, split)
    }
    orders = [list(cost), _dealt(cost, threads)]
    best = min(orders, key=lambda order: _longest_part(order, cost, heads, threads))
    return torch.tensor(best, dtype=torch.int32).reshape(-1, 2)


@outside_inference_mode
def every_split(rows: int, splits: int, device: torch.device) -> Tensor:
    """Work items `int32 [rows * splits, 2]` of every (row, split).

    First splits first: those that rows have no tokens for come last, where they do not take the
    places of others between them (with work-groups of two warps, 8 rows of 8k tokens took 33 us on
    an H100, and take 24).
    """
    return torch.cartesian_prod(*map(torch.arange, (splits, rows))).flip(1).int().to(device)


def _dealt(cost: dict[Item, int], parts: int) -> list[Item]:
    """Items in `parts` runs of equal count and nearly equal cost, short runs padded."""
    runs: list[list[Item]] = [[] for _ in range(parts)]
    load = [0] * parts
    for item in sorted(cost, key=cost.__getitem__, reverse=True):
        lightest = load.index(min(load))
        runs[lightest].append(item)
        load[lightest] += cost[item]
    count = max(map(len, runs))
    return [item for run in runs for item in run + [IDLE] * (count - len(run))]


def _longest_part(order: list[Item], cost: dict[Item, int], heads: int, threads: int) -> int:
    """Cost of the most loaded thread, in tokens x heads."""
    units = len(order) * heads
    size = -(-units // threads)
    load = [0] * threads
    for i, item in enumerate(order):
        start, end = i * heads, (i + 1) * heads
        while start < end:
            thread = start // size
            step = min(end, (thread + 1) * size) - start
            load[thread] += step * cost.get(item, 0)
            start += step
    return max(load)
