"""The sums of `combine_window` over tokens in 16 bits by `mma`: exact products, float32 sums.

Everything is written as the lanes of a warp hold it (`fragments.py`). Keys and values are A as they
lie in memory; no lane needs what another has loaded.
"""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.ops.contract_half import mma_block
from kivi_tvm.ops.fragments import LANES, QUERIES, ROWS, FullTile, pair_of
from kivi_tvm.ops.online_softmax import LOG2_E

TOKENS = ROWS  # of a tile
MATRICES = TOKENS // QUERIES
LOADED = 8  # channels of a key or query that a lane loads at once
DOT_SUMS = 2  # products in a row go into different sums: none waits for the one before


def full_score_blocks(tile: FullTile, dtype: str):
    """Loads of a tile's keys; and `score [lane, matrix, e]` with them in log2 units.

    `before` tokens are before the tile; `place(token)` is where a token lies in the ring. Scores
    are the lowest number from token `count` on.
    """
    D, SPANS = tile.head_dim, tile.key_spans
    dot_mma = mma_block("dot", dtype)

    @T.macro
    def load(k_ring, slot, head, place, before, k_near):
        for s, x, lane, o in T.grid(SPANS, 2, LANES, LOADED):
            with T.sblock("k_near"):
                vs, vx, vl, vo = T.axis.remap("SSSS", [s, x, lane, o])
                token = T.meta_var(before + vx * QUERIES + vl // 4)
                at = T.meta_var(place(token))
                run = T.meta_var(T.min(4 * vs + vl % 4, D // LOADED - 1))
                k_near[vl, vs, vx, vo] = k_ring[slot, head, at, run * LOADED + vo]

    @T.macro
    def scores(k_near, q_load, scale, before, count, score):
        q_pair = T.sblock_alloc_buffer((LANES, SPANS * LOADED // 2), "uint32")
        dot = T.sblock_alloc_buffer((LANES, DOT_SUMS * 4), "float32")
        for s, lane, i in T.grid(SPANS, LANES, LOADED // 2):
            with T.sblock("q_pair"):
                vs, vl, vp = T.axis.remap("SSS", [s, lane, i])
                q_pair[vl, vs * (LOADED // 2) + vp] = T.Select(
                    4 * vs + vl % 4 < D // LOADED,
                    pair_of(q_load[vl, vs, 2 * vp], q_load[vl, vs, 2 * vp + 1]),
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
                    lambda lane, r: q_pair[lane, (vs * DOT_SUMS + vj) * 2 + r],
                )
        for x, lane, e in T.grid(MATRICES, LANES, 2):
            with T.sblock("score"):
                vx, vl, ve = T.axis.remap("SSS", [x, lane, e])
                score[vl, vx, ve] = T.Select(
                    before + vx * QUERIES + vl // 4 < count,
                    (dot[vl, vx * 2 + ve] + dot[vl, 4 + vx * 2 + ve]) * (scale * T.float32(LOG2_E)),
                    T.min_value("float32"),
                )

    return load, scores


def full_output_blocks(tile: FullTile, dtype: str):
    """Loads of a tile's values, and `acc += sum_t p_t v_t` with them."""
    BLOCKS, APART = tile.value_blocks, tile.channels_apart
    out_mma = mma_block("out_of_values", dtype)

    @T.macro
    def load(v_ring, slot, head, place, before, v_near):
        for y, r, lane, o in T.grid(BLOCKS, 4, LANES, APART):
            with T.sblock("v_near"):
                vy, vr, vl, vo = T.axis.remap("SSSS", [y, r, lane, o])
                token = T.meta_var(before + vl % 4 * 2 + vr % 2 + vr // 2 * QUERIES)
                at = T.meta_var(place(token))
                v_near[vl, vy, vr, vo] = v_ring[
                    slot, head, at, (vy * QUERIES + vl // 4) * APART + vo
                ]

    @T.macro
    def outputs(v_near, prob_pair, acc):
        for t in range(tile.value_rows):
            with T.sblock("value_product"):
                vt = T.axis.spatial(tile.value_rows, t)
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

    return load, outputs
