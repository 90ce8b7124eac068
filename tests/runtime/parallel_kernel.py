"""Compile one parallel kernel to the path given: each row is filled with its thread's id.

Further arguments are linked in.
"""

import sys

import tvm
from tvm.script import tirx as T


@T.prim_func(s_tir=True)
def thread_ids(a: T.handle):
    n = T.int32()
    A = T.match_buffer(a, (n,), "int64")
    for i in T.parallel(n):
        with T.sblock("row"):
            row = T.axis.remap("S", [i])
            A[row] = T.call_extern("int64", "pthread_self")


def compiled():
    module = tvm.IRModule({"thread_ids": thread_ids.with_attr("global_symbol", "thread_ids")})
    return tvm.compile(module, target=tvm.target.Target({"kind": "llvm"}))


if __name__ == "__main__":
    compiled().export_library(sys.argv[1], addons=sys.argv[2:])
