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
from kivi_tvm.ops.exp2 import ROUNDER, ROUNDER_BITS
from kivi_tvm.ops.fragments import (
    CODE_UNIT,
    LANES,
    QUERIES,
    TOKENS,
    HalfTile,
    rounded_pair,
    transposed_pair,
)
from kivi_tvm.ops.online_softmax import LOG2_E, row_tiles, store_blocks
from kivi_tvm.ops.prefetch import prefetch_tile

WARPS = 4
TINY = 2.0**-100  # below it a query is zero
TOP_EXPONENT = 15  # of float16: powers of two and products of at most half of 2^16
FLOAT16_MAX = 65504.0


# Blocks that ask for the memory of a warp's next tile.
FETCH = (
    "fetch_k_code", "fetch_k_scale", "fetch_k_zero",
    "fetch_v_code", "fetch_v_scale", "fetch_v_zero",
)  # fmt: skip


def exponent_above(x):
    """The least `e` with `x < 2^e`, for float32 `x >= 0`."""
    return T.Cast("int32", T.reinterpret("uint32", x) >> T.uint32(23)) - 126


def small_float(number):
    """An integer of less than 2^22 as float32, without a conversion, which GPUs do slowly."""
    return T.reinterpret("float32", ROUNDER_BITS + number) - T.float32(ROUNDER)


