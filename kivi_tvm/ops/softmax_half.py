"""The softmax of `attend_half.py` as the lanes of a warp hold it: queries, probabilities, sums.

Lane `(g, c)` holds row `g` of every matrix of a tile for the queries `2 c + e`, and with the other
lanes of its `c` all rows. What is subtracted from scores is called their reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.exp2 import ROUNDER, ROUNDER_BITS
from kivi_tvm.ops.fragments import LANES, TOKENS, FullTile, HalfTile, rounded_pair, transposed_pair
from kivi_tvm.ops.online_softmax import LOG2_E
from kivi_tvm.ops.staged_tile import staged_arrays

TINY = 2.0**-100  # below it a query is zero
TOP_EXPONENT = 15  # of float16: powers of two and products of at most half of 2^16
FLOAT16_MAX = 65504.0
RUN = 8  # scales that a lane reads at once


def exponent_above(x: Any) -> Any:
    """The least `e` with `x < 2^e`, for float32 `x >= 0`."""
    return T.Cast("int32", T.reinterpret("uint32", x) >> T.uint32(23)) - 126


def small_float(number: Any) -> Any:
    """An integer of less than 2^22 as float32, without a conversion, which GPUs do slowly."""
    return T.reinterpret("float32", ROUNDER_BITS + number) - T.float32(ROUNDER)


def fold_block(name: str, columns: int, combine: Callable[..., Any], other: Callable[..., Any]):
    """`result [lane, e]`: that of two lanes of `source`, combined."""

    @T.macro
    def fold(source, result):
        for lane, e in T.grid(LANES, columns):
            with T.sblock(name):
                vl, ve = T.axis.remap("SS", [lane, e])
                result[vl, ve] = combine(source[vl, ve], source[other(vl), ve])

    return fold


def turned(step: int) -> Callable[[Any], Any]:
    """The lane so many lanes further on."""
    return lambda lane: (lane + step) % LANES


def turned_in_quad(step: int) -> Callable[[Any], Any]:
    """The lane of the same `g` whose `c` is so much larger."""
    return lambda lane: lane // 4 * 4 + (lane + step) % 4


def add(a: Any, b: Any) -> Any:
    """Their sum."""
    return a + b


def query_load_block(D: int, M: int, spans: int, each: int, name: str = "q_load"):
    """The channels of `M` queries that a lane has in operands, `q_load [lane, span, each]`."""

    @T.macro
    def load(q, b, row, q_load):
        for s, lane, o in T.grid(spans, LANES, each):
            with T.sblock(name):
                vs, vl, vo = T.axis.remap("SSS", [s, lane, o])
                run = T.meta_var(T.min(4 * vs + vl % 4, D // each - 1))
                q_load[vl, vs, vo] = q[b, row + T.min(vl // 4, M - 1), run * each + vo]

    return load


def query_blocks(key: KernelKey, M: int):
    """The `M` queries of a warp as operands, and what scores of theirs are multiplied with.

    `q_pair [lane, i]` are pairs of channels of query `g`, below 1 by a power of two; `gain [lane,
    e]` undoes that and has the softmax scale.
    """
    tile, D, W = HalfTile(key), key.head_dim, key.key_codes_per_word
    SPANS, PAIRS = tile.key_spans, tile.key_pairs
    near, top = (
        fold_block(name, 1, T.max, turned_in_quad(step))
        for name, step in (("q_near", 2), ("q_top", 1))
    )

    @T.macro
    def queries(q_load, scale, q_pair, gain):
        q_raw = T.sblock_alloc_buffer((LANES, SPANS, W), "float32")
        q_own = T.sblock_alloc_buffer((LANES, 1), "float32")
        q_near = T.sblock_alloc_buffer((LANES, 1), "float32")
        q_top = T.sblock_alloc_buffer((LANES, 1), "float32")
        q_unit = T.sblock_alloc_buffer((LANES,), "float32")
        for s, lane, o in T.grid(SPANS, LANES, W):
            with T.sblock("q_raw"):
                vs, vl, vo = T.axis.remap("SSS", [s, lane, o])
                q_raw[vl, vs, vo] = T.Select(
                    T.And(vl // 4 < M, 4 * vs + vl % 4 < D // W),
                    T.Cast("float32", q_load[vl, vs, vo]),
                    T.float32(0),
                )
        for lane, s, o in T.grid(LANES, SPANS, W):
            with T.sblock("q_own"):
                vl, vs, vo = T.axis.remap("SRR", [lane, s, o])
                with T.init():
                    q_own[vl, 0] = T.float32(TINY)
                q_own[vl, 0] = T.max(q_own[vl, 0], T.abs(q_raw[vl, vs, vo]))
        near(q_own, q_near)
        top(q_near, q_top)
        for lane in range(LANES):
            with T.sblock("q_unit"):
                vl = T.axis.spatial(LANES, lane)
                # 2^-(e + 1) for a top from 2^e on: all are below 1 with it
                q_unit[vl] = T.reinterpret(
                    "float32",
                    T.uint32(253 << 23)
                    - (T.reinterpret("uint32", q_top[vl, 0]) & T.uint32(0x7F800000)),
                )
        for s, lane, i in T.grid(SPANS, LANES, PAIRS):
            with T.sblock("q_pair"):
                vs, vl, vp = T.axis.remap("SSS", [s, lane, i])
                q_pair[vl, vs * PAIRS + vp] = rounded_pair(
                    q_raw[vl, vs, vp] * q_unit[vl], q_raw[vl, vs, vp + PAIRS] * q_unit[vl]
                )
        for lane, e in T.grid(LANES, 2):
            with T.sblock("gain"):
                vl, ve = T.axis.remap("SS", [lane, e])
                unit = T.meta_var(q_unit[(vl % 4 * 2 + ve) * 4])
                gain[vl, ve] = T.reinterpret(
                    "float32", T.uint32(254 << 23) - T.reinterpret("uint32", unit)
                ) * (scale * T.float32(LOG2_E))

    return queries


def lift_blocks(key: KernelKey):
    """How far above the largest score of a tile its reference is to be, in log2 units.

    So far that float16 holds every probability and its product with the token's scales, and no
    further.
    """
    tile = HalfTile(key)
    *_, of_token, _ = staged_arrays(key)
    RUNS = tile.value_groups * TOKENS // RUN
    EACH = -(-RUNS // LANES)
    top_of_2, top_of_4, top_of_8, top_of_16 = (
        fold_block(f"top_of_{LANES // step}", 1, T.max, turned(step)) for step in (16, 8, 4, 2)
    )

    @T.macro
    def find_lift(v_scale, warp, place, lift):
        top_scale = T.sblock_alloc_buffer((LANES, EACH, RUN), "float16")
        own = T.sblock_alloc_buffer((LANES, 1), "float32")
        of_2 = T.sblock_alloc_buffer((LANES, 1), "float32")
        of_4 = T.sblock_alloc_buffer((LANES, 1), "float32")
        of_8 = T.sblock_alloc_buffer((LANES, 1), "float32")
        of_16 = T.sblock_alloc_buffer((LANES, 1), "float32")
        for lane, n, o in T.grid(LANES, EACH, RUN):
            with T.sblock("top_scale"):
                vl, vn, vo = T.axis.remap("SSS", [lane, n, o])
                run = T.meta_var(T.min(vn * LANES + vl, RUNS - 1))
                top_scale[vl, vn, vo] = v_scale[
                    warp, place, run * RUN // TOKENS * of_token.stride + run * RUN % TOKENS + vo
                ]
        for lane, n, o in T.grid(LANES, EACH, RUN):
            with T.sblock("own_top"):
                vl, vn, vo = T.axis.remap("SRR", [lane, n, o])
                found = T.meta_var(T.Cast("float32", top_scale[vl, vn, vo]))
                with T.init():
                    own[vl, 0] = T.float32(0)
                own[vl, 0] = T.max(
                    own[vl, 0],
                    T.Select(found <= T.float32(FLOAT16_MAX), found, T.float32(0)),
                )
        top_of_2(own, of_2)
        top_of_4(of_2, of_4)
        top_of_8(of_4, of_8)
        top_of_16(of_8, of_16)
        for lane in range(LANES):
            with T.sblock("lift"):
                vl = T.axis.spatial(LANES, lane)
                exponent = T.meta_var(
                    exponent_above(T.max(of_16[vl, 0], of_16[(vl + 1) % LANES, 0]))
                )
                lift[vl] = small_float(T.max(exponent - TOP_EXPONENT, -TOP_EXPONENT))

    return find_lift


def start_half_blocks(products: int):
    """The empty state: reference at the lowest float32, sums and accumulators 0."""

    @T.macro
    def start(ref, total, acc):
        for lane, e in T.grid(LANES, 2):
            with T.sblock("start"):
                vl, ve = T.axis.remap("SS", [lane, e])
                ref[vl, ve] = T.min_value("float32")
                total[vl, ve] = T.float32(0)
        for t, lane, e in T.grid(products, LANES, 4):
            with T.sblock("start_acc"):
                vt, vl, ve = T.axis.remap("SSS", [t, lane, e])
                acc[vl, vt * 4 + ve] = T.float32(0)

    return start


def zero_acc_blocks():
    """What `start_half_blocks` and `softmax_half_blocks` do with the sums of zeros."""

    @T.macro
    def start(zero_acc):
        for lane, e in T.grid(LANES, 4):
            with T.sblock("start_zero_acc"):
                vl, ve = T.axis.remap("SS", [lane, e])
                zero_acc[vl, ve] = T.float32(0)

    @T.macro
    def bring(keep, zero_acc):
        for lane, e in T.grid(LANES, 4):
            with T.sblock("keep_zero_acc"):
                vl, ve = T.axis.remap("SS", [lane, e])
                T.reads(keep[vl, ve % 2])
                T.writes(zero_acc[vl, ve])
                zero_acc[vl, ve] = zero_acc[vl, ve] * keep[vl, ve % 2]

    return start, bring


def softmax_half_blocks(matrices: int, products: int, dtype: str = "float16"):
    """`prob_pair [lane, matrix] = 2^(score - reference)`, and the state so far for that reference.

    The pairs are operands of `dtype`: of two tokens, for query `g`. `lift(lane)` is how far above
    the largest score the reference is to be; `keep [lane, e]` is what anything so far is multiplied
    with.
    """
    X, PRODUCTS = matrices, products
    max_of_2, max_of_4 = (
        fold_block(f"max_of_{16 // step * 2}", 2, T.max, turned(step)) for step in (16, 8)
    )

    @T.macro
    def softmax(score, lift, ref, total, acc, keep, prob_pair):
        prob = T.sblock_alloc_buffer((LANES, X, 2), "float32")
        own_max = T.sblock_alloc_buffer((LANES, 2), "float32")
        of_2 = T.sblock_alloc_buffer((LANES, 2), "float32")
        of_4 = T.sblock_alloc_buffer((LANES, 2), "float32")
        new_ref = T.sblock_alloc_buffer((LANES, 2), "float32")
        own_sum = T.sblock_alloc_buffer((LANES, 2), "float32")
        prob_row = T.sblock_alloc_buffer((LANES, X), "uint32")
        for lane, e, x in T.grid(LANES, 2, X):
            with T.sblock("own_max"):
                vl, ve, vx = T.axis.remap("SSR", [lane, e, x])
                with T.init():
                    own_max[vl, ve] = T.min_value("float32")
                own_max[vl, ve] = T.max(own_max[vl, ve], score[vl, vx, ve])
        max_of_2(own_max, of_2)
        max_of_4(of_2, of_4)
        for lane, e in T.grid(LANES, 2):
            with T.sblock("new_ref"):
                vl, ve = T.axis.remap("SS", [lane, e])
                top = T.meta_var(T.max(of_4[vl, ve], of_4[(vl + 4) % LANES, ve]))
                new_ref[vl, ve] = T.max(ref[vl, ve], top + lift(vl))
        for lane, e in T.grid(LANES, 2):
            with T.sblock("keep"):
                vl, ve = T.axis.remap("SS", [lane, e])
                keep[vl, ve] = T.exp2(ref[vl, ve] - new_ref[vl, ve])
        for x, lane, e in T.grid(X, LANES, 2):
            with T.sblock("prob"):
                vx, vl, ve = T.axis.remap("SSS", [x, lane, e])
                prob[vl, vx, ve] = T.exp2(score[vl, vx, ve] - new_ref[vl, ve])
        for lane, e, x in T.grid(LANES, 2, X):
            with T.sblock("own_sum"):
                vl, ve, vx = T.axis.remap("SSR", [lane, e, x])
                with T.init():
                    own_sum[vl, ve] = T.float32(0)
                own_sum[vl, ve] += prob[vl, vx, ve]
        # Declared as written only: an update in place is not scheduled.
        for lane, e in T.grid(LANES, 2):
            with T.sblock("keep_total"):
                vl, ve = T.axis.remap("SS", [lane, e])
                T.reads(keep[vl, ve], own_sum[vl, ve])
                T.writes(total[vl, ve])
                total[vl, ve] = total[vl, ve] * keep[vl, ve] + own_sum[vl, ve]
        for t, lane, e in T.grid(PRODUCTS, LANES, 4):
            with T.sblock("keep_acc"):
                vt, vl, ve = T.axis.remap("SSS", [t, lane, e])
                T.reads(keep[vl, ve % 2])
                T.writes(acc[vl, vt * 4 + ve])
                acc[vl, vt * 4 + ve] = acc[vl, vt * 4 + ve] * keep[vl, ve % 2]
        for lane, e in T.grid(LANES, 2):
            with T.sblock("keep_ref"):
                vl, ve = T.axis.remap("SS", [lane, e])
                ref[vl, ve] = new_ref[vl, ve]
        for x, lane in T.grid(X, LANES):
            with T.sblock("prob_row"):
                vx, vl = T.axis.remap("SS", [x, lane])
                prob_row[vl, vx] = rounded_pair(prob[vl, vx, 0], prob[vl, vx, 1], dtype)
        for x, lane in T.grid(X, LANES):
            with T.sblock("prob_pair"):
                vx, vl = T.axis.remap("SS", [x, lane])
                prob_pair[vl, vx] = transposed_pair(lambda of: prob_row[of, vx], vl)

    return softmax


def total_blocks():
    """`totals [lane, e]`: the sum of `total` over all rows, in every lane of a `c`."""
    of_2, of_4, of_8 = (
        fold_block(f"sum_of_{16 // step * 2}", 2, add, turned(step)) for step in (16, 8, 4)
    )

    @T.macro
    def sum_up(total, totals):
        halves = T.sblock_alloc_buffer((LANES, 2), "float32")
        quarters = T.sblock_alloc_buffer((LANES, 2), "float32")
        of_2(total, halves)
        of_4(halves, quarters)
        of_8(quarters, totals)

    return sum_up


def warp_stat_block(M: int):
    """What a warp has of its `M` queries, where all warps' results are joined."""

    @T.macro
    def store(ref, totals, warp, warp_ref, warp_sum):
        for lane, e in T.grid(LANES, 2):
            with T.sblock("warp_stat"):
                vl, ve = T.axis.remap("SS", [lane, e])
                T.where(lane % 4 * 2 + e < M)
                warp_ref[warp, vl % 4 * 2 + ve] = ref[vl, ve]
                warp_sum[warp, vl % 4 * 2 + ve] = totals[vl, ve]

    return store


def warp_acc_block(tile: HalfTile | FullTile, M: int):
    """A warp's sums over values, where all warps' are joined; `of(product, lane, register)`."""

    @T.macro
    def store(of, warp, warp_acc):
        for t, lane, e in T.grid(tile.value_rows, LANES, 4):
            with T.sblock("warp_acc"):
                vt, vl, ve = T.axis.remap("SSS", [t, lane, e])
                T.where(lane % 4 * 2 + e % 2 < M)
                channel = T.meta_var(tile.channel(vt, vl // 4 + ve // 2 * 8))
                warp_acc[warp, vl % 4 * 2 + ve % 2, channel] = of(vt, vl, ve)

    return store


def highest(sums: int, warp_ref: Any, query: Any) -> Any:
    """The reference of a query that all sums are brought to."""
    return reduce(T.max, [warp_ref[x, query] for x in range(sums)])


def joined(sums: int, warp_ref: Any, top: Any, query: Any, part: Callable[[int], Any]) -> Any:
    """What all sums have, `part(x)`, for that reference."""
    return reduce(add, [part(x) * T.exp2(warp_ref[x, query] - top) for x in range(sums)])
