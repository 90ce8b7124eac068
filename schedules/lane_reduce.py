"""Sum, maximum or minimum of one vector's lanes by shuffles, as tensor intrinsics.

LLVM keeps the order of float additions: a loop over lanes becomes one scalar addition each, and
16 such results at once become gathers. Halving the vector takes 4 steps for 16 lanes.
"""

from __future__ import annotations

from functools import cache

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

COMBINE = {"sum": lambda a, b: a + b, "max": T.max, "min": T.min}


@cache
def lane_reduce(kind: str, lanes: int) -> str:
    """The name of the intrinsic that folds `lanes` float32 lanes, a power of two, into a scalar."""
    name = f"kivi_tvm.lane_reduce.{kind}.{lanes}"
    combine = COMBINE[kind]

    @T.prim_func(s_tir=True)
    def description(
        part: T.Buffer((lanes,), "float32", offset_factor=1),
        total: T.Buffer((1,), "float32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(total[0], part[0:lanes])
            T.writes(total[0])
            for i in range(lanes):
                with T.sblock("update"):
                    vi = T.axis.reduce(lanes, i)
                    total[0] = combine(total[0], part[vi])

    @T.prim_func(s_tir=True)
    def implementation(
        part: T.Buffer((lanes,), "float32", offset_factor=1),
        total: T.Buffer((1,), "float32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(total[0], part[0:lanes])
            T.writes(total[0])
            total[0] = combine(total[0], _fold(combine, part.vload([0], f"float32x{lanes}"), lanes))

    TensorIntrin.register(name, description, implementation)
    return name


def _fold(combine, vector, lanes: int):
    """All lanes combined, one half with the other at every step."""
    while lanes > 1:
        lanes //= 2
        low, high = (
            T.Shuffle([vector], [T.int32(start + i) for i in range(lanes)]) for start in (0, lanes)
        )
        vector = combine(low, high)
    return vector
