"""`attend` by the tensor cores of a GPU: every warp of a work-group takes every so many tiles.

The mathematics of `attend.py`, written as the lanes of a warp hold it (`fragments.py`), with sums
over codes as in `contract_half.py`. What a maximum is subtracted for, that powers of two neither
overflow nor vanish, any number near it serves: here it is one for which float16 holds the product
of every probability with its token's scale, and is as large as can be.
"""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import PACKED_VALUES
from kivi_tvm.ops.contract_half import output_blocks, score_blocks
from kivi_tvm.ops.fragments import CODE_UNIT, LANES, QUERIES, TOKENS, HalfTile
from kivi_tvm.ops.online_softmax import row_tiles, store_blocks
from kivi_tvm.ops.prefetch import prefetch_tile
from kivi_tvm.ops.softmax_half import (
    lift_blocks,
    query_blocks,
    softmax_half_blocks,
    start_half_blocks,
    total_blocks,
)

WARPS = 4
# Blocks that ask for the memory of a warp's next tile.
FETCH = (
    "fetch_k_code", "fetch_k_scale", "fetch_k_zero",
    "fetch_v_code", "fetch_v_scale", "fetch_v_zero",
)  # fmt: skip


def attend_half(key: KernelKey):
    """Partial attention of every work item over its split of the packed tokens.

    Parameters and results as of `attend`; each of `WARPS` warps takes tiles of 64 tokens in turn.
    """
    D, P, dtype = key.head_dim, key.page_size, key.dtype
    tiles, tile = row_tiles(key, QUERIES), HalfTile(key)
    M, ROWS, TILES = tiles.rows, tiles.total, tiles.count
    G_k, G_v = key.key_group_size, key.value_group_size
    W_k, W_v = key.key_codes_per_word, key.value_codes_per_word
    SPLIT, N_k, N_v = key.split_tokens, P // G_k, D // G_v
    SPANS, PAIRS = tile.key_spans, tile.key_pairs
    X, PRODUCTS = tile.matrices, tile.value_rows
    GROUPS = max(1, TOKENS // G_k)
    fetch = [
        prefetch_tile(name, rows, columns, itemsize)
        for name, rows, columns, itemsize in zip(
            FETCH,
            (D // W_k, GROUPS, GROUPS, TOKENS // W_v, N_v, N_v),
            (TOKENS, D, D, D, TOKENS, TOKENS),
            (4, 2, 2, 4, 2, 2),
            strict=True,
        )
    ]
    queries, start, find_lift = query_blocks(key, M), start_half_blocks(PRODUCTS), lift_blocks(key)
    scores, softmax, outputs = score_blocks(key), softmax_half_blocks(key), output_blocks(key)
    sum_up, store = total_blocks(), store_blocks(M, D)

    @T.prim_func(s_tir=True)
    def attend(
        k_code_handle: T.handle,
        k_scale_handle: T.handle,
        k_zero_handle: T.handle,
        v_code_handle: T.handle,
        v_scale_handle: T.handle,
        v_zero_handle: T.handle,
        page_table_handle: T.handle,
        state_handle: T.handle,
        slots_handle: T.handle,
        work_handle: T.handle,
        q_handle: T.handle,
        scale: T.float32,
        part_acc_handle: T.handle,
        part_stat_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        B, H_kv, N, S, pages = T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        items, entries, q_row, q_head = T.int32(), T.int32(), T.int32(), T.int32()
        k_code = T.match_buffer(k_code_handle, (N, H_kv, D // W_k, P), "uint32")
        k_scale = T.match_buffer(k_scale_handle, (N, H_kv, N_k, D), "float16")
        k_zero = T.match_buffer(k_zero_handle, (N, H_kv, N_k, D), "float16")
        v_code = T.match_buffer(v_code_handle, (N, H_kv, P // W_v, D), "uint32")
        v_scale = T.match_buffer(v_scale_handle, (N, H_kv, N_v, P), "float16")
        v_zero = T.match_buffer(v_zero_handle, (N, H_kv, N_v, P), "float16")
        page_table = T.match_buffer(page_table_handle, (S, pages), "int32")
        state = T.match_buffer(state_handle, (S, 4), "int32")
        slots = T.match_buffer(slots_handle, (B,), "int32")
        work = T.match_buffer(work_handle, (items, 2), "int32")
        q = T.match_buffer(q_handle, (B, H_kv * ROWS, D), dtype, strides=(q_row, q_head, 1))
        part_acc = T.match_buffer(part_acc_handle, (B, H_kv * ROWS, entries, D), "float32")
        part_stat = T.match_buffer(part_stat_handle, (B, H_kv * ROWS, entries, 2), "float32")

        for item, h in T.grid(items, H_kv * TILES):
            with T.sblock("split"):
                vi, vh = T.axis.remap("SS", [item, h])
                T.where(work[item, 0] >= 0)
                head = T.meta_var(tiles.head(vh))
                row = T.meta_var(tiles.start(vh))
                T.reads(
                    k_code[0:N, head, 0 : D // W_k, 0:P],
                    k_scale[0:N, head, 0:N_k, 0:D],
                    k_zero[0:N, head, 0:N_k, 0:D],
                    v_code[0:N, head, 0 : P // W_v, 0:D],
                    v_scale[0:N, head, 0:N_v, 0:P],
                    v_zero[0:N, head, 0:N_v, 0:P],
                    page_table[0:S, 0:pages],
                    state[0:S, 0:4],
                    slots[0:B],
                    work[vi, 0:2],
                    q[0:B, row : row + M, 0:D],
                )
                T.writes(
                    part_acc[0:B, row : row + M, 0:entries, 0:D],
                    part_stat[0:B, row : row + M, 0:entries, 0:2],
                )
                b = T.meta_var(work[vi, 0])
                first = T.meta_var(work[vi, 1] * SPLIT)
                warp_ref = T.sblock_alloc_buffer((WARPS, M), "float32")
                warp_sum = T.sblock_alloc_buffer((WARPS, M), "float32")
                warp_acc = T.sblock_alloc_buffer((WARPS, M, D), "float32")
                for w in range(WARPS):
                    with T.sblock("warp"):
                        vw = T.axis.spatial(WARPS, w)
                        T.reads(
                            k_code[0:N, head, 0 : D // W_k, 0:P],
                            k_scale[0:N, head, 0:N_k, 0:D],
                            k_zero[0:N, head, 0:N_k, 0:D],
                            v_code[0:N, head, 0 : P // W_v, 0:D],
                            v_scale[0:N, head, 0:N_v, 0:P],
                            v_zero[0:N, head, 0:N_v, 0:P],
                            page_table[0:S, 0:pages],
                            state[0:S, 0:4],
                            slots[0:B],
                            work[vi, 0:2],
                            q[0:B, row : row + M, 0:D],
                        )
                        T.writes(warp_ref[vw, 0:M], warp_sum[vw, 0:M], warp_acc[vw, 0:M, 0:D])
                        slot = T.sblock_alloc_buffer((1,), "int32")
                        inside = T.sblock_alloc_buffer((1,), "int32")  # packed tokens of the split
                        q_pair = T.sblock_alloc_buffer((LANES, SPANS * PAIRS), "uint32")
                        gain = T.sblock_alloc_buffer((LANES, 2), "float32")
                        ref = T.sblock_alloc_buffer((LANES, 2), "float32")
                        total = T.sblock_alloc_buffer((LANES, 2), "float32")
                        acc = T.sblock_alloc_buffer((LANES, PRODUCTS * 4), "float32")
                        zero_acc = T.sblock_alloc_buffer((LANES, 4), "float32")
                        with T.sblock("slot"):
                            T.reads(slots[0:B], work[vi, 0])
                            T.writes(slot[0])
                            slot[0] = T.max(slots[b], 0)
                        with T.sblock("inside"):
                            T.reads(slots[0:B], state[0:S, PACKED_VALUES], work[vi, 0:2])
                            T.writes(inside[0])
                            inside[0] = T.if_then_else(
                                slots[b] >= 0,
                                T.min(SPLIT, state[slots[b], PACKED_VALUES] - first),
                                0,
                            )
                        queries(q, b, row, scale, q_pair, gain)
                        start(ref, total, acc, zero_acc)
                        turns = T.meta_var(
                            T.max(0, T.ceildiv(T.ceildiv(inside[0], TOKENS) - vw, WARPS))
                        )
                        for c in T.serial(turns):
                            with T.sblock("tile"):
                                vc = T.axis.opaque(SPLIT, c)
                                T.reads(
                                    k_code[0:N, head, 0 : D // W_k, 0:P],
                                    k_scale[0:N, head, 0:N_k, 0:D],
                                    k_zero[0:N, head, 0:N_k, 0:D],
                                    v_code[0:N, head, 0 : P // W_v, 0:D],
                                    v_scale[0:N, head, 0:N_v, 0:P],
                                    v_zero[0:N, head, 0:N_v, 0:P],
                                    page_table[0:S, 0:pages],
                                    slot[0],
                                    inside[0],
                                    work[vi, 0:2],
                                    q_pair[0:LANES, 0 : SPANS * PAIRS],
                                    gain[0:LANES, 0:2],
                                )
                                # Declared as written only: an update in place is not scheduled.
                                T.writes(
                                    ref[0:LANES, 0:2],
                                    total[0:LANES, 0:2],
                                    acc[0:LANES, 0 : PRODUCTS * 4],
                                    zero_acc[0:LANES, 0:4],
                                )
                                done = T.meta_var((vc * WARPS + vw) * TOKENS)
                                base = T.meta_var(first + done)
                                left = T.meta_var(inside[0] - done)
                                page = T.sblock_alloc_buffer((1,), "int32")
                                score = T.sblock_alloc_buffer((LANES, X, 2), "float32")
                                lift = T.sblock_alloc_buffer((LANES,), "float32")
                                prob_pair = T.sblock_alloc_buffer((LANES, X), "uint32")
                                with T.sblock("page"):
                                    T.reads(page_table[slot[0], base // P])
                                    T.writes(page[0])
                                    page[0] = page_table[slot[0], base // P]
                                # the last tile again where there is no other
                                after = T.meta_var(
                                    first
                                    + (T.Select(vc + 1 < turns, vc + 1, vc) * WARPS + vw) * TOKENS
                                )
                                next_page = T.sblock_alloc_buffer((1,), "int32")
                                with T.sblock("next_page"):
                                    T.reads(page_table[slot[0], after // P])
                                    T.writes(next_page[0])
                                    next_page[0] = page_table[slot[0], after // P]
                                there = T.meta_var(next_page[0])
                                at = T.meta_var(after % P)
                                fetch[0](k_code, there, head, 0, at)
                                fetch[1](k_scale, there, head, at // G_k, 0)
                                fetch[2](k_zero, there, head, at // G_k, 0)
                                fetch[3](v_code, there, head, at // W_v, 0)
                                fetch[4](v_scale, there, head, 0, at)
                                fetch[5](v_zero, there, head, 0, at)
                                scores(
                                    q_pair, gain, k_code, k_scale, k_zero, page, head,
                                    base % P, left, score,
                                )  # fmt: skip
                                find_lift(v_scale, page, head, base % P, left, lift)
                                softmax(score, lift, ref, total, acc, zero_acc, prob_pair)
                                outputs(
                                    prob_pair, v_code, v_scale, v_zero, page, head, base % P, left,
                                    acc, zero_acc,
                                )  # fmt: skip
                        totals = T.sblock_alloc_buffer((LANES, 2), "float32")
                        sum_up(total, totals)
                        for lane, e in T.grid(LANES, 2):
                            with T.sblock("warp_stat"):
                                vl, ve = T.axis.remap("SS", [lane, e])
                                T.where(lane % 4 * 2 + e < M)
                                warp_ref[vw, vl % 4 * 2 + ve] = ref[vl, ve]
                                warp_sum[vw, vl % 4 * 2 + ve] = totals[vl, ve]
                        zero_of = T.sblock_alloc_buffer((LANES, N_v, 2), "float32")
                        for g, lane, e in T.grid(N_v, LANES, 2):
                            with T.sblock("zero_of"):
                                vg, vl, ve = T.axis.remap("SSS", [g, lane, e])
                                zero_of[vl, vg, ve] = zero_acc[
                                    vg % QUERIES * 4 + vl % 4, vg // QUERIES * 2 + ve
                                ]
                        for t, lane, e in T.grid(PRODUCTS, LANES, 4):
                            with T.sblock("warp_acc"):
                                vt, vl, ve = T.axis.remap("SSS", [t, lane, e])
                                T.where(lane % 4 * 2 + e % 2 < M)
                                warp_acc[
                                    vw,
                                    vl % 4 * 2 + ve % 2,
                                    tile.channel(vt, vl // 4 + ve // 2 * 8),
                                ] = (
                                    acc[vl, vt * 4 + ve] * T.float32(CODE_UNIT)
                                    + zero_of[vl, tile.channel(vt, 0) // G_v, ve % 2]
                                )
                top_ref = T.sblock_alloc_buffer((M,), "float32")
                share = T.sblock_alloc_buffer((WARPS, M), "float32")
                sum_of_warps = T.sblock_alloc_buffer((M,), "float32")
                acc_of_warps = T.sblock_alloc_buffer((M, D), "float32")
                for m, w in T.grid(M, WARPS):
                    with T.sblock("top_ref"):
                        vm, vw = T.axis.remap("SR", [m, w])
                        with T.init():
                            top_ref[vm] = T.min_value("float32")
                        top_ref[vm] = T.max(top_ref[vm], warp_ref[vw, vm])
                for w, m in T.grid(WARPS, M):
                    with T.sblock("share"):
                        vw, vm = T.axis.remap("SS", [w, m])
                        share[vw, vm] = T.exp2(warp_ref[vw, vm] - top_ref[vm])
                for m, w in T.grid(M, WARPS):
                    with T.sblock("sum_of_warps"):
                        vm, vw = T.axis.remap("SR", [m, w])
                        with T.init():
                            sum_of_warps[vm] = T.float32(0)
                        sum_of_warps[vm] += warp_sum[vw, vm] * share[vw, vm]
                for m, d, w in T.grid(M, D, WARPS):
                    with T.sblock("acc_of_warps"):
                        vm, vd, vw = T.axis.remap("SSR", [m, d, w])
                        with T.init():
                            acc_of_warps[vm, vd] = T.float32(0)
                        acc_of_warps[vm, vd] += warp_acc[vw, vm, vd] * share[vw, vm]
                store(top_ref, sum_of_warps, acc_of_warps, part_acc, part_stat, b, row, work[vi, 1])

    return attend
