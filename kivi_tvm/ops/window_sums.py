"""Sums over the window's tiles and the partial results of the packed tokens, by warps.

Part of `combine_window_half.py` and of `attend_batch.py`, with the mathematics of the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm.script import tirx as T

from kivi_tvm.ops.contract_full import (
    LOADED,
    MATRICES,
    TOKENS,
    full_output_blocks,
    full_score_blocks,
)
from kivi_tvm.ops.fragments import LANES, FullTile
from kivi_tvm.ops.parts_half import part_blocks
from kivi_tvm.ops.regions import ALL, regions
from kivi_tvm.ops.ring import slot_of
from kivi_tvm.ops.softmax_half import (
    highest,
    joined,
    softmax_half_blocks,
    start_half_blocks,
    total_blocks,
    warp_acc_block,
    warp_stat_block,
)
from kivi_tvm.ops.waits import wait_block

SUMS = 8  # of the window's tiles, and of partial results
FEW = 2  # of them, if all windows and rows are so short that nothing goes into the others


def window_sums(head_dim: int, dtype: str, M: int, number_of: Callable[[int], int] = lambda x: x):
    """The states of all sums, `sum_ref`, `sum_mass` and `sum_acc`; those beyond `few` only if not.

    `number_of(x)` is the sum that is computed as number `x`.
    """
    D, tile = head_dim, FullTile(head_dim)
    BLOCKS, APART, PRODUCTS = tile.value_blocks, tile.channels_apart, tile.value_rows
    SPANS = tile.key_spans
    load_keys, scores = full_score_blocks(tile, dtype)
    load_values, outputs = full_output_blocks(tile, dtype)
    start, softmax = start_half_blocks(PRODUCTS), softmax_half_blocks(MATRICES, PRODUCTS, dtype)
    sum_up, store_stat, store_sums = total_blocks(), warp_stat_block(M), warp_acc_block(tile, M)
    fold_parts, attended = part_blocks(tile, M, SUMS), wait_block("attended")

    @T.macro
    def sum_up_window(
        k_ring, v_ring, kv, ring, slot, oldest, count, entries, q_load, scale, parts, few,
        sum_ref, sum_mass, sum_acc,
    ):  # fmt: skip
        for x in range(SUMS):
            with T.sblock("partial"):
                vx = T.axis.spatial(SUMS, number_of(x))
                T.reads(
                    *regions((k_ring, v_ring), ALL, kv),
                    slot[0],
                    oldest[0],
                    count[0],
                    entries[0],
                    q_load[0:LANES, 0:SPANS, 0:LOADED],
                    *parts.regions,
                )
                T.writes(sum_ref[vx, 0:M], sum_mass[vx, 0:M], sum_acc[vx, 0:M, 0:D])
                ref = T.sblock_alloc_buffer((LANES, 2), "float32")
                total = T.sblock_alloc_buffer((LANES, 2), "float32")
                acc = T.sblock_alloc_buffer((LANES, PRODUCTS * 4), "float32")
                start(ref, total, acc)
                for c in T.serial(T.max(0, T.ceildiv(T.ceildiv(count[0], TOKENS) - vx, SUMS))):
                    with T.sblock("tile"):
                        vc = T.axis.opaque(T.ceildiv(ring, TOKENS), c)
                        T.reads(
                            *regions((k_ring, v_ring), ALL, kv),
                            slot[0],
                            oldest[0],
                            count[0],
                            q_load[0:LANES, 0:SPANS, 0:LOADED],
                        )
                        # Declared as written only: an update in place is not scheduled.
                        T.writes(
                            ref[0:LANES, 0:2],
                            total[0:LANES, 0:2],
                            acc[0:LANES, 0 : PRODUCTS * 4],
                        )
                        before = T.meta_var((vc * SUMS + vx) * TOKENS)
                        place = T.meta_var(lambda token: slot_of(oldest[0], count[0], token, ring))
                        k_near = T.sblock_alloc_buffer((LANES, SPANS, 2, LOADED), dtype)
                        v_near = T.sblock_alloc_buffer((LANES, BLOCKS, 4, APART), dtype)
                        score = T.sblock_alloc_buffer((LANES, MATRICES, 2), "float32")
                        keep = T.sblock_alloc_buffer((LANES, 2), "float32")
                        prob_pair = T.sblock_alloc_buffer((LANES, MATRICES), "uint32")
                        load_values(v_ring, slot[0], kv, place, before, v_near)
                        load_keys(k_ring, slot[0], kv, place, before, k_near)
                        scores(k_near, q_load, scale, before, count[0], score)
                        softmax(
                            score, lambda lane: T.float32(0), ref, total, acc, keep,
                            prob_pair,
                        )  # fmt: skip
                        outputs(v_near, prob_pair, acc)
                attended()  # nothing before this reads what `attend` writes
                fold_parts(parts, entries, vx, ref, total, acc)
                with T.sblock("store"):
                    # the same for all of a warp
                    T.where(T.tvm_thread_invariant(T.Or(vx < FEW, T.Not(few))))
                    T.reads(
                        ref[0:LANES, 0:2], total[0:LANES, 0:2],
                        acc[0:LANES, 0 : PRODUCTS * 4],
                    )  # fmt: skip
                    T.writes(sum_ref[vx, 0:M], sum_mass[vx, 0:M], sum_acc[vx, 0:M, 0:D])
                    totals = T.sblock_alloc_buffer((LANES, 2), "float32")
                    sum_up(total, totals)
                    store_stat(ref, totals, vx, sum_ref, sum_mass)
                    store_sums(lambda t, lane, e: acc[lane, t * 4 + e], vx, sum_acc)

    return sum_up_window


def finish_block(M: int, D: int, dtype: str):
    """The output and log-sum-exp of `M` queries from all sums, or from `few` of them."""
    finish_few, finish_all = (_finish_blocks(M, D, dtype, sums) for sums in (FEW, SUMS))

    @T.macro
    def finish(sum_ref, sum_mass, sum_acc, few, row, first, out, lse):
        with T.sblock("finish"):  # an output has one writer
            T.reads(*regions((sum_ref, sum_mass, sum_acc)))
            T.writes(out[row, first : first + M, 0:D], lse[row, first : first + M])
            with T.sblock("few"):
                T.where(T.tvm_thread_invariant(few))
                finish_few(sum_ref, sum_mass, sum_acc, row, first, out, lse)
            with T.sblock("all"):
                T.where(T.tvm_thread_invariant(T.Not(few)))
                finish_all(sum_ref, sum_mass, sum_acc, row, first, out, lse)

    return finish


def _finish_blocks(M: int, D: int, dtype: str, sums: int):
    """The same from so many sums; blocks `out_of_8` and so on."""

    def with_others(found, top):
        """What the sums that are left out have is a zero, which makes a negative one positive."""
        return found if sums == SUMS else found + T.exp2(T.min_value("float32") - top)

    @T.macro
    def finish(sum_ref, sum_mass, sum_acc, row, first, out, lse):
        for m, d in T.grid(M, D):
            with T.sblock(f"out_of_{sums}"):
                vm, vd = T.axis.remap("SS", [m, d])
                top = T.meta_var(highest(sums, sum_ref, vm))
                mass = T.meta_var(joined(sums, sum_ref, top, vm, lambda x: sum_mass[x, vm]))
                found = T.meta_var(
                    with_others(joined(sums, sum_ref, top, vm, lambda x: sum_acc[x, vm, vd]), top)
                )
                out[row, first + vm, vd] = T.Cast(
                    dtype, T.Select(mass == T.float32(0), T.float32(0), found / mass)
                )
        for m in range(M):
            with T.sblock(f"lse_of_{sums}"):
                vm = T.axis.spatial(M, m)
                top = T.meta_var(highest(sums, sum_ref, vm))
                mass = T.meta_var(joined(sums, sum_ref, top, vm, lambda x: sum_mass[x, vm]))
                lse[row, first + vm] = (top + T.log2(mass)) * T.float32(math.log(2))

    return finish
