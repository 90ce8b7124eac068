"""Moves that more than one schedule uses: each a few lines over `s_tir.Schedule`."""

from __future__ import annotations

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV


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


def contract_in_registers(
    sch: Schedule,
    block: SBlockRV,
    consumer: SBlockRV,
    rows: int,
    lanes: int,
) -> None:
    """Run a contraction as register tiles of `rows` x `lanes`, reduced outside the tile.

    `block` has the loops (row, lane axis, *reduced), the last of them unrolled; its only consumer
    is elementwise over (row, lane axis). Every code is unpacked once per tile for all its rows.
    """
    row, lane = sch.get_loops(consumer)
    row_tile, row = split_off(sch, row, rows)
    tile, lane = split_off(sch, lane, lanes)
    sch.reorder(row_tile, tile, row, lane)
    sch.compute_at(block, tile, preserve_unit_loops=True)
    sch.set_scope(block, 0, "local")
    sch.unroll(row)
    sch.vectorize(lane)
    first = len(sch.get_loops(consumer)) - 2  # compute_at put the block beside these
    row, lane, *reduced = sch.get_loops(block)[first:]
    sch.reorder(*reduced, row, lane)
    if len(reduced) > 1:
        sch.unroll(reduced[-1])
    sch.unroll(row)
    sch.vectorize(lane)
    start = sch.decompose_reduction(block, reduced[0])
    row, lane = sch.get_loops(start)[-2:]
    sch.unroll(row)
    sch.vectorize(lane)


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
