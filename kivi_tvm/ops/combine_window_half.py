"""`combine_window` by the tensor cores of a GPU: sums of every so many tiles of the window.

As many sums however many warps there are, so that a row gives the same bits with any number. Keys,
queries and values in 16 bits are operands as they are, and their products exact; sums are float32.
Probabilities are rounded to the cache's dtype once, as its output is.
"""

from __future__ import annotations

import math

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.contract_full import (
    LOADED,
    MATRICES,
    TOKENS,
    full_output_blocks,
    full_score_blocks,
)
from kivi_tvm.ops.fragments import LANES, QUERIES, FullTile
from kivi_tvm.ops.online_softmax import row_tiles
from kivi_tvm.ops.parts_half import part_blocks
from kivi_tvm.ops.ring import row_blocks, slot_of
from kivi_tvm.ops.softmax_half import (
    highest,
    joined,
    query_load_block,
    softmax_half_blocks,
    start_half_blocks,
    total_blocks,
    warp_acc_block,
    warp_stat_block,
)
from kivi_tvm.ops.waits import wait_block

SUMS = 8  # of the window's tiles, and of partial results
FEW = 2  # of them, if all windows and rows are so short that nothing goes into the others


def combine_window_half(key: KernelKey, row_tile: int | None = None):
    """The output and log-sum-exp of every row from its window and its splits' partial results.

    Parameters and results as of `combine_window`; of at most 8 query heads at once.
    """
    D, dtype = key.head_dim, key.dtype
    tiles, tile = row_tiles(key, min(row_tile or QUERIES, QUERIES)), FullTile(key.head_dim)
    M, ROWS, TILES = tiles.rows, tiles.total, tiles.count
    BLOCKS, APART, PRODUCTS = tile.value_blocks, tile.channels_apart, tile.value_rows
    SPANS = tile.key_spans
    load_queries = query_load_block(D, M, SPANS, LOADED)
    load_keys, scores = full_score_blocks(tile, dtype)
    load_values, outputs = full_output_blocks(tile, dtype)
    start, softmax = start_half_blocks(PRODUCTS), softmax_half_blocks(MATRICES, PRODUCTS, dtype)
    find_row, sum_up = row_blocks(key), total_blocks()
    store_stat, store_sums = warp_stat_block(M), warp_acc_block(tile, M)
    fold_parts = part_blocks(tile, M, SUMS)
    attended = wait_block("attended")
    finish_few, finish_all = (finish_blocks(M, D, dtype, sums) for sums in (FEW, SUMS))

    @T.prim_func(s_tir=True)
    def combine_window(
        k_ring_handle: T.handle,
        v_ring_handle: T.handle,
        state_handle: T.handle,
        slots_handle: T.handle,
        q_handle: T.handle,
        scale: T.float32,
        split: T.int32,
        part_acc_handle: T.handle,
        part_stat_handle: T.handle,
        out_handle: T.handle,
        lse_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        B, H_kv, S, X, ring = T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        q_row, q_head, out_row, out_head = T.int32(), T.int32(), T.int32(), T.int32()
        k_ring = T.match_buffer(k_ring_handle, (S, H_kv, ring, D), dtype)
        v_ring = T.match_buffer(v_ring_handle, (S, H_kv, ring, D), dtype)
        state = T.match_buffer(state_handle, (S, 4), "int32")
        slots = T.match_buffer(slots_handle, (B,), "int32")
        q = T.match_buffer(q_handle, (B, H_kv * ROWS, D), dtype, strides=(q_row, q_head, 1))
        part_acc = T.match_buffer(part_acc_handle, (B, H_kv * ROWS, X, D), "float32")
        part_stat = T.match_buffer(part_stat_handle, (B, H_kv * ROWS, X, 2), "float32")
        out = T.match_buffer(out_handle, (B, H_kv * ROWS, D), dtype, strides=(out_row, out_head, 1))
        lse = T.match_buffer(lse_handle, (B, H_kv * ROWS), "float32")
        # a ring has a place more than its window has tokens
        few = T.meta_var(T.And(ring - 1 <= FEW * TOKENS, X <= FEW))
        for b, h in T.grid(B, H_kv * TILES):
            with T.sblock("head"):
                vb, vh = T.axis.remap("SS", [b, h])
                kv = T.meta_var(tiles.head(vh))
                first = T.meta_var(tiles.start(vh))
                T.reads(
                    k_ring[0:S, kv, 0:ring, 0:D],
                    v_ring[0:S, kv, 0:ring, 0:D],
                    state[0:S, 0:4],
                    slots[vb],
                    q[vb, first : first + M, 0:D],
                    part_acc[vb, first : first + M, 0:X, 0:D],
                    part_stat[vb, first : first + M, 0:X, 0:2],
                )
                T.writes(out[vb, first : first + M, 0:D], lse[vb, first : first + M])
                slot = T.sblock_alloc_buffer((1,), "int32")
                oldest = T.sblock_alloc_buffer((1,), "int32")
                count = T.sblock_alloc_buffer((1,), "int32")  # tokens of the window
                entries = T.sblock_alloc_buffer((1,), "int32")
                q_load = T.sblock_alloc_buffer((LANES, SPANS, LOADED), dtype)
                sum_ref = T.sblock_alloc_buffer((SUMS, M), "float32")
                sum_mass = T.sblock_alloc_buffer((SUMS, M), "float32")
                sum_acc = T.sblock_alloc_buffer((SUMS, M, D), "float32")
                find_row(state, slots, vb, ring, split, slot, oldest, count, entries)
                load_queries(q, vb, first, q_load)
                for x in range(SUMS):
                    with T.sblock("partial"):
                        vx = T.axis.spatial(SUMS, x)
                        T.reads(
                            k_ring[0:S, kv, 0:ring, 0:D],
                            v_ring[0:S, kv, 0:ring, 0:D],
                            slot[0],
                            oldest[0],
                            count[0],
                            entries[0],
                            q_load[0:LANES, 0:SPANS, 0:LOADED],
                            part_acc[vb, first : first + M, 0:X, 0:D],
                            part_stat[vb, first : first + M, 0:X, 0:2],
                        )
                        T.writes(sum_ref[vx, 0:M], sum_mass[vx, 0:M], sum_acc[vx, 0:M, 0:D])
                        ref = T.sblock_alloc_buffer((LANES, 2), "float32")
                        total = T.sblock_alloc_buffer((LANES, 2), "float32")
                        acc = T.sblock_alloc_buffer((LANES, PRODUCTS * 4), "float32")
                        start(ref, total, acc)
                        for c in T.serial(
                            T.max(0, T.ceildiv(T.ceildiv(count[0], TOKENS) - vx, SUMS))
                        ):
                            with T.sblock("tile"):
                                vc = T.axis.opaque(T.ceildiv(ring, TOKENS), c)
                                T.reads(
                                    k_ring[0:S, kv, 0:ring, 0:D],
                                    v_ring[0:S, kv, 0:ring, 0:D],
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
                                place = T.meta_var(
                                    lambda token: slot_of(oldest[0], count[0], token, ring)
                                )
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
                        fold_parts(part_acc, part_stat, vb, first, entries, vx, ref, total, acc)
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
                with T.sblock("finish"):  # an output has one writer
                    T.reads(sum_ref[0:SUMS, 0:M], sum_mass[0:SUMS, 0:M], sum_acc[0:SUMS, 0:M, 0:D])
                    T.writes(out[vb, first : first + M, 0:D], lse[vb, first : first + M])
                    with T.sblock("few"):
                        T.where(T.tvm_thread_invariant(few))
                        finish_few(sum_ref, sum_mass, sum_acc, vb, first, out, lse)
                    with T.sblock("all"):
                        T.where(T.tvm_thread_invariant(T.Not(few)))
                        finish_all(sum_ref, sum_mass, sum_acc, vb, first, out, lse)

    return combine_window


def finish_blocks(M: int, D: int, dtype: str, sums: int):
    """The output and log-sum-exp of `M` queries from so many sums; blocks `out_of_8` and so on."""

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
