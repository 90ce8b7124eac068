"""Buffers of constant size live on the stack, where vectors do not straddle cache lines."""

import re

import pytest
import torch
import tvm
from configurations import FEW, config_id
from tvm.script import tirx as T

from kivi_tvm import lowering, targets
from kivi_tvm.compile import scheduled_module
from kivi_tvm.lowering import compile_module

TARGET = targets.resolve("native")
HEAP = "@__TVMBackendAllocWorkspace, align"


def doubled(elements):
    """`b = 2 a` through a buffer of so many elements, read one by one."""

    @T.prim_func(s_tir=True)
    def main(a: T.handle, b: T.handle):
        n = T.int32()
        A = T.match_buffer(a, (n,), "float32")
        B = T.match_buffer(b, (n,), "float32")
        for r in T.parallel(n // elements):
            with T.sblock("row"):
                vr = T.axis.spatial(n // elements, r)
                held = T.sblock_alloc_buffer((elements,), "float32")
                for i in range(elements):
                    with T.sblock("twice"):
                        vi = T.axis.spatial(elements, i)
                        held[vi] = T.float32(2) * A[vr * elements + vi]
                for i in range(elements):
                    with T.sblock("store"):
                        vi = T.axis.spatial(elements, i)
                        B[vr * elements + vi] = held[elements - 1 - vi]

    return main


@pytest.mark.parametrize(
    ("elements", "heap"), [(7, False), (16, False), (4096, False), (20000, True)]
)
def test_what_is_on_the_stack(elements, heap):
    made = compile_module(tvm.IRModule({"main": doubled(elements)}), TARGET)
    code = made.mod.inspect_source("ll")
    assert (HEAP in code) == heap == (4 * elements > lowering.MAX_STACK_BYTES)
    if elements == 4096:  # shorter ones become registers
        assert re.search(r"alloca .*<16 x float>.*, align 64", code)
    a, b = torch.randn(3 * elements), torch.zeros(3 * elements)
    made["main"](a, b)
    assert torch.equal(b.reshape(3, -1), 2 * a.reshape(3, -1).flip(1))


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_kernels_of_one_token_take_nothing_from_the_heap(cfg):
    module = scheduled_module(cfg.kernel_key(), TARGET)
    for name in ("attend", "attend_window", "combine", "append"):
        code = compile_module(tvm.IRModule({name: module[name]}), TARGET).mod.inspect_source("ll")
        assert HEAP not in code, name
