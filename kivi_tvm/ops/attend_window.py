"""Plain attention over the full-precision window: the last `L - packed_values` tokens.

Tokens are taken oldest first: token `i` of the window is in ring slot
`(packed_values + i) mod ring`, so that results do not depend on the ring's size. What a chunk has
too many has weight 0 by selection, and the newest token is read in its place: no other slot is.
"""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import DTYPE_BYTES, LENGTH, PACKED_VALUES
from kivi_tvm.ops.online_softmax import (
    LOG2_E,
    merge_blocks,
    row_tiles,
    softmax_blocks,
    start_blocks,
    store_blocks,
)
from kivi_tvm.ops.prefetch import prefetch_tokens
from kivi_tvm.ops.regions import regions

CHUNK_TOKENS = 32
# Blocks that ask for the memory of the next chunk.
FETCH_KEYS, FETCH_VALUES = "fetch_keys", "fetch_values"


def attend_window(
    key: KernelKey,
    chunk_tokens: int = CHUNK_TOKENS,
    prefetch: str = "none",
    row_tile: int | None = None,
):
    """Partial attention of every row over its window, stored as one partial result.

    Parameters
    ----------
    key : KernelKey
    chunk_tokens : int
        Tokens whose scores are held at once.
    prefetch : str
        "next" asks for the memory of the next chunk in blocks `fetch_*`, which a schedule spreads
        over the work on this one; "none" does not.
    row_tile : int, optional
        As for `attend`.

    Returns
    -------
    PrimFunc
        `(k_ring, v_ring [S, H_kv, ring, D], state [S, 4], slots [B], q [B, H n, D], scale,
        entry, part_acc [B, H n, X, D], part_stat [B, H n, X, 2])` with `n` tokens' queries per
        head; the result is number `X - entry`; rows with slot -1 are skipped.
    """
    D, C, dtype = key.head_dim, chunk_tokens, key.dtype
    tiles = row_tiles(key, row_tile)
    M, ROWS, TILES = tiles.rows, tiles.total, tiles.count
    fetch_keys, fetch_values = (
        prefetch_tokens(name, C, D, DTYPE_BYTES[dtype]) for name in (FETCH_KEYS, FETCH_VALUES)
    )
    start, softmax = start_blocks(M, D), softmax_blocks(M, C)
    merge, store = merge_blocks(M, D), store_blocks(M, D)

    @T.prim_func(s_tir=True)
    def attend_window(
        k_ring_handle: T.handle,
        v_ring_handle: T.handle,
        state_handle: T.handle,
        slots_handle: T.handle,
        q_handle: T.handle,
        scale: T.float32,
        entry: T.int32,
        part_acc_handle: T.handle,
        part_stat_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        B, H_kv, S, X, ring, q_row, q_head = (
            T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(),
        )  # fmt: skip
        k_ring = T.match_buffer(k_ring_handle, (S, H_kv, ring, D), dtype)
        v_ring = T.match_buffer(v_ring_handle, (S, H_kv, ring, D), dtype)
        state = T.match_buffer(state_handle, (S, 4), "int32")
        slots = T.match_buffer(slots_handle, (B,), "int32")
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
                    k_ring[0:S, kv, 0:ring, 0:D],
                    v_ring[0:S, kv, 0:ring, 0:D],
                    state[0:S, 0:4],
                    slots[vb],
                    q[vb, row : row + M, 0:D],
                )
                T.writes(
                    part_acc[vb, row : row + M, X - entry, 0:D],
                    part_stat[vb, row : row + M, X - entry, 0:2],
                )
                slot = T.meta_var(slots[vb])
                count = T.meta_var(state[slot, LENGTH] - state[slot, PACKED_VALUES])
                oldest = T.sblock_alloc_buffer((1,), "int32")
                q_scaled = T.sblock_alloc_buffer((M, D), "float32")
                run_max = T.sblock_alloc_buffer((M,), "float32")
                run_sum = T.sblock_alloc_buffer((M,), "float32")
                run_acc = T.sblock_alloc_buffer((M, D), "float32")
                chunk_max = T.sblock_alloc_buffer((M,), "float32")
                chunk_sum = T.sblock_alloc_buffer((M,), "float32")
                chunk_acc = T.sblock_alloc_buffer((M, D), "float32")
                run = T.meta_var((run_max, run_sum, run_acc))
                chunk = T.meta_var((chunk_max, chunk_sum, chunk_acc))
                with T.sblock("oldest"):
                    oldest[0] = state[slot, PACKED_VALUES] % ring
                for m, d in T.grid(M, D):
                    with T.sblock("q_scaled"):
                        vm, vd = T.axis.remap("SS", [m, d])
                        q_scaled[vm, vd] = T.Cast("float32", q[vb, row + vm, vd]) * (
                            scale * T.float32(LOG2_E)
                        )
                start(run_max, run_sum, run_acc)
                for c in T.serial(T.ceildiv(count, C)):
                    with T.sblock("chunk"):
                        vc = T.axis.opaque(T.ceildiv(ring, C), c)
                        T.reads(
                            k_ring[0:S, kv, 0:ring, 0:D],
                            v_ring[0:S, kv, 0:ring, 0:D],
                            state[0:S, 0:4],
                            slots[vb],
                            oldest[0],
                            q_scaled[0:M, 0:D],
                        )
                        T.writes(*regions(chunk))
                        source = T.sblock_alloc_buffer((C,), "int32")
                        dot = T.sblock_alloc_buffer((M, C), "float32")
                        score = T.sblock_alloc_buffer((M, C), "float32")
                        prob = T.sblock_alloc_buffer((M, C), "float32")
                        mass = T.sblock_alloc_buffer((M, C), "float32")
                        out = T.sblock_alloc_buffer((M, D), "float32")
                        for t in range(C):
                            with T.sblock("source"):
                                vt = T.axis.spatial(C, t)
                                at = T.meta_var(oldest[0] + T.min(vc * C + vt, count - 1))
                                source[vt] = at - T.Select(at >= ring, ring, 0)
                        if prefetch == "next":
                            # The next chunk, or the first one of the next head.
                            ends = T.meta_var((vc + 1) * C >= count)
                            first = T.meta_var(T.Select(ends, 0, (vc + 1) * C))
                            head = T.meta_var(T.Select(ends, T.min(kv + 1, H_kv - 1), kv))
                            next_source = T.sblock_alloc_buffer((C,), "int32")
                            for t in range(C):
                                with T.sblock("next_source"):
                                    vt = T.axis.spatial(C, t)
                                    at = T.meta_var(oldest[0] + T.min(first + vt, count - 1))
                                    next_source[vt] = at - T.Select(at >= ring, ring, 0)
                            fetch_keys(k_ring, slot, head, lambda t: next_source[t])
                            fetch_values(v_ring, slot, head, lambda t: next_source[t])
                        for m, t, d in T.grid(M, C, D):
                            with T.sblock("dot"):
                                vm, vt, vd = T.axis.remap("SSR", [m, t, d])
                                with T.init():
                                    dot[vm, vt] = T.float32(0)
                                dot[vm, vt] += q_scaled[vm, vd] * T.Cast(
                                    "float32", k_ring[slot, kv, source[vt], vd]
                                )
                        for m, t in T.grid(M, C):
                            with T.sblock("score"):
                                vm, vt = T.axis.remap("SS", [m, t])
                                score[vm, vt] = T.Select(
                                    vc * C + vt < count, dot[vm, vt], T.min_value("float32")
                                )
                        softmax(score, chunk_max, prob, chunk_sum)
                        for m, t in T.grid(M, C):
                            with T.sblock("mass"):
                                vm, vt = T.axis.remap("SS", [m, t])
                                mass[vm, vt] = T.Select(
                                    vc * C + vt < count, prob[vm, vt], T.float32(0)
                                )
                        for m, d, t in T.grid(M, D, C):
                            with T.sblock("out"):
                                vm, vd, vt = T.axis.remap("SSR", [m, d, t])
                                with T.init():
                                    out[vm, vd] = T.float32(0)
                                out[vm, vd] += mass[vm, vt] * T.Cast(
                                    "float32", v_ring[slot, kv, source[vt], vd]
                                )
                        for m, d in T.grid(M, D):
                            with T.sblock("chunk_acc"):
                                vm, vd = T.axis.remap("SS", [m, d])
                                chunk_acc[vm, vd] = out[vm, vd]
                    with T.sblock("merge"):
                        vc = T.axis.opaque(T.ceildiv(ring, C), c)
                        T.reads(*regions((*run, *chunk)))
                        T.writes(*regions(run))
                        merge(run_max, run_sum, run_acc, chunk_max, chunk_sum, chunk_acc)
                store(run_max, run_sum, run_acc, part_acc, part_stat, vb, row, X - entry)

    return attend_window
