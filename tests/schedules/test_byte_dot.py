"""Instructions on bytes give what their plain description says."""

import pytest
import torch
import tvm
from tvm.s_tir import Schedule
from tvm.script import tirx as T

from kivi_tvm import targets
from kivi_tvm.cpu import missing_cpu_flags
from kivi_tvm.schedules.byte_dot import LANES, byte_dot, byte_sum, has
from kivi_tvm.schedules.byte_tiles import sum_bytes

PROCESSORS = {"vnni": "znver4", "maddubs": "haswell", "sdot": "neoverse-n1"}
HERE = {name: targets.from_identity({"kind": "llvm", "machine": "x86_64", "system": "linux",
        "mcpu": mcpu}) for name, mcpu in PROCESSORS.items() if name != "sdot"}  # fmt: skip


def runs_here(kind):
    return kind in HERE and not missing_cpu_flags(targets.required_cpu_flags(HERE[kind]))


CASES = [
    pytest.param(kind, lanes, marks=pytest.mark.skipif(not runs_here(kind), reason=f"needs {kind}"))
    for kind in ("vnni", "maddubs")
    for lanes in LANES[kind]
    if kind == "vnni" or lanes == 8
]


def dots(lanes, quads):
    """`[2, lanes]` dot products of `quads` vectors of codes with `[2, quads]` quads."""

    @T.prim_func(s_tir=True)
    def main(a: T.handle, b: T.handle, c: T.handle):
        A = T.match_buffer(a, (quads, lanes), "uint32")
        B = T.match_buffer(b, (2, quads), "int32")
        C = T.match_buffer(c, (2, lanes), "int32")
        for x in range(1):
            with T.sblock("row"):
                T.axis.spatial(1, x)
                codes = T.sblock_alloc_buffer((quads, lanes), "uint32")
                total = T.sblock_alloc_buffer((2, lanes), "int32")
                for k, i in T.grid(quads, lanes):
                    with T.sblock("codes"):
                        vk, vi = T.axis.remap("SS", [k, i])
                        codes[vk, vi] = A[vk, vi]
                for r, i, k, j in T.grid(2, lanes, quads, 4):
                    with T.sblock("dot"):
                        vr, vi, vk, vb = T.axis.remap("SSRR", [r, i, k, j])
                        with T.init():
                            total[vr, vi] = 0
                        total[vr, vi] = total[vr, vi] + T.Cast(
                            "int32", (codes[vk, vi] >> T.Cast("uint32", vb * 8)) & T.uint32(255)
                        ) * ((B[vr, vk] << (24 - vb * 8)) >> 24)
                for r, i in T.grid(2, lanes):
                    with T.sblock("store"):
                        vr, vi = T.axis.remap("SS", [r, i])
                        C[vr, vi] = total[vr, vi]

    return main


@pytest.mark.parametrize(("kind", "lanes"), CASES)
def test_dot_products(kind, lanes):
    sch = Schedule(dots(lanes, 7))
    dot = sch.get_sblock("dot")
    for name in ("codes", "dot"):
        sch.set_scope(sch.get_sblock(name), 0, "local")
    row, lane, quad, byte = sch.get_loops(dot)
    sch.reorder(row, quad, lane, byte)
    sch.decompose_reduction(dot, quad)
    sch.tensorize(lane, byte_dot(kind, lanes))
    top = 256 if kind == "vnni" else 16  # pairs of larger products do not fit int16
    codes = torch.randint(0, top, (7, lanes, 4), dtype=torch.uint8)
    numbers = torch.randint(-127, 128, (2, 7, 4), dtype=torch.int8)
    found = torch.zeros(2, lanes, dtype=torch.int32)
    words = codes.view(torch.uint32).squeeze(-1), numbers.view(torch.int32).squeeze(-1)
    tvm.compile(sch.mod, target=HERE[kind])["main"](*words, found)
    assert torch.equal(found, torch.einsum("kib,rkb->ri", codes.int(), numbers.int()))


def sums(lanes):
    """`[1, 3, 4, lanes]` sums over 5 steps of the bytes of quads."""

    @T.prim_func(s_tir=True)
    def main(a: T.handle, c: T.handle):
        A = T.match_buffer(a, (1, 3, 4, 5 * lanes), "int32")
        C = T.match_buffer(c, (1, 3, 4, lanes), "int32")
        for n, m, g, k, i, b in T.grid(1, 3, 4, 5, lanes, 4):
            with T.sblock("total"):
                vn, vm, vg, vk, vi, vb = T.axis.remap("SSSRSR", [n, m, g, k, i, b])
                with T.init():
                    C[vn, vm, vg, vi] = 0
                C[vn, vm, vg, vi] = C[vn, vm, vg, vi] + (
                    (A[vn, vm, vg, vk * lanes + vi] << (24 - vb * 8)) >> 24
                )

    return main


@pytest.mark.parametrize(
    ("kind", "lanes"), [*CASES, (None, 16), pytest.param("vnni", 2, marks=CASES[0].marks)]
)
def test_sums_of_bytes(kind, lanes):
    """Also without an instruction, and for so few lanes that there is none."""
    sch = Schedule(sums(lanes))
    sum_bytes(sch, sch.get_sblock("total"), (2, 4), 16, kind)
    assert ("call_llvm_pure_intrin" in sch.mod.script()) == (kind is not None and has(kind, lanes))
    numbers = torch.randint(-127, 128, (1, 3, 4, 5, lanes, 4), dtype=torch.int8)
    found = torch.zeros(1, 3, 4, lanes, dtype=torch.int32)
    quads = numbers.view(torch.int32).reshape(1, 3, 4, 5 * lanes)
    tvm.compile(sch.mod, target=HERE.get(kind, "llvm"))["main"](quads, found)
    assert torch.equal(found, numbers.int().sum((3, 5), dtype=torch.int32))


def test_intrinsics_are_registered_once():
    assert byte_sum("vnni", 16) is byte_sum("vnni", 16)
