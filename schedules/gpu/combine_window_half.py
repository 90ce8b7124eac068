"""`combine_window` in compute mode "half": products with the window by tensor cores."""

from __future__ import annotations

from tvm import DataType
from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.combine_window_half import WARPS
from kivi_tvm.ops.fragments import QUERIES, FullTile
from kivi_tvm.ops.merge_parts import CHUNK_PARTS, PART_SUMS
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.async_copy import SCOPE
from kivi_tvm.schedules.mma import mma, transpose
from kivi_tvm.schedules.primitives import extent_of
from kivi_tvm.schedules.threads import (
    WorkGroup,
    by_lane,
    keep_in_registers,
    over_threads,
    unroll,
)
from kivi_tvm.targets import Hardware

LARGE = "warp_acc", "run_acc", "parts_of", "parts_acc", "new_acc_parts"
LOADS = "q_load", "k_near", "v_near"
BY_LANE = (
    "q_pair", "start", "start_acc", "dot_start", "k_pair", "score", "own_max", "max_of_2",
    "max_of_4", "new_ref", "keep", "prob", "own_sum", "keep_total", "keep_acc", "keep_ref",
    "prob_row", "v_pair", "sum_of_2", "sum_of_4", "sum_of_8", "warp_stat", "warp_acc",
)  # fmt: skip
PRODUCTS = "dot", "out_of_values"
ROW_TILES = 1, 2, 4, 8
WIDE_HEAD = 128  # beyond it the sums of partial results take the registers of two rows


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """Rows of a tile share the window, and the sums of partial results take registers for each."""
    fits = [n for n in ROW_TILES if shared_bytes(key, n, WARPS) <= hardware.dynamic_bytes]
    options = sorted({min(n, key.rows) for n in fits})
    default = min(4 if key.head_dim <= WIDE_HEAD else 2, options[-1])
    return {"row_tile": (options, default), "warps": ((2, 4, WARPS), WARPS)}


def shared_bytes(key: KernelKey, rows: int, warps: int) -> int:
    """Shared memory of a work-group: what warps have, and of partial results."""
    rows, D = min(rows, QUERIES), key.head_dim
    return 4 * rows * ((warps + PART_SUMS + 5) * D + 2 * CHUNK_PARTS + 2 * warps)


def min_blocks(key: KernelKey) -> int:
    """Two where registers suffice: wide heads take more of them, and many addresses do."""
    wide = key.head_dim > WIDE_HEAD
    return 1 if wide or FullTile(key.head_dim).channels_apart == 2 else 2


def attend_by_warps(sch: Schedule, hardware: Hardware) -> WorkGroup:
    """Schedule the window for warps; their work-group."""
    warp = sch.get_loops(sch.get_sblock("warp"))[-1]
    group = WorkGroup(extent_of(sch, warp), hardware.warp)
    # 0. what is large is allocated at launch; TVM takes all of that for one buffer, and would put
    # barriers between any two accesses
    for name in LARGE:
        sch.set_scope(sch.get_sblock(name), 0, SCOPE)
    over_threads(sch, sch.get_sblock("q_near"), group)
    # 1. what a warp computes lies in the registers of its lanes, loaded all before the first use
    keep_in_registers(sch, sch.get_sblock("warp"))
    for name in LOADS:
        block = sch.get_sblock(name)
        by_lane(sch, block, extent_of(sch, sch.get_loops(block)[-1]))
    for name in BY_LANE:
        by_lane(sch, sch.get_sblock(name))
    # 2. products and the transpose by instructions of the warp
    dtype = str(DataType(sch.get(sch.get_sblock("k_near")).writes[0].source.dtype))
    for name in PRODUCTS:
        *outer, row, _, _ = sch.get_loops(sch.get_sblock(name))
        sch.tensorize(row, mma(dtype))
        unroll(sch, outer)
    *outer, lane = sch.get_loops(sch.get_sblock("prob_pair"))
    sch.tensorize(lane, transpose())
    unroll(sch, outer)
    for name in ("key_step", "value_product"):
        unroll(sch, sch.get_loops(sch.get_sblock(name)))
    # 3. the warps of a work-group, joined through shared memory
    sch.bind(warp, "threadIdx.y")
    for name in ("run_stat", "run_acc"):
        over_threads(sch, sch.get_sblock(name), group)
    return group
