"""`combine_window` in threads: one work-group per row and tile of query heads of a KV head."""

from __future__ import annotations

from math import gcd

from tvm import DataType
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.combine_window import CHUNK_PARTS, PART_SUMS, TOKEN_SUMS, chunk_tokens
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.early_launch import wait
from kivi_tvm.schedules.primitives import extent_of, largest_divisor
from kivi_tvm.schedules.threads import (
    WORDS,
    WorkGroup,
    bind_threads,
    keep_local,
    over_groups,
    over_spatial,
    over_threads,
    reduce_by_warps,
    share,
    unroll,
)
from kivi_tvm.targets import Hardware

SCALARS = "slot", "oldest", "count", "entries"
ELEMENTWISE = (
    "q_scaled", "start_stat", "start_acc", "score", "prob", "mass",
    "new_stat", "new_sum", "new_acc", "keep_stat", "keep_acc", "level", "weight",
    "new_stat_parts", "new_sum_parts", "new_acc_parts", "keep_stat_parts", "keep_acc_parts",
    "out", "lse",
)  # fmt: skip
THREADS, LANES = 256, 8
ROW_TILES, DEFAULT_ROWS = (1, 2, 4), 2
WORD_BYTES = 4
BEGINNING = "later"  # the window was written before `attend`, which may still be running
REDUCED = "max", "sum", "part_max", "part_sum"
# What is summed over tokens or partial results, the loads of it, and the sum of those sums.
SUMS = ("acc", "v_near", "chunk_acc"), ("parts_of", "part_near", "parts_acc")


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """Rows of a tile share what is loaded of the window: two, where there is room for their sums.

    With more of them a single row of a batch would wait longer.
    """
    fits = [n for n in ROW_TILES if shared_bytes(key, n) <= hardware.shared_bytes]
    options = sorted({min(n, key.rows) for n in fits})
    return {"row_tile": (options, min(DEFAULT_ROWS, options[-1]))}


def shared_bytes(key: KernelKey, rows: int) -> int:
    """Shared memory of a work-group: sums of lanes and of threads, and their results."""
    sums = LANES * chunk_tokens(key) + (TOKEN_SUMS + PART_SUMS) * key.head_dim
    results = 8 * key.head_dim + 4 * chunk_tokens(key) + 4 * CHUNK_PARTS + THREADS
    return 4 * rows * (sums + results)


def min_blocks(key: KernelKey) -> int:
    """Registers for two: a thread holds 32 elements of keys and of values, or more."""
    return 2


def combine_window(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `combine_window` for work-groups."""
    loads = sch.get_sblock("k_near")
    channels = extent_of(sch, sch.get_loops(loads)[-1])
    lanes = gcd(LANES, channels // wide(sch, loads))
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


def wide(sch: Schedule, loads: SBlockRV) -> int:
    """Elements of 16 bytes of what a block loads."""
    return WORDS * WORD_BYTES // DataType(sch.get(loads).writes[0].source.dtype).itemsize


def dot_by_lanes(sch: Schedule, block: SBlockRV, loads: SBlockRV, group: WorkGroup) -> None:
    """Give a token to `group.lanes` lanes; all loads are under way before the first sum.

    Few lanes, so that many tokens are under way: with a warp each they took 16 us.
    """
    width = wide(sch, loads)
    # 1. neighbouring keys in the registers of the lanes that multiply with them
    token, channel = sch.get_loops(loads)
    warp, token = sch.split(token, [group.warps, None])
    lane, channel, vector = sch.split(channel, [group.lanes, None, width])
    sch.reorder(warp, lane, token, channel, vector)
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    sch.vectorize(vector)
    unroll(sch, [token, channel])
    sch.set_scope(loads, 0, "local")
    # 2. a sum per lane
    lane, _ = sch.split(sch.get_loops(block)[-1], [group.lanes, None])
    partial = sch.rfactor(lane, factor_axis=0)
    row, token, lane, channel = sch.get_loops(partial)
    warp, token = sch.split(token, [group.warps, None])
    sch.reorder(warp, lane, row, token, channel)
    sch.bind(warp, "threadIdx.y")
    sch.bind(lane, "threadIdx.x")
    result = sch.cache_write(partial, 0, "local")
    sch.reverse_compute_at(result, token)
    unroll(sch, [token, channel])
    # 3. their sum
    over_spatial(sch, block, group)


def sum_by_threads(
    sch: Schedule, block: SBlockRV, loads: SBlockRV, total: SBlockRV, group: WorkGroup
) -> None:
    """Give neighbouring channels of one sum to a thread; loads of 16 bytes first, all of them."""
    width = wide(sch, loads)
    part, *inner, channel = sch.get_loops(loads)
    vectors = extent_of(sch, channel) // width
    at_once = largest_divisor(vectors, group.threads // extent_of(sch, part))
    # 1. what is summed, in registers
    channel, turn, vector = sch.split(channel, [at_once, None, width])
    sch.reorder(part, channel, *inner, turn, vector)
    bind_threads(sch, sch.fuse(part, channel), group)
    sch.vectorize(vector)
    unroll(sch, [*inner, turn])
    sch.set_scope(loads, 0, "local")
    # 2. the sums, to shared memory
    result = sch.cache_write(block, 0, "local")
    part, row, channel, each = sch.get_loops(block)
    channel, neighbour = sch.split(channel, [at_once, None])
    sch.reorder(part, channel, row, each, neighbour)
    thread = bind_threads(sch, sch.fuse(part, channel), group)
    sch.reverse_compute_at(result, thread)
    unroll(sch, [row, each, neighbour])
    sch.decompose_reduction(block, each)
    # 3. their sum, a channel per thread
    over_spatial(sch, total, group)
