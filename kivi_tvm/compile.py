"""From a kernel key and a target to compiled functions: operators, schedules, code generator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tvm
from tvm.s_tir import Schedule
from tvm.target import Target

from kivi_tvm import targets
from kivi_tvm.config import KernelKey
from kivi_tvm.host import find_cxx
from kivi_tvm.manifest import Manifest
from kivi_tvm.ops import FUNCTIONS, OPS
from kivi_tvm.schedules import rule


@dataclass(frozen=True, slots=True)
class CompiledKernels:
    """All functions of a kernel key, compiled for one target."""

    key: KernelKey
    target: Target
    executable: Any
    sources: Mapping[str, str]

    def export(self, path: Path) -> None:
        """Write the shared library; needs a C++ compiler."""
        self.executable.export_library(str(path), cc=find_cxx())

    def manifest(self) -> Manifest:
        """What the compiled functions are, for the artifact or the report."""
        return Manifest(
            kernel_key=self.key.to_dict(),
            target=targets.as_dict(self.target),
            sources=self.sources,
            cpu_flags=targets.required_cpu_flags(self.target),
        )


def scheduled_module(key: KernelKey, target: Target) -> tvm.IRModule:
    """Every function of `key` with its default schedule for `target`."""
    facts = targets.hardware(target)
    extend_key = replace(key, rows_per_query=key.extend_rows)
    functions = {}
    for name, (op, extends) in FUNCTIONS.items():
        function = OPS[op](extend_key if extends else key)
        schedule = Schedule(tvm.IRModule({name: function.with_attr("global_symbol", name)}))
        schedule.work_on(name)
        rule(op, facts)(schedule, facts)
        functions[name] = schedule.mod[name]
    return tvm.IRModule(functions)


def compile_kernels(key: KernelKey, target: Target) -> CompiledKernels:
    """Compile every function of `key` for `target`.

    Raises
    ------
    RuntimeError
        TVM's code generator fails.
    """
    executable = tvm.compile(scheduled_module(key, target), target=target)
    return CompiledKernels(key, target, executable, dict.fromkeys(FUNCTIONS, "default"))
