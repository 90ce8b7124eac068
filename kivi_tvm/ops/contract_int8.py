"""The sums of `attend` over codes in integers: compute modes "int8" and "int8x2".

The prepared operand (`q_d s_d` of a key group, `p_t s_t` of a value group and chunk) becomes an
integer times a unit, `max |x| / 127` in mode "int8"; in mode "int8x2" that unit is 256 times finer
and the integer `256 high + low`, two planes of int8 with a sum of their own. Sums are exact in
int32.

Four codes that share a word are one operand of the processors' dot products of bytes: they are its
bits at equal places of its four bytes, `(word >> shift) & mask`. Quads of the other operand are put
in that order.
"""

from __future__ import annotations

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import pack_order

LARGEST = 127
TINY = 1e-30
# Added to a float32 of at most 2^22, it leaves the nearest integer in the low bits.
ROUNDER = 12582912.0
BYTES = 0x01010101


def planes(key: KernelKey) -> int:
    """int8 numbers per operand."""
    return 2 if key.compute == "int8x2" else 1


def _largest(count: int) -> float:
    """The largest integer of an operand with so many planes."""
    return float(LARGEST << 8 * (count - 1))


def _as_byte(x, plane, count: int):
    """The int8 of a plane of `x`, which is in units; plane 0 is the higher one."""
    number = T.reinterpret("int32", x + T.float32(ROUNDER))
    if count == 1:
        return T.Cast("int8", number)
    # The low byte is signed, so that the high one is rounded.
    return T.Cast("int8", (number + (128 - plane * 128)) >> (8 - plane * 8))


def _byte(word, number):
    return T.Cast("int32", (word >> T.Cast("uint32", number * 8)) & T.uint32(255))


def _sum_of_planes(x, m, i, rows: int, count: int):
    """The float32 of int32 sums `x [count * rows, ...]`, in units."""
    high = T.Cast("float32", x[m, i])
    if count == 1:
        return high
    return high * T.float32(256) + T.Cast("float32", x[rows + m, i])


def query_blocks(key: KernelKey):
    """The query of every channel as its codes want it: as it is."""
    M, D = key.rows, key.head_dim

    @T.macro
    def query(q_scaled, q_fold):
        for m, d in T.grid(M, D):
            with T.sblock("q_fold"):
                vm, vd = T.axis.remap("SS", [m, d])
                q_fold[vm, vd] = q_scaled[vm, vd]

    return query


