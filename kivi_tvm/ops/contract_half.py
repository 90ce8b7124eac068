"""The sums of `attend` over codes by `mma`: float16 operands, float32 sums; compute mode "half".

Everything is written as the lanes of a warp hold it (`fragments.py`). Codes enter as subnormal
float16 numbers, exactly, at the cost of one `and` per pair; the power of two that they lack is in
the other operand. That one is rounded to float16 once:

    score_t = u sum_d half(half(q_d / u) s_d) code_td + u sum_d half(q_d / u) z_d
    acc_d   = sum_t half(half(p_t) s_t) code_td + sum_t half(p_t) z_t

with `u` a power of two above all `|q_d|`, so that the products with any scale are finite.
"""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import value_order
from kivi_tvm.ops.fragments import (
    BYTE_BITS,
    CODE_UNIT,
    DEPTH,
    LANES,
    QUERIES,
    ROWS,
    HalfTile,
    c_lane,
    c_register,
    code_pair,
    pair_of,
    pair_product,
    position,
    power_pair,
    product,
)
from kivi_tvm.ops.staged_tile import staged_arrays


def mma_block(name: str, dtype: str = "float16"):
    """`result += a b` by one `mma` on `dtype`, in a block `name`.

    The macro takes `result [32, n]`, the first of the four registers there, and what gives the
    operands' registers by (lane, number).
    """

    @T.macro
    def multiply(result, first, a, b):
        for m, n, k in T.grid(ROWS, QUERIES, DEPTH):
            with T.sblock(name):
                vm, vn, vk = T.axis.remap("SSR", [m, n, k])
                result[c_lane(vm, vn), first + c_register(vm, vn)] = result[
                    c_lane(vm, vn), first + c_register(vm, vn)
                ] + product(a, b, vm, vn, vk, dtype)

    return multiply


