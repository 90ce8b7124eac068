"""How scheduled functions are lowered: TVM's pipeline, with the tiles of CPU kernels on the stack.

TVM allocates a function's buffers from a heap, but for those in scope "global" below 1 kB, which
its storage planner makes part of larger ones. Register tiles then never become registers, and every
call of a kernel allocates. On the stack LLVM sees whole lifetimes, and what fits becomes registers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm.backend.cuda.op import cuda_func_call
from tvm.ir import Call, IRModule, Op, TensorLoad
from tvm.ir.transform import PassContext, Sequential, module_pass
from tvm.s_tir import SBlock
from tvm.support import nvcc
from tvm.target import Target
from tvm.tirx import (
    AllocBuffer,
    AttrStmt,
    Buffer,
    BufferLoad,
    DeclBuffer,
    Evaluate,
    Expr,
    For,
    IfThenElse,
    IntImm,
    PrimFunc,
    Ramp,
    SeqStmt,
    Stmt,
    decl_buffer,
)
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline
from tvm.tirx.op import address_of, call_extern
from tvm.tirx.transform import LowerWarpMemory

from kivi_tvm.cuda import (
    PTXAS_LEVEL,
    find_compiler,
    find_nvcc,
    machine_code_of,
    with_asked_bytes,
    with_early_launch,
    with_launch_bounds,
    with_machine_code,
)

NAME = "kivi_tvm"
MIN_BLOCKS_ATTR = "kivi.min_blocks"  # of a function: `cuda.with_launch_bounds`
BEGINNING_ATTR = "kivi.beginning"  # of a function: `cuda.with_early_launch`
# What TVM calls that, in its spelling.
LAUNCH_PARAMS_ATTR = "tirx.kernel_launch_params"
EARLY_LAUNCH = "tirx.use_programtic_dependent_launch"
# Those of the module that is compiled.
_blocks: ContextVar[Mapping[str, int]] = ContextVar("blocks", default={})  # noqa: B039
# Shared memory that its kernels ask for at launch, by name; filled in when they are lowered.
_asked_bytes: ContextVar[dict[str, int]] = ContextVar("asked_bytes")
# How its kernels begin, if they are launched early.
_beginnings: ContextVar[Mapping[str, str]] = ContextVar("beginnings", default={})  # noqa: B039
# Whether its CUDA source is to carry its machine code.
_machine_code: ContextVar[bool] = ContextVar("machine_code", default=False)
ACTIVE_LANES, EXP2 = Op.get("tirx.tvm_warp_activemask"), Op.get("tirx.exp2")
# exp2f without what it does for results below 2^-126, which are 0 here
EXP2_SOURCE = """
__device__ __forceinline__ float kivi_tvm_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
"""
LOAD_BYTES = 16
LOAD_SOURCE = """
__device__ __forceinline__ {type} kivi_tvm_load_{type}(const void* from) {{
  return __ldcg(static_cast<const {type}*>(from));
}}
"""
EXACT = ["--ftz=false", "--prec-div=true", "--prec-sqrt=true"]  # after nvrtc's fast mathematics
LINE_BYTES = 64
MAX_STACK_BYTES = 65536  # of one buffer; threads have 512 kB and more


def compile_module(module: IRModule, target: Target, for_elsewhere: bool = False) -> Any:
    """The executable of scheduled functions; use this for every kernel.

    Parameters
    ----------
    module : IRModule
    target : Target
    for_elsewhere : bool
        Whether kernels for a GPU become machine code even where there is none, which takes a while.
    """
    if target.kind.name == "cuda":
        configure_cuda()
        _blocks.set({name: int(n) for name, n in attributes(module, MIN_BLOCKS_ATTR).items()})
        _asked_bytes.set({})
        _beginnings.set(attributes(module, BEGINNING_ATTR))
        _machine_code.set(for_elsewhere and not has_cuda_runtime())
    with target:  # whose architecture CUDA sources are compiled for
        return tvm.compile(module, target=target, tir_pipeline=_registered())


def attributes(module: IRModule, name: str) -> dict[str, Any]:
    """An attribute of the functions that have it, by their names."""
    return {
        each.name_hint: function.attrs[name]
        for each, function in module.functions.items()
        if function.attrs and name in function.attrs
    }


@cache
def configure_cuda() -> None:
    """Make TVM compile CUDA sources as ours need it.

    Without `--use_fast_math`: divisions are approximate with it and denormal numbers 0, so that
    codes, scales and zeros would not be the reference's. And without spilled registers.
    """
    os.environ["TVM_CUDA_NVCC_NO_FAST_MATH"] = "1"
    os.environ.setdefault("TVM_CUDA_PTXAS_REG_LEVEL", PTXAS_LEVEL)
    if path := find_nvcc():
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(path).parent)])
    tvm_ffi.register_global_func("tvm_callback_cuda_postproc", _finished, override=True)
    tvm_ffi.register_global_func("tvm_callback_cuda_compile", _compile_cuda, override=True)


def has_cuda_runtime() -> bool:
    """Tell whether TVM's CUDA runtime is in this process, which takes a driver."""
    return tvm_ffi.get_global_func("ffi.Module.create.cuda", allow_missing=True) is not None


def _finished(source: str, target: Target) -> str:
    source = with_asked_bytes(with_launch_bounds(source, _blocks.get()), _asked_bytes.get())
    if beginnings := _beginnings.get():
        source = with_early_launch(source, beginnings)
    if not _machine_code.get():
        return source
    return with_machine_code(source, _compile_cuda(source, target))


