"""`attend` in compute mode "half": work-groups of warps, products by tensor cores."""

from __future__ import annotations

from itertools import product

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.attend_half import FIRST, LAST, NEXT
from kivi_tvm.ops.fragments import QUERIES, HalfTile
from kivi_tvm.ops.staged_tile import staged_bytes
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.async_copy import SCOPE, arrive, clear_item, copy_line
from kivi_tvm.schedules.early_launch import wait
from kivi_tvm.schedules.mma import mma, transpose
from kivi_tvm.schedules.primitives import extent_of, has_block
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

SCALARS = (
    "b", "part", "slot", "packed", "first_tile", "inside", "first_page", "second_page", "next_page",
    "first_row", "appended",
)  # fmt: skip
LOADS = {  # elements of 16 bytes
    "q_load": 8,
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


WARPS = 1, 2, 4
ALIGNMENT = 128  # bytes
# That a multiprocessor has registers for; and with more of them: for several tokens, wide heads, or
# less wide ones whose lanes take pairs of channels instead of four.
RESIDENT_WARPS, FEWER_WARPS = 12, 8
PAIRED_HEAD = 96


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """So many warps that as many as possible are on a multiprocessor; of equal counts the most."""
    fits = [n for n in WARPS if shared_bytes(key, n) <= hardware.dynamic_bytes]
    wide = [n for n in fits if n > 1] or fits  # one warp alone has too much to do besides
    return {"warps": (fits, max(wide, key=lambda n: (n * resident_groups(key, n, hardware), n)))}


def min_blocks(key: KernelKey, hardware: Hardware) -> int:
    """As many as a multiprocessor holds."""
    _, warps = offers(key, hardware)["warps"]
    return resident_groups(key, int(warps), hardware)


def resident_groups(key: KernelKey, warps: int, hardware: Hardware) -> int:
    """Work-groups of so many warps that a multiprocessor has registers and shared memory for."""
    pairs = HalfTile(key).channels_apart == 2 and key.head_dim > PAIRED_HEAD
    fewer = pairs or key.head_dim > WIDE_HEAD or key.rows_per_query > 1
    by_registers = (FEWER_WARPS if fewer else RESIDENT_WARPS) // warps
    return min(by_registers, hardware.dynamic_bytes // shared_bytes(key, warps))


def shared_bytes(key: KernelKey, warps: int) -> int:
    """Shared memory of a work-group, at most: tiles and states of its warps, aligned."""
    states = 4 * min(key.rows, QUERIES) * (key.head_dim + 2) * warps
    return warps * staged_bytes(key) + states + ALIGNMENT


def attend_half(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `attend` for warps."""
    warp = sch.get_loops(sch.get_sblock("warp"))[-1]
    group = WorkGroup(extent_of(sch, warp), hardware.warp)
    # 1. what a warp computes lies in the registers of its lanes
    for name in SCALARS:
        keep_local(sch, name)
    sch.set_scope(sch.get_sblock("q_load"), 0, "warp")
    keep_in_registers(sch, sch.get_sblock("warp"))
    for name in (*BY_LANE, *[x for x in PIECEWISE if has_block(sch, x)]):
        block = sch.get_sblock(name)
        by_lane(sch, block, min(LOADS.get(name, 1), extent_of(sch, sch.get_loops(block)[-1])))
    # 2. tiles are copied on their own while the one before is computed with
    for turn, (name, dtype) in product((FIRST, LAST, NEXT), COPIES.items()):
        lines, line = (sch.get_sblock(f"{turn}_{name}{part}") for part in ("", "_line"))
        sch.set_scope(line, 0, SCOPE)
        sch.tensorize(sch.get_loops(line)[-1], copy_line(dtype))
        by_lane(sch, lines)
    for name in "no_scale", "no_zero":
        sch.tensorize(sch.get_sblock(f"{name}_item"), clear_item())
        by_lane(sch, sch.get_sblock(name))
    for name in "arrive", "cleared":
        sch.tensorize(sch.get_loops(sch.get_sblock(name))[-1], arrive())
    if hardware.early_launch:  # once more, where the kernel has waited at its beginning
        sch.tensorize(sch.get_sblock("appended"), wait(release=True))
    # 3. products and the transpose by instructions of the warp
    for name in PRODUCTS:
        *outer, row, _, _ = sch.get_loops(sch.get_sblock(name))
        sch.tensorize(row, mma("float16"))
        unroll(sch, outer)
    *outer, lane = sch.get_loops(sch.get_sblock("prob_pair"))
    sch.tensorize(lane, transpose())
    unroll(sch, outer)
    for name in UNROLLED:
        unroll(sch, sch.get_loops(sch.get_sblock(name)))
    # 4. the warps of a work-group, joined through shared memory
    sch.bind(warp, "threadIdx.y")
    for name in "store_stat", "store_acc":
        over_threads(sch, sch.get_sblock(name), group)
    share(sch, SCOPE)
    over_groups(sch, sch.get_sblock("split"))
