"""The CUDA sources that TVM writes, finished and compiled as ours need it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import tvm_ffi
from tvm.ir import IRModule
from tvm.support import nvcc
from tvm.target import Target

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

MIN_BLOCKS_ATTR = "kivi.min_blocks"  # of a function: `cuda.with_launch_bounds`
BEGINNING_ATTR = "kivi.beginning"  # of a function: `cuda.with_early_launch`
# What TVM calls that, in its spelling.
LAUNCH_PARAMS_ATTR = "tirx.kernel_launch_params"
EARLY_LAUNCH = "tirx.use_programtic_dependent_launch"
EXACT = ["--ftz=false", "--prec-div=true", "--prec-sqrt=true"]  # after nvrtc's fast mathematics


@dataclass(frozen=True, slots=True)
class CudaBuild:
    """What the functions of the module that is compiled say of their kernels, by name.

    Parameters
    ----------
    min_blocks, beginnings : mapping
        For `cuda.with_launch_bounds` and, if kernels are launched early, `cuda.with_early_launch`.
    carries_code : bool
        Whether the source is to carry its machine code.
    asked_bytes : dict
        Shared memory that kernels ask for at launch; filled in when they are lowered.
    """

    min_blocks: Mapping[str, int]
    beginnings: Mapping[str, str]
    carries_code: bool
    asked_bytes: dict[str, int] = field(default_factory=dict)


_current: ContextVar[CudaBuild] = ContextVar("current")


def current() -> CudaBuild:
    """What `begin` was told of last."""
    return _current.get()


def begin(module: IRModule, for_elsewhere: bool) -> None:
    """Prepare for a module's source; see `lowering.compile_module`."""
    configure_cuda()
    carries_code = for_elsewhere and not has_cuda_runtime()
    blocks = {name: int(n) for name, n in attributes(module, MIN_BLOCKS_ATTR).items()}
    _current.set(CudaBuild(blocks, attributes(module, BEGINNING_ATTR), carries_code))


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
    build = current()
    source = with_asked_bytes(with_launch_bounds(source, build.min_blocks), build.asked_bytes)
    if build.beginnings:
        source = with_early_launch(source, build.beginnings)
    if not build.carries_code:
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
