"""Where a kernel waits for earlier ones that it was launched before the end of, as intrinsics."""

from __future__ import annotations

from functools import cache

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from kivi_tvm.cuda import RELEASE_SOURCE, WAIT_SOURCE


def waiting() -> PrimFunc:
    """What an intrinsic takes the place of: a block of `wait_block`, which gives a 1."""

    @T.prim_func(s_tir=True)
    def description(handle: T.handle) -> None:
        here = T.match_buffer(handle, (1,), "uint32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads()
            T.writes(here[0])
            here[0] = T.uint32(1)

    return description


@cache
def wait(release: bool = False) -> str:
    """The name of the intrinsic that waits, where the block gives a 1 that nobody reads.

    With `release` the next kernel is launched then.
    """
    name = f"kivi_tvm.wait{'_and_release' * release}"

    @T.prim_func(s_tir=True)
    def implementation(handle: T.handle) -> None:
        here = T.match_buffer(handle, (1,), "uint32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads()
            T.writes(here[0])
            here[0] = T.cuda.func_call(
                "kivi_tvm_wait", source_code=WAIT_SOURCE, return_type="uint32"
            )
            if release:
                T.evaluate(T.cuda.func_call("kivi_tvm_release", source_code=RELEASE_SOURCE))

    TensorIntrin.register(name, waiting(), implementation)
    return name
