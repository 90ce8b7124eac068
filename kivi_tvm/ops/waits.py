"""Where a kernel that is launched early waits for those before it: no mathematics."""

from __future__ import annotations

from tvm.script import tirx as T


def wait_block(name: str):
    """Block `name`, which gives a 1 that nobody reads, once what is computed before is there."""

    @T.macro
    def wait():
        here = T.sblock_alloc_buffer((1,), "uint32")
        with T.sblock(name):
            T.reads()
            T.writes(here[0])
            here[0] = T.uint32(1)

    return wait
