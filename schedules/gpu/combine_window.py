"""`combine_window` in threads: one work-group per row and tile of query heads of a KV head."""

from __future__ import annotations

from math import gcd

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import DTYPE_BYTES
from kivi_tvm.ops.combine_window import CHUNK_PARTS, PART_SUMS, TOKEN_SUMS, chunk_tokens
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.early_launch import wait
from kivi_tvm.schedules.gpu import combine_window_half
from kivi_tvm.schedules.primitives import extent_of, has_block
from kivi_tvm.schedules.thread_sums import LOAD_BYTES, dot_by_lanes, sum_by_threads, wide
from kivi_tvm.schedules.threads import (
    WorkGroup,
    keep_local,
    over_groups,
    over_threads,
    reduce_by_warps,
    share,
)
from kivi_tvm.targets import Hardware

SCALARS = "given", "slot", "length", "packed", "oldest", "count", "part", "entries"
ELEMENTWISE = (
    "q_scaled", "start_stat", "start_acc", "score", "prob", "mass",
    "new_stat", "new_sum", "new_acc", "keep_stat", "keep_acc", "level", "weight",
    "new_stat_parts", "new_sum_parts", "new_acc_parts", "keep_stat_parts", "keep_acc_parts",
    "out", "lse",
)  # fmt: skip
THREADS, LANES = 256, 8
ROW_TILES, DEFAULT_ROWS = (1, 2, 4), 2
REDUCED = "max", "sum", "part_max", "part_sum"
# What is summed over tokens or partial results, the loads of it, and the sum of those sums.
SUMS = ("acc", "v_near", "chunk_acc"), ("parts_of", "part_near", "parts_acc")


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """Rows of a tile share what is loaded of the window: two, where there is room for their sums.

    With more of them a single row of a batch would wait longer. One, where fewer lanes than `LANES`
    share a token: two would spill registers on sm_80.
    """
    if key.compute == "half":
        return combine_window_half.offers(key, hardware)
    fits = [n for n in ROW_TILES if shared_bytes(key, n) <= hardware.shared_bytes]
    options = sorted({min(n, key.rows) for n in fits})
    default = DEFAULT_ROWS if lanes_of(key.head_dim * DTYPE_BYTES[key.dtype]) == LANES else 1
    return {"row_tile": (options, min(default, options[-1]))}


def beginning(key: KernelKey, extends: bool) -> str:
    """The window was written before `attend`, which may still be running."""
    del key, extends
    return "later"


def lanes_of(token_bytes: int) -> int:
    """Lanes that share a token, each with loads of 16 bytes."""
    return gcd(LANES, token_bytes // LOAD_BYTES)


def shared_bytes(key: KernelKey, rows: int) -> int:
    """Shared memory of a work-group: sums of lanes and of threads, and their results."""
    sums = LANES * chunk_tokens(key) + (TOKEN_SUMS + PART_SUMS) * key.head_dim
    results = 8 * key.head_dim + 4 * chunk_tokens(key) + 4 * CHUNK_PARTS + THREADS
    return 4 * rows * (sums + results)


def min_blocks(key: KernelKey, hardware: Hardware) -> int:
    """Registers for two: a thread holds 32 elements of keys and of values, or more."""
    return combine_window_half.min_blocks(key, hardware) if key.compute == "half" else 2


def combine_window(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `combine_window` for work-groups."""
    if has_block(sch, "partial"):
        combine_window_half.combine_window_half(sch, hardware)
        return
    loads = sch.get_sblock("k_near")
    channels = extent_of(sch, sch.get_loops(loads)[-1])
    lanes = lanes_of(channels // wide(sch, loads) * LOAD_BYTES)
    group = WorkGroup(THREADS // lanes, lanes)
    for name in SCALARS:
        keep_local(sch, name)
    dot_by_lanes(sch, sch.get_sblock("dot"), loads, group)
    for names in SUMS:
        block, summed, total = map(sch.get_sblock, names)
        sum_by_threads(sch, block, summed, total, group)
    for name in REDUCED:
        reduce_by_warps(sch, sch.get_sblock(name), group)
    for name in ELEMENTWISE:
        over_threads(sch, sch.get_sblock(name), group)
    keep_local(sch, "attended")
    if hardware.early_launch:
        sch.tensorize(sch.get_sblock("attended"), wait())
    share(sch)
    over_groups(sch, sch.get_sblock("head"))
