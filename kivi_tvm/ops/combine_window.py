"""Attend to the window and merge the partial results of the splits: the end of a decode step.

`attend_window` and `combine` in one function, for devices on which a launch costs more than either:
the window of a row is one chunk after the other, and so are the splits' partial results, each as
if it were a token whose weight is its sum and whose value is its accumulator:

    m = max_x m_x,  l = sum_x l_x 2^(m_x - m),  out = sum_x acc_x 2^(m_x - m) / l
"""

from __future__ import annotations

import math

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import DTYPE_BYTES
from kivi_tvm.ops.combine_window_half import combine_window_half
from kivi_tvm.ops.online_softmax import (
    LOG2_E,
    merge_blocks,
    row_tiles,
    softmax_blocks,
    start_blocks,
)
from kivi_tvm.ops.regions import regions
from kivi_tvm.ops.ring import row_blocks, slot_of
from kivi_tvm.ops.waits import wait_block

CHUNK_BYTES = 32768  # of the window's keys, and of its values, that are held at once
MAX_CHUNK_TOKENS = 128
CHUNK_PARTS = 32  # partial results
# A chunk is summed in so many sums of every so many-th, which are summed in the end.
TOKEN_SUMS, PART_SUMS = 16, 8


def chunk_tokens(key: KernelKey) -> int:
    """Tokens of a chunk, a power of two."""
    most = CHUNK_BYTES // (key.head_dim * DTYPE_BYTES[key.dtype])
    return min(MAX_CHUNK_TOKENS, 1 << (most.bit_length() - 1))


