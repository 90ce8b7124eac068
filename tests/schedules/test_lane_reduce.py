"""Folding lanes by shuffles: the same result as the description, for every width and kind."""

import pytest
import torch
import tvm
from tolerance import relative_l2
from tvm.s_tir import Schedule
from tvm.script import tirx as T

from kivi_tvm.schedules.lane_reduce import lane_reduce, lane_reduce_rows
from kivi_tvm.schedules.primitives import reduce_by_lanes

COMBINE = {"sum": lambda a, b: a + b, "max": T.max, "min": T.min}
EXPECTED = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}


def folded(kind, dtype, rows, lanes):
    """Every row of `[3 rows, lanes]` folded into what its result held before, `rows` at once."""
    combine = COMBINE[kind]

    @T.prim_func(s_tir=True)
    def fold(a: T.handle, b: T.handle):
        A = T.match_buffer(a, (3 * rows, lanes), dtype)
        B = T.match_buffer(b, (3 * rows,), dtype)
        for r, i in T.grid(3 * rows, lanes):
            with T.sblock("fold"):
                vi, vr = T.axis.remap("RS", [i, r])
                B[vr] = combine(B[vr], A[vr, vi])

    sch = Schedule(fold)
    row, lane = sch.get_loops(sch.get_sblock("fold"))
    if rows == 1:
        sch.tensorize(lane, lane_reduce(kind, dtype, lanes))
    else:
        _, row = sch.split(row, [None, rows])
        sch.tensorize(row, lane_reduce_rows(kind, dtype, rows, lanes))
    return sch


@pytest.mark.parametrize(
    ("rows", "lanes"),
    [(1, 2), (1, 4), (1, 16), (1, 32), (2, 4), (4, 4), (2, 16), (8, 16), (16, 16)],
)
@pytest.mark.parametrize("kind", ["sum", "max", "min"])
def test_all_lanes_are_folded_into_what_was_there(kind, rows, lanes):
    x, start = torch.randn(3 * rows, lanes), torch.randn(3 * rows)
    found = start.clone()
    tvm.compile(folded(kind, "float32", rows, lanes).mod, target="llvm")["fold"](x, found)
    expected = EXPECTED[kind](torch.cat([x, start[:, None]], 1).double(), 1)
    assert relative_l2(found, expected) < 1e-6


def test_integers_are_summed_exactly():
    x = torch.randint(-(2**20), 2**20, (24, 16), dtype=torch.int32)
    found = torch.zeros(24, dtype=torch.int32)
    tvm.compile(folded("sum", "int32", 8, 16).mod, target="llvm")["fold"](x, found)
    assert torch.equal(found, x.sum(1).to(torch.int32))


@T.prim_func(s_tir=True)
def row_lows(a: T.handle, b: T.handle):
    A = T.match_buffer(a, (3, 80), "float32")
    B = T.match_buffer(b, (3,), "float32")
    for r, k in T.grid(3, 80):
        with T.sblock("low"):
            vr, vk = T.axis.remap("SR", [r, k])
            with T.init():
                B[vr] = T.max_value("float32")
            B[vr] = T.min(B[vr], A[vr, vk])


@pytest.mark.parametrize("lanes", [4, 16, 24])
def test_reductions_take_a_power_of_two_of_lanes(lanes):
    sch = Schedule(row_lows)
    reduce_by_lanes(sch, sch.get_sblock("low"), lanes)
    assert "T.Shuffle" in sch.mod.script()
    x, found = torch.randn(3, 80), torch.full((3,), float("nan"))
    tvm.compile(sch.mod, target="llvm")["row_lows"](x, found)
    assert torch.equal(found, x.amin(1))
