"""`combine_window` by the tensor cores of a GPU: a warp takes every so many tiles of the window.

Keys, queries and values in 16 bits are operands as they are, and their products exact; sums are
float32. Probabilities are rounded to the cache's dtype once, as its output is.
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
    softmax_half_blocks,
    start_half_blocks,
    total_blocks,
    warp_acc_block,
    warp_stat_block,
)
from kivi_tvm.ops.waits import wait_block

WARPS = 8


def combine_window_half(key: KernelKey, row_tile: int | None = None, warps: int = WARPS):
    """The output and log-sum-exp of every row from its window and its splits' partial results.

    Parameters and results as of `combine_window`; of at most 8 query heads at once.
    """
    D, dtype, WARPS = key.head_dim, key.dtype, warps
    tiles, tile = row_tiles(key, min(row_tile or QUERIES, QUERIES)), FullTile(key.head_dim)
    M, ROWS, TILES = tiles.rows, tiles.total, tiles.count
    BLOCKS, APART, PRODUCTS = tile.value_blocks, tile.channels_apart, tile.value_rows
    SPANS = tile.key_spans
    load_keys, scores = full_score_blocks(tile, M, dtype)
    load_values, outputs = full_output_blocks(tile, dtype)
    start, softmax = start_half_blocks(PRODUCTS), softmax_half_blocks(MATRICES, PRODUCTS, dtype)
    find_row, sum_up = row_blocks(key), total_blocks()
    store_stat, store_sums = warp_stat_block(M), warp_acc_block(tile, M)
    fold_parts = part_blocks(tile, M, WARPS)
    attended = wait_block("attended")

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
                q_near = T.sblock_alloc_buffer((M, D), dtype)
                warp_ref = T.sblock_alloc_buffer((WARPS, M), "float32")
                warp_sum = T.sblock_alloc_buffer((WARPS, M), "float32")
                warp_acc = T.sblock_alloc_buffer((WARPS, M, D), "float32")
                find_row(state, slots, vb, ring, split, slot, oldest, count, entries)
                for m, d in T.grid(M, D):
                    with T.sblock("q_near"):
                        vm, vd = T.axis.remap("SS", [m, d])
                        q_near[vm, vd] = q[vb, first + vm, vd]
                for w in range(WARPS):
                    with T.sblock("warp"):
                        vw = T.axis.spatial(WARPS, w)
                        T.reads(
                            k_ring[0:S, kv, 0:ring, 0:D],
                            v_ring[0:S, kv, 0:ring, 0:D],
                            slot[0],
                            oldest[0],
                            count[0],
                            entries[0],
                            q_near[0:M, 0:D],
                            part_acc[vb, first : first + M, 0:X, 0:D],
                            part_stat[vb, first : first + M, 0:X, 0:2],
                        )
                        T.writes(warp_ref[vw, 0:M], warp_sum[vw, 0:M], warp_acc[vw, 0:M, 0:D])
                        ref = T.sblock_alloc_buffer((LANES, 2), "float32")
                        total = T.sblock_alloc_buffer((LANES, 2), "float32")
                        acc = T.sblock_alloc_buffer((LANES, PRODUCTS * 4), "float32")
                        start(ref, total, acc)
                        for c in T.serial(
                            T.max(0, T.ceildiv(T.ceildiv(count[0], TOKENS) - vw, WARPS))
                        ):
                            with T.sblock("tile"):
                                vc = T.axis.opaque(T.ceildiv(ring, TOKENS), c)
                                T.reads(
                                    k_ring[0:S, kv, 0:ring, 0:D],
                                    v_ring[0:S, kv, 0:ring, 0:D],
                                    slot[0],
                                    oldest[0],
                                    count[0],
                                    q_near[0:M, 0:D],
                                )
                                # Declared as written only: an update in place is not scheduled.
                                T.writes(
                                    ref[0:LANES, 0:2],
                                    total[0:LANES, 0:2],
                                    acc[0:LANES, 0 : PRODUCTS * 4],
                                )
                                before = T.meta_var((vc * WARPS + vw) * TOKENS)
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
                                scores(k_near, q_near, scale, before, count[0], score)
                                softmax(
                                    score, lambda lane: T.float32(0), ref, total, acc, keep,
                                    prob_pair,
                                )  # fmt: skip
                                outputs(v_near, prob_pair, acc)
                        attended()  # nothing before this reads what `attend` writes
                        fold_parts(part_acc, part_stat, vb, first, entries, vw, ref, total, acc)
                        totals = T.sblock_alloc_buffer((LANES, 2), "float32")
                        sum_up(total, totals)
                        store_stat(ref, totals, vw, warp_ref, warp_sum)
                        store_sums(lambda t, lane, e: acc[lane, t * 4 + e], vw, warp_acc)
                for m, d in T.grid(M, D):
                    with T.sblock("out"):
                        vm, vd = T.axis.remap("SS", [m, d])
                        top = T.meta_var(highest(WARPS, warp_ref, vm))
                        mass = T.meta_var(
                            joined(WARPS, warp_ref, top, vm, lambda warp: warp_sum[warp, vm])
                        )
                        found = T.meta_var(
                            joined(WARPS, warp_ref, top, vm, lambda warp: warp_acc[warp, vm, vd])
                        )
                        out[vb, first + vm, vd] = T.Cast(
                            dtype, T.Select(mass == T.float32(0), T.float32(0), found / mass)
                        )
                for m in range(M):
                    with T.sblock("lse"):
                        vm = T.axis.spatial(M, m)
                        top = T.meta_var(highest(WARPS, warp_ref, vm))
                        mass = T.meta_var(
                            joined(WARPS, warp_ref, top, vm, lambda warp: warp_sum[warp, vm])
                        )
                        lse[vb, first + vm] = (top + T.log2(mass)) * T.float32(math.log(2))

    return combine_window
