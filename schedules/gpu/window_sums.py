"""Sums over the window and partial results: some each by the warps of a work-group."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from tvm import DataType
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV

from kivi_tvm.ops.window_sums import FEW, SUMS
from kivi_tvm.schedules.mma import mma, transpose
from kivi_tvm.schedules.primitives import extent_of
from kivi_tvm.schedules.thread_sums import wide
from kivi_tvm.schedules.threads import (
    WorkGroup,
    by_lane,
    keep_in_registers,
    over_threads,
    unroll,
)

LOADS = "k_near", "v_near", "near"
BY_LANE = (
    "q_pair", "start", "start_acc", "dot_start", "k_pair", "score", "own_max", "max_of_2",
    "max_of_4", "new_ref", "keep", "prob", "own_sum", "keep_total", "keep_acc", "keep_ref",
    "prob_row", "v_pair", "level", "part_mass", "part_ref", "part_keep", "part_gain", "part_total",
    "part_acc", "keep_part_ref", "sum_of_2", "sum_of_4", "sum_of_8", "warp_stat", "warp_acc",
)  # fmt: skip
PRODUCTS = "dot", "out_of_values"


def window_sums(
    sch: Schedule,
    blocks: Mapping[str, SBlockRV],
    queries: SBlockRV,
    group: WorkGroup,
) -> None:
    """Schedule the sums that have `blocks` inside, loads of their queries and what ends them."""
    # 1. what a warp computes lies in the registers of its lanes, loaded all before the first use
    sch.set_scope(queries, 0, "warp")
    keep_in_registers(sch, blocks["partial"])
    loads = [queries, *(blocks[name] for name in LOADS)]
    for block in loads:
        by_lane(sch, block, min(wide(sch, block), extent_of(sch, sch.get_loops(block)[-1])))
    for name in BY_LANE:
        by_lane(sch, blocks[name])
    # 2. products and the transpose by instructions of the warp
    dtype = str(DataType(sch.get(blocks["k_near"]).writes[0].source.dtype))
    for name in PRODUCTS:
        *outer, row, _, _ = sch.get_loops(blocks[name])
        sch.tensorize(row, mma(dtype))
        unroll(sch, outer)
    *outer, lane = sch.get_loops(blocks["prob_pair"])
    sch.tensorize(lane, transpose())
    unroll(sch, outer)
    for name in ("key_step", "value_product"):
        unroll(sch, sch.get_loops(blocks[name]))
    # 3. a warp computes every so many-th sum; they are joined through shared memory
    _, warp = sch.split(sch.get_loops(blocks["partial"])[-1], [None, group.warps])
    sch.bind(warp, "threadIdx.y")
    for name, sums in product(("out", "lse"), (FEW, SUMS)):
        over_threads(sch, sch.get_sblock(f"{name}_of_{sums}"), group)
