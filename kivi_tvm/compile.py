"""From a kernel key and a target to compiled functions: operators, schedules, code generator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm.target import Target

from kivi_tvm import targets
from kivi_tvm.config import KernelKey
from kivi_tvm.host import find_cxx
from kivi_tvm.manifest import Manifest
from kivi_tvm.ops import FUNCTIONS, OPS
from kivi_tvm.schedules import offers, rule
from kivi_tvm.schedules.choices import GuidedSchedule, Option, decide


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


def scheduled_function(
    name: str, key: KernelKey, target: Target, decisions: Mapping[str, Option] | None = None
) -> GuidedSchedule:
    """The function `name` of `FUNCTIONS`, made and scheduled for `target`.

    Parameters
    ----------
    name : str
    key : KernelKey
        Of the module, also for functions that take several tokens' queries.
    target : Target
    decisions : mapping of str to int or str, optional
        Choices made otherwise than by default.

    Returns
    -------
    GuidedSchedule
        Its `mod[name]` is the scheduled function, its `choices` what could be decided.

    Raises
    ------
    ValueError
        A decision is not among its choice's options, or no choice has that name.
    """
    op, extends = FUNCTIONS[name]
    op_key = replace(key, rows_per_query=key.extend_rows) if extends else key
    facts = targets.hardware(target)
    made = {
        parameter: decide(parameter, options, default, decisions or {})
        for parameter, (options, default) in offers(op, facts, op_key).items()
    }
    function = OPS[op](op_key, **{parameter: choice.taken for parameter, choice in made.items()})
    module = tvm.IRModule({name: function.with_attr("global_symbol", name)})
    schedule = GuidedSchedule(module, decisions, made)
    schedule.work_on(name)
    rule(op, facts)(schedule, facts)
    if unused := schedule.unused():
        raise ValueError(f"`decisions` of {name} must be among its choices, got {unused}")
    return schedule


def schedule_hash(name: str, schedule: GuidedSchedule) -> str:
    """16 hex digits that tell scheduled functions apart, the same in every process."""
    digest: int = tvm_ffi.structural_hash(schedule.mod[name])
    return f"{digest & 0xFFFFFFFFFFFFFFFF:016x}"


def scheduled_module(key: KernelKey, target: Target) -> tvm.IRModule:
    """Every function of `key` with its default schedule for `target`."""
    return tvm.IRModule(
        {name: scheduled_function(name, key, target).mod[name] for name in FUNCTIONS}
    )


def compile_kernels(key: KernelKey, target: Target) -> CompiledKernels:
    """Compile every function of `key` for `target`.

    Raises
    ------
    RuntimeError
        TVM's code generator fails.
    """
    executable = tvm.compile(scheduled_module(key, target), target=target)
    return CompiledKernels(key, target, executable, dict.fromkeys(FUNCTIONS, "default"))
