"""Dot products of four bytes in one instruction, as tensor intrinsics.

`byte_dot` multiplies the four bytes of a 32-bit lane with the four int8 of a quad that all lanes
share, and adds the products to an int32; `byte_sum` adds up the int8 of every lane's own quad. Both
are plain TensorIR to whoever reads the operator; only what is emitted differs from chip to chip.
"""

from __future__ import annotations

from functools import cache

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

# The widest bytes that multiply without loss: vpdpbusd takes unsigned ones and adds in 32 bits;
# pairs of products must fit int16, or the codes are signed.
UNSIGNED = ("vnni",)
# Lanes that there are instructions for.
LANES = {"vnni": (4, 8, 16), "maddubs": (8, 16), "sdot": (2, 4)}


def has(kind: str, lanes: int) -> bool:
    """Tell whether there is an instruction of this kind for so many 32-bit lanes."""
    return lanes in LANES[kind]


@cache
def byte_dot(kind: str, lanes: int) -> str:
    """The name of the intrinsic for `lanes` 32-bit lanes; `kind` is `Hardware.byte_dot`."""
    name = f"kivi_tvm.byte_dot.{kind}.{lanes}"
    bytes_, words = f"int8x{4 * lanes}", f"int32x{lanes}"
    product = _PRODUCTS[kind](lanes)

    @T.prim_func(s_tir=True)
    def description(
        codes: T.Buffer((lanes,), "uint32", offset_factor=1, scope="local"),
        quad: T.Buffer((1,), "int32", offset_factor=1),
        total: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(total[0:lanes], codes[0:lanes], quad[0])
            T.writes(total[0:lanes])
            for i, b in T.grid(lanes, 4):
                with T.sblock("update"):
                    vi, vb = T.axis.remap("SR", [i, b])
                    total[vi] = total[vi] + T.Cast(
                        "int32", (codes[vi] >> T.Cast("uint32", vb * 8)) & T.uint32(255)
                    ) * ((quad[0] << (24 - vb * 8)) >> 24)

    @T.prim_func(s_tir=True)
    def implementation(
        codes: T.Buffer((lanes,), "uint32", offset_factor=1, scope="local"),
        quad: T.Buffer((1,), "int32", offset_factor=1),
        total: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(total[0:lanes], codes[0:lanes], quad[0])
            T.writes(total[0:lanes])
            total[T.ramp(T.int32(0), 1, lanes)] = product(
                total.vload([0], dtype=words),
                T.reinterpret(codes.vload([0], dtype=f"uint32x{lanes}"), dtype=bytes_),
                T.reinterpret(T.broadcast(quad[0], lanes), dtype=bytes_),
            )

    TensorIntrin.register(name, description, implementation)
    return name


@cache
def byte_sum(kind: str, lanes: int) -> str:
    """The name of the intrinsic that adds up the four int8 of every lane's quad."""
    name = f"kivi_tvm.byte_sum.{kind}.{lanes}"
    bytes_, words = f"int8x{4 * lanes}", f"int32x{lanes}"
    product = _PRODUCTS[kind](lanes)

    @T.prim_func(s_tir=True)
    def description(
        quads: T.Buffer((lanes,), "int32", offset_factor=1),
        total: T.Buffer((lanes,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(total[0:lanes], quads[0:lanes])
            T.writes(total[0:lanes])
            for i, b in T.grid(lanes, 4):
                with T.sblock("update"):
                    vi, vb = T.axis.remap("SR", [i, b])
                    total[vi] = total[vi] + ((quads[vi] << (24 - vb * 8)) >> 24)

    @T.prim_func(s_tir=True)
    def implementation(
        quads: T.Buffer((lanes,), "int32", offset_factor=1),
        total: T.Buffer((lanes,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(total[0:lanes], quads[0:lanes])
            T.writes(total[0:lanes])
            total[T.ramp(T.int32(0), 1, lanes)] = product(
                total.vload([0], dtype=words),
                T.broadcast(T.int8(1), 4 * lanes),
                T.reinterpret(quads.vload([0], dtype=words), dtype=bytes_),
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
    """AVX2 and AVX-512 without VNNI: pairs of products fit int16 while codes are at most 15."""
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