def score_blocks(key: KernelKey):
    """`score [lane, matrix, e]` of the first `left` tokens of a tile, in log2 units; else lowest.

    The tile's keys are in a place of a warp (`staged_tile.py`).
    Lane `(g, c)` gets row `g` of every matrix for the queries `2 c + e`.
    """
    tile = HalfTile(key)
    D, G_k, W, bits = key.head_dim, key.key_group_size, key.key_codes_per_word, key.key_bits
    SPANS, PAIRS, STEPS, SECTIONS = tile.key_spans, tile.key_pairs, tile.key_steps, tile.sections
    APART, SIZE = tile.rows_apart, tile.section_tokens
    q_zero_mma, dot_mma = mma_block("q_zero"), mma_block("dot")
    codes, of_group, *_ = staged_arrays(key)

    def word(span, lane):
        """The word of every token's key that a lane takes; the last one where there is none."""
        return T.min(4 * span + lane % 4, D // W - 1)

    @T.macro
    def scores(q_pair, gain, k_code, k_scale, k_zero, warp, place, left, score):
        q_zero = T.sblock_alloc_buffer((LANES, 4), "float32")
        zero_of = T.sblock_alloc_buffer((LANES, SECTIONS, 2), "float32")
        dot = T.sblock_alloc_buffer((LANES, tile.matrices * 2), "float32")
        for lane, e in T.grid(LANES, 4):
            with T.sblock("q_zero_start"):
                vl, ve = T.axis.remap("SS", [lane, e])
                q_zero[vl, ve] = T.float32(0)
        for u, lane, e in T.grid(tile.matrices // 2, LANES, 4):
            with T.sblock("dot_start"):
                vu, vl, ve = T.axis.remap("SSS", [u, lane, e])
                dot[vl, vu * 4 + ve] = T.float32(0)
        for s in range(SPANS):
            with T.sblock("key_span"):
                vs = T.axis.reduce(SPANS, s)
                words = T.sblock_alloc_buffer((LANES, tile.matrices), "uint32")
                zeros = T.sblock_alloc_buffer((LANES, W), "float16")
                scales = T.sblock_alloc_buffer((LANES, SECTIONS, W), "float16")
                for lane, section, x in T.grid(LANES, SECTIONS, APART):
                    with T.sblock("key_word"):
                        vl, vc, vx = T.axis.remap("SSS", [lane, section, x])
                        words[vl, vc * APART + vx] = k_code[
                            warp,
                            place,
                            word(vs, vl) * codes.stride + vc * SIZE + vl // 4 * APART + vx,
                        ]
                # Rows of A are sections here: the first lanes `g` hold one each.
                for lane, o in T.grid(LANES, W):
                    with T.sblock("key_zero"):
                        vl, vo = T.axis.remap("SS", [lane, o])
                        section = T.meta_var(T.min(vl // 4, SECTIONS - 1))
                        zeros[vl, vo] = k_zero[
                            warp,
                            place,
                            section * SIZE // G_k * of_group.stride + word(vs, vl) * W + vo,
                        ]
                for section, lane, o in T.grid(SECTIONS, LANES, W):
                    with T.sblock("key_scale"):
                        vc, vl, vo = T.axis.remap("SSS", [section, lane, o])
                        scales[vl, vc, vo] = k_scale[
                            warp,
                            place,
                            vc * SIZE // G_k * of_group.stride + word(vs, vl) * W + vo,
                        ]
                # Products in a row go into different sums: none waits for the one before.
                for j in range(STEPS):
                    with T.sblock("key_step"):
                        vj = T.axis.reduce(STEPS, j)
                        zero_pair = T.sblock_alloc_buffer((LANES, 4), "uint32")
                        for lane, r in T.grid(LANES, 4):
                            with T.sblock("key_zero_pair"):
                                vl, vr = T.axis.remap("SS", [lane, r])
                                pair = T.meta_var(2 * vj + vr // 2)
                                zero_pair[vl, vr] = T.Select(
                                    vr % 2 == 0,
                                    pair_of(zeros[vl, pair], zeros[vl, pair + PAIRS]),
                                    T.uint32(0),
                                )
                        q_zero_mma(
                            q_zero,
                            0,
                            lambda lane, r: zero_pair[lane, r],
                            lambda lane, r: q_pair[lane, (vs * STEPS + vj) * 2 + r],
                        )
                        q_low = T.sblock_alloc_buffer((LANES, 2), "uint32")
                        for lane, r in T.grid(LANES, 2):
                            with T.sblock("q_low"):
                                vl, vr = T.axis.remap("SS", [lane, r])
                                _, at_bit = T.meta_var(position(bits, 2 * vj + vr))
                                q_low[vl, vr] = pair_product(
                                    q_pair[vl, (vs * STEPS + vj) * 2 + vr], power_pair(-at_bit)
                                )
                        for section in range(SECTIONS):
                            with T.sblock("section"):
                                vc = T.axis.spatial(SECTIONS, section)
                                q_key = T.sblock_alloc_buffer((LANES, 2), "uint32")
                                for lane, r in T.grid(LANES, 2):
                                    with T.sblock("q_key"):
                                        vl, vr = T.axis.remap("SS", [lane, r])
                                        pair = T.meta_var(2 * vj + vr)
                                        q_key[vl, vr] = pair_product(
                                            q_low[vl, vr],
                                            pair_of(
                                                scales[vl, vc, pair], scales[vl, vc, pair + PAIRS]
                                            ),
                                        )
                                for u in range(APART // 2):
                                    with T.sblock("key_product"):
                                        vu = T.axis.spatial(APART // 2, u)
                                        at_u = T.meta_var(vc * (APART // 2) + vu)
                                        code = T.sblock_alloc_buffer((LANES, 4), "uint32")
                                        for lane, r in T.grid(LANES, 4):
                                            with T.sblock("key_code"):
                                                vl, vr = T.axis.remap("SS", [lane, r])
                                                code[vl, vr] = code_pair(
                                                    words[vl, 2 * at_u + vr % 2],
                                                    bits,
                                                    2 * vj + vr // 2,
                                                )
                                        dot_mma(
                                            dot,
                                            4 * at_u,
                                            lambda lane, r: code[lane, r],
                                            lambda lane, r: q_key[lane, r],
                                        )
        for section, lane, e in T.grid(SECTIONS, LANES, 2):
            with T.sblock("key_zero_of"):
                vc, vl, ve = T.axis.remap("SSS", [section, lane, e])
                zero_of[vl, vc, ve] = q_zero[vc * 4 + vl % 4, ve]
        for x, lane, e in T.grid(tile.matrices, LANES, 2):
            with T.sblock("score"):
                vx, vl, ve = T.axis.remap("SSS", [x, lane, e])
                score[vl, vx, ve] = T.Select(
                    tile.token(vx, vl // 4) < left,
                    (dot[vl, vx * 2 + ve] * T.float32(CODE_UNIT) + zero_of[vl, vx // APART, ve])
                    * gain[vl, ve],
                    T.min_value("float32"),
                )

    return scores


def value_word_blocks(key: KernelKey):
    """`words [lane, unit, block, channel]`: the codes of a tile's values that a lane takes.

    Where a unit's tokens are pieces of two pages, two words of each have those of all lanes: a lane
    takes a byte of every half word of one of both.
    """
    tile, BLOCKS, CHANNELS = HalfTile(key), HalfTile(key).value_blocks, HalfTile(key).channels_apart
    *_, codes, _, _ = staged_arrays(key)
    share = value_order(key).words_together

    def of_lane(first, second, odd):
        shift, mask = T.Cast("uint32", odd * BYTE_BITS), T.uint32(0x00FF00FF)
        low, high = (T.shift_right(x, shift) & mask for x in (first, second))
        return low | T.shift_left(high, T.uint32(BYTE_BITS))

    def load_block(count, word):
        @T.macro
        def load(v_code, warp, place, words):
            for u, y, lane, o in T.grid(count, BLOCKS, LANES, CHANNELS):
                with T.sblock("value_word"):
                    vu, vy, vl, vo = T.axis.remap("SSSS", [u, y, lane, o])
                    words[vl, vu, vy, vo] = v_code[
                        warp,
                        place,
                        (vu * share + word(vl % 4)) * codes.stride
                        + (vy * QUERIES + vl // 4) * CHANNELS
                        + vo,
                    ]

        return load

    if share == 4:
        return load_block(tile.units, lambda c: c)
    load_halves = load_block(2 * tile.units, lambda c: c // 2)

    @T.macro
    def load(v_code, warp, place, words):
        halves = T.sblock_alloc_buffer((LANES, 2 * tile.units, BLOCKS, CHANNELS), "uint32")
        load_halves(v_code, warp, place, halves)
        for u, y, lane, o in T.grid(tile.units, BLOCKS, LANES, CHANNELS):
            with T.sblock("value_halves"):
                vu, vy, vl, vo = T.axis.remap("SSSS", [u, y, lane, o])
                words[vl, vu, vy, vo] = of_lane(
                    halves[vl, 2 * vu, vy, vo], halves[vl, 2 * vu + 1, vy, vo], vl % 2
                )

    return load


def output_blocks(key: KernelKey):
    """`acc += sum_t (p_t s_t) code_t`, `zero_acc += sum_t p_t z_t` over a tile's tokens.

    The tile's values are in a place of a warp (`staged_tile.py`).
    `prob_pair [lane, matrix]` are the registers of B: pairs of tokens, a query per lane `g`.
    """
    tile = HalfTile(key)
    bits = key.value_bits
    APART, SIZE, RUN = tile.rows_apart, tile.section_tokens, 2 * tile.rows_apart
    STEPS, GROUPS, BLOCKS = tile.matrices // 2, tile.value_groups, tile.value_blocks
    CHANNELS, PRODUCTS, SECTIONS = tile.channels_apart, tile.value_rows, tile.sections
    GROUP_ROWS, OF_GROUP = -(-GROUPS // QUERIES), PRODUCTS // GROUPS
    UNIT = tile.unit_tokens // QUERIES  # matrices
    out_zero_mma, out_mma = mma_block("out_zero"), mma_block("out")
    load_words = value_word_blocks(key)
    *_, of_token, _ = staged_arrays(key)

    def shift(matrix):
        """Where a matrix's pair of codes is in a byte."""
        _, at = position(bits, matrix % UNIT)
        return at

    @T.macro
    def outputs(prob_pair, v_code, v_scale, v_zero, warp, place, acc, zero_acc):
        words = T.sblock_alloc_buffer((LANES, tile.units, BLOCKS, CHANNELS), "uint32")
        load_words(v_code, warp, place, words)
        for section in range(SECTIONS):
            with T.sblock("value_section"):
                vc = T.axis.reduce(SECTIONS, section)
                scales = T.sblock_alloc_buffer((LANES, GROUPS, RUN), "float16")
                zeros = T.sblock_alloc_buffer((LANES, GROUP_ROWS, RUN), "float16")
                for g, lane, o in T.grid(GROUPS, LANES, RUN):
                    with T.sblock("value_scale"):
                        vg, vl, vo = T.axis.remap("SSS", [g, lane, o])
                        scales[vl, vg, vo] = v_scale[
                            warp, place, vg * of_token.stride + vc * SIZE + vl % 4 * RUN + vo
                        ]
                # Rows of A are groups of channels here.
                for g, lane, o in T.grid(GROUP_ROWS, LANES, RUN):
                    with T.sblock("value_zero"):
                        vg, vl, vo = T.axis.remap("SSS", [g, lane, o])
                        group = T.meta_var(T.min(vg * QUERIES + vl // 4, GROUPS - 1))
                        zeros[vl, vg, vo] = v_zero[
                            warp, place, group * of_token.stride + vc * SIZE + vl % 4 * RUN + vo
                        ]
                for k in range(APART // 2):
                    with T.sblock("value_step"):
                        vk = T.axis.reduce(APART // 2, k)
                        at_k = T.meta_var(vc * (APART // 2) + vk)
                        zero_pair = T.sblock_alloc_buffer((LANES, 4), "uint32")
                        prob_low = T.sblock_alloc_buffer((LANES, 2), "uint32")
                        for lane, r in T.grid(LANES, 4):
                            with T.sblock("value_zero_pair"):
                                vl, vr = T.axis.remap("SS", [lane, r])
                                inside = T.meta_var(2 * vk + vr // 2)
                                row = T.meta_var(vr % 2 if GROUP_ROWS == 2 else 0)
                                zero_pair[vl, vr] = T.Select(
                                    vr % 2 < GROUP_ROWS,
                                    pair_of(zeros[vl, row, inside], zeros[vl, row, APART + inside]),
                                    T.uint32(0),
                                )
                        out_zero_mma(
                            zero_acc,
                            0,
                            lambda lane, r: zero_pair[lane, r],
                            lambda lane, r: prob_pair[lane, 2 * at_k + r],
                        )
                        for lane, r in T.grid(LANES, 2):
                            with T.sblock("prob_low"):
                                vl, vr = T.axis.remap("SS", [lane, r])
                                prob_low[vl, vr] = pair_product(
                                    prob_pair[vl, 2 * at_k + vr], power_pair(-shift(2 * at_k + vr))
                                )
                        for g in range(GROUPS):
                            with T.sblock("value_group"):
                                vg = T.axis.spatial(GROUPS, g)
                                prob_fold = T.sblock_alloc_buffer((LANES, 2), "uint32")
                                for lane, r in T.grid(LANES, 2):
                                    with T.sblock("prob_fold"):
                                        vl, vr = T.axis.remap("SS", [lane, r])
                                        inside = T.meta_var(2 * vk + vr)
                                        prob_fold[vl, vr] = pair_product(
                                            prob_low[vl, vr],
                                            pair_of(
                                                scales[vl, vg, inside],
                                                scales[vl, vg, APART + inside],
                                            ),
                                        )
                                for t in range(OF_GROUP):
                                    with T.sblock("value_product"):
                                        vt = T.axis.spatial(OF_GROUP, t)
                                        at_t = T.meta_var(vg * OF_GROUP + vt)
                                        code = T.sblock_alloc_buffer((LANES, 4), "uint32")
                                        for lane, r in T.grid(LANES, 4):
                                            with T.sblock("value_code"):
                                                vl, vr = T.axis.remap("SS", [lane, r])
                                                matrix = T.meta_var(2 * at_k + vr // 2)
                                                code[vl, vr] = code_pair(
                                                    words[
                                                        vl,
                                                        matrix // UNIT,
                                                        tile.block(at_t),
                                                        tile.place(at_t, vr % 2),
                                                    ],
                                                    bits,
                                                    matrix % UNIT,
                                                )
                                        out_mma(
                                            acc,
                                            4 * at_t,
                                            lambda lane, r: code[lane, r],
                                            lambda lane, r: prob_fold[lane, r],
                                        )

    return outputs
