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
    """Run a contraction over packed words as register tiles of `rows` x `lanes`.

    `block` has the loops (row, lane axis, word, slot); its only consumer is elementwise over
    (row, lane axis). Every code is unpacked once per tile and used by all its rows.
    """
    row, lane = sch.get_loops(consumer)
    row_tile, row = split_off(sch, row, rows)
    tile, lane = split_off(sch, lane, lanes)
    sch.reorder(row_tile, tile, row, lane)
    sch.compute_at(block, tile, preserve_unit_loops=True)
    sch.set_scope(block, 0, "local")
    sch.unroll(row)
    sch.vectorize(lane)
    *_, row, lane, word, slot = sch.get_loops(block)
    sch.reorder(word, slot, row, lane)
    for loop in (slot, row):
        sch.unroll(loop)
    sch.vectorize(lane)
    init = sch.decompose_reduction(block, word)
    *_, row, lane = sch.get_loops(init)
    sch.unroll(row)
    sch.vectorize(lane)
