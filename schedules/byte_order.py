"""Elements in the order of words to the order of their bytes, by shuffles, as a tensor intrinsic.

A word's elements are `4 * places` in a row, `places` of them in each byte. Elements of the same
byte of several words are to lie side by side.
"""

from __future__ import annotations

from functools import cache

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

BYTES = 4


@cache
def byte_order(words: int, places: int) -> str:
    """The name of the intrinsic that makes four vectors of `words` words, one per byte."""
    name = f"kivi_tvm.byte_order.{words}x{places}"
    lanes = words * places

    def moved(plain, byte: int):
        vectors = [plain.vload([part * lanes], f"float32x{lanes}") for part in range(BYTES)]
        source = [(w * BYTES + byte) * places + i for w in range(words) for i in range(places)]
        return T.Shuffle(vectors, [T.int32(i) for i in source])

    @T.prim_func(s_tir=True)
    def description(plain_handle: T.handle, ordered_handle: T.handle) -> None:
        stride = T.int32()
        plain = T.match_buffer(plain_handle, (BYTES * lanes,), "float32", offset_factor=1)
        ordered = T.match_buffer(
            ordered_handle, (BYTES, lanes), "float32", offset_factor=1, strides=(stride, 1)
        )
        with T.sblock("root"):
            T.reads(plain[0 : BYTES * lanes])
            T.writes(ordered[0:BYTES, 0:lanes])
            for b, w, i in T.grid(BYTES, words, places):
                with T.sblock("move"):
                    vb, vw, vi = T.axis.remap("SSS", [b, w, i])
                    ordered[vb, vw * places + vi] = plain[
                        vw * (BYTES * places) + (vb * places + vi)
                    ]

    @T.prim_func(s_tir=True)
    def implementation(plain_handle: T.handle, ordered_handle: T.handle) -> None:
        stride = T.int32()
        plain = T.match_buffer(plain_handle, (BYTES * lanes,), "float32", offset_factor=1)
        ordered = T.match_buffer(
            ordered_handle, (BYTES, lanes), "float32", offset_factor=1, strides=(stride, 1)
        )
        with T.sblock("root"):
            T.reads(plain[0 : BYTES * lanes])
            T.writes(ordered[0:BYTES, 0:lanes])
            ordered[0, T.ramp(T.int32(0), 1, lanes)] = moved(plain, 0)
            ordered[1, T.ramp(T.int32(0), 1, lanes)] = moved(plain, 1)
            ordered[2, T.ramp(T.int32(0), 1, lanes)] = moved(plain, 2)
            ordered[3, T.ramp(T.int32(0), 1, lanes)] = moved(plain, 3)

    TensorIntrin.register(name, description, implementation)
    return name
