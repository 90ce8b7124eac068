"""The moves that schedules share keep what a function computes."""

import pytest
import torch
import tvm
from tvm.s_tir import Schedule
from tvm.script import tirx as T

from kivi_tvm.schedules.choices import GuidedSchedule
from kivi_tvm.schedules.primitives import (
    extent_of,
    largest_divisor,
    parallelize,
    reduce_by_lanes,
    reduce_over_rows,
    split_off,
    vectorize_last,
)
from kivi_tvm.schedules.tiles import dot_by_lanes, register_tile


@T.prim_func(s_tir=True)
def row_sums(a: T.handle, b: T.handle):
    A = T.match_buffer(a, (6, 48), "float32")
    B = T.match_buffer(b, (6,), "float32")
    for r in range(6):
        with T.sblock("tile"):
            vr = T.axis.spatial(6, r)
            S = T.sblock_alloc_buffer((1,), "float32")
            for i, k in T.grid(1, 48):
                with T.sblock("sum"):
                    vi, vk = T.axis.remap("SR", [i, k])
                    with T.init():
                        S[vi] = T.float32(0)
                    S[vi] += A[vr, vk]
            for i in range(1):
                with T.sblock("store"):
                    vi = T.axis.spatial(1, i)
                    B[vr + vi] = S[vi]


@T.prim_func(s_tir=True)
def column_max(a: T.handle, b: T.handle):
    A = T.match_buffer(a, (6, 48), "float32")
    B = T.match_buffer(b, (48,), "float32")
    for k, c in T.grid(6, 48):
        with T.sblock("top"):
            vk, vc = T.axis.remap("RS", [k, c])
            with T.init():
                B[vc] = T.min_value("float32")
            B[vc] = T.max(B[vc], A[vk, vc])


@T.prim_func(s_tir=True)
def double(a: T.handle, b: T.handle):
    A = T.match_buffer(a, (6, 48), "float32")
    B = T.match_buffer(b, (6, 48), "float32")
    for r in range(6):
        with T.sblock("row"):
            vr = T.axis.spatial(6, r)
            for c in range(48):
                with T.sblock("twice"):
                    vc = T.axis.spatial(48, c)
                    B[vr, vc] = A[vr, vc] * T.float32(2)


@T.prim_func(s_tir=True)
def products(a: T.handle, b: T.handle):
    A = T.match_buffer(a, (6, 48), "float32")
    B = T.match_buffer(b, (6, 6), "float32")
    for r in range(1):
        with T.sblock("tile"):
            vr = T.axis.spatial(1, r)
            S = T.sblock_alloc_buffer((6, 6), "float32")
            for i, j, k in T.grid(6, 6, 48):
                with T.sblock("dot"):
                    vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                    with T.init():
                        S[vi, vj] = T.float32(0)
                    S[vi, vj] += A[vi, vk] * A[vj, vk]
            for i, j in T.grid(6, 6):
                with T.sblock("store"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    B[vr + vi, vj] = S[vi, vj]


def run(schedule, shape):
    a, b = torch.randn(6, 48), torch.full(shape, float("nan"))
    tvm.compile(schedule.mod, target="llvm")["main"](a, b)
    return a, b


@pytest.mark.parametrize(
    ("extent", "limit", "expected"),
    [(48, 16, 16), (80, 32, 20), (71, 4, 1), (7, 8, 7), (112, 16, 16), (1, 4, 1)],
)
def test_largest_divisor(extent, limit, expected):
    assert largest_divisor(extent, limit) == expected


@pytest.mark.parametrize(
    ("rows", "vectors", "expected"),
    [(4, 8, (2, 4)), (1, 8, (1, 8)), (7, 8, (7, 2)), (8, 5, (2, 5)), (71, 7, (1, 7))],
)
def test_register_tile(rows, vectors, expected):
    assert register_tile(rows, vectors, 14) == expected


def test_split_off():
    schedule = Schedule(double)
    (loop,) = schedule.get_loops(schedule.get_sblock("twice"))
    outer, inner = split_off(schedule, loop, 20)
    assert (extent_of(schedule, outer), extent_of(schedule, inner)) == (3, 16)


def test_vectorize_and_parallelize():
    schedule = Schedule(double)
    vectorize_last(schedule, schedule.get_sblock("twice"), 16)
    parallelize(schedule, schedule.get_sblock("row"))
    a, b = run(schedule, (6, 48))
    assert torch.equal(b, 2 * a)


def test_reduce_by_lanes():
    schedule = Schedule(row_sums)
    reduce_by_lanes(schedule, schedule.get_sblock("sum"), 16)
    a, b = run(schedule, (6,))
    torch.testing.assert_close(b, a.sum(1))


def test_reduce_over_rows():
    schedule = Schedule(column_max)
    reduce_over_rows(schedule, schedule.get_sblock("top"), 16)
    a, b = run(schedule, (48,))
    assert torch.equal(b, a.amax(0))


@pytest.mark.parametrize(("tile", "lanes"), [(None, 16), ("3x2", 16), ("1x8", 8), ("2x4", 4)])
def test_dot_by_lanes(tile, lanes):
    schedule = GuidedSchedule(products, {"dot_tile": tile} if tile else {})
    dot_by_lanes(schedule, schedule.get_sblock("dot"), 14, lanes)
    a, b = run(schedule, (6, 6))
    torch.testing.assert_close(b, a @ a.T)
    assert schedule.choices["dot_tile"].taken == (tile or "2x6")
