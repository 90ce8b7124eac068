"""Dot products of four bytes in one instruction, as tensor intrinsics.

`byte_dot` multiplies the four bytes of a 32-bit lane (codes, at most 15) with four int8 numbers
that all lanes share, and adds the products to an int32. `quads` brings int8 numbers in the order
of the codes of a word: those of bits `b s` of all four bytes side by side. Both are plain TensorIR
to whoever reads the operator; only what is emitted differs from chip to chip.
"""

from __future__ import annotations

from functools import cache

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

WORD_BYTES = 4
VECTOR_BYTES = 64


@cache
def byte_dot(kind: str, lanes: int) -> str:
    """The name of the intrinsic for `lanes` 32-bit lanes; `kind` is `Hardware.byte_dot`."""
    name = f"kivi_tvm.byte_dot.{kind}.{lanes}"
    bytes_, words = f"int8x{4 * lanes}", f"int32x{lanes}"
    product = _PRODUCTS[kind](lanes)

    @T.prim_func(s_tir=True)
    def description(
        codes: T.Buffer((lanes,), "uint32", offset_factor=1, scope="local"),
        quad: T.Buffer((4,), "int8", offset_factor=1),
        total: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(total[0:lanes], codes[0:lanes], quad[0:4])
            T.writes(total[0:lanes])
            for i, b in T.grid(lanes, 4):
                with T.sblock("update"):
                    vi, vb = T.axis.remap("SR", [i, b])
                    total[vi] = total[vi] + T.Cast(
                        "int32", (codes[vi] >> T.Cast("uint32", vb * 8)) & T.uint32(255)
                    ) * T.Cast("int32", quad[vb])

    @T.prim_func(s_tir=True)
    def implementation(
        codes: T.Buffer((lanes,), "uint32", offset_factor=1, scope="local"),
        quad: T.Buffer((4,), "int8", offset_factor=1),
        total: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(total[0:lanes], codes[0:lanes], quad[0:4])
            T.writes(total[0:lanes])
            total[T.ramp(T.int32(0), 1, lanes)] = product(
                total.vload([0], dtype=words),
                T.reinterpret(codes.vload([0], dtype=f"uint32x{lanes}"), dtype=bytes_),
                T.reinterpret(
                    T.broadcast(T.reinterpret(quad.vload([0], "int8x4"), dtype="int32"), lanes),
                    dtype=bytes_,
                ),
            )

    TensorIntrin.register(name, description, implementation)
    return name


def _one_instruction(call: str, lanes: int):
    """An instruction that does all of it: vpdpbusd, or Arm's signed sdot.

    Codes are at most 15, so that they are int8 as well as uint8.
    """

    def product(total, codes, quads):
        return T.call_llvm_pure_intrin(
            T.llvm_lookup_intrinsic_id(call), total, codes, quads, dtype=f"int32x{lanes}"
        )

    return product


def _maddubs(lanes: int):
    """AVX2 and AVX-512 without VNNI: pairs of products fit int16, since codes are at most 15."""
    pairs = f"int16x{2 * lanes}"
    first, second = {
        8: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
        16: ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
    }[lanes]

    def product(total, codes, quads):
        in_pairs = T.call_llvm_pure_intrin(
            T.llvm_lookup_intrinsic_id(first), codes, quads, dtype=pairs
        )
        return total + T.call_llvm_pure_intrin(
            T.llvm_lookup_intrinsic_id(second),
            in_pairs,
            T.broadcast(T.int16(1), 2 * lanes),
            dtype=f"int32x{lanes}",
        )

    return product


_PRODUCTS = {
    "vnni": lambda n: _one_instruction(f"llvm.x86.avx512.vpdpbusd.{32 * n}", n),
    "maddubs": _maddubs,
    "sdot": lambda n: _one_instruction(f"llvm.aarch64.neon.sdot.v{n}i32.v{4 * n}i8", n),
}


@cache
def quads(words: int, codes_per_byte: int) -> str:
    """The name of the intrinsic that reorders int8 numbers for so many words of codes."""
    name = f"kivi_tvm.quads.{words}.{codes_per_byte}"
    S = codes_per_byte
    W = WORD_BYTES * S
    count = words * W
    order = [i * W + b * S + s for i in range(words) for s in range(S) for b in range(4)]
    indices = [T.int32(place) for place in order]

    @T.prim_func(s_tir=True)
    def description(
        plain: T.Buffer((count,), "int8", offset_factor=1),
        quad: T.Buffer((words, S, 4), "int8", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(plain[0:count])
            T.writes(quad[0:words, 0:S, 0:4])
            for i, s, b in T.grid(words, S, 4):
                with T.sblock("update"):
                    vi, vs, vb = T.axis.remap("SSS", [i, s, b])
                    quad[vi, vs, vb] = plain[vi * W + vb * S + vs]

    @T.prim_func(s_tir=True)
    def implementation(
        plain: T.Buffer((count,), "int8", offset_factor=1),
        quad: T.Buffer((words, S, 4), "int8", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(plain[0:count])
            T.writes(quad[0:words, 0:S, 0:4])
            quad.vstore([0, 0, 0], T.Shuffle([plain.vload([0], dtype=f"int8x{count}")], indices))

    TensorIntrin.register(name, description, implementation)
    return name