def attend_half(key: KernelKey, warps: int = WARPS):
    """Partial attention of every work item over its split of the packed tokens.

    Parameters and results as of `attend`; of `warps` warps each takes tiles of 64 tokens in turn.
    """
    D, P, dtype = key.head_dim, key.page_size, key.dtype
    tiles, tile = row_tiles(key, QUERIES), HalfTile(key)
    M, ROWS, TILES = tiles.rows, tiles.total, tiles.count
    G_k, G_v = key.key_group_size, key.value_group_size
    W_k, W_v = key.key_codes_per_word, key.value_codes_per_word
    SPLIT, N_k, N_v = key.split_tokens, P // G_k, D // G_v
    SPANS, PAIRS = tile.key_spans, tile.key_pairs
    X, PRODUCTS, RUNS = tile.matrices, tile.value_rows, N_v * TOKENS // 8
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
    LANE_RUNS = -(-RUNS // LANES)
    scores, outputs, store = score_blocks(key), output_blocks(key), store_blocks(M, D)

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
                warp_ref = T.sblock_alloc_buffer((warps, M), "float32")
                warp_sum = T.sblock_alloc_buffer((warps, M), "float32")
                warp_acc = T.sblock_alloc_buffer((warps, M, D), "float32")
                for w in range(warps):
                    with T.sblock("warp"):
                        vw = T.axis.spatial(warps, w)
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
                        q_raw = T.sblock_alloc_buffer((LANES, SPANS, W_k), "float32")
                        q_own = T.sblock_alloc_buffer((LANES,), "float32")
                        q_near = T.sblock_alloc_buffer((LANES,), "float32")
                        q_top = T.sblock_alloc_buffer((LANES,), "float32")
                        q_unit = T.sblock_alloc_buffer((LANES,), "float32")
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
                        for s, lane, o in T.grid(SPANS, LANES, W_k):
                            with T.sblock("q_raw"):
                                vs, vl, vo = T.axis.remap("SSS", [s, lane, o])
                                channel = T.meta_var((4 * vs + vl % 4) * W_k + vo)
                                q_raw[vl, vs, vo] = T.if_then_else(
                                    T.And(vl // 4 < M, channel < D),
                                    T.Cast("float32", q[b, row + vl // 4, channel]),
                                    T.float32(0),
                                )
                        for lane, s, o in T.grid(LANES, SPANS, W_k):
                            with T.sblock("q_own"):
                                vl, vs, vo = T.axis.remap("SRR", [lane, s, o])
                                with T.init():
                                    q_own[vl] = T.float32(TINY)
                                q_own[vl] = T.max(q_own[vl], T.abs(q_raw[vl, vs, vo]))
                        for lane in range(LANES):
                            with T.sblock("q_near"):
                                vl = T.axis.spatial(LANES, lane)
                                q_near[vl] = T.max(q_own[vl], q_own[vl // 4 * 4 + (vl + 2) % 4])
                        for lane in range(LANES):
                            with T.sblock("q_top"):
                                vl = T.axis.spatial(LANES, lane)
                                q_top[vl] = T.max(q_near[vl], q_near[vl // 4 * 4 + (vl + 1) % 4])
                        for lane in range(LANES):
                            with T.sblock("q_unit"):
                                vl = T.axis.spatial(LANES, lane)
                                # 2^-(e + 1) for a top from 2^e on: all are below 1 with it
                                q_unit[vl] = T.reinterpret(
                                    "float32",
                                    T.uint32(253 << 23)
                                    - (T.reinterpret("uint32", q_top[vl]) & T.uint32(0x7F800000)),
                                )
                        for s, lane, i in T.grid(SPANS, LANES, PAIRS):
                            with T.sblock("q_pair"):
                                vs, vl, vp = T.axis.remap("SSS", [s, lane, i])
                                q_pair[vl, vs * PAIRS + vp] = rounded_pair(
                                    q_raw[vl, vs, vp] * q_unit[vl],
                                    q_raw[vl, vs, vp + PAIRS] * q_unit[vl],
                                )
                        for lane, e in T.grid(LANES, 2):
                            with T.sblock("gain"):
                                vl, ve = T.axis.remap("SS", [lane, e])
                                unit = T.meta_var(q_unit[(vl % 4 * 2 + ve) * 4])
                                gain[vl, ve] = T.reinterpret(
                                    "float32",
                                    T.uint32(254 << 23) - T.reinterpret("uint32", unit),
                                ) * (scale * T.float32(LOG2_E))
                        for lane, e in T.grid(LANES, 2):
                            with T.sblock("start"):
                                vl, ve = T.axis.remap("SS", [lane, e])
                                ref[vl, ve] = T.min_value("float32")
                                total[vl, ve] = T.float32(0)
                        for t, lane, e in T.grid(PRODUCTS, LANES, 4):
                            with T.sblock("start_acc"):
                                vt, vl, ve = T.axis.remap("SSS", [t, lane, e])
                                acc[vl, vt * 4 + ve] = T.float32(0)
                        for lane, e in T.grid(LANES, 4):
                            with T.sblock("start_zero_acc"):
                                vl, ve = T.axis.remap("SS", [lane, e])
                                zero_acc[vl, ve] = T.float32(0)
                        turns = T.meta_var(
                            T.max(0, T.ceildiv(T.ceildiv(inside[0], TOKENS) - vw, warps))
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
                                done = T.meta_var((vc * warps + vw) * TOKENS)
                                base = T.meta_var(first + done)
                                left = T.meta_var(inside[0] - done)
                                page = T.sblock_alloc_buffer((1,), "int32")
                                score = T.sblock_alloc_buffer((LANES, X, 2), "float32")
                                prob = T.sblock_alloc_buffer((LANES, X, 2), "float32")
                                own_max = T.sblock_alloc_buffer((LANES, 2), "float32")
                                max_of_2 = T.sblock_alloc_buffer((LANES, 2), "float32")
                                max_of_4 = T.sblock_alloc_buffer((LANES, 2), "float32")
                                top_scale = T.sblock_alloc_buffer((LANES, LANE_RUNS, 8), "float16")
                                own_top = T.sblock_alloc_buffer((LANES,), "float32")
                                top_of_2 = T.sblock_alloc_buffer((LANES,), "float32")
                                top_of_4 = T.sblock_alloc_buffer((LANES,), "float32")
                                top_of_8 = T.sblock_alloc_buffer((LANES,), "float32")
                                top_of_16 = T.sblock_alloc_buffer((LANES,), "float32")
                                lift = T.sblock_alloc_buffer((LANES,), "float32")
                                new_ref = T.sblock_alloc_buffer((LANES, 2), "float32")
                                keep = T.sblock_alloc_buffer((LANES, 2), "float32")
                                own_sum = T.sblock_alloc_buffer((LANES, 2), "float32")
                                prob_row = T.sblock_alloc_buffer((LANES, X), "uint32")
                                prob_pair = T.sblock_alloc_buffer((LANES, X), "uint32")
                                with T.sblock("page"):
                                    T.reads(page_table[slot[0], base // P])
                                    T.writes(page[0])
                                    page[0] = page_table[slot[0], base // P]
                                # the last tile again where there is no other
                                after = T.meta_var(
                                    first
                                    + (T.Select(vc + 1 < turns, vc + 1, vc) * warps + vw) * TOKENS
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
                                for lane, e, x in T.grid(LANES, 2, X):
                                    with T.sblock("own_max"):
                                        vl, ve, vx = T.axis.remap("SSR", [lane, e, x])
                                        with T.init():
                                            own_max[vl, ve] = T.min_value("float32")
                                        own_max[vl, ve] = T.max(own_max[vl, ve], score[vl, vx, ve])
                                for lane, e in T.grid(LANES, 2):
                                    with T.sblock("max_of_2"):
                                        vl, ve = T.axis.remap("SS", [lane, e])
                                        max_of_2[vl, ve] = T.max(
                                            own_max[vl, ve], own_max[(vl + 16) % LANES, ve]
                                        )
                                for lane, e in T.grid(LANES, 2):
                                    with T.sblock("max_of_4"):
                                        vl, ve = T.axis.remap("SS", [lane, e])
                                        max_of_4[vl, ve] = T.max(
                                            max_of_2[vl, ve], max_of_2[(vl + 8) % LANES, ve]
                                        )
                                for lane, n, o in T.grid(LANES, LANE_RUNS, 8):
                                    with T.sblock("top_scale"):
                                        vl, vn, vo = T.axis.remap("SSS", [lane, n, o])
                                        run = T.meta_var(T.min(vn * LANES + vl, RUNS - 1))
                                        top_scale[vl, vn, vo] = v_scale[
                                            page[0], head, run // 8, base % P + run % 8 * 8 + vo
                                        ]
                                for lane, n, o in T.grid(LANES, LANE_RUNS, 8):
                                    with T.sblock("own_top"):
                                        vl, vn, vo = T.axis.remap("SRR", [lane, n, o])
                                        run = T.meta_var(T.min(vn * LANES + vl, RUNS - 1))
                                        token = T.meta_var(run % 8 * 8 + vo)
                                        found = T.meta_var(T.Cast("float32", top_scale[vl, vn, vo]))
                                        with T.init():
                                            own_top[vl] = T.float32(0)
                                        own_top[vl] = T.max(
                                            own_top[vl],
                                            T.Select(
                                                T.And(
                                                    token < left, found <= T.float32(FLOAT16_MAX)
                                                ),
                                                found,
                                                T.float32(0),
                                            ),
                                        )
                                for lane in range(LANES):
                                    with T.sblock("top_of_2"):
                                        vl = T.axis.spatial(LANES, lane)
                                        top_of_2[vl] = T.max(
                                            own_top[vl], own_top[(vl + 16) % LANES]
                                        )
                                for lane in range(LANES):
                                    with T.sblock("top_of_4"):
                                        vl = T.axis.spatial(LANES, lane)
                                        top_of_4[vl] = T.max(
                                            top_of_2[vl], top_of_2[(vl + 8) % LANES]
                                        )
                                for lane in range(LANES):
                                    with T.sblock("top_of_8"):
                                        vl = T.axis.spatial(LANES, lane)
                                        top_of_8[vl] = T.max(
                                            top_of_4[vl], top_of_4[(vl + 4) % LANES]
                                        )
                                for lane in range(LANES):
                                    with T.sblock("top_of_16"):
                                        vl = T.axis.spatial(LANES, lane)
                                        top_of_16[vl] = T.max(
                                            top_of_8[vl], top_of_8[(vl + 2) % LANES]
                                        )
                                for lane in range(LANES):
                                    with T.sblock("lift"):
                                        vl = T.axis.spatial(LANES, lane)
                                        top = T.meta_var(
                                            T.max(top_of_16[vl], top_of_16[(vl + 1) % LANES])
                                        )
                                        exponent = T.meta_var(exponent_above(top))
                                        lift[vl] = small_float(
                                            T.max(exponent - TOP_EXPONENT, -TOP_EXPONENT)
                                        )
                                for lane, e in T.grid(LANES, 2):
                                    with T.sblock("new_ref"):
                                        vl, ve = T.axis.remap("SS", [lane, e])
                                        new_ref[vl, ve] = T.max(
                                            ref[vl, ve],
                                            T.max(max_of_4[vl, ve], max_of_4[(vl + 4) % LANES, ve])
                                            + lift[vl],
                                        )
                                for lane, e in T.grid(LANES, 2):
                                    with T.sblock("keep"):
                                        vl, ve = T.axis.remap("SS", [lane, e])
                                        keep[vl, ve] = T.exp2(ref[vl, ve] - new_ref[vl, ve])
                                for x, lane, e in T.grid(X, LANES, 2):
                                    with T.sblock("prob"):
                                        vx, vl, ve = T.axis.remap("SSS", [x, lane, e])
                                        prob[vl, vx, ve] = T.exp2(
                                            score[vl, vx, ve] - new_ref[vl, ve]
                                        )
                                for lane, e, x in T.grid(LANES, 2, X):
                                    with T.sblock("own_sum"):
                                        vl, ve, vx = T.axis.remap("SSR", [lane, e, x])
                                        with T.init():
                                            own_sum[vl, ve] = T.float32(0)
                                        own_sum[vl, ve] += prob[vl, vx, ve]
                                for lane, e in T.grid(LANES, 2):
                                    with T.sblock("keep_total"):
                                        vl, ve = T.axis.remap("SS", [lane, e])
                                        T.reads(keep[vl, ve], own_sum[vl, ve])
                                        T.writes(total[vl, ve])
                                        total[vl, ve] = (
                                            total[vl, ve] * keep[vl, ve] + own_sum[vl, ve]
                                        )
                                for t, lane, e in T.grid(PRODUCTS, LANES, 4):
                                    with T.sblock("keep_acc"):
                                        vt, vl, ve = T.axis.remap("SSS", [t, lane, e])
                                        T.reads(keep[vl, ve % 2])
                                        T.writes(acc[vl, vt * 4 + ve])
                                        acc[vl, vt * 4 + ve] = (
                                            acc[vl, vt * 4 + ve] * keep[vl, ve % 2]
                                        )
                                for lane, e in T.grid(LANES, 4):
                                    with T.sblock("keep_zero_acc"):
                                        vl, ve = T.axis.remap("SS", [lane, e])
                                        T.reads(keep[vl, ve % 2])
                                        T.writes(zero_acc[vl, ve])
                                        zero_acc[vl, ve] = zero_acc[vl, ve] * keep[vl, ve % 2]
                                for lane, e in T.grid(LANES, 2):
                                    with T.sblock("keep_ref"):
                                        vl, ve = T.axis.remap("SS", [lane, e])
                                        ref[vl, ve] = new_ref[vl, ve]
                                for x, lane in T.grid(X, LANES):
                                    with T.sblock("prob_row"):
                                        vx, vl = T.axis.remap("SS", [x, lane])
                                        prob_row[vl, vx] = rounded_pair(
                                            prob[vl, vx, 0], prob[vl, vx, 1]
                                        )
                                for x, lane in T.grid(X, LANES):
                                    with T.sblock("prob_pair"):
                                        vx, vl = T.axis.remap("SS", [x, lane])
                                        prob_pair[vl, vx] = transposed_pair(
                                            lambda of: prob_row[of, vx], vl
                                        )
                                outputs(
                                    prob_pair, v_code, v_scale, v_zero, page, head, base % P, left,
                                    acc, zero_acc,
                                )  # fmt: skip
                        sum_of_2 = T.sblock_alloc_buffer((LANES, 2), "float32")
                        sum_of_8 = T.sblock_alloc_buffer((LANES, 2), "float32")
                        sum_of_4 = T.sblock_alloc_buffer((LANES, 2), "float32")
                        for lane, e in T.grid(LANES, 2):
                            with T.sblock("sum_of_2"):
                                vl, ve = T.axis.remap("SS", [lane, e])
                                sum_of_2[vl, ve] = total[vl, ve] + total[(vl + 16) % LANES, ve]
                        for lane, e in T.grid(LANES, 2):
                            with T.sblock("sum_of_4"):
                                vl, ve = T.axis.remap("SS", [lane, e])
                                sum_of_4[vl, ve] = sum_of_2[vl, ve] + sum_of_2[(vl + 8) % LANES, ve]
                        for lane, e in T.grid(LANES, 2):
                            with T.sblock("sum_of_8"):
                                vl, ve = T.axis.remap("SS", [lane, e])
                                sum_of_8[vl, ve] = sum_of_4[vl, ve] + sum_of_4[(vl + 4) % LANES, ve]
                        for lane, e in T.grid(LANES, 2):
                            with T.sblock("warp_stat"):
                                vl, ve = T.axis.remap("SS", [lane, e])
                                T.where(lane % 4 * 2 + e < M)
                                warp_ref[vw, vl % 4 * 2 + ve] = ref[vl, ve]
                                warp_sum[vw, vl % 4 * 2 + ve] = sum_of_8[vl, ve]
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
                share = T.sblock_alloc_buffer((warps, M), "float32")
                sum_of_warps = T.sblock_alloc_buffer((M,), "float32")
                acc_of_warps = T.sblock_alloc_buffer((M, D), "float32")
                for m, w in T.grid(M, warps):
                    with T.sblock("top_ref"):
                        vm, vw = T.axis.remap("SR", [m, w])
                        with T.init():
                            top_ref[vm] = T.min_value("float32")
                        top_ref[vm] = T.max(top_ref[vm], warp_ref[vw, vm])
                for w, m in T.grid(warps, M):
                    with T.sblock("share"):
                        vw, vm = T.axis.remap("SS", [w, m])
                        share[vw, vm] = T.exp2(warp_ref[vw, vm] - top_ref[vm])
                for m, w in T.grid(M, warps):
                    with T.sblock("sum_of_warps"):
                        vm, vw = T.axis.remap("SR", [m, w])
                        with T.init():
                            sum_of_warps[vm] = T.float32(0)
                        sum_of_warps[vm] += warp_sum[vw, vm] * share[vw, vm]
                for m, d, w in T.grid(M, D, warps):
                    with T.sblock("acc_of_warps"):
                        vm, vd, vw = T.axis.remap("SSR", [m, d, w])
                        with T.init():
                            acc_of_warps[vm, vd] = T.float32(0)
                        acc_of_warps[vm, vd] += warp_acc[vw, vm, vd] * share[vw, vm]
                store(top_ref, sum_of_warps, acc_of_warps, part_acc, part_stat, b, row, work[vi, 1])

    return attend
