"""`combine_window` by the tensor cores of a GPU: sums of every so many tiles of the window.

As many sums however many warps there are, so that a row gives the same bits with any number. Keys,
queries and values in 16 bits are operands as they are, and their products exact; sums are float32.
Probabilities are rounded to the cache's dtype once, as its output is.
"""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.contract_full import LOADED, TOKENS
from kivi_tvm.ops.fragments import LANES, QUERIES, FullTile
from kivi_tvm.ops.online_softmax import row_tiles
from kivi_tvm.ops.parts_half import stored_parts
from kivi_tvm.ops.ring import row_blocks
from kivi_tvm.ops.softmax_half import query_load_block
from kivi_tvm.ops.window_sums import FEW, SUMS, finish_block, window_sums


def combine_window_half(key: KernelKey, row_tile: int | None = None):
    """The output and log-sum-exp of every row from its window and its splits' partial results.

    Parameters and results as of `combine_window`; of at most 8 query heads at once.
    """
    D, dtype = key.head_dim, key.dtype
    tiles, SPANS = row_tiles(key, min(row_tile or QUERIES, QUERIES)), FullTile(D).key_spans
    M, ROWS, TILES = tiles.rows, tiles.total, tiles.count
    load_queries, find_row = query_load_block(D, M, SPANS, LOADED), row_blocks(key)
    sum_up_window = window_sums(D, dtype, M)
    finish = finish_block(M, D, dtype)

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
                parts = T.meta_var(stored_parts(part_acc, part_stat, vb, first, M))
                sum_up_window(
                    k_ring, v_ring, kv, ring, slot, oldest, count, entries, q_load, scale, parts,
                    few, sum_ref, sum_mass, sum_acc,
                )  # fmt: skip
                finish(sum_ref, sum_mass, sum_acc, few, vb, first, out, lse)

    return combine_window
