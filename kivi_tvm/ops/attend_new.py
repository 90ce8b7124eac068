"""Causal attention of new queries over the new tokens themselves, exact.

Query `i` of a pass that starts at new token `first` sees the new tokens `j <= first + i` that its
row has. Hidden tokens count for nothing by selection, whatever they hold.
"""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.online_softmax import (
    LOG2_E,
    merge_blocks,
    row_tiles,
    softmax_blocks,
    start_blocks,
    store_blocks,
)
from kivi_tvm.ops.regions import regions

CHUNK = 32  # new tokens whose scores are held at once


def attend_new(key: KernelKey, row_tile: int | None = None):
    """Partial attention of every row over its new tokens, stored as the last but one result.

    Parameters
    ----------
    key : KernelKey
    row_tile : int, optional
        As for `attend`.

    Returns
    -------
    PrimFunc
        `(slots [B], added [B] new tokens of each row, k, v [B, H_kv, tokens, D], q [B, H n, D],
        first, scale, part_acc [B, H n, X, D], part_stat [B, H n, X, 2])` with `n` tokens' queries
        per head; rows with slot -1 are skipped.
    """
    D, n, C, dtype = key.head_dim, key.rows_per_query, CHUNK, key.dtype
    tiles = row_tiles(key, row_tile)
    M, ROWS, TILES = tiles.rows, tiles.total, tiles.count
    start, softmax = start_blocks(M, D), softmax_blocks(M, C)
    merge, store = merge_blocks(M, D), store_blocks(M, D)

    @T.prim_func(s_tir=True)
    def attend_new(
        slots_handle: T.handle,
        added_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        q_handle: T.handle,
        first: T.int32,
        scale: T.float32,
        part_acc_handle: T.handle,
        part_stat_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        B, H_kv, X, tokens = T.int32(), T.int32(), T.int32(), T.int32()
        k_row, k_head, k_token = T.int32(), T.int32(), T.int32()
        v_row, v_head, v_token, q_row, q_head = (
            T.int32(), T.int32(), T.int32(), T.int32(), T.int32(),
        )  # fmt: skip
        slots = T.match_buffer(slots_handle, (B,), "int32")
        added = T.match_buffer(added_handle, (B,), "int32")
        k = T.match_buffer(
            k_handle, (B, H_kv, tokens, D), dtype, strides=(k_row, k_head, k_token, 1)
        )
        v = T.match_buffer(
            v_handle, (B, H_kv, tokens, D), dtype, strides=(v_row, v_head, v_token, 1)
        )
        q = T.match_buffer(q_handle, (B, H_kv * ROWS, D), dtype, strides=(q_row, q_head, 1))
        part_acc = T.match_buffer(part_acc_handle, (B, H_kv * ROWS, X, D), "float32")
        part_stat = T.match_buffer(part_stat_handle, (B, H_kv * ROWS, X, 2), "float32")
        for b, h in T.grid(B, H_kv * TILES):
            with T.sblock("row"):
                vb, vh = T.axis.remap("SS", [b, h])
                T.where(slots[b] >= 0)
                kv = T.meta_var(tiles.head(vh))
                row = T.meta_var(tiles.start(vh))
                T.reads(
                    k[vb, kv, 0:tokens, 0:D],
                    v[vb, kv, 0:tokens, 0:D],
                    added[vb],
                    q[vb, row : row + M, 0:D],
                )
                T.writes(
                    part_acc[vb, row : row + M, X - 2, 0:D],
                    part_stat[vb, row : row + M, X - 2, 0:2],
                )
                seen = T.meta_var(T.min(first + n, added[vb]))
                q_scaled = T.sblock_alloc_buffer((M, D), "float32")
                run_max = T.sblock_alloc_buffer((M,), "float32")
                run_sum = T.sblock_alloc_buffer((M,), "float32")
                run_acc = T.sblock_alloc_buffer((M, D), "float32")
                chunk_max = T.sblock_alloc_buffer((M,), "float32")
                chunk_sum = T.sblock_alloc_buffer((M,), "float32")
                chunk_acc = T.sblock_alloc_buffer((M, D), "float32")
                run = T.meta_var((run_max, run_sum, run_acc))
                chunk = T.meta_var((chunk_max, chunk_sum, chunk_acc))
                for m, d in T.grid(M, D):
                    with T.sblock("q_scaled"):
                        vm, vd = T.axis.remap("SS", [m, d])
                        q_scaled[vm, vd] = T.Cast("float32", q[vb, row + vm, vd]) * (
                            scale * T.float32(LOG2_E)
                        )
                start(run_max, run_sum, run_acc)
                for c in T.serial(T.ceildiv(seen, C)):
                    with T.sblock("chunk"):
                        vc = T.axis.opaque(T.ceildiv(tokens, C), c)
                        T.reads(
                            k[vb, kv, 0:tokens, 0:D],
                            v[vb, kv, 0:tokens, 0:D],
                            added[vb],
                            q_scaled[0:M, 0:D],
                        )
                        T.writes(*regions(chunk))
                        dot = T.sblock_alloc_buffer((M, C), "float32")
                        score = T.sblock_alloc_buffer((M, C), "float32")
                        prob = T.sblock_alloc_buffer((M, C), "float32")
                        mass = T.sblock_alloc_buffer((M, C), "float32")
                        out = T.sblock_alloc_buffer((M, D), "float32")
                        for m, t, d in T.grid(M, C, D):
                            with T.sblock("dot"):
                                vm, vt, vd = T.axis.remap("SSR", [m, t, d])
                                with T.init():
                                    dot[vm, vt] = T.float32(0)
                                dot[vm, vt] += q_scaled[vm, vd] * T.Cast(
                                    "float32", k[vb, kv, T.min(vc * C + vt, tokens - 1), vd]
                                )
                        for m, t in T.grid(M, C):
                            with T.sblock("score"):
                                vm, vt = T.axis.remap("SS", [m, t])
                                score[vm, vt] = T.Select(
                                    vc * C + vt < seen
                                    and vc * C + vt <= first + (tiles.first(vh) + vm) % n,
                                    dot[vm, vt],
                                    T.min_value("float32"),
                                )
                        softmax(score, chunk_max, prob, chunk_sum)
                        for m, t in T.grid(M, C):
                            with T.sblock("mass"):
                                vm, vt = T.axis.remap("SS", [m, t])
                                mass[vm, vt] = T.Select(
                                    vc * C + vt < seen
                                    and vc * C + vt <= first + (tiles.first(vh) + vm) % n,
                                    prob[vm, vt],
                                    T.float32(0),
                                )
                        for m, d, t in T.grid(M, D, C):
                            with T.sblock("out"):
                                vm, vd, vt = T.axis.remap("SSR", [m, d, t])
                                with T.init():
                                    out[vm, vd] = T.float32(0)
                                out[vm, vd] += T.Select(
                                    mass[vm, vt] > T.float32(0),
                                    mass[vm, vt]
                                    * T.Cast(
                                        "float32", v[vb, kv, T.min(vc * C + vt, tokens - 1), vd]
                                    ),
                                    T.float32(0),
                                )
                        for m, d in T.grid(M, D):
                            with T.sblock("chunk_acc"):
                                vm, vd = T.axis.remap("SS", [m, d])
                                chunk_acc[vm, vd] = out[vm, vd]
                    with T.sblock("merge"):
                        vc = T.axis.opaque(T.ceildiv(tokens, C), c)
                        T.reads(*regions((*run, *chunk)))
                        T.writes(*regions(run))
                        merge(run_max, run_sum, run_acc, chunk_max, chunk_sum, chunk_acc)
                store(run_max, run_sum, run_acc, part_acc, part_stat, vb, row, X - 2)

    return attend_new
