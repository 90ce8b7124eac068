"""Passes over GPU kernels that TVM's pipeline needs besides its own."""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm.backend.cuda.op import cuda_func_call
from tvm.ir import Call, IRModule, Op, TensorLoad
from tvm.ir.transform import PassContext, module_pass
from tvm.s_tir import SBlock
from tvm.sym import Analyzer
from tvm.tirx import (
    AllocBuffer,
    Buffer,
    BufferLoad,
    DeclBuffer,
    Evaluate,
    Expr,
    IntImm,
    PrimFunc,
    Ramp,
    Stmt,
)
from tvm.tirx.op import address_of, call_extern
from tvm.tirx.transform import LowerWarpMemory

from kivi_tvm import cuda_build
from kivi_tvm.cuda import WAITS_LATER
from kivi_tvm.statements import changed, constant_bytes

ACTIVE_LANES, EXP2 = Op.get("tirx.tvm_warp_activemask"), Op.get("tirx.exp2")
ADDRESS_OF, CALL_EXTERN = Op.get("tirx.address_of"), Op.get("tirx.call_extern")
# exp2f without what it does for results below 2^-126, which are 0 here
EXP2_SOURCE = """
__device__ __forceinline__ float kivi_tvm_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
"""
# What CUDA loads so many bytes as, and the types in which TVM writes such vectors.
LOADED = {16: "uint4", 8: "uint2", 4: "unsigned"}
WRITTEN = {
    "float32x4": "float4", "float32x2": "float2", "float16x4": "half4", "float16x2": "half2",
    "bfloat16x4": "nv_bfloat164", "bfloat16x2": "nv_bfloat162",
}  # fmt: skip
LOAD_SOURCE = """
__device__ __forceinline__ {type} kivi_tvm_{name}_{type}(const void* from) {{
  {raw} found = {load}static_cast<const {raw}*>(from));
  return *reinterpret_cast<{type}*>(&found);
}}
"""
LOADS = {"load": "__ldcg(", "take": "*("}
EIGHT_HALVES = "float16x8", "bfloat16x8"


def lowered_one_by_one(lower: Any) -> Any:
    """TVM's pass, without common subexpressions where the buffers of a warp are.

    Those are told apart by their indices as they are; the compiler finds subexpressions again. All
    other kernels need them: between two accesses by equal indices TVM puts no barrier, though one
    of them be by a single lane for all.
    """

    @module_pass(opt_level=0, name="kivi_tvm.lowered_one_by_one")  # type: ignore[untyped-decorator]
    def run(module: IRModule, _: PassContext) -> IRModule:
        found: dict[Any, Any] = {}
        for name, function in module.functions.items():
            config = {"tirx.disable_cse_tir": _has_warp_blocks(function)}
            with PassContext(config=config):
                found |= dict(lower(IRModule({name: function})).functions)
        return IRModule(found, attrs=module.attrs)

    return run


def _has_warp_blocks(function: PrimFunc) -> bool:
    found: list[Buffer] = []

    def visit(block: SBlock) -> None:
        found.extend(each for each in block.alloc_buffers if each.scope() == "warp")

    tvm_ffi.structural_walk(function.body, (SBlock, visit))
    return bool(found)


@module_pass(opt_level=0, name="kivi_tvm.note_asked_bytes")  # type: ignore[untyped-decorator]
def note_asked_bytes(module: IRModule, _: PassContext) -> IRModule:
    """Note how much shared memory kernels ask for when they are launched."""
    for name, function in module.functions.items():

        def visit(stmt: AllocBuffer, kernel: str = name.name_hint) -> None:
            if stmt.buffer.scope() == "shared.dyn":
                cuda_build.current().asked_bytes[kernel] = constant_bytes(stmt.buffer)

        tvm_ffi.structural_walk(function.body, (AllocBuffer, visit))
    return module


@module_pass(opt_level=0, name="kivi_tvm.lower_warp_memory")  # type: ignore[untyped-decorator]
def lower_warp_memory(module: IRModule, _: PassContext) -> IRModule:
    """Lower all buffers of warps: TVM's pass does one of those that are allocated side by side.

    Lanes exchange numbers all together: those that TVM finds active need not be all of them, where
    some have taken another branch before.
    """
    found = {}
    for name, function in module.functions.items():
        if _has_warp_buffers(function):
            only = IRModule({name: function.with_body(_with_own_registers(function.body))})
            while _has_warp_buffers(only[name]):
                only = LowerWarpMemory()(only)
            body = tvm_ffi.structural_map(only[name].body, (Call, _for_warps))
            function = only[name].with_body(body)
        found[name] = function
    return IRModule(found, attrs=module.attrs)


