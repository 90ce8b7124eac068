"""Sums of a work-group over what its threads load first, all of it, into registers."""

from __future__ import annotations

from tvm import DataType
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV

from kivi_tvm.schedules.primitives import extent_of, largest_divisor
from kivi_tvm.schedules.threads import WorkGroup, bind_threads, over_spatial, unroll

LOAD_BYTES = 16  # of a thread at once


def wide(sch: Schedule, loads: SBlockRV) -> int:
    """Elements of what a block loads that a thread loads at once."""
    return LOAD_BYTES // DataType(sch.get(loads).writes[0].source.dtype).itemsize


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