def score_blocks(key: KernelKey, C: int):
    """`score = sum_d (q_d s_d) code_d + q_zero` of the first `left` of `C` tokens, else lowest."""
    M, D, P, G = key.rows, key.head_dim, key.page_size, key.key_group_size
    W, bits, N = key.key_codes_per_word, key.key_bits, planes(key)
    S, order = 8 // bits, pack_order(key.pack_order, bits)
    mask, most = order.code_mask * BYTES, _largest(N)

    @T.macro
    def scores(q_fold, k_code, k_scale, page, head, left, q_zero, score):
        q_key = T.sblock_alloc_buffer((M, C // P, P // G, D), "float32")
        q_peak = T.sblock_alloc_buffer((M, C // P, P // G), "float32")
        q_unit = T.sblock_alloc_buffer((M, C // P, P // G), "float32")
        q_gain = T.sblock_alloc_buffer((M, C // P, P // G), "float32")
        q_byte = T.sblock_alloc_buffer((N * M, C // P, P // G, D), "int8")
        q_quad = T.sblock_alloc_buffer((N * M, C // P, P // G, D // W, S, 4), "int8")
        k_quad = T.sblock_alloc_buffer((D // W, S, C), "uint32")
        dot = T.sblock_alloc_buffer((N * M, C), "int32")
        for m, j, g, d in T.grid(M, C // P, P // G, D):
            with T.sblock("q_key"):
                vm, vj, vg, vd = T.axis.remap("SSSS", [m, j, g, d])
                q_key[vm, vj, vg, vd] = q_fold[vm, vd] * T.Cast(
                    "float32", k_scale[page[vj], head, vg, vd]
                )
        for m, j, g, d in T.grid(M, C // P, P // G, D):
            with T.sblock("q_peak"):
                vm, vj, vg, vd = T.axis.remap("SSSR", [m, j, g, d])
                with T.init():
                    q_peak[vm, vj, vg] = T.min_value("float32")
                q_peak[vm, vj, vg] = T.max(q_peak[vm, vj, vg], T.fabs(q_key[vm, vj, vg, vd]))
        for m, j, g in T.grid(M, C // P, P // G):
            with T.sblock("q_unit"):
                vm, vj, vg = T.axis.remap("SSS", [m, j, g])
                q_unit[vm, vj, vg] = T.max(q_peak[vm, vj, vg], T.float32(TINY)) * T.float32(
                    1 / most
                )
                q_gain[vm, vj, vg] = T.float32(most) / T.max(q_peak[vm, vj, vg], T.float32(TINY))
        for n, m, j, g, d in T.grid(N, M, C // P, P // G, D):
            with T.sblock("q_byte"):
                vn, vm, vj, vg, vd = T.axis.remap("SSSSS", [n, m, j, g, d])
                q_byte[vn * M + vm, vj, vg, vd] = _as_byte(
                    q_key[vm, vj, vg, vd] * q_gain[vm, vj, vg], vn, N
                )
        for r, j, g, w, i, b in T.grid(N * M, C // P, P // G, D // W, S, 4):
            with T.sblock("q_quad"):
                vr, vj, vg, vw, vs, vb = T.axis.remap("SSSSSS", [r, j, g, w, i, b])
                q_quad[vr, vj, vg, vw, vs, vb] = q_byte[vr, vj, vg, order.element(vw, vb * S + vs)]
        for w, i, t in T.grid(D // W, S, C):
            with T.sblock("k_quad"):
                vw, vs, vt = T.axis.remap("SSS", [w, i, t])
                k_quad[vw, vs, vt] = (
                    k_code[page[vt // P], head, vw, vt % P] >> T.Cast("uint32", order.shift(vs))
                ) & T.uint32(mask)
        for r, t, w, i, b in T.grid(N * M, C, D // W, S, 4):
            with T.sblock("dot"):
                vr, vt, vw, vs, vb = T.axis.remap("SSRRR", [r, t, w, i, b])
                with T.init():
                    dot[vr, vt] = 0
                dot[vr, vt] = dot[vr, vt] + _byte(k_quad[vw, vs, vt], vb) * T.Cast(
                    "int32", q_quad[vr, vt // P, vt % P // G, vw, vs, vb]
                )
        for m, t in T.grid(M, C):
            with T.sblock("score"):
                vm, vt = T.axis.remap("SS", [m, t])
                score[vm, vt] = T.Select(
                    vt < left,
                    _sum_of_planes(dot, vm, vt, M, N) * q_unit[vm, vt // P, vt % P // G]
                    + q_zero[vm, vt // P, vt % P // G],
                    T.min_value("float32"),
                )

    return scores


def output_blocks(key: KernelKey, C: int):
    """`chunk_acc_d = sum_t (p_t s_t) code_t + p_zero` over the first `left` of `C` tokens."""
    M, D, P, G = key.rows, key.head_dim, key.page_size, key.value_group_size
    W, bits, N = key.value_codes_per_word, key.value_bits, planes(key)
    S, order = 8 // bits, pack_order(key.pack_order, bits)
    mask, most = order.code_mask * BYTES, _largest(N)

    @T.macro
    def outputs(prob, v_code, v_scale, page, head, left, p_zero, chunk_acc):
        p_fold = T.sblock_alloc_buffer((M, D // G, C), "float32")
        p_peak = T.sblock_alloc_buffer((M, D // G), "float32")
        p_unit = T.sblock_alloc_buffer((M, D // G), "float32")
        p_gain = T.sblock_alloc_buffer((M, D // G), "float32")
        p_byte = T.sblock_alloc_buffer((N * M, D // G, C), "int8")
        p_quad = T.sblock_alloc_buffer((N * M, D // G, C // W, S, 4), "int8")
        v_quad = T.sblock_alloc_buffer((C // W, S, D), "uint32")
        out = T.sblock_alloc_buffer((N * M, D), "int32")
        for m, g, t in T.grid(M, D // G, C):
            with T.sblock("p_fold"):
                vm, vg, vt = T.axis.remap("SSS", [m, g, t])
                p_fold[vm, vg, vt] = T.Select(
                    vt < left,
                    prob[vm, vt] * T.Cast("float32", v_scale[page[vt // P], head, vg, vt % P]),
                    T.float32(0),
                )
        for m, g, t in T.grid(M, D // G, C):
            with T.sblock("p_peak"):
                vm, vg, vt = T.axis.remap("SSR", [m, g, t])
                with T.init():
                    p_peak[vm, vg] = T.min_value("float32")
                p_peak[vm, vg] = T.max(p_peak[vm, vg], T.fabs(p_fold[vm, vg, vt]))
        for m, g in T.grid(M, D // G):
            with T.sblock("p_unit"):
                vm, vg = T.axis.remap("SS", [m, g])
                p_unit[vm, vg] = T.max(p_peak[vm, vg], T.float32(TINY)) * T.float32(1 / most)
                p_gain[vm, vg] = T.float32(most) / T.max(p_peak[vm, vg], T.float32(TINY))
        for n, m, g, t in T.grid(N, M, D // G, C):
            with T.sblock("p_byte"):
                vn, vm, vg, vt = T.axis.remap("SSSS", [n, m, g, t])
                p_byte[vn * M + vm, vg, vt] = _as_byte(p_fold[vm, vg, vt] * p_gain[vm, vg], vn, N)
        for r, g, w, i, b in T.grid(N * M, D // G, C // W, S, 4):
            with T.sblock("p_quad"):
                vr, vg, vw, vs, vb = T.axis.remap("SSSSS", [r, g, w, i, b])
                p_quad[vr, vg, vw, vs, vb] = p_byte[vr, vg, order.element(vw, vb * S + vs)]
        for w, i, d in T.grid(C // W, S, D):
            with T.sblock("v_quad"):
                vw, vs, vd = T.axis.remap("SSS", [w, i, d])
                v_quad[vw, vs, vd] = (
                    v_code[page[vw // (P // W)], head, vw % (P // W), vd]
                    >> T.Cast("uint32", order.shift(vs))
                ) & T.uint32(mask)
        for r, d, w, i, b in T.grid(N * M, D, C // W, S, 4):
            with T.sblock("out"):
                vr, vd, vw, vs, vb = T.axis.remap("SSRRR", [r, d, w, i, b])
                with T.init():
                    out[vr, vd] = 0
                out[vr, vd] = out[vr, vd] + _byte(v_quad[vw, vs, vd], vb) * T.Cast(
                    "int32", p_quad[vr, vd // G, vw, vs, vb]
                )
        for m, d in T.grid(M, D):
            with T.sblock("chunk_acc"):
                vm, vd = T.axis.remap("SS", [m, d])
                chunk_acc[vm, vd] = (
                    _sum_of_planes(out, vm, vd, M, N) * p_unit[vm, vd // G] + p_zero[vm, vd // G]
                )

    return outputs
