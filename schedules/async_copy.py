"""Asynchronous copies to shared memory as tensor intrinsics: `cp.async` and the wait for it.

Source: PTX ISA 9.7.9.25 ("Asynchronous copy"). Copies are calls with addresses, which TVM puts no
barriers around: `arrive` is where the lanes of a warp meet. Before anything else is stored where
tiles were, TVM has all warps meet, since one allocation is for all shared memory of this scope.
"""

from __future__ import annotations

from functools import cache

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from kivi_tvm.layout import DTYPE_BYTES
from kivi_tvm.ops.fragments import LANES
from kivi_tvm.ops.staged_tile import LINE_BYTES
from kivi_tvm.schedules.early_launch import waiting
from kivi_tvm.schedules.mma import registers

SCOPE = "shared.dyn"  # more than the 48 KiB that kernels have without asking

COPY = """
__device__ __forceinline__ void kivi_tvm_copy(void* to, const void* from) {
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
               : : "r"(address), "l"(from) : "memory");
}
"""
CLEAR = """
__device__ __forceinline__ void kivi_tvm_clear(void* to) {
  *static_cast<volatile unsigned short*>(to) = 0;
}
"""
ARRIVE = """
__device__ __forceinline__ unsigned kivi_tvm_arrive() {
  asm volatile("cp.async.wait_all;" : : : "memory");
  __syncwarp();
  return 1;
}
"""


@cache
def copy_line(dtype: str) -> str:
    """The name of the intrinsic that copies `LINE_BYTES` side by side."""
    name, size = f"kivi_tvm.copy_{dtype}", LINE_BYTES // DTYPE_BYTES[dtype]

    @T.prim_func(s_tir=True)
    def description(source_handle: T.handle, target_handle: T.handle) -> None:
        source = T.match_buffer(source_handle, (size,), dtype, offset_factor=1)
        target = T.match_buffer(target_handle, (size,), dtype, offset_factor=1, scope=SCOPE)
        with T.sblock("root"):
            T.reads(source[0:size])
            T.writes(target[0:size])
            for o in range(size):
                with T.sblock("copy"):
                    vo = T.axis.spatial(size, o)
                    target[vo] = source[vo]

    @T.prim_func(s_tir=True)
    def implementation(source_handle: T.handle, target_handle: T.handle) -> None:
        source = T.match_buffer(source_handle, (size,), dtype, offset_factor=1)
        target = T.match_buffer(target_handle, (size,), dtype, offset_factor=1, scope=SCOPE)
        with T.sblock("root"):
            T.reads(source[0:size])
            T.writes(target[0:size])
            T.evaluate(
                T.cuda.func_call(
                    "kivi_tvm_copy",
                    T.address_of(target[0]),
                    T.address_of(source[0]),
                    source_code=COPY,
                )
            )

    TensorIntrin.register(name, description, implementation)
    return name


@cache
def clear_item() -> str:
    """The name of the intrinsic that stores a 0 of 16 bits."""
    name = "kivi_tvm.clear"

    @T.prim_func(s_tir=True)
    def description(target_handle: T.handle) -> None:
        target = T.match_buffer(target_handle, (1,), "float16", offset_factor=1, scope=SCOPE)
        with T.sblock("root"):
            T.reads()
            T.writes(target[0])
            target[0] = T.float16(0)

    @T.prim_func(s_tir=True)
    def implementation(target_handle: T.handle) -> None:
        target = T.match_buffer(target_handle, (1,), "float16", offset_factor=1, scope=SCOPE)
        with T.sblock("root"):
            T.reads()
            T.writes(target[0])
            T.evaluate(
                T.cuda.func_call("kivi_tvm_clear", T.address_of(target[0]), source_code=CLEAR)
            )

    TensorIntrin.register(name, description, implementation)
    return name


@cache
def arrive() -> str:
    """The name of the intrinsic that waits for a warp's copies, and for its lanes."""
    name = "kivi_tvm.arrive"

    @T.prim_func(s_tir=True)
    def description(handle: T.handle) -> None:
        of_lane = T.int32()
        here = registers(handle, 1, "uint32", of_lane)
        with T.sblock("root"):
            T.reads()
            T.writes(here[0:LANES, 0])
            for lane in range(LANES):
                with T.sblock("arrive"):
                    vl = T.axis.spatial(LANES, lane)
                    here[vl, 0] = T.uint32(1)

    @T.prim_func(s_tir=True)
    def implementation(handle: T.handle) -> None:
        of_lane = T.int32()
        here = registers(handle, 1, "uint32", of_lane)
        with T.sblock("root"):
            T.reads()
            T.writes(here[0:LANES, 0])
            for lane in T.thread_binding(LANES, "threadIdx.x"):
                here[lane, 0] = T.cuda.func_call(
                    "kivi_tvm_arrive", source_code=ARRIVE, return_type="uint32"
                )

    TensorIntrin.register(name, description, implementation)
    return name


@cache
def barrier(scope: str) -> str:
    """The name of the intrinsic that waits for all warps of a work-group, in a `wait_block`.

    For what they have written in `scope`, "shared" or "shared.dyn".
    """
    name = f"kivi_tvm.barrier.{scope}"

    @T.prim_func(s_tir=True)
    def implementation(handle: T.handle) -> None:
        here = T.match_buffer(handle, (1,), "uint32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads()
            T.writes(here[0])
            T.evaluate(T.tvm_storage_sync(scope))

    TensorIntrin.register(name, waiting(), implementation)
    return name
