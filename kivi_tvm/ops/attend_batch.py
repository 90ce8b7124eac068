"""`attend` and `combine_batch` of mode "half" in one: large batches of rows that are one part each.

The same sums, hence the same bits. What one function stores for the other stays in shared memory
here; a warp takes the tiles of some sums one after the other, and copies the next while it computes
with one; and a warp that is done with them attends to the window.
"""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.attend_half import WARPS
from kivi_tvm.ops.contract_full import LOADED
from kivi_tvm.ops.contract_full import TOKENS as WINDOW_TOKENS
from kivi_tvm.ops.contract_half import score_blocks
from kivi_tvm.ops.fragments import LANES, QUERIES, TOKENS, FullTile, HalfTile
from kivi_tvm.ops.online_softmax import row_tiles
from kivi_tvm.ops.packed_tiles import FIRST, LAST, NEXT, arrival_block, tile_sum_blocks
from kivi_tvm.ops.parts_half import Parts
from kivi_tvm.ops.regions import ALL, regions
from kivi_tvm.ops.ring import window_blocks
from kivi_tvm.ops.softmax_half import highest, joined, query_blocks, query_load_block
from kivi_tvm.ops.staged_tile import PLACES, copy_tile_blocks, pages_block, staged_arrays
from kivi_tvm.ops.waits import wait_block
from kivi_tvm.ops.window_sums import FEW, SUMS, finish_block, window_sums

AT_ONCE = 2


