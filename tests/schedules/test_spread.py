"""Work spread over the turns of loops is all done, in equal parts, and nothing else changes."""

import pytest
import torch
import tvm
from tvm.s_tir import Schedule
from tvm.script import tirx as T

from kivi_tvm.schedules.spread import spread


def counting(hints):
    """Doubling `[4, 6]`; beside it a block counts how often each of `hints` hints is given."""

    @T.prim_func(s_tir=True)
    def main(a: T.handle, b: T.handle, c: T.handle):
        A = T.match_buffer(a, (4, 6), "float32")
        B = T.match_buffer(b, (4, 6), "float32")
        C = T.match_buffer(c, (hints + 1,), "int32")
        for r in range(1):
            with T.sblock("row"):
                T.axis.spatial(1, r)
                T.reads(A[0:4, 0:6])
                T.writes(B[0:4, 0:6])
                for i in range(hints):
                    with T.sblock("hint"):
                        vi = T.axis.opaque(hints, i)
                        T.reads()
                        T.writes()
                        C[vi] = C[vi] + 1
                        C[hints] = C[hints] + 1
                for i, j in T.grid(4, 6):
                    with T.sblock("twice"):
                        vi, vj = T.axis.remap("SS", [i, j])
                        B[vi, vj] = T.float32(2) * A[vi, vj]

    return main


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("hints", [1, 4, 24, 37])
def test_every_hint_is_given_between_the_turns(hints, depth):
    sch = Schedule(counting(hints))
    loops = sch.get_loops(sch.get_sblock("twice"))[:depth]
    spread(sch, ["hint"], loops)
    turns = 4 if depth == 1 else 24
    size = -(-hints // turns)
    a, b, c = torch.randn(4, 6), torch.zeros(4, 6), torch.zeros(hints + 1, dtype=torch.int32)
    tvm.compile(sch.mod, target="llvm")["main"](a, b, c)
    assert torch.equal(b, 2 * a)
    assert bool((c[:hints] >= 1).all()) and c[hints] == size * turns
    assert sch.mod.script().count('T.sblock("hint")') == 1
    # still scheduled: what is around the block can be given to threads
    sch.parallel(sch.get_loops(sch.get_sblock("row"))[0])
