"""Moves that more than one schedule uses: each a few lines over `s_tir.Schedule`."""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV, ScheduleError

from kivi_tvm.schedules.choices import choose
from kivi_tvm.schedules.lane_reduce import lane_reduce, lane_reduce_rows


def largest_divisor(extent: int, limit: int) -> int:
    """The largest divisor of `extent` that is at most `limit`."""
    return max(d for d in range(1, min(extent, limit) + 1) if extent % d == 0)


def largest_power_of_two(extent: int, limit: int) -> int:
    """The largest power of two that divides `extent` and is at most `limit`."""
    return next(n for n in (1 << i for i in range(30, -1, -1)) if n <= limit and extent % n == 0)


def extent_of(sch: Schedule, loop: LoopRV) -> int:
    """The constant extent of a loop."""
    return int(sch.get(loop).extent)


def split_off(sch: Schedule, loop: LoopRV, limit: int) -> tuple[LoopRV, LoopRV]:
    """Split an inner loop of at most `limit` iterations off, with no remainder."""
    inner = largest_divisor(extent_of(sch, loop), limit)
    outer, tile = sch.split(loop, [None, inner])
    return outer, tile


def has_block(sch: Schedule, name: str) -> bool:
    """Tell whether the function has a block of this name."""
    try:
        sch.get_sblock(name)
    except ScheduleError:
        return False
    return True


def vectorize_last(sch: Schedule, block: SBlockRV, lanes: int) -> None:
    """Vectorize the innermost loop of an elementwise block, `lanes` at a time."""
    loop = sch.get_loops(block)[-1]
    _, lane = split_off(sch, loop, lanes)
    sch.vectorize(lane)


def choose_width(sch: Schedule, name: str, lanes: int) -> int:
    """Elements that a stage takes at once: half a register, one, or two to hide latency."""
    return choose(sch, f"{name}_width", [lanes // 2, lanes, 2 * lanes], lanes)


def reduce_by_lanes(sch: Schedule, block: SBlockRV, lanes: int) -> None:
    """Reduce the innermost loop in at most `lanes` partial results first, then these by shuffles.

    LLVM keeps the order of float additions, so a serial reduction is never vectorized.
    """
    loop = sch.get_loops(block)[-1]
    lanes = largest_power_of_two(extent_of(sch, loop), lanes)
    _, lane = sch.split(loop, [None, lanes])
    partial = sch.rfactor(lane, factor_axis=-1)
    *_, step, lane = sch.get_loops(partial)
    sch.vectorize(lane)
    init = sch.decompose_reduction(partial, step)
    sch.vectorize(sch.get_loops(init)[-1])
    fold_lanes(sch, block)


def fold_lanes(sch: Schedule, block: SBlockRV) -> None:
    """Reduce the innermost loop, over one vector of partial results, by shuffles if it can be.

    So many rows at once as there are in the loop around it, up to a vector of them.
    """
    *_, row, lane = sch.get_loops(block)
    lanes, kind = extent_of(sch, lane), reduction(sch, block)
    if kind is None or largest_power_of_two(lanes, lanes) != lanes:
        sch.decompose_reduction(block, lane)
        return
    dtype = sch.get(block).body.buffer.dtype
    rows = largest_power_of_two(extent_of(sch, row), lanes)
    if rows == 1:
        sch.decompose_reduction(block, lane)
        sch.tensorize(lane, lane_reduce(kind, dtype, lanes))
        return
    _, row = sch.split(row, [None, rows])
    sch.decompose_reduction(block, row)
    sch.tensorize(row, lane_reduce_rows(kind, dtype, rows, lanes))


def reduction(sch: Schedule, block: SBlockRV) -> str | None:
    """How a block reduces, in `lane_reduce`'s words; None if it is none of them."""
    kinds = {tirx.Add: "sum", tirx.Max: "max", tirx.Min: "min"}
    return kinds.get(type(sch.get(block).body.value))


def divisors(extent: int, limit: int) -> list[int]:
    """The divisors of `extent` that are at most `limit`, in order."""
    return [d for d in range(1, min(extent, limit) + 1) if extent % d == 0]


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