@module_pass(opt_level=0, name="kivi_tvm.explicit_loads")  # type: ignore[untyped-decorator]
def explicit_loads(module: IRModule, _: PassContext) -> IRModule:
    """Let kernels that begin before earlier ones have ended load from the second-level cache.

    What was written before is there. In the first level there may be what was there before that:
    it is only said to be gone where a kernel has waited.

    And let all of them load eight 16-bit numbers at once, which TVM does one by one unless it can
    prove where they are: those are queries, and the runtime sees to where they begin (`in_lines` in
    `runtime/checks.py`). Nothing else may be loaded so.
    """
    found = {}
    for name, function in module.functions.items():
        kernel = name.name_hint.removesuffix("_kernel")
        later = cuda_build.current().beginnings.get(kernel) in WAITS_LATER
        rule = _past_l1 if later else _eight_halves
        body = tvm_ffi.structural_map(function.body, (TensorLoad, rule))
        body = tvm_ffi.structural_map(body, (Call, _of_what_is_not_loaded))
        found[name] = function.with_body(body)
    return IRModule(found, attrs=module.attrs)


def _past_l1(load: TensorLoad) -> Expr:
    [index], dtype = load.indices, tvm.DataType(load.ty.dtype)
    if load.source.scope() != "global":
        return load
    if not isinstance(index, Ramp):
        return call_extern(str(dtype), "__ldcg", address_of(load))
    size = dtype.bits * dtype.lanes // 8
    if size not in LOADED or int(index.stride) != 1:
        raise ValueError(f"`load` must be of {list(LOADED)} bytes side by side, got {load}")
    return _loaded("load", load, index.base, size)


def _eight_halves(load: TensorLoad) -> Expr:
    [index], dtype = load.indices, str(load.ty.dtype)
    if load.source.scope() != "global" or dtype not in EIGHT_HALVES or not isinstance(index, Ramp):
        return load
    bound = Analyzer().modular_set(index.base)
    if int(index.stride) != 1 or (bound.coeff % 8 == 0 and bound.base % 8 == 0):
        return load
    return _loaded("take", load, index.base, 16)


def _loaded(name: str, load: TensorLoad, first: Expr, size: int) -> Expr:
    """What a load gives, from element `first` on, by one of `LOADS`."""
    dtype = str(load.ty.dtype)
    of_cuda, raw = WRITTEN.get(dtype, LOADED[size]), LOADED[size]
    return cuda_func_call(
        f"kivi_tvm_{name}_{of_cuda}",
        address_of(BufferLoad(load.source, [first])),
        source_code=LOAD_SOURCE.format(name=name, load=LOADS[name], type=of_cuda, raw=raw),
        return_type=dtype,
    )


def _of_what_is_not_loaded(call: Call) -> Expr:
    """An address is of the element, not of what is loaded there."""
    [of] = call.args if call.op.same_as(ADDRESS_OF) else (None,)
    if isinstance(of, Call) and of.op.same_as(CALL_EXTERN) and of.args[0] == "__ldcg":
        return of.args[1]
    return call


def _for_warps(call: Call) -> Expr:
    if call.op.same_as(ACTIVE_LANES):
        return IntImm("uint32", 0xFFFFFFFF)
    if call.op.same_as(EXP2):
        return cuda_func_call(
            "kivi_tvm_exp2", call.args[0], source_code=EXP2_SOURCE, return_type="float32"
        )
    return call


def _with_own_registers(body: Stmt) -> Stmt:
    """A kernel whose warps' buffers are allocated, none in the place of another.

    `StorageRewrite` declares such, for which TVM's pass has no rule: they become that other one.
    """
    places: list[tuple[Buffer, Buffer]] = []

    def remove(stmt: Stmt) -> Stmt:
        if isinstance(stmt, DeclBuffer) and stmt.buffer.scope() == "warp":
            places.append((stmt.buffer, stmt.data.args[0]))
            return Evaluate(0)
        return stmt

    def replace(buffer: Buffer) -> Buffer:
        return next((place for mine, place in places if mine.same_as(buffer)), buffer)

    body = changed(body, remove)
    return tvm_ffi.structural_map(body, (Buffer, replace)) if places else body


def _has_warp_buffers(function: PrimFunc) -> bool:
    found = []

    def visit(stmt: AllocBuffer) -> None:
        if stmt.buffer.scope() == "warp":
            found.append(stmt)

    tvm_ffi.structural_walk(function.body, (AllocBuffer, visit))
    return bool(found)
