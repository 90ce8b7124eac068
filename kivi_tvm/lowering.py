"""How scheduled functions are lowered: TVM's pipeline, with the tiles of CPU kernels on the stack.

TVM allocates a function's buffers from a heap, but for those in scope "global" below 1 kB, which
its storage planner makes part of larger ones. Register tiles then never become registers, and every
call of a kernel allocates. On the stack LLVM sees whole lifetimes, and what fits becomes registers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import tvm
from tvm.ir import IRModule
from tvm.ir.transform import PassContext, Sequential, module_pass
from tvm.target import Target
from tvm.tirx import AllocBuffer, DeclBuffer, IntImm, PrimFunc, SeqStmt, Stmt, decl_buffer
from tvm.tirx.compilation_pipeline import get_tir_pipeline, register_tir_pipeline

from kivi_tvm import cuda_build
from kivi_tvm.gpu_passes import (
    explicit_loads,
    lower_warp_memory,
    lowered_one_by_one,
    note_asked_bytes,
)
from kivi_tvm.statements import changed, constant_bytes

NAME = "kivi_tvm"
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
        cuda_build.begin(module, for_elsewhere)
    with target:  # whose architecture CUDA sources are compiled for
        return tvm.compile(module, target=target, tir_pipeline=_registered())


@cache
def _registered() -> str:
    register_tir_pipeline(NAME, _pipeline)
    return NAME


def _pipeline() -> tuple[Any, Any, Any]:
    lower, host, device = get_tir_pipeline("s_tir")
    return (
        lowered_one_by_one(lower),
        lambda: Sequential([keep_on_stack, host()]),
        lambda: Sequential([note_asked_bytes, lower_warp_memory, explicit_loads, device()]),
    )


@module_pass(opt_level=0, name="kivi_tvm.keep_on_stack")  # type: ignore[untyped-decorator]
def keep_on_stack(module: IRModule, _: PassContext) -> IRModule:
    """Exempt buffers of constant size from what `LowerTVMBuiltin` does with them."""
    found = {}
    for name, function in module.functions.items():
        if isinstance(function, PrimFunc):
            function = function.with_body(changed(function.body, _on_stack))
        found[name] = function
    return IRModule(found, attrs=module.attrs)


def _on_stack(stmt: Stmt) -> Stmt:
    if isinstance(stmt, AllocBuffer) and 0 < constant_bytes(stmt.buffer) <= MAX_STACK_BYTES:
        return _aligned(stmt)
    return stmt


def _aligned(stmt: AllocBuffer) -> Stmt:
    """An allocation on the stack that vectors do not straddle cache lines in.

    LLVM's code generator aligns arrays of scalars to 16 bytes, those of vectors to the vector.
    """
    buffer, size = stmt.buffer, constant_bytes(stmt.buffer)
    dtype = tvm.DataType(buffer.dtype)
    annotations = {**stmt.annotations, "disable_lower_builtin": IntImm("bool", 1)}
    if dtype.lanes > 1 or size % LINE_BYTES:
        return AllocBuffer(buffer, annotations)
    storage = decl_buffer(
        (size // LINE_BYTES,), f"{dtype}x{LINE_BYTES // dtype.itemsize}", f"{buffer.name}_storage",
        scope=buffer.scope(),
    )  # fmt: skip
    return SeqStmt([AllocBuffer(storage, annotations), DeclBuffer(buffer, data=storage.data)])
