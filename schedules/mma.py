"""Instructions of a warp as tensor intrinsics: `mma.m16n8k16` and `movmatrix`.

Descriptions are `ops/fragments.py`'s; `tests/schedules/test_mma.py` holds them against the tables
of the PTX manual.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.tirx import Var

from kivi_tvm.ops.fragments import (
    DEPTH,
    LANES,
    QUERIES,
    ROWS,
    c_lane,
    c_register,
    product,
    transposed_pair,
)

TRANSPOSE = """
__device__ __forceinline__ unsigned kivi_tvm_transpose(unsigned x) {
  unsigned y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
"""


def registers(handle: Var, count: int, dtype: str, of_lane: Var) -> Any:
    """`count` registers of every lane: elements side by side, lanes `of_lane` elements apart."""
    return T.match_buffer(
        handle, (LANES, count), dtype, strides=[of_lane, 1], offset_factor=1, scope="warp"
    )


@cache
def mma(dtype: str) -> str:
    """The name of the intrinsic `c [32, 4] += a [32, 4] b [32, 2]`, registers of lanes."""
    name, of_ptx = f"kivi_tvm.mma_{dtype}", {"float16": "fp16", "bfloat16": "bf16"}[dtype]

    @T.prim_func(s_tir=True)
    def description(a_handle: T.handle, b_handle: T.handle, c_handle: T.handle) -> None:
        a_lane, b_lane, lane_of_c = T.int32(), T.int32(), T.int32()
        a = registers(a_handle, 4, "uint32", a_lane)
        b = registers(b_handle, 2, "uint32", b_lane)
        c = registers(c_handle, 4, "float32", lane_of_c)
        with T.sblock("root"):
            T.reads(c[0:LANES, 0:4], a[0:LANES, 0:4], b[0:LANES, 0:2])
            T.writes(c[0:LANES, 0:4])
            for i, j, k in T.grid(ROWS, QUERIES, DEPTH):
                with T.sblock("mma"):
                    vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                    c[c_lane(vi, vj), c_register(vi, vj)] = c[
                        c_lane(vi, vj), c_register(vi, vj)
                    ] + product(
                        lambda lane, r: a[lane, r], lambda lane, r: b[lane, r], vi, vj, vk, dtype
                    )

    @T.prim_func(s_tir=True)
    def implementation(a_handle: T.handle, b_handle: T.handle, c_handle: T.handle) -> None:
        a_lane, b_lane, lane_of_c = T.int32(), T.int32(), T.int32()
        a = registers(a_handle, 4, "uint32", a_lane)
        b = registers(b_handle, 2, "uint32", b_lane)
        c = registers(c_handle, 4, "float32", lane_of_c)
        with T.sblock("root"):
            T.reads(c[0:LANES, 0:4], a[0:LANES, 0:4], b[0:LANES, 0:2])
            T.writes(c[0:LANES, 0:4])
            for lane in T.thread_binding(LANES, "threadIdx.x"):
                T.evaluate(
                    T.ptx_legacy.mma(
                        "m16n8k16", "row", "col", of_ptx, of_ptx, "fp32",
                        a.data, a.elem_offset + lane * a_lane,
                        b.data, b.elem_offset + lane * b_lane,
                        c.data, c.elem_offset + lane * lane_of_c,
                        False, dtype="float32",
                    )
                )  # fmt: skip

    TensorIntrin.register(name, description, implementation)
    return name


@cache
def transpose() -> str:
    """The name of the intrinsic that transposes 8 rows of 8 float16 numbers, a pair per lane."""
    name = "kivi_tvm.transpose"

    @T.prim_func(s_tir=True)
    def description(x_handle: T.handle, y_handle: T.handle) -> None:
        x_lane, y_lane = T.int32(), T.int32()
        x = registers(x_handle, 1, "uint32", x_lane)
        y = registers(y_handle, 1, "uint32", y_lane)
        with T.sblock("root"):
            T.reads(x[0:LANES, 0])
            T.writes(y[0:LANES, 0])
            for lane in range(LANES):
                with T.sblock("transpose"):
                    vl = T.axis.spatial(LANES, lane)
                    y[vl, 0] = transposed_pair(lambda of: x[of, 0], vl)

    @T.prim_func(s_tir=True)
    def implementation(x_handle: T.handle, y_handle: T.handle) -> None:
        x_lane, y_lane = T.int32(), T.int32()
        x = registers(x_handle, 1, "uint32", x_lane)
        y = registers(y_handle, 1, "uint32", y_lane)
        with T.sblock("root"):
            T.reads(x[0:LANES, 0])
            T.writes(y[0:LANES, 0])
            for lane in T.thread_binding(LANES, "threadIdx.x"):
                y[lane, 0] = T.cuda.func_call(
                    "kivi_tvm_transpose", x[lane, 0], source_code=TRANSPOSE, return_type="uint32"
                )

    TensorIntrin.register(name, description, implementation)
    return name