def combine_window(key: KernelKey, row_tile: int | None = None):
    """The output and log-sum-exp of every row from its window and its splits' partial results.

    Parameters
    ----------
    key : KernelKey
    row_tile : int, optional
        Query heads that are computed together, of those that share a KV head; default all, in mode
        "half" at most 8.

    Returns
    -------
    PrimFunc
        `(k_ring, v_ring [S, H_kv, ring, D], state [S, 4], slots [B], q [B, H, D], scale, split,
        part_acc [B, H, X, D], part_stat [B, H, X, 2], out [B, H, D], lse [B, H] float32)`. The
        row's first entries are read, one per part of `split` packed tokens (`layout.split_tokens`).
        Rows with slot -1 give out 0 and lse -inf.
    """
    if key.compute == "half":
        return combine_window_half(key, row_tile)
    D, dtype, tiles = key.head_dim, key.dtype, row_tiles(key, row_tile)
    M, ROWS, TILES = tiles.rows, tiles.total, tiles.count
    C, X_C, SUMS, X_SUMS = chunk_tokens(key), CHUNK_PARTS, TOKEN_SUMS, PART_SUMS
    start, softmax = start_blocks(M, D), softmax_blocks(M, C)
    find_row = row_blocks(key)
    attended = wait_block("attended")
    merge, merge_parts = merge_blocks(M, D), merge_blocks(M, D, "_parts")

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
                q_scaled = T.sblock_alloc_buffer((M, D), "float32")
                run_max = T.sblock_alloc_buffer((M,), "float32")
                run_sum = T.sblock_alloc_buffer((M,), "float32")
                run_acc = T.sblock_alloc_buffer((M, D), "float32")
                chunk_max = T.sblock_alloc_buffer((M,), "float32")
                chunk_sum = T.sblock_alloc_buffer((M,), "float32")
                chunk_acc = T.sblock_alloc_buffer((M, D), "float32")
                run = T.meta_var((run_max, run_sum, run_acc))
                chunk = T.meta_var((chunk_max, chunk_sum, chunk_acc))
                part_max = T.sblock_alloc_buffer((M,), "float32")
                part_sum = T.sblock_alloc_buffer((M,), "float32")
                parts_acc = T.sblock_alloc_buffer((M, D), "float32")
                part = T.meta_var((part_max, part_sum, parts_acc))
                find_row(state, slots, vb, ring, split, slot, oldest, count, entries)
                for m, d in T.grid(M, D):
                    with T.sblock("q_scaled"):
                        vm, vd = T.axis.remap("SS", [m, d])
                        q_scaled[vm, vd] = T.Cast("float32", q[vb, first + vm, vd]) * (
                            scale * T.float32(LOG2_E)
                        )
                start(run_max, run_sum, run_acc)
                for c in T.serial(T.ceildiv(count[0], C)):
                    with T.sblock("chunk"):
                        vc = T.axis.opaque(T.ceildiv(ring, C), c)
                        T.reads(
                            k_ring[0:S, kv, 0:ring, 0:D],
                            v_ring[0:S, kv, 0:ring, 0:D],
                            slot[0],
                            oldest[0],
                            count[0],
                            q_scaled[0:M, 0:D],
                        )
                        T.writes(*regions(chunk))
                        k_near = T.sblock_alloc_buffer((C, D), dtype)
                        v_near = T.sblock_alloc_buffer((SUMS, C // SUMS, D), dtype)
                        dot = T.sblock_alloc_buffer((M, C), "float32")
                        score = T.sblock_alloc_buffer((M, C), "float32")
                        prob = T.sblock_alloc_buffer((M, C), "float32")
                        mass = T.sblock_alloc_buffer((M, C), "float32")
                        acc = T.sblock_alloc_buffer((SUMS, M, D), "float32")
                        for t, d in T.grid(C, D):
                            with T.sblock("k_near"):
                                vt, vd = T.axis.remap("SS", [t, d])
                                at = T.meta_var(slot_of(oldest[0], count[0], vc * C + vt, ring))
                                k_near[vt, vd] = k_ring[slot[0], kv, at, vd]
                        for s, j, d in T.grid(SUMS, C // SUMS, D):
                            with T.sblock("v_near"):
                                vs, vj, vd = T.axis.remap("SSS", [s, j, d])
                                token = T.meta_var(vc * C + vj * SUMS + vs)
                                at = T.meta_var(slot_of(oldest[0], count[0], token, ring))
                                v_near[vs, vj, vd] = v_ring[slot[0], kv, at, vd]
                        for m, t, d in T.grid(M, C, D):
                            with T.sblock("dot"):
                                vm, vt, vd = T.axis.remap("SSR", [m, t, d])
                                with T.init():
                                    dot[vm, vt] = T.float32(0)
                                dot[vm, vt] += q_scaled[vm, vd] * T.Cast("float32", k_near[vt, vd])
                        for m, t in T.grid(M, C):
                            with T.sblock("score"):
                                vm, vt = T.axis.remap("SS", [m, t])
                                score[vm, vt] = T.Select(
                                    vc * C + vt < count[0], dot[vm, vt], T.min_value("float32")
                                )
                        softmax(score, chunk_max, prob, chunk_sum)
                        for m, t in T.grid(M, C):
                            with T.sblock("mass"):
                                vm, vt = T.axis.remap("SS", [m, t])
                                mass[vm, vt] = T.Select(
                                    vc * C + vt < count[0], prob[vm, vt], T.float32(0)
                                )
                        for s, m, d, j in T.grid(SUMS, M, D, C // SUMS):
                            with T.sblock("acc"):
                                vs, vm, vd, vj = T.axis.remap("SSSR", [s, m, d, j])
                                with T.init():
                                    acc[vs, vm, vd] = T.float32(0)
                                acc[vs, vm, vd] += mass[vm, vj * SUMS + vs] * T.Cast(
                                    "float32", v_near[vs, vj, vd]
                                )
                        for m, d, s in T.grid(M, D, SUMS):
                            with T.sblock("chunk_acc"):
                                vm, vd, vs = T.axis.remap("SSR", [m, d, s])
                                with T.init():
                                    chunk_acc[vm, vd] = T.float32(0)
                                chunk_acc[vm, vd] += acc[vs, vm, vd]
                    with T.sblock("merge"):
                        T.reads(*regions((*run, *chunk)))
                        T.writes(*regions(run))
                        merge(run_max, run_sum, run_acc, chunk_max, chunk_sum, chunk_acc)
                attended()  # nothing before this reads what `attend` writes
                for c in T.serial(T.ceildiv(entries[0], X_C)):
                    with T.sblock("parts"):
                        vc = T.axis.opaque(T.ceildiv(X, X_C), c)
                        T.reads(
                            part_acc[vb, first : first + M, 0:X, 0:D],
                            part_stat[vb, first : first + M, 0:X, 0:2],
                            entries[0],
                        )
                        T.writes(*regions(part))
                        level = T.sblock_alloc_buffer((M, X_C), "float32")
                        weight = T.sblock_alloc_buffer((M, X_C), "float32")
                        part_near = T.sblock_alloc_buffer((X_SUMS, M, X_C // X_SUMS, D), "float32")
                        parts = T.sblock_alloc_buffer((X_SUMS, M, D), "float32")
                        for s, m, j, d in T.grid(X_SUMS, M, X_C // X_SUMS, D):
                            with T.sblock("part_near"):
                                vs, vm, vj, vd = T.axis.remap("SSSS", [s, m, j, d])
                                entry = T.meta_var(vc * X_C + vj * X_SUMS + vs)
                                part_near[vs, vm, vj, vd] = T.if_then_else(
                                    entry < entries[0],
                                    part_acc[vb, first + vm, entry, vd],
                                    T.float32(0),
                                )
                        for m, x in T.grid(M, X_C):
                            with T.sblock("level"):
                                vm, vx = T.axis.remap("SS", [m, x])
                                level[vm, vx] = T.if_then_else(
                                    vc * X_C + vx < entries[0],
                                    part_stat[vb, first + vm, vc * X_C + vx, 0],
                                    T.min_value("float32"),
                                )
                        for m, x in T.grid(M, X_C):
                            with T.sblock("part_max"):
                                vm, vx = T.axis.remap("SR", [m, x])
                                with T.init():
                                    part_max[vm] = T.min_value("float32")
                                part_max[vm] = T.max(part_max[vm], level[vm, vx])
                        for m, x in T.grid(M, X_C):
                            with T.sblock("weight"):
                                vm, vx = T.axis.remap("SS", [m, x])
                                weight[vm, vx] = T.Select(
                                    vc * X_C + vx < entries[0],
                                    T.exp2(level[vm, vx] - part_max[vm]),
                                    T.float32(0),
                                )
                        for m, x in T.grid(M, X_C):
                            with T.sblock("part_sum"):
                                vm, vx = T.axis.remap("SR", [m, x])
                                with T.init():
                                    part_sum[vm] = T.float32(0)
                                part_sum[vm] += (
                                    weight[vm, vx]
                                    * part_stat[
                                        vb, first + vm, T.min(vc * X_C + vx, entries[0] - 1), 1
                                    ]
                                )
                        for s, m, d, j in T.grid(X_SUMS, M, D, X_C // X_SUMS):
                            with T.sblock("parts_of"):
                                vs, vm, vd, vj = T.axis.remap("SSSR", [s, m, d, j])
                                with T.init():
                                    parts[vs, vm, vd] = T.float32(0)
                                parts[vs, vm, vd] += (
                                    weight[vm, vj * X_SUMS + vs] * part_near[vs, vm, vj, vd]
                                )
                        for m, d, s in T.grid(M, D, X_SUMS):
                            with T.sblock("parts_acc"):
                                vm, vd, vs = T.axis.remap("SSR", [m, d, s])
                                with T.init():
                                    parts_acc[vm, vd] = T.float32(0)
                                parts_acc[vm, vd] += parts[vs, vm, vd]
                    with T.sblock("merge_parts"):
                        T.reads(*regions((*run, *part)))
                        T.writes(*regions(run))
                        merge_parts(run_max, run_sum, run_acc, part_max, part_sum, parts_acc)
                for m, d in T.grid(M, D):
                    with T.sblock("out"):
                        vm, vd = T.axis.remap("SS", [m, d])
                        out[vb, first + vm, vd] = T.Cast(
                            dtype,
                            T.Select(
                                run_sum[vm] == T.float32(0),
                                T.float32(0),
                                run_acc[vm, vd] / run_sum[vm],
                            ),
                        )
                for m in range(M):
                    with T.sblock("lse"):
                        vm = T.axis.spatial(M, m)
                        lse[vb, first + vm] = (run_max[vm] + T.log2(run_sum[vm])) * T.float32(
                            math.log(2)
                        )

    return combine_window
