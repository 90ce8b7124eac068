"""Fused attention over the packed pages, split along tokens (flash-decoding).

For one query head `m`, with `s2 = scale * log2(e)` folded into the query, over the packed tokens
`t` of a sequence (design section 4):

    score_t = sum_d (q_d s_kd) code_td + sum_d q_d z_kd          per group of G_k tokens
    p_t     = 2^(score_t - max)                                  0 where t is not packed
    acc_d   = sum_t (p_t s_vt) code_td + sum_t p_t z_vt          per group of G_v channels

How the sums over codes are computed is the compute mode: `contract_float`, `contract_int8`.
"""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import PACKED_VALUES
from kivi_tvm.ops import contract_float, contract_int8
from kivi_tvm.ops.attend_half import WARPS, attend_half
from kivi_tvm.ops.online_softmax import (
    LOG2_E,
    merge_blocks,
    row_tiles,
    softmax_blocks,
    start_blocks,
    store_blocks,
)
from kivi_tvm.ops.prefetch import prefetch_block
from kivi_tvm.ops.regions import ALL, regions

# Blocks that ask for the memory of the next chunk.
FETCH_KEYS = "fetch_k_code", "fetch_k_scale", "fetch_k_zero"
FETCH_VALUES = "fetch_v_code", "fetch_v_scale", "fetch_v_zero"
COMPUTE_ATTR = "kivi.compute"  # of a function in another mode than "float"
CONTRACTIONS = {"float": contract_float, "int8": contract_int8, "int8x2": contract_int8}


