"""Sums over tiles of packed tokens by a warp: part of `attend_half.py` and of `attend_batch.py`.

The steps that a tile goes through, between which an operator copies the next one.
"""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.contract_half import output_blocks
from kivi_tvm.ops.fragments import CODE_UNIT, LANES, QUERIES, TOKENS, HalfTile
from kivi_tvm.ops.regions import regions
from kivi_tvm.ops.softmax_half import (
    lift_blocks,
    softmax_half_blocks,
    start_half_blocks,
    total_blocks,
    warp_acc_block,
    warp_stat_block,
    zero_acc_blocks,
)
from kivi_tvm.ops.staged_tile import arrive_block, clear_tail_block, staged_arrays

# Blocks that copy a warp's first tile, or that if it is the row's last, and the one after each.
FIRST, LAST, NEXT = "first", "last", "next"


def arrival_block(key: KernelKey):
    """Where a tile has arrived, of which the row has `left` tokens: other values become zeros."""
    *_, of_token, _ = staged_arrays(key)
    arrive, cleared = arrive_block("arrive"), arrive_block("cleared")
    no_scale, no_zero = (clear_tail_block(name, of_token) for name in ("no_scale", "no_zero"))

    @T.macro
    def arrival(inside, left, v_scale_tile, v_zero_tile, warp, place):
        arrive()
        # What is behind the last token may be anything.
        with T.sblock("value_tail"):
            T.where(left < TOKENS)
            T.reads(inside[0])
            T.writes(*regions((v_scale_tile, v_zero_tile), warp))
            no_scale(v_scale_tile, warp, place, left)
            no_zero(v_zero_tile, warp, place, left)
            cleared()

    return arrival


def tile_sum_blocks(key: KernelKey, M: int):
    """The state of a warp's `M` queries: as it starts, with a tile's scores, and in the end."""
    tile = HalfTile(key)
    G_v, N_v = key.value_group_size, tile.value_groups
    start_state, find_lift = start_half_blocks(tile.value_rows), lift_blocks(key)
    start_zeros, bring_zeros = zero_acc_blocks()
    softmax, outputs = softmax_half_blocks(tile.matrices, tile.value_rows), output_blocks(key)
    sum_up, store_stat, store_sums = total_blocks(), warp_stat_block(M), warp_acc_block(tile, M)

    @T.macro
    def start(ref, total, acc, zero_acc):
        start_state(ref, total, acc)
        start_zeros(zero_acc)

    @T.macro
    def add_tile(score, keep, prob_pair, lift, values, warp, place, ref, total, acc, zero_acc):
        find_lift(values[1], warp, place, lift)
        softmax(score, lambda lane: lift[lane], ref, total, acc, keep, prob_pair)
        bring_zeros(keep, zero_acc)
        outputs(prob_pair, values[0], values[1], values[2], warp, place, acc, zero_acc)

    @T.macro
    def store(ref, total, acc, zero_acc, warp, warp_ref, warp_sum, warp_acc):
        totals = T.sblock_alloc_buffer((LANES, 2), "float32")
        sum_up(total, totals)
        store_stat(ref, totals, warp, warp_ref, warp_sum)
        zero_of = T.sblock_alloc_buffer((LANES, N_v, 2), "float32")
        for g, lane, e in T.grid(N_v, LANES, 2):
            with T.sblock("zero_of"):
                vg, vl, ve = T.axis.remap("SSS", [g, lane, e])
                zero_of[vl, vg, ve] = zero_acc[vg % QUERIES * 4 + vl % 4, vg // QUERIES * 2 + ve]
        store_sums(
            lambda t, lane, e: (
                acc[lane, t * 4 + e] * T.float32(CODE_UNIT)
                + zero_of[lane, tile.channel(t, 0) // G_v, e % 2]
            ),
            warp,
            warp_acc,
        )

    return start, add_tile, store
