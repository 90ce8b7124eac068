"""`attend` in compute mode "half": work-groups of warps, products by tensor cores."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.ops.attend_half import FETCH
from kivi_tvm.schedules.mma import mma, transpose
from kivi_tvm.schedules.primitives import extent_of
from kivi_tvm.schedules.threads import (
    WorkGroup,
    by_lane,
    keep_in_registers,
    keep_local,
    over_groups,
    over_spatial,
    over_threads,
    share,
    unroll,
)
from kivi_tvm.targets import Hardware

LOADS = {  # elements of 16 bytes
    "key_word": 4, "key_zero": 8, "key_scale": 8,
    "value_word": 4, "value_zero": 8, "value_scale": 8, "top_scale": 8,
}  # fmt: skip
BY_LANE = (
    *LOADS, *FETCH, "q_raw", "q_own", "q_near", "q_top", "q_unit", "q_pair", "q_low", "gain",
    "start", "start_acc", "start_zero_acc", "key_zero_pair", "q_zero_start", "dot_start", "q_key",
    "key_code", "key_zero_of", "score", "own_max", "max_of_2", "max_of_4", "own_top", "top_of_2",
    "top_of_4", "top_of_8", "top_of_16", "lift", "new_ref", "keep", "prob", "own_sum", "keep_total",
    "keep_acc", "keep_zero_acc", "keep_ref", "prob_row", "valid", "value_zero_pair", "prob_low",
    "prob_fold", "value_code", "sum_of_2", "sum_of_4", "sum_of_8", "warp_stat", "zero_of",
    "warp_acc",
)  # fmt: skip
PRODUCTS = "q_zero", "dot", "out_zero", "out"
UNROLLED = (
    "key_span", "key_step", "section", "key_product",
    "value_section", "value_step", "value_group", "value_product",
)  # fmt: skip


def attend_half(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `attend` for warps."""
    warp = sch.get_loops(sch.get_sblock("warp"))[-1]
    group = WorkGroup(extent_of(sch, warp), hardware.warp)
    # 1. what a warp computes lies in the registers of its lanes
    for name in "slot", "inside", "page", "next_page":
        keep_local(sch, name)
    keep_in_registers(sch, sch.get_sblock("warp"))
    for name in BY_LANE:
        by_lane(sch, sch.get_sblock(name), LOADS.get(name, 1))
    # 2. products and the transpose by instructions of the warp
    for name in PRODUCTS:
        *outer, row, _, _ = sch.get_loops(sch.get_sblock(name))
        sch.tensorize(row, mma())
        unroll(sch, outer)
    *outer, lane = sch.get_loops(sch.get_sblock("prob_pair"))
    sch.tensorize(lane, transpose())
    unroll(sch, outer)
    for name in UNROLLED:
        unroll(sch, sch.get_loops(sch.get_sblock(name)))
    # 3. the warps of a work-group, joined through shared memory
    sch.bind(warp, "threadIdx.y")
    for name in "top_ref", "sum_of_warps", "acc_of_warps":
        over_spatial(sch, sch.get_sblock(name), group)
    for name in "share", "store_stat", "store_acc":
        over_threads(sch, sch.get_sblock(name), group)
    share(sch)
    over_groups(sch, sch.get_sblock("split"))
