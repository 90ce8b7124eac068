"""The sums of `attend` over codes in integers: compute modes "int8" and "int8x2".

The prepared operand (`q_d s_d` of a key group, `p_t s_t` of a value group) becomes an integer times
a unit: `1 / 127` of the largest one of a row (and value group) in the chunk in mode "int8"; in mode
"int8x2" that unit is 256 times finer and the integer `256 high + low`, two planes of int8 with a
sum of their own. Sums are exact in int32.

What is rounded is the operand of codes around their middle `c = (2^b - 1) / 2`, since rounding
errors do not meet the common part of a group's codes then:

    sum_d q_d (s_d code_d + z_d) = sum_d (q_d s_d) (code_d - c) + sum_d q_d (z_d + c s_d)
                                ~= unit (sum_d n_d code_d - c sum_d n_d) + sum_d q_d (z_d + c s_d)

Four codes that share a word are one operand of the processors' dot products of bytes: they are its
bits at equal places of its four bytes, `(word >> shift) & mask`. The other operand's four bytes, a
quad, must be of the same elements: a quarter of a span apart in pack order "bytes", so that quads
are made of four vectors without moving any lane.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tvm.script import tirx as T

from kivi_tvm.config import KernelKey
from kivi_tvm.layout import PackOrder, key_order, value_order
from kivi_tvm.ops.exp2 import ROUNDER

PACK_ORDER = "bytes"
LARGEST = 127
TINY = 1e-12  # scores and outputs that small need no relative accuracy
BYTES = 0x01010101
MAX_PARTS = 16  # of a sum, as many as there are lanes: additions keep their order


class Codes(NamedTuple):
    """How words hold codes and how quads meet them.

    With `masked` codes stay where they are in their bytes, `code * 2^shift`, which only unsigned
    bytes can hold; otherwise every place is shifted down first.
    """

    order: PackOrder
    masked: bool

    @property
    def places(self) -> int:
        """Codes in a byte, and quads of a word."""
        return 8 // self.order.bits

    @property
    def middle(self) -> float:
        return self.order.code_mask / 2

    def element(self, quad, byte):
        """The element that `byte` of a quad belongs to."""
        quarter = self.order.span // 4
        return quad // quarter * self.order.span + byte * quarter + quad % quarter

    def bytes_of(self, word, place):
        """The codes at a place of all four bytes."""
        shift = T.Cast("uint32", place * self.order.bits)
        mask = T.uint32(self.order.code_mask * BYTES)
        return word & (mask << shift) if self.masked else (word >> shift) & mask

    def weight(self, place):
        """What a sum over `bytes_of` counts, as float32."""
        shift = place * self.order.bits if self.masked else 0
        return T.reinterpret("float32", (127 - shift) << 23)


def _codes(order: PackOrder, unpack: str) -> Codes:
    if order.name != PACK_ORDER:
        raise ValueError(f"`pack_order` must be {PACK_ORDER!r} in integers, got {order.name!r}")
    return Codes(order, unpack == "mask")


def planes(key: KernelKey) -> int:
    """int8 numbers per operand."""
    return 2 if key.compute == "int8x2" else 1


def _byte(word, number):
    return T.Cast("int32", (word >> T.Cast("uint32", number * 8)) & T.uint32(255))


def _signed_byte(quad, number):
    return (quad << (24 - number * 8)) >> 24


def _quad(integer, plane, planes: int):
    """The quad of four integers, `integer(0)` to `integer(3)`; plane 0 is the highest one.

    The low byte is signed, so that the high one is rounded.
    """
    first = (planes - 1 - plane) * 8

    def byte(i):
        return ((integer(i) + first * 16) >> first) << (8 * i)

    quad = byte(3)
    for i in (2, 1, 0):
        mask = 255 << 8 * i
        quad = (byte(i) & mask) | (quad & ~mask)
    return quad


def _rounded(x, gain):
    """The nearest integer to `x * gain` in the low 22 bits."""
    return T.reinterpret("int32", x * gain + T.float32(ROUNDER))


def _float_of(plane, N: int):
    """The float32 of integer sums in units, `plane(0)` to `plane(N - 1)`."""
    high = T.Cast("float32", plane(0))
    return high if N == 1 else high * T.float32(256) + T.Cast("float32", plane(1))


def _unit_blocks(name: str, rows: int, columns: int, N: int):
    """`unit` and `gain = 1 / unit` of what is at most `peak`, all `[rows, columns]`."""
    unit_name, most = f"{name}_unit", float(LARGEST << 8 * (N - 1))

    @T.macro
    def units(peak, unit, gain):
        for i, j in T.grid(rows, columns):
            with T.sblock(unit_name):
                vi, vj = T.axis.remap("SS", [i, j])
                unit[vi, vj] = T.max(peak[vi, vj], T.float32(TINY)) * T.float32(1 / most)
                gain[vi, vj] = T.float32(most) / T.max(peak[vi, vj], T.float32(TINY))

    return units


def _base_blocks(name: str, M: int, groups: int, count: int, N: int, middle: float):
    """`base [M, groups]`: all that does not depend on the codes.

    That is `sum_i x_i mid_i` of `x [M, count]` and `mid [groups, count]`, less what the rounded
    operands `quad` stand for in the middle of the codes. Both are summed in the same `L` parts.
    """
    total_name, part_name, base_name = (f"{name}_{each}" for each in ("total", "part", "base"))
    Q = count // 4
    L = math.gcd(Q, MAX_PARTS)

    @T.macro
    def bases(x, mid, quad, unit, base):
        total = T.sblock_alloc_buffer((N, M, groups, L), "int32")
        part = T.sblock_alloc_buffer((M, groups, L), "float32")
        for n, m, g, k, i, b in T.grid(N, M, groups, Q // L, L, 4):
            with T.sblock(total_name):
                vn, vm, vg, vk, vi, vb = T.axis.remap("SSSRSR", [n, m, g, k, i, b])
                with T.init():
                    total[vn, vm, vg, vi] = 0
                total[vn, vm, vg, vi] = total[vn, vm, vg, vi] + _signed_byte(
                    quad[vn, vm, vg, vk * L + vi], vb
                )
        for m, g, k, i in T.grid(M, groups, count // L, L):
            with T.sblock(part_name):
                vm, vg, vk, vi = T.axis.remap("SSRS", [m, g, k, i])
                with T.init():
                    part[vm, vg, vi] = T.float32(0)
                part[vm, vg, vi] += x[vm, vk * L + vi] * mid[vg, vk * L + vi]
        for m, g, i in T.grid(M, groups, L):
            with T.sblock(base_name):
                vm, vg, vi = T.axis.remap("SSR", [m, g, i])
                with T.init():
                    base[vm, vg] = T.float32(0)
                base[vm, vg] += part[vm, vg, vi] - _float_of(lambda n: total[n, vm, vg, vi], N) * (
                    unit(vm, vg) * middle
                )

    return bases


def score_blocks(key: KernelKey, M: int, C: int, unpack: str):
    """`score = sum_d q_d (s_d code_d + z_d)` of the first `left` of `C` tokens, else lowest."""
    D, P, G, N = key.head_dim, key.page_size, key.key_group_size, planes(key)
    codes = _codes(key_order(key), unpack)
    W, S, Q = key.key_codes_per_word, codes.places, D // 4
    units = _unit_blocks("q", 1, M, N)
    bases = _base_blocks("q", M, C // G, D, N, codes.middle)

    @T.macro
    def scores(q_scaled, k_code, k_scale, k_zero, page, head, left, score):
        scale = T.sblock_alloc_buffer((C // G, D), "float32")
        mid = T.sblock_alloc_buffer((C // G, D), "float32")
        top = T.sblock_alloc_buffer((D,), "float32")
        peak = T.sblock_alloc_buffer((1, M), "float32")
        unit = T.sblock_alloc_buffer((1, M), "float32")
        gain = T.sblock_alloc_buffer((1, M), "float32")
        gained = T.sblock_alloc_buffer((M, D), "float32")
        quad = T.sblock_alloc_buffer((N, M, C // G, Q), "int32")
        base = T.sblock_alloc_buffer((M, C // G), "float32")
        k_quad = T.sblock_alloc_buffer((S, D // W, C), "uint32")
        dot = T.sblock_alloc_buffer((S, N, M, C), "int32")
        dots = T.sblock_alloc_buffer((M, C), "float32")
        for g, d in T.grid(C // G, D):
            with T.sblock("key_scale"):
                vg, vd = T.axis.remap("SS", [g, d])
                # The unit is common to all groups of a chunk: those not written must not reach it.
                scale[vg, vd] = T.Select(
                    vg * G < left,
                    T.Cast("float32", k_scale[page[vg // (P // G)], head, vg % (P // G), vd]),
                    T.float32(0),
                )
        for g, d in T.grid(C // G, D):
            with T.sblock("key_mid"):
                vg, vd = T.axis.remap("SS", [g, d])
                mid[vg, vd] = (
                    T.Cast("float32", k_zero[page[vg // (P // G)], head, vg % (P // G), vd])
                    + scale[vg, vd] * codes.middle
                )
        # The largest `q_d s_d` of all groups, or a little more: one pass over the queries.
        for g, d in T.grid(C // G, D):
            with T.sblock("key_top"):
                vg, vd = T.axis.remap("RS", [g, d])
                with T.init():
                    top[vd] = T.float32(0)
                top[vd] = T.max(top[vd], scale[vg, vd])
        for m, d in T.grid(M, D):
            with T.sblock("q_peak"):
                vm, vd = T.axis.remap("SR", [m, d])
                with T.init():
                    peak[0, vm] = T.min_value("float32")  # the identity that `rfactor` knows
                peak[0, vm] = T.max(peak[0, vm], T.fabs(q_scaled[vm, vd]) * top[vd])
        units(peak, unit, gain)
        for m, d in T.grid(M, D):
            with T.sblock("q_gained"):
                vm, vd = T.axis.remap("SS", [m, d])
                gained[vm, vd] = q_scaled[vm, vd] * gain[0, vm]
        for n, m, g, i in T.grid(N, M, C // G, Q):
            with T.sblock("q_quad"):
                vn, vm, vg, vi = T.axis.remap("SSSS", [n, m, g, i])
                quad[vn, vm, vg, vi] = _quad(
                    lambda b: _rounded(
                        gained[vm, codes.element(vi, b)], scale[vg, codes.element(vi, b)]
                    ),
                    vn,
                    N,
                )
        bases(q_scaled, mid, quad, lambda m, g: unit[0, m], base)
        for i, w, t in T.grid(S, D // W, C):
            with T.sblock("k_quad"):
                vs, vw, vt = T.axis.remap("SSS", [i, w, t])
                k_quad[vs, vw, vt] = codes.bytes_of(k_code[page[vt // P], head, vw, vt % P], vs)
        for i, n, m, t, w, b in T.grid(S, N, M, C, D // W, 4):
            with T.sblock("dot"):
                vs, vn, vm, vt, vw, vb = T.axis.remap("SSSSRR", [i, n, m, t, w, b])
                with T.init():
                    dot[vs, vn, vm, vt] = 0
                dot[vs, vn, vm, vt] = dot[vs, vn, vm, vt] + _byte(
                    k_quad[vs, vw, vt], vb
                ) * _signed_byte(quad[vn, vm, vt // G, vw * S + vs], vb)
        for m, t, i in T.grid(M, C, S):
            with T.sblock("dots"):
                vm, vt, vs = T.axis.remap("SSR", [m, t, i])
                with T.init():
                    dots[vm, vt] = T.float32(0)
                dots[vm, vt] += _float_of(lambda n: dot[vs, n, vm, vt], N) * codes.weight(vs)
        for m, t in T.grid(M, C):
            with T.sblock("score"):
                vm, vt = T.axis.remap("SS", [m, t])
                score[vm, vt] = T.Select(
                    vt < left,
                    dots[vm, vt] * unit[0, vm] + base[vm, vt // G],
                    T.min_value("float32"),
                )

    return scores


def output_blocks(key: KernelKey, M: int, C: int, unpack: str):
    """`chunk_acc_d = sum_t p_t (s_t code_t + z_t)` over the first `left` of `C` tokens."""
    D, P, G, N = key.head_dim, key.page_size, key.value_group_size, planes(key)
    codes = _codes(value_order(key), unpack)
    W, S, Q = key.value_codes_per_word, codes.places, C // 4
    units = _unit_blocks("p", M, D // G, N)
    bases = _base_blocks("p", M, D // G, C, N, codes.middle)

    @T.macro
    def outputs(prob, v_code, v_scale, v_zero, page, head, left, chunk_acc):
        scale = T.sblock_alloc_buffer((D // G, C), "float32")
        mid = T.sblock_alloc_buffer((D // G, C), "float32")
        fold = T.sblock_alloc_buffer((M, D // G, C), "float32")
        peak = T.sblock_alloc_buffer((M, D // G), "float32")
        unit = T.sblock_alloc_buffer((M, D // G), "float32")
        gain = T.sblock_alloc_buffer((M, D // G), "float32")
        quad = T.sblock_alloc_buffer((N, M, D // G, Q), "int32")
        base = T.sblock_alloc_buffer((M, D // G), "float32")
        v_quad = T.sblock_alloc_buffer((S, C // W, D), "uint32")
        out = T.sblock_alloc_buffer((S, N, M, D), "int32")
        outs = T.sblock_alloc_buffer((M, D), "float32")
        for g, t in T.grid(D // G, C):
            with T.sblock("value_scale"):
                vg, vt = T.axis.remap("SS", [g, t])
                scale[vg, vt] = T.Select(
                    vt < left,
                    T.Cast("float32", v_scale[page[vt // P], head, vg, vt % P]),
                    T.float32(0),
                )
        for g, t in T.grid(D // G, C):
            with T.sblock("value_mid"):
                vg, vt = T.axis.remap("SS", [g, t])
                mid[vg, vt] = T.Select(
                    vt < left,
                    T.Cast("float32", v_zero[page[vt // P], head, vg, vt % P])
                    + scale[vg, vt] * codes.middle,
                    T.float32(0),
                )
        for m, g, t in T.grid(M, D // G, C):
            with T.sblock("p_fold"):
                vm, vg, vt = T.axis.remap("SSS", [m, g, t])
                fold[vm, vg, vt] = prob[vm, vt] * scale[vg, vt]
        for m, g, t in T.grid(M, D // G, C):
            with T.sblock("p_peak"):
                vm, vg, vt = T.axis.remap("SSR", [m, g, t])
                with T.init():
                    peak[vm, vg] = T.min_value("float32")
                peak[vm, vg] = T.max(peak[vm, vg], fold[vm, vg, vt])
        units(peak, unit, gain)
        for n, m, g, i in T.grid(N, M, D // G, Q):
            with T.sblock("p_quad"):
                vn, vm, vg, vi = T.axis.remap("SSSS", [n, m, g, i])
                quad[vn, vm, vg, vi] = _quad(
                    lambda b: _rounded(fold[vm, vg, codes.element(vi, b)], gain[vm, vg]), vn, N
                )
        bases(prob, mid, quad, lambda m, g: unit[m, g], base)
        for i, w, d in T.grid(S, C // W, D):
            with T.sblock("v_quad"):
                vs, vw, vd = T.axis.remap("SSS", [i, w, d])
                v_quad[vs, vw, vd] = codes.bytes_of(
                    v_code[page[vw // (P // W)], head, vw % (P // W), vd], vs
                )
        for i, n, m, d, w, b in T.grid(S, N, M, D, C // W, 4):
            with T.sblock("out"):
                vs, vn, vm, vd, vw, vb = T.axis.remap("SSSSRR", [i, n, m, d, w, b])
                with T.init():
                    out[vs, vn, vm, vd] = 0
                out[vs, vn, vm, vd] = out[vs, vn, vm, vd] + _byte(
                    v_quad[vs, vw, vd], vb
                ) * _signed_byte(quad[vn, vm, vd // G, vw * S + vs], vb)
        for m, d, i in T.grid(M, D, S):
            with T.sblock("outs"):
                vm, vd, vs = T.axis.remap("SSR", [m, d, i])
                with T.init():
                    outs[vm, vd] = T.float32(0)
                outs[vm, vd] += _float_of(lambda n: out[vs, n, vm, vd], N) * codes.weight(vs)
        for m, d in T.grid(M, D):
            with T.sblock("chunk_acc"):
                vm, vd = T.axis.remap("SS", [m, d])
                chunk_acc[vm, vd] = outs[vm, vd] * unit[vm, vd // G] + base[vm, vd // G]

    return outputs
