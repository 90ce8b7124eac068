"""Sum, maximum or minimum of vectors' lanes by shuffles, as tensor intrinsics.

LLVM keeps the order of float additions: a loop over lanes becomes one scalar addition each, and
16 such results at once become gathers. Halving the vector takes 4 steps for 16 lanes; folding
several vectors into one first, half of each beside half of the next, takes 3 instructions a vector.
"""

from __future__ import annotations

from functools import cache

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.tirx import Expr, Let, Var

COMBINE = {"sum": lambda a, b: a + b, "max": T.max, "min": T.min}


@cache
def lane_reduce(kind: str, dtype: str, lanes: int) -> str:
    """The name of the intrinsic that folds `lanes` lanes, a power of two, into a scalar."""
    name = f"kivi_tvm.lane_reduce.{kind}.{dtype}.{lanes}"
    combine, vector = COMBINE[kind], f"{dtype}x{lanes}"

    @T.prim_func(s_tir=True)
    def description(
        part: T.Buffer((lanes,), dtype, offset_factor=1),
        total: T.Buffer((1,), dtype, offset_factor=1),
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
        part: T.Buffer((lanes,), dtype, offset_factor=1),
        total: T.Buffer((1,), dtype, offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(total[0], part[0:lanes])
            T.writes(total[0])
            total[0] = combine(
                total[0], _fold(combine, [part.vload([0], f"{dtype}x{lanes}")], lanes)
            )

    TensorIntrin.register(name, description, implementation)
    return name


@cache
def lane_reduce_rows(kind: str, dtype: str, rows: int, lanes: int) -> str:
    """The same for `rows` vectors at once: a power of two, at most `lanes`."""
    name = f"kivi_tvm.lane_reduce.{kind}.{dtype}.{rows}x{lanes}"
    combine, vector = COMBINE[kind], f"{dtype}x{lanes}"

    @T.prim_func(s_tir=True)
    def description(
        part: T.Buffer((rows, lanes), dtype, offset_factor=1),
        total: T.Buffer((rows,), dtype, offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(total[0:rows], part[0:rows, 0:lanes])
            T.writes(total[0:rows])
            for r, i in T.grid(rows, lanes):
                with T.sblock("update"):
                    vi, vr = T.axis.remap("RS", [i, r])  # in the order that `rfactor` leaves
                    total[vr] = combine(total[vr], part[vr, vi])

    @T.prim_func(s_tir=True)
    def implementation(
        part: T.Buffer((rows, lanes), dtype, offset_factor=1),
        total: T.Buffer((rows,), dtype, offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(total[0:rows], part[0:rows, 0:lanes])
            T.writes(total[0:rows])
            total[T.ramp(T.int32(0), 1, rows)] = combine(
                total.vload([0], f"{dtype}x{rows}"),
                _fold(
                    combine, [part.vload([r, 0], f"{dtype}x{lanes}") for r in range(rows)], lanes
                ),
            )

    TensorIntrin.register(name, description, implementation)
    return name


def _fold(combine, vectors, lanes: int):
    """One vector of what all lanes of each of `vectors` combined are."""
    named: list[tuple[Var, Expr]] = []

    def keep(value: Expr) -> Var:
        """Use a value twice without writing it twice."""
        named.append((Var(f"fold{len(named)}", value.ty), value))
        return named[-1][0]

    def halved(vectors: list[Var], segments: int, width: int) -> Var:
        """The lower half of every segment of `width` lanes combined with its upper half."""
        low = [start * width + i for start in range(segments) for i in range(width // 2)]
        high = [i + width // 2 for i in low]
        parts = (T.Shuffle(vectors, [T.int32(i) for i in way]) for way in (low, high))
        return keep(combine(*map(keep, parts)))

    vectors = [*map(keep, vectors)]
    segments, width = 1, lanes
    while len(vectors) > 1:  # two vectors become one with twice as many segments
        segments *= 2
        pairs = zip(vectors[::2], vectors[1::2])
        vectors = [halved([*pair], segments, width) for pair in pairs]
        width //= 2
    (found,) = vectors
    while width > 1:
        found = halved([found], segments, width)
        width //= 2
    for var, value in reversed(named):
        found = Let(var, value, found)
    return found
