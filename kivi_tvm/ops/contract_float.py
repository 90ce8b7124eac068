"""The sums of `attend` over codes in float32: compute mode "float".

Codes enter as `float(word & (mask << shift))`, exactly `code * 2^shift`; the power of two is
folded into the other operand, so a code costs one `and` and one conversion.
"""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import key_order, value_order


def _power(shift):
    """2^-shift as float32."""
    return T.reinterpret("float32", (127 - shift) << 23)


def score_blocks(key: KernelKey, M: int, C: int, unpack: str):
    """`score [M, C] = sum_d (q_d s_d) code_d + q_d z_d` of the first `left` tokens, else lowest."""
    D, P, G = key.head_dim, key.page_size, key.key_group_size
    del unpack
    W, order = key.key_codes_per_word, key_order(key)
    mask = order.code_mask

    @T.macro
    def scores(q_scaled, k_code, k_scale, k_zero, page, head, left, score):
        zero = T.sblock_alloc_buffer((C // G, D), "float32")
        q_zero = T.sblock_alloc_buffer((M, C // G), "float32")
        scale = T.sblock_alloc_buffer((C // G, D), "float32")
        q_key = T.sblock_alloc_buffer((M, C // G, D), "float32")
        word = T.sblock_alloc_buffer((D // W, C), "uint32")
        dot = T.sblock_alloc_buffer((M, C), "float32")
        for g, d in T.grid(C // G, D):
            with T.sblock("key_zero"):
                vg, vd = T.axis.remap("SS", [g, d])
                zero[vg, vd] = T.Cast(
                    "float32", k_zero[page[vg // (P // G)], head, vg % (P // G), vd]
                )
        for m, g, d in T.grid(M, C // G, D):
            with T.sblock("q_zero"):
                vm, vg, vd = T.axis.remap("SSR", [m, g, d])
                with T.init():
                    q_zero[vm, vg] = T.float32(0)
                q_zero[vm, vg] += q_scaled[vm, vd] * zero[vg, vd]
        for g, d in T.grid(C // G, D):
            with T.sblock("key_scale"):
                vg, vd = T.axis.remap("SS", [g, d])
                scale[vg, vd] = T.Cast(
                    "float32", k_scale[page[vg // (P // G)], head, vg % (P // G), vd]
                ) * _power(order.shift(order.slot(vd)))
        for m, g, d in T.grid(M, C // G, D):
            with T.sblock("q_key"):
                vm, vg, vd = T.axis.remap("SSS", [m, g, d])
                q_key[vm, vg, vd] = q_scaled[vm, vd] * scale[vg, vd]
        for w, t in T.grid(D // W, C):
            with T.sblock("key_word"):
                vw, vt = T.axis.remap("SS", [w, t])
                word[vw, vt] = k_code[page[vt // P], head, vw, vt % P]
        for m, t, w, i in T.grid(M, C, D // W, W):
            with T.sblock("dot"):
                vm, vt, vw, vs = T.axis.remap("SSRR", [m, t, w, i])
                with T.init():
                    dot[vm, vt] = T.float32(0)
                dot[vm, vt] += q_key[vm, vt // G, order.element(vw, vs)] * T.Cast(
                    "float32",
                    word[vw, vt] & (T.uint32(mask) << T.Cast("uint32", order.shift(vs))),
                )
        for m, t in T.grid(M, C):
            with T.sblock("score"):
                vm, vt = T.axis.remap("SS", [m, t])
                score[vm, vt] = T.Select(
                    vt < left,
                    dot[vm, vt] + q_zero[vm, vt // G],
                    T.min_value("float32"),
                )

    return scores


def output_blocks(key: KernelKey, M: int, C: int, unpack: str):
    """`chunk_acc_d = sum_t (p_t s_t) code_t + p_t z_t` over the first `left` of `C` tokens."""
    D, P, G = key.head_dim, key.page_size, key.value_group_size
    del unpack
    W, order = key.value_codes_per_word, value_order(key)
    mask = order.code_mask

    @T.macro
    def outputs(prob, v_code, v_scale, v_zero, page, head, left, chunk_acc):
        zero = T.sblock_alloc_buffer((D // G, C), "float32")
        p_zero = T.sblock_alloc_buffer((M, D // G), "float32")
        scale = T.sblock_alloc_buffer((D // G, C), "float32")
        p_fold = T.sblock_alloc_buffer((M, D // G, C), "float32")
        word = T.sblock_alloc_buffer((C // W, D), "uint32")
        out = T.sblock_alloc_buffer((M, D), "float32")
        for g, t in T.grid(D // G, C):
            with T.sblock("value_zero"):
                vg, vt = T.axis.remap("SS", [g, t])
                zero[vg, vt] = T.Select(
                    vt < left,
                    T.Cast("float32", v_zero[page[vt // P], head, vg, vt % P]),
                    T.float32(0),
                )
        for m, g, t in T.grid(M, D // G, C):
            with T.sblock("p_zero"):
                vm, vg, vt = T.axis.remap("SSR", [m, g, t])
                with T.init():
                    p_zero[vm, vg] = T.float32(0)
                p_zero[vm, vg] += prob[vm, vt] * zero[vg, vt]
        for g, t in T.grid(D // G, C):
            with T.sblock("value_scale"):
                vg, vt = T.axis.remap("SS", [g, t])
                scale[vg, vt] = T.Select(
                    vt < left,
                    T.Cast("float32", v_scale[page[vt // P], head, vg, vt % P])
                    * _power(order.shift(order.slot(vt))),
                    T.float32(0),
                )
        for m, g, t in T.grid(M, D // G, C):
            with T.sblock("p_fold"):
                vm, vg, vt = T.axis.remap("SSS", [m, g, t])
                p_fold[vm, vg, vt] = prob[vm, vt] * scale[vg, vt]
        for w, d in T.grid(C // W, D):
            with T.sblock("value_word"):
                vw, vd = T.axis.remap("SS", [w, d])
                word[vw, vd] = v_code[page[vw // (P // W)], head, vw % (P // W), vd]
        for m, d, w, i in T.grid(M, D, C // W, W):
            with T.sblock("out"):
                vm, vd, vw, vs = T.axis.remap("SSRR", [m, d, w, i])
                with T.init():
                    out[vm, vd] = T.float32(0)
                out[vm, vd] += p_fold[vm, vd // G, order.element(vw, vs)] * T.Cast(
                    "float32",
                    word[vw, vd] & (T.uint32(mask) << T.Cast("uint32", order.shift(vs))),
                )
        for m, d in T.grid(M, D):
            with T.sblock("chunk_acc"):
                vm, vd = T.axis.remap("SS", [m, d])
                chunk_acc[vm, vd] = out[vm, vd] + p_zero[vm, vd // G]

    return outputs
