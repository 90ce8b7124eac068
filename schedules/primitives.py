"""Moves that more than one schedule uses: each a few lines over `s_tir.Schedule`."""

from __future__ import annotations

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

SUMMED_LANES = 4


def largest_divisor(extent: int, limit: int) -> int:
    """The largest divisor of `extent` that is at most `limit`."""
    return max(d for d in range(1, min(extent, limit) + 1) if extent % d == 0)


def extent_of(sch: Schedule, loop: LoopRV) -> int:
    """The constant extent of a loop."""
    return int(sch.get(loop).extent)


def split_off(sch: Schedule, loop: LoopRV, limit: int) -> tuple[LoopRV, LoopRV]:
    """Split an inner loop of at most `limit` iterations off, with no remainder."""
    inner = largest_divisor(extent_of(sch, loop), limit)
    outer, tile = sch.split(loop, [None, inner])
    return outer, tile


def vectorize_last(sch: Schedule, block: SBlockRV, lanes: int) -> None:
    """Vectorize the innermost loop of an elementwise block, `lanes` at a time."""
    loop = sch.get_loops(block)[-1]
    _, lane = split_off(sch, loop, lanes)
    sch.vectorize(lane)


def reduce_by_lanes(sch: Schedule, block: SBlockRV, lanes: int) -> None:
    """Reduce the innermost loop in `lanes` partial results first.

    LLVM keeps the order of float additions, so a serial reduction is never vectorized.
    """
    _, lane = split_off(sch, sch.get_loops(block)[-1], lanes)
    partial = sch.rfactor(lane, factor_axis=-1)
    *_, step, lane = sch.get_loops(partial)
    sch.vectorize(lane)
    init = sch.decompose_reduction(partial, step)
    sch.vectorize(sch.get_loops(init)[-1])
    sch.decompose_reduction(block, sch.get_loops(block)[-1])


def register_tile(rows: int, vectors: int, accumulators: int) -> tuple[int, int]:
    """Divisors of `rows` and `vectors` whose tile loads least for each multiplication.

    A tile of `r` x `v` accumulators takes `r + v` loads for `r v` multiplications.
    """
    tiles = [
        (r, v)
        for r in range(1, rows + 1)
        for v in range(1, vectors + 1)
        if rows % r == 0 and vectors % v == 0 and r * v <= accumulators
    ]
    return min(tiles, key=lambda tile: sum(tile) / (tile[0] * tile[1]))


def fill_registers(sch: Schedule, block: SBlockRV) -> None:
    """Unroll and vectorize the innermost loops (row, vector, lane) of a register tile."""
    row, vector, lane = sch.get_loops(block)[-3:]
    sch.unroll(row)
    sch.unroll(vector)
    sch.vectorize(lane)


def contract_in_registers(
    sch: Schedule,
    block: SBlockRV,
    consumer: SBlockRV,
    rows: int,
    vectors: int,
    lanes: int,
) -> None:
    """Run a contraction as register tiles of `rows` x `vectors`, reduced outside the tile.

    `block` has the loops (row, lane axis, *reduced), the last of several unrolled; its only
    consumer is elementwise over (row, lane axis). Every code is unpacked once per tile for all its
    rows. A vector has `lanes` elements, not the whole tile's: one of 80 is no power of two, and one
    of 32 spans two groups of 16 (`attend` took 7 to 12 times as long).
    """
    row, lane = sch.get_loops(consumer)
    row_tile, row = split_off(sch, row, rows)
    vector, lane = split_off(sch, lane, lanes)
    tile, vector = split_off(sch, vector, vectors)
    sch.reorder(row_tile, tile, row, vector, lane)
    sch.compute_at(block, tile, preserve_unit_loops=True)
    sch.set_scope(block, 0, "local")
    fill_registers(sch, consumer)
    first = len(sch.get_loops(consumer)) - 3  # compute_at put the block beside these
    row, lane, *reduced = sch.get_loops(block)[first:]
    vector, lane = split_off(sch, lane, lanes)
    sch.reorder(*reduced, row, vector, lane)
    if len(reduced) > 1:
        sch.unroll(reduced[-1])
    fill_registers(sch, block)
    fill_registers(sch, sch.decompose_reduction(block, reduced[0]))


def dot_by_lanes(sch: Schedule, block: SBlockRV, rows: int, columns: int, lanes: int) -> None:
    """Run dot products of contiguous operands in `lanes` partial results, as register tiles.

    `block` has the loops (row, column, reduced axis); a tile has `rows` x `columns` results.
    """
    # 1. one partial result per lane
    _, lane = split_off(sch, sch.get_loops(block)[-1], lanes)
    partial = sch.rfactor(lane, factor_axis=-1)
    row, column, step, lane = sch.get_loops(partial)
    row_tile, row = split_off(sch, row, rows)
    tile, column = split_off(sch, column, columns)
    sch.reorder(row_tile, tile, step, row, column, lane)
    fill_registers(sch, partial)
    fill_registers(sch, sch.decompose_reduction(partial, step))
    # 2. their sums, four lanes at a time instead of one scalar addition per lane
    reduce_by_lanes(sch, block, SUMMED_LANES)


def reduce_over_rows(sch: Schedule, block: SBlockRV, lanes: int) -> None:
    """Reduce the outer of two loops (reduced, lane axis), `lanes` elements of the axis at once."""
    step, axis = sch.get_loops(block)[-2:]
    outer, lane = split_off(sch, axis, lanes)
    sch.reorder(outer, step, lane)
    sch.vectorize(lane)
    start = sch.decompose_reduction(block, step)
    sch.vectorize(sch.get_loops(start)[-1])


def parallelize(sch: Schedule, block: SBlockRV) -> None:
    """Give all loops around a block to threads as one."""
    sch.parallel(sch.fuse(*sch.get_loops(block)))
