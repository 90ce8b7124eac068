"""Where a kernel waits for earlier ones that it was launched before the end of, as an intrinsic."""

from __future__ import annotations

from functools import cache

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from kivi_tvm.cuda import WAIT_SOURCE


@cache
def wait() -> str:
    """The name of the intrinsic that waits, where the block gives a 1 that nobody reads."""
    name = "kivi_tvm.wait"

    @T.prim_func(s_tir=True)
    def description(handle: T.handle) -> None:
        here = T.match_buffer(handle, (1,), "uint32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads()
            T.writes(here[0])
            here[0] = T.uint32(1)

    @T.prim_func(s_tir=True)
    def implementation(handle: T.handle) -> None:
        here = T.match_buffer(handle, (1,), "uint32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads()
            T.writes(here[0])
            here[0] = T.cuda.func_call(
                "kivi_tvm_wait", source_code=WAIT_SOURCE, return_type="uint32"
            )

    TensorIntrin.register(name, description, implementation)
    return name
