"""The sums of `attend` over codes in integers: compute modes "int8" and "int8x2".

The prepared operand (`q_d s_d` of a key group, `p_t s_t` of a value group and chunk) becomes an
integer times a unit, `max |x| / 127` in mode "int8"; in mode "int8x2" that unit is 256 times finer
and the integer `256 high + low`, two planes of int8 with a sum of their own. Sums are exact in
int32.

Four codes that share a word are one operand of the processors' dot products of bytes: they are its
bits at equal places of its four bytes, `(word >> shift) & mask`. The other operand's four bytes, a
quad, must be of the same elements. It is prepared in the order of `Codes.element`, all elements of
byte 0, then those of byte 1 and so on: quads come from four vectors without moving any lane.
"""

from __future__ import annotations

from typing import NamedTuple

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import PackOrder, pack_order

LARGEST = 127
TINY = 1e-30
# Added to a float32 of at most 2^22, it leaves the nearest integer in the low bits.
ROUNDER = 12582912.0
BYTES = 0x01010101


class Codes(NamedTuple):
    """How words hold so many `elements` and how integers meet them."""

    order: PackOrder
    bits: int
    elements: int

    @property
    def per_byte(self) -> int:
        return 8 // self.bits

    @property
    def quads(self) -> int:
        """Quads of all codes: one for every place of a byte in every word."""
        return self.elements // 4

    @property
    def mask(self) -> int:
        """The bits of the lowest place of all four bytes."""
        return self.order.code_mask * BYTES

    def element(self, x):
        """The element at place `x` of the order by bytes."""
        byte, quad = x // self.quads, x % self.quads
        return self.order.element(
            quad // self.per_byte, byte * self.per_byte + quad % self.per_byte
        )

    def shift(self, place):
        return T.Cast("uint32", self.order.shift(place))


def planes(key: KernelKey) -> int:
    """int8 numbers per operand."""
    return 2 if key.compute == "int8x2" else 1


def _byte(word, number):
    return T.Cast("int32", (word >> T.Cast("uint32", number * 8)) & T.uint32(255))


def _signed_byte(quad, number):
    return (quad << (24 - number * 8)) >> 24


def _quad(number, plane, count: int):
    """The quad of four integers in units, `number(0)` to `number(3)`; plane 0 is the higher one.

    The low byte is signed, so that the high one is rounded.
    """

    def byte(i):
        x = T.reinterpret("int32", number(i) + T.float32(ROUNDER))
        if count == 2:
            x = (x + (128 - plane * 128)) >> (8 - plane * 8)
        return (x & 255) << (8 * i)

    return byte(0) | byte(1) | byte(2) | byte(3)


def _sum_of_planes(x, m, i, rows: int, count: int):
    """The float32 of int32 sums `x [count * rows, ...]`, in units."""
    high = T.Cast("float32", x[m, i])
    if count == 1:
        return high
    return high * T.float32(256) + T.Cast("float32", x[rows + m, i])


def _quad_blocks(name: str, M: int, groups: int, count: int, N: int):
    """Quads `[N * M, groups, count / 4]` and `unit [M, groups]` of `x [M, groups, count]`."""
    peak_name, unit_name, quad_name = (f"{name}_{each}" for each in ("peak", "unit", "quad"))
    most, quads = float(LARGEST << 8 * (N - 1)), count // 4

    @T.macro
    def quantize(x, unit, quad):
        peak = T.sblock_alloc_buffer((M, groups), "float32")
        gain = T.sblock_alloc_buffer((M, groups), "float32")
        for m, g, i in T.grid(M, groups, count):
            with T.sblock(peak_name):
                vm, vg, vi = T.axis.remap("SSR", [m, g, i])
                with T.init():
                    peak[vm, vg] = T.min_value("float32")  # the identity that `rfactor` knows
                peak[vm, vg] = T.max(peak[vm, vg], T.fabs(x[vm, vg, vi]))
        for m, g in T.grid(M, groups):
            with T.sblock(unit_name):
                vm, vg = T.axis.remap("SS", [m, g])
                unit[vm, vg] = T.max(peak[vm, vg], T.float32(TINY)) * T.float32(1 / most)
                gain[vm, vg] = T.float32(most) / T.max(peak[vm, vg], T.float32(TINY))
        for n, m, g, i in T.grid(N, M, groups, quads):
            with T.sblock(quad_name):
                vn, vm, vg, vi = T.axis.remap("SSSS", [n, m, g, i])
                quad[vn * M + vm, vg, vi] = _quad(
                    lambda byte: x[vm, vg, byte * quads + vi] * gain[vm, vg], vn, N
                )

    return quantize


