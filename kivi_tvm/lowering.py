"""How scheduled functions are lowered: TVM's pipeline, with the tiles of CPU kernels on the stack.

TVM allocates a function's buffers from a heap, but for those in scope "global" below 1 kB, which
its storage planner makes part of larger ones. Register tiles then never become registers, and every
call of a kernel allocates. On the stack LLVM sees whole lifetimes, and what fits becomes registers.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm.ir import IRModule
from tvm.ir.transform import PassContext, Sequential, module_pass
from tvm.support import nvcc
from tvm.target import Target
from tvm.tirx import (
    AllocBuffer,
    AttrStmt,
    Buffer,
    DeclBuffer,
    For,
    IfThenElse,
    IntImm,
    PrimFunc,
    SeqStmt,
    Stmt,
    decl_buffer,
)
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline

from kivi_tvm.cuda import find_compiler, find_nvcc, with_launch_bounds

NAME = "kivi_tvm"
EXACT = ["--ftz=false", "--prec-div=true", "--prec-sqrt=true"]  # after nvrtc's fast mathematics
LINE_BYTES = 64
MAX_STACK_BYTES = 65536  # of one buffer; threads have 512 kB and more


def compile_module(module: IRModule, target: Target) -> Any:
    """The executable of scheduled functions; use this for every kernel."""
    if target.kind.name == "cuda":
        configure_cuda()
    with target:  # whose architecture CUDA sources are compiled for
        return tvm.compile(module, target=target, tir_pipeline=_registered())


@cache
def configure_cuda() -> None:
    """Make TVM compile CUDA sources as ours need it.

    Without `--use_fast_math`: divisions are approximate with it and denormal numbers 0, so that
    codes, scales and zeros would not be the reference's. And without spilled registers.
    """
    os.environ["TVM_CUDA_NVCC_NO_FAST_MATH"] = "1"
    if path := find_nvcc():
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(path).parent)])
    tvm_ffi.register_global_func("tvm_callback_cuda_compile", _compile_cuda, override=True)


def _compile_cuda(source: str) -> bytes:
    architecture, source = str(Target.current().attrs["arch"]), with_launch_bounds(source)
    if find_compiler() == "nvcc":
        code = architecture.removeprefix("sm_")
        gencode = ["-gencode", f"arch=compute_{code},code={architecture}"]
        return bytes(nvcc.compile_cuda(source, "fatbin", gencode, compiler="nvcc"))
    return bytes(nvcc.compile_cuda(source, "cubin", architecture, EXACT, compiler="nvrtc"))


@cache
def _registered() -> str:
    register_tir_pipeline(NAME, _pipeline)
    return NAME


def _pipeline() -> tuple[Any, Any, Any]:
    lower, host, device = get_tir_pipeline("s_tir")
    return lower, lambda: Sequential([keep_on_stack, host()]), device


@module_pass(opt_level=0, name="kivi_tvm.keep_on_stack")  # type: ignore[untyped-decorator]
def keep_on_stack(module: IRModule, _: PassContext) -> IRModule:
    """Exempt buffers of constant size from what `LowerTVMBuiltin` does with them."""
    found = {}
    for name, function in module.functions.items():
        if isinstance(function, PrimFunc):
            function = function.with_body(_on_stack(function.body))
        found[name] = function
    return IRModule(found, attrs=module.attrs)


def _on_stack(stmt: Stmt) -> Stmt:
    if isinstance(stmt, SeqStmt):
        return SeqStmt([_on_stack(each) for each in stmt.seq])
    if isinstance(stmt, For):
        return For(
            stmt.loop_var, stmt.min, stmt.extent, stmt.kind, _on_stack(stmt.body),
            stmt.thread_binding, stmt.annotations, stmt.step,
        )  # fmt: skip
    if isinstance(stmt, AttrStmt):
        return AttrStmt(stmt.node, stmt.attr_key, stmt.value, _on_stack(stmt.body))
    if isinstance(stmt, IfThenElse):
        other = stmt.else_case and _on_stack(stmt.else_case)
        return IfThenElse(stmt.condition, _on_stack(stmt.then_case), other)
    if isinstance(stmt, AllocBuffer) and 0 < _constant_bytes(stmt.buffer) <= MAX_STACK_BYTES:
        return _aligned(stmt)
    return stmt


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