def _compile_cuda(source: str, target: Target | None = None) -> bytes:
    if code := machine_code_of(source):
        return code
    architecture = str((target or Target.current()).attrs["arch"])
    if find_compiler() == "nvcc":
        virtual = architecture.replace("sm_", "compute_")
        gencode = ["-gencode", f"arch={virtual},code={architecture}"]
        return bytes(nvcc.compile_cuda(source, "fatbin", gencode, compiler="nvcc"))
    return bytes(nvcc.compile_cuda(source, "cubin", architecture, EXACT, compiler="nvrtc"))


@cache
def _registered() -> str:
    register_tir_pipeline(NAME, _pipeline)
    return NAME


def _pipeline() -> tuple[Any, Any, Any]:
    lower, host, device = get_tir_pipeline("s_tir")
    return (
        lowered_one_by_one(lower),
        lambda: Sequential([keep_on_stack, host()]),
        lambda: Sequential([note_asked_bytes, lower_warp_memory, load_past_l1, device()]),
    )


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
                _asked_bytes.get()[kernel] = _constant_bytes(stmt.buffer)

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


@module_pass(opt_level=0, name="kivi_tvm.load_past_l1")  # type: ignore[untyped-decorator]
def load_past_l1(module: IRModule, _: PassContext) -> IRModule:
    """Let kernels that begin before earlier ones have ended load from the second-level cache.

    What was written before is there. In the first level there may be what was there before that:
    it is only said to be gone where a kernel has waited.
    """
    found = dict(module.functions)
    for name, function in module.functions.items():
        if _beginnings.get().get(name.name_hint.removesuffix("_kernel")) == "later":
            body = tvm_ffi.structural_map(function.body, (TensorLoad, _past_l1))
            found[name] = function.with_body(body)
    return IRModule(found, attrs=module.attrs)


def _past_l1(load: TensorLoad) -> Expr:
    [index], dtype = load.indices, tvm.DataType(load.ty.dtype)
    if load.source.scope() != "global":
        return load
    if not isinstance(index, Ramp):
        return call_extern(str(dtype), "__ldcg", address_of(load))
    size = dtype.bits * dtype.lanes // 8
    if size != LOAD_BYTES or int(index.stride) != 1:
        raise ValueError(f"`load` must be of {LOAD_BYTES} bytes side by side, got {load}")
    first = BufferLoad(load.source, [index.base])
    of_cuda = "float4" if str(dtype) == "float32x4" else "uint4"  # as TVM writes such types
    return cuda_func_call(
        f"kivi_tvm_load_{of_cuda}",
        address_of(first),
        source_code=LOAD_SOURCE.format(type=of_cuda),
        return_type=str(dtype),
    )


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

    body = _changed(body, remove)
    return tvm_ffi.structural_map(body, (Buffer, replace)) if places else body


def _has_warp_buffers(function: PrimFunc) -> bool:
    found = []

    def visit(stmt: AllocBuffer) -> None:
        if stmt.buffer.scope() == "warp":
            found.append(stmt)

    tvm_ffi.structural_walk(function.body, (AllocBuffer, visit))
    return bool(found)


@module_pass(opt_level=0, name="kivi_tvm.keep_on_stack")  # type: ignore[untyped-decorator]
def keep_on_stack(module: IRModule, _: PassContext) -> IRModule:
    """Exempt buffers of constant size from what `LowerTVMBuiltin` does with them."""
    found = {}
    for name, function in module.functions.items():
        if isinstance(function, PrimFunc):
            function = function.with_body(_changed(function.body, _on_stack))
        found[name] = function
    return IRModule(found, attrs=module.attrs)


def _on_stack(stmt: Stmt) -> Stmt:
    if isinstance(stmt, AllocBuffer) and 0 < _constant_bytes(stmt.buffer) <= MAX_STACK_BYTES:
        return _aligned(stmt)
    return stmt


def _changed(stmt: Stmt, change: Callable[[Stmt], Stmt]) -> Stmt:
    """A statement with `change` applied to everything in it, from the inside out."""
    if isinstance(stmt, SeqStmt):
        stmt = SeqStmt([_changed(each, change) for each in stmt.seq])
    elif isinstance(stmt, For):
        stmt = For(
            stmt.loop_var, stmt.min, stmt.extent, stmt.kind, _changed(stmt.body, change),
            stmt.thread_binding, stmt.annotations, stmt.step,
        )  # fmt: skip
    elif isinstance(stmt, AttrStmt):
        stmt = AttrStmt(stmt.node, stmt.attr_key, stmt.value, _changed(stmt.body, change))
    elif isinstance(stmt, IfThenElse):
        other = stmt.else_case and _changed(stmt.else_case, change)
        stmt = IfThenElse(stmt.condition, _changed(stmt.then_case, change), other)
    return change(stmt)


def _aligned(stmt: AllocBuffer) -> Stmt:
    """An allocation on the stack that vectors do not straddle cache lines in.

    LLVM's code generator aligns arrays of scalars to 16 bytes, those of vectors to the vector.
    """
    buffer, size = stmt.buffer, _constant_bytes(stmt.buffer)
    dtype = tvm.DataType(buffer.dtype)
    annotations = {**stmt.annotations, "disable_lower_builtin": IntImm("bool", 1)}
    if dtype.lanes > 1 or size % LINE_BYTES:
        return AllocBuffer(buffer, annotations)
    storage = decl_buffer(
        (size // LINE_BYTES,), f"{dtype}x{LINE_BYTES // dtype.itemsize}", f"{buffer.name}_storage",
        scope=buffer.scope(),
    )  # fmt: skip
    return SeqStmt([AllocBuffer(storage, annotations), DeclBuffer(buffer, data=storage.data)])


def _constant_bytes(buffer: Buffer) -> int:
    """Bytes of a buffer whose shape is known, else 0."""
    count: int = tvm.DataType(buffer.dtype).itemsize
    for extent in buffer.shape:
        if not isinstance(extent, IntImm):
            return 0
        count *= int(extent)
    return count