def query_blocks(key: KernelKey):
    """The query of every channel as its codes want it: in the order by bytes."""
    M, D = key.rows, key.head_dim
    codes = Codes(pack_order(key.pack_order, key.key_bits), key.key_bits, D)

    @T.macro
    def query(q_scaled, q_fold):
        for m, x in T.grid(M, D):
            with T.sblock("q_fold"):
                vm, vx = T.axis.remap("SS", [m, x])
                q_fold[vm, vx] = q_scaled[vm, codes.element(vx)]

    return query


def score_blocks(key: KernelKey, C: int):
    """`score = sum_d (q_d s_d) code_d + q_zero` of the first `left` of `C` tokens, else lowest."""
    M, D, P, G, N = key.rows, key.head_dim, key.page_size, key.key_group_size, planes(key)
    codes = Codes(pack_order(key.pack_order, key.key_bits), key.key_bits, D)
    W, S, Q = key.key_codes_per_word, codes.per_byte, codes.quads
    quantize = _quad_blocks("q", M, C // G, D, N)

    @T.macro
    def scores(q_fold, k_code, k_scale, page, head, left, q_zero, score):
        scale = T.sblock_alloc_buffer((C // G, D), "float32")
        q_key = T.sblock_alloc_buffer((M, C // G, D), "float32")
        q_unit = T.sblock_alloc_buffer((M, C // G), "float32")
        q_quad = T.sblock_alloc_buffer((N * M, C // G, Q), "int32")
        k_quad = T.sblock_alloc_buffer((D // W, S, C), "uint32")
        dot = T.sblock_alloc_buffer((N * M, C), "int32")
        for g, b, w, i in T.grid(C // G, 4, D // W, S):
            with T.sblock("key_scale"):
                vg, vb, vw, vs = T.axis.remap("SSSS", [g, b, w, i])
                scale[vg, vb * Q + vw * S + vs] = T.Cast(
                    "float32",
                    k_scale[
                        page[vg // (P // G)],
                        head,
                        vg % (P // G),
                        codes.order.element(vw, vb * S + vs),
                    ],
                )
        for m, g, x in T.grid(M, C // G, D):
            with T.sblock("q_key"):
                vm, vg, vx = T.axis.remap("SSS", [m, g, x])
                q_key[vm, vg, vx] = q_fold[vm, vx] * scale[vg, vx]
        quantize(q_key, q_unit, q_quad)
        for w, i, t in T.grid(D // W, S, C):
            with T.sblock("k_quad"):
                vw, vs, vt = T.axis.remap("SSS", [w, i, t])
                k_quad[vw, vs, vt] = (
                    k_code[page[vt // P], head, vw, vt % P] >> codes.shift(vs)
                ) & T.uint32(codes.mask)
        for r, t, w, i, b in T.grid(N * M, C, D // W, S, 4):
            with T.sblock("dot"):
                vr, vt, vw, vs, vb = T.axis.remap("SSRRR", [r, t, w, i, b])
                with T.init():
                    dot[vr, vt] = 0
                dot[vr, vt] = dot[vr, vt] + _byte(k_quad[vw, vs, vt], vb) * _signed_byte(
                    q_quad[vr, vt // G, vw * S + vs], vb
                )
        for m, t in T.grid(M, C):
            with T.sblock("score"):
                vm, vt = T.axis.remap("SS", [m, t])
                score[vm, vt] = T.Select(
                    vt < left,
                    _sum_of_planes(dot, vm, vt, M, N) * q_unit[vm, vt // G] + q_zero[vm, vt // G],
                    T.min_value("float32"),
                )

    return scores


def output_blocks(key: KernelKey, C: int):
    """`chunk_acc_d = sum_t (p_t s_t) code_t + p_zero` over the first `left` of `C` tokens."""
    M, D, P, G, N = key.rows, key.head_dim, key.page_size, key.value_group_size, planes(key)
    codes = Codes(pack_order(key.pack_order, key.value_bits), key.value_bits, C)
    W, S, Q = key.value_codes_per_word, codes.per_byte, codes.quads
    quantize = _quad_blocks("p", M, D // G, C, N)

    @T.macro
    def outputs(prob, v_code, v_scale, page, head, left, p_zero, chunk_acc):
        scale = T.sblock_alloc_buffer((D // G, C), "float32")
        p_order = T.sblock_alloc_buffer((M, C), "float32")
        p_fold = T.sblock_alloc_buffer((M, D // G, C), "float32")
        p_unit = T.sblock_alloc_buffer((M, D // G), "float32")
        p_quad = T.sblock_alloc_buffer((N * M, D // G, Q), "int32")
        v_quad = T.sblock_alloc_buffer((C // W, S, D), "uint32")
        out = T.sblock_alloc_buffer((N * M, D), "int32")
        for g, b, w, i in T.grid(D // G, 4, C // W, S):
            with T.sblock("value_scale"):
                vg, vb, vw, vs = T.axis.remap("SSSS", [g, b, w, i])
                scale[vg, vb * Q + vw * S + vs] = T.Select(
                    codes.order.element(vw, vb * S + vs) < left,
                    T.Cast(
                        "float32",
                        v_scale[
                            page[vw // (P // W)],
                            head,
                            vg,
                            codes.order.element(vw % (P // W), vb * S + vs),
                        ],
                    ),
                    T.float32(0),
                )
        for m, b, w, i in T.grid(M, 4, C // W, S):
            with T.sblock("p_order"):
                vm, vb, vw, vs = T.axis.remap("SSSS", [m, b, w, i])
                p_order[vm, vb * Q + vw * S + vs] = prob[vm, codes.order.element(vw, vb * S + vs)]
        for m, g, x in T.grid(M, D // G, C):
            with T.sblock("p_fold"):
                vm, vg, vx = T.axis.remap("SSS", [m, g, x])
                p_fold[vm, vg, vx] = p_order[vm, vx] * scale[vg, vx]
        quantize(p_fold, p_unit, p_quad)
        for w, i, d in T.grid(C // W, S, D):
            with T.sblock("v_quad"):
                vw, vs, vd = T.axis.remap("SSS", [w, i, d])
                v_quad[vw, vs, vd] = (
                    v_code[page[vw // (P // W)], head, vw % (P // W), vd] >> codes.shift(vs)
                ) & T.uint32(codes.mask)
        for r, d, w, i, b in T.grid(N * M, D, C // W, S, 4):
            with T.sblock("out"):
                vr, vd, vw, vs, vb = T.axis.remap("SSRRR", [r, d, w, i, b])
                with T.init():
                    out[vr, vd] = 0
                out[vr, vd] = out[vr, vd] + _byte(v_quad[vw, vs, vd], vb) * _signed_byte(
                    p_quad[vr, vd // G, vw * S + vs], vb
                )
        for m, d in T.grid(M, D):
            with T.sblock("chunk_acc"):
                vm, vd = T.axis.remap("SS", [m, d])
                chunk_acc[vm, vd] = (
                    _sum_of_planes(out, vm, vd, M, N) * p_unit[vm, vd // G] + p_zero[vm, vd // G]
                )

    return outputs
