"""The work list of `attend`: which splits of which rows, in an order that balances threads."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

IDLE = (-1, 0)  # an item that is skipped


def work_list(packed: list[int], split: int, heads: int, threads: int) -> Tensor:
    """Work items `int32 [n, 2]` of (row, split) over the packed tokens of every row.

    A split never depends on other rows; only the order does. A kernel's parallel loop runs over
    heads x items and gives every thread one contiguous part, so when the heads divide evenly among
    the threads any order balances. Otherwise `threads / gcd(threads, heads)` threads share one
    head's items: these are dealt out, largest first, and padded to parts of equal count.

    Parameters
    ----------
    packed : list of int
        Packed tokens of each row.
    split : int
        Tokens per item.
    heads, threads : int
        KV heads and threads of the loop.
    """
    items = [
        (min(split, tokens - first), row, first // split)
        for row, tokens in enumerate(packed)
        for first in range(0, tokens, split)
    ]
    parts = threads // gcd(threads, heads)
    if parts == 1 or len(items) <= parts:
        chosen = [(row, index) for _, row, index in items]
    else:
        chosen = _dealt(items, parts)
    return torch.tensor(chosen, dtype=torch.int32).reshape(-1, 2)


def _dealt(items: list[tuple[int, int, int]], parts: int) -> list[tuple[int, int]]:
    """Items in `parts` runs of equal count and nearly equal cost, short runs padded."""
    bins: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    cost = [0] * parts
    for tokens, row, index in sorted(items, key=lambda item: -item[0]):
        lightest = min(range(parts), key=cost.__getitem__)
        bins[lightest].append((row, index))
        cost[lightest] += tokens
    longest = max(map(len, bins))
    return [item for part in bins for item in part + [IDLE] * (longest - len(part))]
