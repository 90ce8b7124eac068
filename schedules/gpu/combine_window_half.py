"""`combine_window` in compute mode "half": work-groups of warps, products by tensor cores."""

from __future__ import annotations

from itertools import product

from tvm import DataType
from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.combine_window_half import FEW, SUMS
from kivi_tvm.ops.fragments import QUERIES, FullTile
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.async_copy import SCOPE
from kivi_tvm.schedules.choices import choose
from kivi_tvm.schedules.early_launch import wait
from kivi_tvm.schedules.mma import mma, transpose
from kivi_tvm.schedules.primitives import extent_of
from kivi_tvm.schedules.thread_sums import wide
from kivi_tvm.schedules.threads import (
    WIDE_HEAD,
    WorkGroup,
    by_lane,
    keep_in_registers,
    keep_local,
    over_groups,
    over_threads,
    share,
    unroll,
)
from kivi_tvm.targets import Hardware

SCALARS = "given", "slot", "length", "packed", "oldest", "count", "part", "entries", "attended"
LOADS = "q_load", "k_near", "v_near", "near"
BY_LANE = (
    "q_pair", "start", "start_acc", "dot_start", "k_pair", "score", "own_max", "max_of_2",
    "max_of_4", "new_ref", "keep", "prob", "own_sum", "keep_total", "keep_acc", "keep_ref",
    "prob_row", "v_pair", "level", "part_mass", "part_ref", "part_keep", "part_gain", "part_total",
    "part_acc", "keep_part_ref", "sum_of_2", "sum_of_4", "sum_of_8", "warp_stat", "warp_acc",
)  # fmt: skip
PRODUCTS = "dot", "out_of_values"
ROW_TILES = 1, 2, 4, 8
WARPS = 2, 4, SUMS


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """Rows of a tile share what is loaded of the window: by default all that an operand holds."""
    fits = [n for n in ROW_TILES if shared_bytes(key.head_dim, n) <= hardware.dynamic_bytes]
    options = sorted({min(n, key.rows) for n in fits})
    return {"row_tile": (options, options[-1])}


def shared_bytes(head_dim: int, rows: int) -> int:
    """Shared memory of a work-group: its sums."""
    return 4 * SUMS * min(rows, QUERIES) * (head_dim + 2)


def min_blocks(key: KernelKey, hardware: Hardware) -> int:
    """As many as registers suffice for."""
    del hardware
    return resident_groups(key.head_dim)


def resident_groups(head_dim: int) -> int:
    """Two, of as many warps as sums; wide heads take more registers, and many addresses do."""
    return 1 if head_dim > WIDE_HEAD or FullTile(head_dim).channels_apart == 2 else 2


def combine_window_half(
    sch: Schedule, hardware: Hardware, options: tuple[int, ...] = WARPS, default: int = SUMS
) -> None:
    """Schedule `combine_window` for one of so many warps."""
    group = WorkGroup(choose(sch, "warps", options, default), hardware.warp)
    for name in SCALARS:
        keep_local(sch, name)
    if hardware.early_launch:
        sch.tensorize(sch.get_sblock("attended"), wait())
    # 1. what a warp computes lies in the registers of its lanes, loaded all before the first use
    sch.set_scope(sch.get_sblock("q_load"), 0, "warp")
    keep_in_registers(sch, sch.get_sblock("partial"))
    for name in LOADS:
        block = sch.get_sblock(name)
        by_lane(sch, block, min(wide(sch, block), extent_of(sch, sch.get_loops(block)[-1])))
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
    # 3. a warp computes every so many-th sum; they are joined through shared memory
    _, warp = sch.split(sch.get_loops(sch.get_sblock("partial"))[-1], [None, group.warps])
    sch.bind(warp, "threadIdx.y")
    for name, sums in product(("out", "lse"), (FEW, SUMS)):
        over_threads(sch, sch.get_sblock(f"{name}_of_{sums}"), group)
    share(sch, SCOPE)
    over_groups(sch, sch.get_sblock("head"))
