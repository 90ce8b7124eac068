"""Sums over packed tokens: warps of a work-group, products by tensor cores."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV

from kivi_tvm.ops.packed_tiles import FIRST, LAST, NEXT
from kivi_tvm.schedules.async_copy import SCOPE, arrive, clear_item, copy_line
from kivi_tvm.schedules.early_launch import wait
from kivi_tvm.schedules.mma import mma, transpose
from kivi_tvm.schedules.primitives import extent_of
from kivi_tvm.schedules.threads import (
    WorkGroup,
    by_lane,
    keep_in_registers,
    unroll,
)
from kivi_tvm.targets import Hardware

SCALARS = "first_tile", "inside", "first_page", "second_page", "next_page", "appended"
QUERY_LOAD = 8  # elements of 16 bytes
LOADS = {
    "key_word": 4, "key_zero": 8, "key_scale": 8,
    "value_word": 4, "value_zero": 8, "value_scale": 8, "top_scale": 8,
}  # fmt: skip
COPIES = {
    "k_code": "uint32", "k_scale": "float16", "k_zero": "float16",
    "v_code": "uint32", "v_scale": "float16", "v_zero": "float16",
}  # fmt: skip
BY_LANE = (
    *LOADS, "q_raw", "q_own", "q_near", "q_top", "q_unit", "q_pair", "q_low", "gain",
    "start", "start_acc", "start_zero_acc", "key_zero_pair", "q_zero_start", "dot_start", "q_key",
    "key_code", "key_zero_of", "score", "own_max", "max_of_2", "max_of_4", "own_top", "top_of_2",
    "top_of_4", "top_of_8", "top_of_16", "lift", "new_ref", "keep", "prob", "own_sum", "keep_total",
    "keep_acc", "keep_zero_acc", "keep_ref", "prob_row", "value_zero_pair", "prob_low",
    "prob_fold", "value_code", "sum_of_2", "sum_of_4", "sum_of_8", "warp_stat", "zero_of",
    "warp_acc",
)  # fmt: skip
PIECEWISE = ("value_halves",)  # by lane, where a tile's pieces share no words
PRODUCTS = "q_zero", "dot", "out_zero", "out"
UNROLLED = (
    "key_span", "key_step", "section", "key_product",
    "value_section", "value_step", "value_group", "value_product",
)  # fmt: skip


def packed_tiles(
    sch: Schedule, blocks: Mapping[str, SBlockRV], queries: SBlockRV, hardware: Hardware
) -> WorkGroup:
    """Schedule the warps that have `blocks` inside, and the loads of their queries."""
    warp = sch.get_loops(blocks["warp"])[-1]
    group = WorkGroup(extent_of(sch, warp), hardware.warp)
    # 1. what a warp computes lies in the registers of its lanes
    for name in SCALARS:
        if name in blocks:
            sch.set_scope(blocks[name], 0, "local")
    sch.set_scope(queries, 0, "warp")
    keep_in_registers(sch, blocks["warp"])
    by_lane(sch, queries, min(QUERY_LOAD, extent_of(sch, sch.get_loops(queries)[-1])))
    for name in (*BY_LANE, *[x for x in PIECEWISE if x in blocks]):
        block = blocks[name]
        by_lane(sch, block, min(LOADS.get(name, 1), extent_of(sch, sch.get_loops(block)[-1])))
    # 2. tiles are copied on their own while the one before is computed with
    for turn, (name, dtype) in product((FIRST, LAST, NEXT), COPIES.items()):
        lines, line = (blocks[f"{turn}_{name}{part}"] for part in ("", "_line"))
        sch.set_scope(line, 0, SCOPE)
        sch.tensorize(sch.get_loops(line)[-1], copy_line(dtype))
        by_lane(sch, lines)
    for name in "no_scale", "no_zero":
        sch.tensorize(blocks[f"{name}_item"], clear_item())
        by_lane(sch, blocks[name])
    for name in "arrive", "cleared":
        sch.tensorize(sch.get_loops(blocks[name])[-1], arrive())
    if hardware.early_launch:  # once more, where the kernel has waited at its beginning
        sch.tensorize(blocks["appended"], wait(release=True))
    # 3. products and the transpose by instructions of the warp
    for name in PRODUCTS:
        *outer, row, _, _ = sch.get_loops(blocks[name])
        sch.tensorize(row, mma("float16"))
        unroll(sch, outer)
    *outer, lane = sch.get_loops(blocks["prob_pair"])
    sch.tensorize(lane, transpose())
    unroll(sch, outer)
    for name in UNROLLED:
        unroll(sch, sch.get_loops(blocks[name]))
    sch.bind(warp, "threadIdx.y")
    return group