def attend_batch(key: KernelKey, sums: int = WARPS, at_once: int = AT_ONCE):
    """The output and log-sum-exp of every row from its packed tokens and its window.

    Parameters
    ----------
    key : KernelKey
        With `compute="half"`.
    sums : int
        Of packed tokens: as many as `attend` has warps.
    at_once : int
        Warps that take these sums, a divisor of `sums`.

    Returns
    -------
    PrimFunc
        `(k_code, k_scale, k_zero, v_code, v_scale, v_zero, page_table [S, pages], k_ring, v_ring
        [S, H_kv, ring, D], state [S, 4], slots [B], q [B, H, D], scale, out [B, H, D], lse [B, H]
        float32)`. All packed tokens of a row are one part, also where `layout.split_tokens` says
        otherwise: then it gives other bits than `attend` and `combine_window`. Rows with slot -1
        give out 0 and lse -inf.
    """
    D, P, dtype, L = key.head_dim, key.page_size, key.dtype, sums // at_once
    tiles, tile = row_tiles(key, QUERIES), HalfTile(key)
    M, ROWS, TILES = tiles.rows, tiles.total, tiles.count
    G_k, G_v = key.key_group_size, key.value_group_size
    W_k, W_v = key.key_codes_per_word, key.value_codes_per_word
    N_k, N_v, WINDOW_SPANS = P // G_k, D // G_v, FullTile(D).key_spans
    SPANS, PAIRS, PIECES = tile.key_spans, tile.key_pairs, tile.pieces
    X, PRODUCTS = tile.matrices, tile.value_rows
    STATES = M if sums * M > 1 else 2  # TVM fails to place a buffer of one element
    K_CODE, K_SCALE, K_ZERO, V_CODE, V_SCALE, V_ZERO = (x.size for x in staged_arrays(key))
    load_queries, queries = query_load_block(D, M, SPANS, W_k), query_blocks(key, M)
    load_again = query_load_block(D, M, WINDOW_SPANS, LOADED, "q_load_again")
    copy_first, copy_last, copy_next = (copy_tile_blocks(key, x) for x in (FIRST, LAST, NEXT))
    first_pages, next_pages = pages_block("first_page", key, True), pages_block("next_page", key)
    start, add_tile, store_state = tile_sum_blocks(key, M)
    arrival, scores, appended = arrival_block(key), score_blocks(key), wait_block("appended")
    find_window = window_blocks()
    # the sums that every window has come last, to warps that are done with their packed tokens
    sum_up_window = window_sums(D, dtype, M, lambda x: SUMS - 1 - x)
    finish = finish_block(M, D, dtype)

    @T.prim_func(s_tir=True)
    def attend_batch(
        k_code_handle: T.handle,
        k_scale_handle: T.handle,
        k_zero_handle: T.handle,
        v_code_handle: T.handle,
        v_scale_handle: T.handle,
        v_zero_handle: T.handle,
        page_table_handle: T.handle,
        k_ring_handle: T.handle,
        v_ring_handle: T.handle,
        state_handle: T.handle,
        slots_handle: T.handle,
        q_handle: T.handle,
        scale: T.float32,
        out_handle: T.handle,
        lse_handle: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        B, H_kv, N, S, pages = T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        ring, q_row, q_head = T.int32(), T.int32(), T.int32()
        out_row, out_head = T.int32(), T.int32()
        k_code = T.match_buffer(k_code_handle, (N, H_kv, D // W_k, P), "uint32")
        k_scale = T.match_buffer(k_scale_handle, (N, H_kv, N_k, D), "float16")
        k_zero = T.match_buffer(k_zero_handle, (N, H_kv, N_k, D), "float16")
        v_code = T.match_buffer(v_code_handle, (N, H_kv, P // W_v, D), "uint32")
        v_scale = T.match_buffer(v_scale_handle, (N, H_kv, N_v, P), "float16")
        v_zero = T.match_buffer(v_zero_handle, (N, H_kv, N_v, P), "float16")
        stored = T.meta_var((k_code, k_scale, k_zero, v_code, v_scale, v_zero))
        page_table = T.match_buffer(page_table_handle, (S, pages), "int32")
        k_ring = T.match_buffer(k_ring_handle, (S, H_kv, ring, D), dtype)
        v_ring = T.match_buffer(v_ring_handle, (S, H_kv, ring, D), dtype)
        state = T.match_buffer(state_handle, (S, 4), "int32")
        slots = T.match_buffer(slots_handle, (B,), "int32")
        q = T.match_buffer(q_handle, (B, H_kv * ROWS, D), dtype, strides=(q_row, q_head, 1))
        out = T.match_buffer(out_handle, (B, H_kv * ROWS, D), dtype, strides=(out_row, out_head, 1))
        lse = T.match_buffer(lse_handle, (B, H_kv * ROWS), "float32")
        # a ring has a place more than its window has tokens
        few = T.meta_var(ring - 1 <= FEW * WINDOW_TOKENS)
        for b, h in T.grid(B, H_kv * TILES):
            with T.sblock("head"):
                vb, vh = T.axis.remap("SS", [b, h])
                kv = T.meta_var(tiles.head(vh))
                first = T.meta_var(tiles.start(vh))
                T.reads(
                    *regions(stored, ALL, kv),
                    page_table[0:S, 0:pages],
                    *regions((k_ring, v_ring), ALL, kv),
                    state[0:S, 0:4],
                    slots[vb],
                    q[vb, first : first + M, 0:D],
                )
                T.writes(out[vb, first : first + M, 0:D], lse[vb, first : first + M])
                given = T.sblock_alloc_buffer((1,), "int32")
                slot = T.sblock_alloc_buffer((1,), "int32")
                length = T.sblock_alloc_buffer((1,), "int32")
                in_pages = T.sblock_alloc_buffer((1,), "int32")
                packed = T.sblock_alloc_buffer((1,), "int32")
                oldest = T.sblock_alloc_buffer((1,), "int32")
                count = T.sblock_alloc_buffer((1,), "int32")  # tokens of the window
                entries = T.sblock_alloc_buffer((1,), "int32")
                first_row = T.sblock_alloc_buffer((1,), "int32")
                q_load = T.sblock_alloc_buffer((LANES, SPANS, W_k), dtype)
                q_load_again = T.sblock_alloc_buffer((LANES, WINDOW_SPANS, LOADED), dtype)
                warp_ref = T.sblock_alloc_buffer((sums, STATES), "float32")
                warp_sum = T.sblock_alloc_buffer((sums, STATES), "float32")
                warp_acc = T.sblock_alloc_buffer((sums, M, D), "float32")
                k_code_tile = T.sblock_alloc_buffer((at_once, PLACES, K_CODE), "uint32")
                k_scale_tile = T.sblock_alloc_buffer((at_once, PLACES, K_SCALE), "float16")
                k_zero_tile = T.sblock_alloc_buffer((at_once, PLACES, K_ZERO), "float16")
                v_code_tile = T.sblock_alloc_buffer((at_once, PLACES, V_CODE), "uint32")
                v_scale_tile = T.sblock_alloc_buffer((at_once, PLACES, V_SCALE), "float16")
                v_zero_tile = T.sblock_alloc_buffer((at_once, PLACES, V_ZERO), "float16")
                keys = T.meta_var((k_code_tile, k_scale_tile, k_zero_tile))
                values = T.meta_var((v_code_tile, v_scale_tile, v_zero_tile))
                tile_places = T.meta_var((*keys, *values))
                sum_ref = T.sblock_alloc_buffer((SUMS, M), "float32")
                sum_mass = T.sblock_alloc_buffer((SUMS, M), "float32")
                sum_acc = T.sblock_alloc_buffer((SUMS, M, D), "float32")
                with T.sblock("first_row"):
                    first_row[0] = first  # once for all loads: it takes a division
                load_queries(q, vb, first_row[0], q_load)
                find_window(state, slots, vb, ring, given, slot, length, in_pages, oldest, count)
                with T.sblock("of_row"):
                    packed[0] = T.Select(given[0] >= 0, in_pages[0], 0)
                with T.sblock("entries"):
                    entries[0] = T.Select(packed[0] > 0, 1, 0)
                left_of = T.meta_var(lambda number: packed[0] - number * TOKENS)
                known = T.meta_var((packed[0],))
                for y in range(at_once):
                    with T.sblock("warp"):
                        vy = T.axis.spatial(at_once, y)
                        T.reads(
                            *regions(stored, ALL, kv),
                            page_table[0:S, 0:pages],
                            q_load[0:LANES, 0:SPANS, 0:W_k],
                            slot[0],
                            packed[0],
                        )
                        # all states are somebody's: of which warp's is not to be told from here
                        T.writes(*regions((warp_ref, warp_sum, warp_acc)))
                        q_pair = T.sblock_alloc_buffer((LANES, SPANS * PAIRS), "uint32")
                        gain = T.sblock_alloc_buffer((LANES, 2), "float32")
                        first_page = T.sblock_alloc_buffer((PIECES,), "int32")
                        taken = T.sblock_alloc_buffer((1,), "int32")
                        own = T.meta_var(vy * TOKENS)
                        first_pages(
                            left_of(vy) > 0, known, page_table, slot, own, left_of(vy), first_page
                        )
                        # of a row's packed tokens `append` writes the last one's value
                        at_last = T.meta_var(left_of(vy) <= TOKENS)
                        copy_first(
                            T.And(left_of(vy) > 0, T.Not(at_last)), known, stored, first_page, kv,
                            own, tile_places, vy, 0,
                        )  # fmt: skip
                        queries(q_load, scale, q_pair, gain)
                        with T.sblock("none_taken"):
                            taken[0] = 0
                        appended()  # nothing before this reads what `append` writes
                        copy_last(
                            T.And(left_of(vy) > 0, at_last), known, stored, first_page, kv, own,
                            tile_places, vy, 0,
                        )  # fmt: skip
                        for n in T.serial(L):
                            with T.sblock("sum"):
                                vn = T.axis.opaque(L, n)
                                T.reads(
                                    *regions(stored, ALL, kv),
                                    page_table[0:S, 0:pages],
                                    q_pair[0:LANES, 0 : SPANS * PAIRS],
                                    gain[0:LANES, 0:2],
                                    slot[0],
                                    packed[0],
                                )
                                # Declared as written only: an update in place is not scheduled.
                                T.writes(
                                    *regions(tile_places, vy),
                                    *regions((warp_ref, warp_sum, warp_acc)),
                                    taken[0],
                                )
                                ref = T.sblock_alloc_buffer((LANES, 2), "float32")
                                total = T.sblock_alloc_buffer((LANES, 2), "float32")
                                acc = T.sblock_alloc_buffer((LANES, PRODUCTS * 4), "float32")
                                zero_acc = T.sblock_alloc_buffer((LANES, 4), "float32")
                                own_sum = T.meta_var(vn * at_once + vy)
                                turns = T.meta_var(
                                    T.max(
                                        0,
                                        T.ceildiv(T.ceildiv(packed[0], TOKENS) - own_sum, sums),
                                    )
                                )
                                start(ref, total, acc, zero_acc)
                                for c in T.serial(turns):
                                    with T.sblock("tile"):
                                        vc = T.axis.opaque(key.split_tokens, c)
                                        T.reads(
                                            *regions(stored, ALL, kv),
                                            page_table[0:S, 0:pages],
                                            slot[0],
                                            packed[0],
                                            q_pair[0:LANES, 0 : SPANS * PAIRS],
                                            gain[0:LANES, 0:2],
                                        )
                                        T.writes(
                                            *regions(tile_places, vy),
                                            ref[0:LANES, 0:2],
                                            total[0:LANES, 0:2],
                                            acc[0:LANES, 0 : PRODUCTS * 4],
                                            zero_acc[0:LANES, 0:4],
                                            taken[0],
                                        )
                                        number = T.meta_var(vc * sums + own_sum)
                                        left = T.meta_var(left_of(number))
                                        place = T.meta_var(taken[0] % PLACES)
                                        after = T.sblock_alloc_buffer((1,), "int32")
                                        next_page = T.sblock_alloc_buffer((PIECES,), "int32")
                                        score = T.sblock_alloc_buffer((LANES, X, 2), "float32")
                                        lift = T.sblock_alloc_buffer((LANES,), "float32")
                                        keep = T.sblock_alloc_buffer((LANES, 2), "float32")
                                        prob_pair = T.sblock_alloc_buffer((LANES, X), "uint32")
                                        arrival(packed, left, v_scale_tile, v_zero_tile, vy, place)
                                        with T.sblock("after"):
                                            # the next tile of this sum, or the first of the next
                                            # sum; behind the row's last one if there is none
                                            after[0] = T.Select(
                                                vc + 1 < turns,
                                                number + sums,
                                                T.Select(vn + 1 < L, own_sum + at_once, packed[0]),
                                            )
                                        more = T.meta_var(left_of(after[0]) > 0)
                                        next_token = T.meta_var(after[0] * TOKENS)
                                        next_pages(
                                            more, (packed[0], after[0]), page_table, slot,
                                            next_token, left_of(after[0]), next_page,
                                        )  # fmt: skip
                                        scores(
                                            q_pair, gain, k_code_tile, k_scale_tile, k_zero_tile,
                                            vy, place, left, score,
                                        )  # fmt: skip
                                        copy_next(
                                            more, (packed[0], after[0]), stored, next_page, kv,
                                            next_token, tile_places, vy, (taken[0] + 1) % PLACES,
                                        )  # fmt: skip
                                        add_tile(
                                            score, keep, prob_pair, lift, values, vy, place, ref,
                                            total, acc, zero_acc,
                                        )  # fmt: skip
                                        with T.sblock("one_taken"):
                                            T.reads()
                                            T.writes(taken[0])
                                            taken[0] = taken[0] + 1
                                store_state(
                                    ref, total, acc, zero_acc, own_sum, warp_ref, warp_sum, warp_acc
                                )
                top_of = T.meta_var(lambda query: highest(sums, warp_ref, query))
                joined_of = T.meta_var(
                    lambda query, of: joined(sums, warp_ref, top_of(query), query, of)
                )
                parts = T.meta_var(
                    Parts(
                        1,
                        tuple(regions((warp_ref, warp_sum, warp_acc))),
                        lambda query, entry: top_of(query),
                        lambda query, entry: joined_of(query, lambda w: warp_sum[w, query]),
                        lambda query, entry, channel: joined_of(
                            query, lambda w: warp_acc[w, query, channel]
                        ),
                    )
                )
                load_again(q, vb, first_row[0], q_load_again)
                sum_up_window(
                    k_ring, v_ring, kv, ring, slot, oldest, count, entries, q_load_again, scale,
                    parts, few, sum_ref, sum_mass, sum_acc,
                )  # fmt: skip
                finish(sum_ref, sum_mass, sum_acc, few, vb, first, out, lse)

    return attend_batch
