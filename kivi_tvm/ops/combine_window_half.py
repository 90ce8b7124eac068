"""`combine_window` by the tensor cores of a GPU: a warp takes every so many tiles of the window.

Keys, queries and values in 16 bits are operands as they are, and their products exact; sums are
float32. Probabilities are rounded to the cache's dtype once, as its output is.
"""

from __future__ import annotations

import math
from functools import reduce

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import LENGTH, PACKED_VALUES, split_tokens
from kivi_tvm.ops.contract_half import mma_block
from kivi_tvm.ops.fragments import LANES, QUERIES, ROWS, FullTile, pair_of
from kivi_tvm.ops.online_softmax import LOG2_E, row_tiles
from kivi_tvm.ops.ring import slot_of
from kivi_tvm.ops.softmax_half import (
    add,
    highest,
    joined,
    softmax_half_blocks,
    start_half_blocks,
    total_blocks,
    warp_stat_block,
)

WARPS = 8
TOKENS = ROWS  # of a tile
MATRICES = TOKENS // QUERIES
LOADED = 8  # channels of a key that a lane loads at once
PARTS = 2  # partial results that a warp loads at once
DOT_SUMS = 2  # products in a row go into different sums: none waits for the one before


def part_blocks(tile: FullTile, M: int, warps: int):
    """Fold every so many-th partial result into the state of a warp, as if it were a token.

    Its weight is its sum, its value its accumulator:

        m = max_x m_x,  l = sum_x l_x 2^(m_x - m),  acc = sum_x acc_x 2^(m_x - m)
    """
    D, N, BLOCKS, APART = tile.head_dim, PARTS, tile.value_blocks, tile.channels_apart

    def folded(combine, first, of_part):
        """What there is combined with something of every part that is loaded at once."""
        return reduce(combine, map(of_part, range(N)), first)

    @T.macro
    def fold(part_acc, part_stat, row, first, entries, warp, ref, total, acc):
        X = T.meta_var(part_acc.shape[2])
        for c in T.serial(T.max(0, T.ceildiv(T.ceildiv(entries[0] - warp, warps), N))):
            with T.sblock("parts"):
                vc = T.axis.opaque(T.ceildiv(X, warps * N), c)
                T.reads(
                    part_acc[row, first : first + M, 0:X, 0:D],
                    part_stat[row, first : first + M, 0:X, 0:2],
                    entries[0],
                )
                # Declared as written only: an update in place is not scheduled.
                T.writes(
                    ref[0:LANES, 0:2],
                    total[0:LANES, 0:2],
                    acc[0:LANES, 0 : tile.value_rows * 4],
                )
                level = T.sblock_alloc_buffer((LANES, N, 2), "float32")
                mass = T.sblock_alloc_buffer((LANES, N, 2), "float32")
                near = T.sblock_alloc_buffer((LANES, N, 2, BLOCKS, APART), "float32")
                part_ref = T.sblock_alloc_buffer((LANES, 2), "float32")
                part_keep = T.sblock_alloc_buffer((LANES, 2), "float32")
                part_gain = T.sblock_alloc_buffer((LANES, N, 2), "float32")
                for n, e, y, lane, o in T.grid(N, 2, BLOCKS, LANES, APART):
                    with T.sblock("near"):
                        vn, ve, vy, vl, vo = T.axis.remap("SSSSS", [n, e, y, lane, o])
                        entry = T.meta_var((vc * N + vn) * warps + warp)
                        query = T.meta_var(vl % 4 * 2 + ve)
                        near[vl, vn, ve, vy, vo] = T.if_then_else(
                            T.And(entry < entries[0], query < M),
                            part_acc[
                                row, first + query, entry, (vy * QUERIES + vl // 4) * APART + vo
                            ],
                            T.float32(0),
                        )
                for n, e, lane in T.grid(N, 2, LANES):
                    with T.sblock("level"):
                        vn, ve, vl = T.axis.remap("SSS", [n, e, lane])
                        entry = T.meta_var((vc * N + vn) * warps + warp)
                        query = T.meta_var(vl % 4 * 2 + ve)
                        level[vl, vn, ve] = T.if_then_else(
                            T.And(entry < entries[0], query < M),
                            part_stat[row, first + query, entry, 0],
                            T.min_value("float32"),
                        )
                # The lanes `g` of a query sum up in the end: the first has it for all.
                for n, e, lane in T.grid(N, 2, LANES):
                    with T.sblock("part_mass"):
                        vn, ve, vl = T.axis.remap("SSS", [n, e, lane])
                        entry = T.meta_var((vc * N + vn) * warps + warp)
                        query = T.meta_var(vl % 4 * 2 + ve)
                        mass[vl, vn, ve] = T.if_then_else(
                            T.And(T.And(entry < entries[0], query < M), vl // 4 == 0),
                            part_stat[row, first + query, entry, 1],
                            T.float32(0),
                        )
                for lane, e in T.grid(LANES, 2):
                    with T.sblock("part_ref"):
                        vl, ve = T.axis.remap("SS", [lane, e])
                        part_ref[vl, ve] = folded(T.max, ref[vl, ve], lambda n: level[vl, n, ve])
                for lane, e in T.grid(LANES, 2):
                    with T.sblock("part_keep"):
                        vl, ve = T.axis.remap("SS", [lane, e])
                        part_keep[vl, ve] = T.exp2(ref[vl, ve] - part_ref[vl, ve])
                for n, lane, e in T.grid(N, LANES, 2):
                    with T.sblock("part_gain"):
                        vn, vl, ve = T.axis.remap("SSS", [n, lane, e])
                        part_gain[vl, vn, ve] = T.exp2(level[vl, vn, ve] - part_ref[vl, ve])
                for lane, e in T.grid(LANES, 2):
                    with T.sblock("part_total"):
                        vl, ve = T.axis.remap("SS", [lane, e])
                        T.reads(part_keep[vl, ve], mass[vl, 0:N, ve], part_gain[vl, 0:N, ve])
                        T.writes(total[vl, ve])
                        total[vl, ve] = folded(
                            add,
                            total[vl, ve] * part_keep[vl, ve],
                            lambda n: mass[vl, n, ve] * part_gain[vl, n, ve],
                        )
                for t, lane, e in T.grid(tile.value_rows, LANES, 4):
                    with T.sblock("part_acc"):
                        vt, vl, ve = T.axis.remap("SSS", [t, lane, e])
                        y, o = T.meta_var((tile.block(vt), tile.place(vt, ve // 2)))
                        T.reads(
                            part_keep[vl, ve % 2],
                            near[vl, 0:N, ve % 2, y, o],
                            part_gain[vl, 0:N, ve % 2],
                        )
                        T.writes(acc[vl, vt * 4 + ve])
                        acc[vl, vt * 4 + ve] = folded(
                            add,
                            acc[vl, vt * 4 + ve] * part_keep[vl, ve % 2],
                            lambda n: near[vl, n, ve % 2, y, o] * part_gain[vl, n, ve % 2],
                        )
                for lane, e in T.grid(LANES, 2):
                    with T.sblock("keep_part_ref"):
                        vl, ve = T.axis.remap("SS", [lane, e])
                        ref[vl, ve] = part_ref[vl, ve]

    return fold


def combine_window_half(key: KernelKey, row_tile: int | None = None, warps: int = WARPS):
    """The output and log-sum-exp of every row from its window and its splits' partial results.

    Parameters and results as of `combine_window`; of at most 8 query heads at once.
    """
    D, dtype, WARPS = key.head_dim, key.dtype, warps
    tiles, tile = row_tiles(key, min(row_tile or QUERIES, QUERIES)), FullTile(key.head_dim)
    M, ROWS, TILES = tiles.rows, tiles.total, tiles.count
    SPANS, BLOCKS, APART, PRODUCTS = (
        tile.key_spans, tile.value_blocks, tile.channels_apart, tile.value_rows
    )  # fmt: skip
    dot_mma, out_mma = mma_block("dot", dtype), mma_block("out_of_values", dtype)
    start, softmax = start_half_blocks(PRODUCTS), softmax_half_blocks(MATRICES, PRODUCTS, dtype)
    sum_up, store_stat = total_blocks(), warp_stat_block(M)
    fold_parts = part_blocks(tile, M, WARPS)

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
                with T.sblock("slot"):
                    slot[0] = T.max(slots[vb], 0)
                with T.sblock("oldest"):
                    oldest[0] = state[slot[0], PACKED_VALUES] % ring
                with T.sblock("count"):
                    count[0] = T.Select(
                        slots[vb] >= 0, state[slot[0], LENGTH] - state[slot[0], PACKED_VALUES], 0
                    )
                with T.sblock("entries"):
                    packed = T.meta_var(state[slot[0], PACKED_VALUES])
                    entries[0] = T.Select(
                        slots[vb] >= 0,
                        T.ceildiv(packed, split_tokens(key, packed, split, T.Select)),
                        0,
                    )
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
                                q_load = T.sblock_alloc_buffer((LANES, SPANS, LOADED), dtype)
                                q_pair = T.sblock_alloc_buffer(
                                    (LANES, SPANS * LOADED // 2), "uint32"
                                )
                                k_near = T.sblock_alloc_buffer((LANES, SPANS, 2, LOADED), dtype)
                                v_near = T.sblock_alloc_buffer((LANES, BLOCKS, 4, APART), dtype)
                                dot = T.sblock_alloc_buffer((LANES, DOT_SUMS * 4), "float32")
                                score = T.sblock_alloc_buffer((LANES, MATRICES, 2), "float32")
                                keep = T.sblock_alloc_buffer((LANES, 2), "float32")
                                prob_pair = T.sblock_alloc_buffer((LANES, MATRICES), "uint32")
                                for s, x, lane, o in T.grid(SPANS, 2, LANES, LOADED):
                                    with T.sblock("k_near"):
                                        vs, vx, vl, vo = T.axis.remap("SSSS", [s, x, lane, o])
                                        token = T.meta_var(before + vx * QUERIES + vl // 4)
                                        at = T.meta_var(slot_of(oldest[0], count[0], token, ring))
                                        run = T.meta_var(T.min(4 * vs + vl % 4, D // LOADED - 1))
                                        k_near[vl, vs, vx, vo] = k_ring[
                                            slot[0], kv, at, run * LOADED + vo
                                        ]
                                for s, lane, o in T.grid(SPANS, LANES, LOADED):
                                    with T.sblock("q_load"):
                                        vs, vl, vo = T.axis.remap("SSS", [s, lane, o])
                                        run = T.meta_var(T.min(4 * vs + vl % 4, D // LOADED - 1))
                                        q_load[vl, vs, vo] = q_near[
                                            T.min(vl // 4, M - 1), run * LOADED + vo
                                        ]
                                for s, lane, i in T.grid(SPANS, LANES, LOADED // 2):
                                    with T.sblock("q_pair"):
                                        vs, vl, vp = T.axis.remap("SSS", [s, lane, i])
                                        q_pair[vl, vs * (LOADED // 2) + vp] = T.Select(
                                            4 * vs + vl % 4 < D // LOADED,
                                            pair_of(
                                                q_load[vl, vs, 2 * vp], q_load[vl, vs, 2 * vp + 1]
                                            ),
                                            T.uint32(0),
                                        )
                                for lane, e in T.grid(LANES, DOT_SUMS * 4):
                                    with T.sblock("dot_start"):
                                        vl, ve = T.axis.remap("SS", [lane, e])
                                        dot[vl, ve] = T.float32(0)
                                for s, j in T.grid(SPANS, DOT_SUMS):
                                    with T.sblock("key_step"):
                                        vs, vj = T.axis.remap("RS", [s, j])
                                        k_pair = T.sblock_alloc_buffer((LANES, 4), "uint32")
                                        for lane, r in T.grid(LANES, 4):
                                            with T.sblock("k_pair"):
                                                vl, vr = T.axis.remap("SS", [lane, r])
                                                of = T.meta_var(2 * (2 * vj + vr // 2))
                                                k_pair[vl, vr] = pair_of(
                                                    k_near[vl, vs, vr % 2, of],
                                                    k_near[vl, vs, vr % 2, of + 1],
                                                )
                                        dot_mma(
                                            dot,
                                            4 * vj,
                                            lambda lane, r: k_pair[lane, r],
                                            lambda lane, r: q_pair[
                                                lane, (vs * DOT_SUMS + vj) * 2 + r
                                            ],
                                        )
                                for x, lane, e in T.grid(MATRICES, LANES, 2):
                                    with T.sblock("score"):
                                        vx, vl, ve = T.axis.remap("SSS", [x, lane, e])
                                        score[vl, vx, ve] = T.Select(
                                            before + vx * QUERIES + vl // 4 < count[0],
                                            (dot[vl, vx * 2 + ve] + dot[vl, 4 + vx * 2 + ve])
                                            * (scale * T.float32(LOG2_E)),
                                            T.min_value("float32"),
                                        )
                                for y, r, lane, o in T.grid(BLOCKS, 4, LANES, APART):
                                    with T.sblock("v_near"):
                                        vy, vr, vl, vo = T.axis.remap("SSSS", [y, r, lane, o])
                                        token = T.meta_var(
                                            before + vl % 4 * 2 + vr % 2 + vr // 2 * QUERIES
                                        )
                                        at = T.meta_var(slot_of(oldest[0], count[0], token, ring))
                                        v_near[vl, vy, vr, vo] = v_ring[
                                            slot[0], kv, at, (vy * QUERIES + vl // 4) * APART + vo
                                        ]
                                softmax(
                                    score, lambda lane: T.float32(0), ref, total, acc, keep,
                                    prob_pair,
                                )  # fmt: skip
                                for t in range(PRODUCTS):
                                    with T.sblock("value_product"):
                                        vt = T.axis.spatial(PRODUCTS, t)
                                        v_pair = T.sblock_alloc_buffer((LANES, 4), "uint32")
                                        for lane, r in T.grid(LANES, 4):
                                            with T.sblock("v_pair"):
                                                vl, vr = T.axis.remap("SS", [lane, r])
                                                y = T.meta_var(tile.block(vt))
                                                o = T.meta_var(tile.place(vt, vr % 2))
                                                v_pair[vl, vr] = pair_of(
                                                    v_near[vl, y, vr // 2 * 2, o],
                                                    v_near[vl, y, vr // 2 * 2 + 1, o],
                                                )
                                        out_mma(
                                            acc,
                                            4 * vt,
                                            lambda lane, r: v_pair[lane, r],
                                            lambda lane, r: prob_pair[lane, r],
                                        )
                        # Nothing before this reads what `attend` writes; no mathematics.
                        attended = T.sblock_alloc_buffer((1,), "uint32")
                        with T.sblock("attended"):
                            T.reads()
                            T.writes(attended[0])
                            attended[0] = T.uint32(1)
                        fold_parts(part_acc, part_stat, vb, first, entries, vw, ref, total, acc)
                        totals = T.sblock_alloc_buffer((LANES, 2), "float32")
                        sum_up(total, totals)
                        store_stat(ref, totals, vw, warp_ref, warp_sum)
                        for t, lane, e in T.grid(PRODUCTS, LANES, 4):
                            with T.sblock("warp_acc"):
                                vt, vl, ve = T.axis.remap("SSS", [t, lane, e])
                                T.where(lane % 4 * 2 + e % 2 < M)
                                warp_acc[
                                    vw,
                                    vl % 4 * 2 + ve % 2,
                                    tile.channel(vt, vl // 4 + ve // 2 * 8),
                                ] = acc[vl, vt * 4 + ve]
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
