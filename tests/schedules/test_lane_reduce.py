"""Folding lanes by shuffles: the same result as the description, for every width and kind."""

import pytest
import torch
import tvm
from tolerance import relative_l2
from tvm.s_tir import Schedule
from tvm.script import tirx as T

from kivi_tvm.schedules.lane_reduce import lane_reduce
from kivi_tvm.schedules.primitives import reduce_by_lanes

EXPECTED = {
    "sum": lambda x: x.double().sum(1),
    "max": lambda x: x.double().amax(1),
    "min": lambda x: x.double().amin(1),
}


def folded(kind, lanes):
    combine = {"sum": lambda a, b: a + b, "max": T.max, "min": T.min}[kind]

    @T.prim_func(s_tir=True)
    def fold(a: T.handle, b: T.handle):
        A = T.match_buffer(a, (5, lanes), "float32")
        B = T.match_buffer(b, (5,), "float32")
        for r, i in T.grid(5, lanes):
            with T.sblock("fold"):
                vr, vi = T.axis.remap("SR", [r, i])
                B[vr] = combine(B[vr], A[vr, vi])

    sch = Schedule(fold)
    sch.tensorize(sch.get_loops(sch.get_sblock("fold"))[-1], lane_reduce(kind, lanes))
    return sch


@pytest.mark.parametrize("lanes", [2, 4, 16, 32])
@pytest.mark.parametrize("kind", ["sum", "max", "min"])
def test_all_lanes_are_folded_into_what_was_there(kind, lanes):
    x = torch.randn(5, lanes)
    start = torch.randn(5)
    found = start.clone()
    tvm.compile(folded(kind, lanes).mod, target="llvm")["fold"](x, found)
    assert relative_l2(found, EXPECTED[kind](torch.cat([x, start[:, None]], 1))) < 1e-6


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
