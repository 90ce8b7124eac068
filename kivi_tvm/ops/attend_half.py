"""`attend` by the tensor cores of a GPU: every warp of a work-group takes every so many tiles.

The mathematics of `attend.py`, written as the lanes of a warp hold it (`fragments.py`), with sums
over codes as in `contract_half.py`. What a maximum is subtracted for, that powers of two neither
overflow nor vanish, any number near it serves: here it is one for which float16 holds the product
of every probability with its token's scale, and is as large as can be.
"""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import PACKED_VALUES, split_tokens
from kivi_tvm.ops.contract_half import score_blocks
from kivi_tvm.ops.fragments import LANES, QUERIES, TOKENS, HalfTile
from kivi_tvm.ops.online_softmax import row_tiles
from kivi_tvm.ops.packed_tiles import FIRST, LAST, NEXT, arrival_block, tile_sum_blocks
from kivi_tvm.ops.regions import ALL, regions
from kivi_tvm.ops.softmax_half import highest, joined, query_blocks, query_load_block
from kivi_tvm.ops.staged_tile import PLACES, copy_tile_blocks, pages_block, staged_arrays
from kivi_tvm.ops.waits import wait_block

WARPS = 4


def attend_half(key: KernelKey, warps: int = WARPS):
    """Partial attention of every work item over its split of the packed tokens.

    Parameters and results as of `attend`; each of `warps` warps takes tiles of 64 tokens in turn.
    Splits that no token of their row falls into are not work: their results are not written.
    """
    D, P, dtype, WARPS = key.head_dim, key.page_size, key.dtype, warps
    tiles, tile = row_tiles(key, QUERIES), HalfTile(key)
    M, ROWS, TILES = tiles.rows, tiles.total, tiles.count
    G_k, G_v = key.key_group_size, key.value_group_size
    W_k, W_v = key.key_codes_per_word, key.value_codes_per_word
    SPLIT, N_k, N_v = key.split_tokens, P // G_k, D // G_v
    STATES = M if WARPS * M > 1 else 2  # TVM fails to place a buffer of one element
    SPANS, PAIRS, PIECES = tile.key_spans, tile.key_pairs, tile.pieces
    X, PRODUCTS = tile.matrices, tile.value_rows
    K_CODE, K_SCALE, K_ZERO, V_CODE, V_SCALE, V_ZERO = (x.size for x in staged_arrays(key))
    load_queries, queries = query_load_block(D, M, SPANS, W_k), query_blocks(key, M)
    copy_first, copy_last, copy_next = (copy_tile_blocks(key, x) for x in (FIRST, LAST, NEXT))
    first_pages, second_pages, next_pages = (
        pages_block(f"{x}_page", key) for x in ("first", "second", "next")
    )
    start, add_tile, store_state = tile_sum_blocks(key, M)
    arrival, scores, appended = arrival_block(key), score_blocks(key), wait_block("appended")

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
        stored = T.meta_var((k_code, k_scale, k_zero, v_code, v_scale, v_zero))
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
                head = T.meta_var(tiles.head(vh))
                row = T.meta_var(tiles.start(vh))
                T.reads(
                    *regions(stored, ALL, head),
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
                b = T.sblock_alloc_buffer((1,), "int32")
                part = T.sblock_alloc_buffer((1,), "int32")
                slot = T.sblock_alloc_buffer((1,), "int32")  # -1: the row is not there
                packed = T.sblock_alloc_buffer((1,), "int32")  # tokens of the row
                first_row = T.sblock_alloc_buffer((1,), "int32")
                q_load = T.sblock_alloc_buffer((LANES, SPANS, W_k), dtype)
                with T.sblock("b"):
                    b[0] = work[vi, 0]
                with T.sblock("part"):
                    part[0] = work[vi, 1]
                with T.sblock("first_row"):
                    first_row[0] = row  # once for all loads: it takes a division
                # they arrive while it is looked up where the row's tokens are
                load_queries(q, T.max(b[0], 0), first_row[0], q_load)
                with T.sblock("slot"):
                    slot[0] = slots[T.max(b[0], 0)]
                with T.sblock("packed"):
                    packed[0] = T.if_then_else(slot[0] >= 0, state[slot[0], PACKED_VALUES], 0)
                split = T.meta_var(split_tokens(key, packed[0], SPLIT, T.Select))
                with T.sblock("present"):
                    # a row that is not there gets what one without tokens gets
                    T.where(
                        T.tvm_thread_invariant(
                            T.And(b[0] >= 0, T.Or(slot[0] < 0, part[0] * split < packed[0]))
                        )
                    )
                    T.reads(
                        *regions(stored, ALL, head),
                        page_table[0:S, 0:pages],
                        q_load[0:LANES, 0:SPANS, 0:W_k],
                        b[0], part[0], slot[0], packed[0],
                    )  # fmt: skip
                    T.writes(
                        part_acc[0:B, row : row + M, 0:entries, 0:D],
                        part_stat[0:B, row : row + M, 0:entries, 0:2],
                    )
                    warp_ref = T.sblock_alloc_buffer((WARPS, STATES), "float32")
                    warp_sum = T.sblock_alloc_buffer((WARPS, STATES), "float32")
                    warp_acc = T.sblock_alloc_buffer((WARPS, M, D), "float32")
                    k_code_tile = T.sblock_alloc_buffer((WARPS, PLACES, K_CODE), "uint32")
                    k_scale_tile = T.sblock_alloc_buffer((WARPS, PLACES, K_SCALE), "float16")
                    k_zero_tile = T.sblock_alloc_buffer((WARPS, PLACES, K_ZERO), "float16")
                    v_code_tile = T.sblock_alloc_buffer((WARPS, PLACES, V_CODE), "uint32")
                    v_scale_tile = T.sblock_alloc_buffer((WARPS, PLACES, V_SCALE), "float16")
                    v_zero_tile = T.sblock_alloc_buffer((WARPS, PLACES, V_ZERO), "float16")
                    keys = T.meta_var((k_code_tile, k_scale_tile, k_zero_tile))
                    values = T.meta_var((v_code_tile, v_scale_tile, v_zero_tile))
                    tile_places = T.meta_var((*keys, *values))
                    for w in range(WARPS):
                        with T.sblock("warp"):
                            vw = T.axis.spatial(WARPS, w)
                            T.reads(
                                *regions(stored, ALL, head),
                                page_table[0:S, 0:pages],
                                q_load[0:LANES, 0:SPANS, 0:W_k],
                                b[0], part[0], slot[0], packed[0],
                            )  # fmt: skip
                            T.writes(warp_ref[vw, 0:M], warp_sum[vw, 0:M], warp_acc[vw, 0:M, 0:D])
                            # tiles before the split in its row, and packed tokens of the split
                            first_tile = T.sblock_alloc_buffer((1,), "int32")
                            inside = T.sblock_alloc_buffer((1,), "int32")
                            q_pair = T.sblock_alloc_buffer((LANES, SPANS * PAIRS), "uint32")
                            gain = T.sblock_alloc_buffer((LANES, 2), "float32")
                            ref = T.sblock_alloc_buffer((LANES, 2), "float32")
                            total = T.sblock_alloc_buffer((LANES, 2), "float32")
                            acc = T.sblock_alloc_buffer((LANES, PRODUCTS * 4), "float32")
                            zero_acc = T.sblock_alloc_buffer((LANES, 4), "float32")
                            with T.sblock("first_tile"):
                                first_tile[0] = part[0] * (split // TOKENS)
                            with T.sblock("inside"):
                                inside[0] = T.min(split, packed[0] - first_tile[0] * TOKENS)
                            first = T.meta_var(first_tile[0] * TOKENS)
                            turns = T.meta_var(
                                T.max(0, T.ceildiv(T.ceildiv(inside[0], TOKENS) - vw, WARPS))
                            )
                            first_page = T.sblock_alloc_buffer((PIECES,), "int32")
                            next_page = T.sblock_alloc_buffer((PIECES,), "int32")
                            own = T.meta_var(first + vw * TOKENS)
                            second = T.meta_var(first + (WARPS + vw) * TOKENS)
                            left_of = T.meta_var(lambda token: inside[0] + first - token)
                            first_pages(
                                turns > 0, (inside[0], first_tile[0]), page_table, slot, own,
                                left_of(own), first_page,
                            )  # fmt: skip
                            # of a row's packed tokens `append` writes the last one's value
                            at_last = T.meta_var(packed[0] <= first + (vw + 1) * TOKENS)
                            known = T.meta_var((inside[0], first_tile[0], packed[0]))
                            copy_first(
                                T.And(turns > 0, T.Not(at_last)), known, stored, first_page, head,
                                own, tile_places, vw, 0,
                            )  # fmt: skip
                            second_pages(
                                turns > 1, (inside[0], first_tile[0]), page_table, slot, second,
                                left_of(second), next_page,
                            )  # fmt: skip
                            queries(q_load, scale, q_pair, gain)
                            start(ref, total, acc, zero_acc)
                            appended()  # nothing before this reads what `append` writes
                            copy_last(
                                T.And(turns > 0, at_last), known, stored, first_page, head, own,
                                tile_places, vw, 0,
                            )  # fmt: skip
                            for c in T.serial(turns):
                                with T.sblock("tile"):
                                    vc = T.axis.opaque(SPLIT, c)
                                    T.reads(
                                        *regions(stored, ALL, head),
                                        page_table[0:S, 0:pages],
                                        slot[0],
                                        inside[0],
                                        first_tile[0],
                                        q_pair[0:LANES, 0 : SPANS * PAIRS],
                                        gain[0:LANES, 0:2],
                                    )
                                    # Declared as written only: an update in place is not scheduled.
                                    T.writes(
                                        *regions(tile_places, vw),
                                        *regions((next_page,)),
                                        ref[0:LANES, 0:2],
                                        total[0:LANES, 0:2],
                                        acc[0:LANES, 0 : PRODUCTS * 4],
                                        zero_acc[0:LANES, 0:4],
                                    )
                                    place = T.meta_var(vc % PLACES)
                                    left = T.meta_var(inside[0] - (vc * WARPS + vw) * TOKENS)
                                    after = T.meta_var(first + ((vc + 1) * WARPS + vw) * TOKENS)
                                    score = T.sblock_alloc_buffer((LANES, X, 2), "float32")
                                    lift = T.sblock_alloc_buffer((LANES,), "float32")
                                    keep = T.sblock_alloc_buffer((LANES, 2), "float32")
                                    prob_pair = T.sblock_alloc_buffer((LANES, X), "uint32")
                                    arrival(inside, left, v_scale_tile, v_zero_tile, vw, place)
                                    copy_next(
                                        vc + 1 < turns, known, stored, next_page, head, after,
                                        tile_places, vw, (vc + 1) % PLACES,
                                    )  # fmt: skip
                                    later = T.meta_var(after + WARPS * TOKENS)
                                    next_pages(
                                        vc + 2 < turns, (inside[0], first_tile[0]), page_table,
                                        slot, later, left_of(later), next_page,
                                    )  # fmt: skip
                                    scores(
                                        q_pair, gain, k_code_tile, k_scale_tile, k_zero_tile, vw,
                                        place, left, score,
                                    )  # fmt: skip
                                    add_tile(
                                        score, keep, prob_pair, lift, values, vw, place, ref,
                                        total, acc, zero_acc,
                                    )  # fmt: skip
                            store_state(ref, total, acc, zero_acc, vw, warp_ref, warp_sum, warp_acc)
                    for m in range(M):
                        with T.sblock("store_stat"):
                            vm = T.axis.spatial(M, m)
                            top = T.meta_var(highest(WARPS, warp_ref, vm))
                            part_stat[b[0], row + vm, part[0], 0] = top
                            part_stat[b[0], row + vm, part[0], 1] = joined(
                                WARPS, warp_ref, top, vm, lambda warp: warp_sum[warp, vm]
                            )
                    for m, d in T.grid(M, D):
                        with T.sblock("store_acc"):
                            vm, vd = T.axis.remap("SS", [m, d])
                            top = T.meta_var(highest(WARPS, warp_ref, vm))
                            part_acc[b[0], row + vm, part[0], vd] = joined(
                                WARPS, warp_ref, top, vm, lambda warp: warp_acc[warp, vm, vd]
                            )

    return attend