def attend(
    key: KernelKey,
    chunk_tokens: int | None = None,
    prefetch: str = "none",
    unpack: str = "shift",
    row_tile: int | None = None,
    warps: int = WARPS,
):
    """Partial attention of every work item over its split of the packed tokens.

    A work item covers `key.split_tokens` tokens of one row.

    Parameters
    ----------
    key : KernelKey
    chunk_tokens : int, optional
        Tokens whose scores are held at once: whole pages, a divisor of `key.split_tokens`; default
        `key.chunk_tokens`.
    prefetch : str
        "next" asks for the memory of the next chunk in blocks `fetch_*`, which a schedule spreads
        over the work on this one; "none" does not.
    unpack : str
        How integer modes get a place of a word's bytes: "shift" moves it down, "mask" leaves it
        where it is, which takes unsigned products.
    row_tile : int, optional
        Query rows that are computed together, of those that share a KV head; default all. Each tile
        reads the codes once.
    warps : int
        Of a work-group, in mode "half".

    Returns
    -------
    PrimFunc
        `(k_code, k_scale, k_zero, v_code, v_scale, v_zero, page_table [S, pages], state [S, 4],
        slots [B], work [n, 2] of (row, split), q [B, H n, D], scale, part_acc [B, H n, X, D],
        part_stat [B, H n, X, 2] of (max in log2 units, sum))` with `n` tokens' queries per head.
        Work items with row -1 are skipped. The last entries of the partial results belong to
        others: the window and new tokens.
    """
    if key.compute == "half":
        return attend_half(key, warps)
    D, P, dtype = key.head_dim, key.page_size, key.dtype
    tiles = row_tiles(key, row_tile)
    M, ROWS, TILES = tiles.rows, tiles.total, tiles.count
    G_k, G_v = key.key_group_size, key.value_group_size
    W_k, W_v = key.key_codes_per_word, key.value_codes_per_word
    C, SPLIT = chunk_tokens or key.chunk_tokens, key.split_tokens
    CHUNKS, PAGES, N_k, N_v = SPLIT // C, C // P, P // G_k, D // G_v

    fetch = [
        prefetch_block(name, PAGES, rows, columns, itemsize)
        for name, rows, columns, itemsize in zip(
            (*FETCH_KEYS, *FETCH_VALUES),
            (D // W_k, N_k, N_k, P // W_v, N_v, N_v),
            (P, D, D, D, P, P),
            (4, 2, 2, 4, 2, 2),
        )
    ]
    contraction = CONTRACTIONS[key.compute]
    scores = contraction.score_blocks(key, M, C, unpack)
    outputs = contraction.output_blocks(key, M, C, unpack)
    start, softmax = start_blocks(M, D), softmax_blocks(M, C)
    merge, store = merge_blocks(M, D), store_blocks(M, D)

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
        items, X, q_row, q_head = T.int32(), T.int32(), T.int32(), T.int32()
        k_code = T.match_buffer(k_code_handle, (N, H_kv, D // W_k, P), "uint32")
        k_scale = T.match_buffer(k_scale_handle, (N, H_kv, N_k, D), "float16")
        k_zero = T.match_buffer(k_zero_handle, (N, H_kv, N_k, D), "float16")
        v_code = T.match_buffer(v_code_handle, (N, H_kv, P // W_v, D), "uint32")
        v_scale = T.match_buffer(v_scale_handle, (N, H_kv, N_v, P), "float16")
        v_zero = T.match_buffer(v_zero_handle, (N, H_kv, N_v, P), "float16")
        stored = T.meta_var((k_code, k_scale, k_zero, v_code, v_scale, v_zero))
        page_table = T.match_buffer(page_table_handle, (S, pages), "int32")
        state = T.match_buffer(state_handle, (S, 4), "int32")
        slots = T.match_buffer(slots_handle, (B,), "int32")
        work = T.match_buffer(work_handle, (items, 2), "int32")
        q = T.match_buffer(q_handle, (B, H_kv * ROWS, D), dtype, strides=(q_row, q_head, 1))
        part_acc = T.match_buffer(part_acc_handle, (B, H_kv * ROWS, X, D), "float32")
        part_stat = T.match_buffer(part_stat_handle, (B, H_kv * ROWS, X, 2), "float32")

        # Heads inside: a page's heads lie side by side, and reading them in turn instead of one
        # head's pages at a stride is 1.5 times faster once the cache exceeds the last-level cache.
        for item, h in T.grid(items, H_kv * TILES):
            with T.sblock("split"):
                vi, vh = T.axis.remap("SS", [item, h])
                T.where(work[item, 0] >= 0)
                kv = T.meta_var(tiles.head(vh))
                row = T.meta_var(tiles.start(vh))
                T.reads(
                    *regions(stored, ALL, kv),
                    page_table[0:S, 0:pages],
                    state[0:S, 0:4],
                    slots[0:B],
                    work[vi, 0:2],
                    q[0:B, row : row + M, 0:D],
                )
                T.writes(
                    part_acc[0:B, row : row + M, 0:X, 0:D],
                    part_stat[0:B, row : row + M, 0:X, 0:2],
                )
                b = T.meta_var(work[vi, 0])
                slot = T.meta_var(slots[b])
                packed = T.meta_var(state[slot, PACKED_VALUES])
                first = T.meta_var(work[vi, 1] * SPLIT)
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
                        q_scaled[vm, vd] = T.Cast("float32", q[b, row + vm, vd]) * (
                            scale * T.float32(LOG2_E)
                        )
                start(run_max, run_sum, run_acc)
                for c in T.serial(T.min(CHUNKS, T.ceildiv(packed - first, C))):
                    with T.sblock("chunk"):
                        vc = T.axis.opaque(CHUNKS, c)
                        T.reads(
                            *regions(stored, ALL, kv),
                            page_table[0:S, 0:pages],
                            state[0:S, 0:4],
                            slots[0:B],
                            work[vi, 0:2],
                            q_scaled[0:M, 0:D],
                        )
                        T.writes(*regions(chunk))
                        base = T.meta_var(first + vc * C)
                        page = T.sblock_alloc_buffer((PAGES,), "int32")
                        score = T.sblock_alloc_buffer((M, C), "float32")
                        prob = T.sblock_alloc_buffer((M, C), "float32")
                        for j in range(PAGES):
                            with T.sblock("page"):
                                vj = T.axis.spatial(PAGES, j)
                                page[vj] = page_table[
                                    slot, T.min(base // P + vj, (packed - 1) // P)
                                ]
                        if prefetch == "next":
                            # The next chunk, or the first one of the next head.
                            ends = T.meta_var((vc + 1) * C >= T.min(SPLIT, packed - first))
                            after = T.meta_var(T.Select(ends, first, base + C))
                            head = T.meta_var(T.Select(ends, T.min(kv + 1, H_kv - 1), kv))
                            next_page = T.sblock_alloc_buffer((PAGES,), "int32")
                            for j in range(PAGES):
                                with T.sblock("next_page"):
                                    vj = T.axis.spatial(PAGES, j)
                                    next_page[vj] = page_table[
                                        slot, T.min(after // P + vj, (packed - 1) // P)
                                    ]
                            fetch[0](k_code, next_page, head)
                            fetch[1](k_scale, next_page, head)
                            fetch[2](k_zero, next_page, head)
                            fetch[3](v_code, next_page, head)
                            fetch[4](v_scale, next_page, head)
                            fetch[5](v_zero, next_page, head)
                        left = T.meta_var(packed - base)
                        scores(q_scaled, k_code, k_scale, k_zero, page, kv, left, score)
                        softmax(score, chunk_max, prob, chunk_sum)
                        outputs(prob, v_code, v_scale, v_zero, page, kv, left, chunk_acc)
                    with T.sblock("merge"):
                        vc = T.axis.opaque(CHUNKS, c)
                        T.reads(*regions((*run, *chunk)))
                        T.writes(*regions(run))
                        merge(run_max, run_sum, run_acc, chunk_max, chunk_sum, chunk_acc)
                store(run_max, run_sum, run_acc, part_acc, part_stat, b, row, work[vi, 1])

    if key.compute == "float":
        return attend
    return attend.with_attr(COMPUTE_ATTR, key.compute)
