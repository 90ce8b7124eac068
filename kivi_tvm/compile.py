"""From a kernel key and a target to compiled functions: operators, schedules, code generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm.target import Target

from kivi_tvm import targets
from kivi_tvm.config import KernelKey
from kivi_tvm.database import Found, Record
from kivi_tvm.host import find_cxx
from kivi_tvm.manifest import Manifest
from kivi_tvm.notices import announce_once
from kivi_tvm.ops import FUNCTIONS, OPS
from kivi_tvm.schedules import offers, rule
from kivi_tvm.schedules.choices import GuidedSchedule, Option, decide


@dataclass(frozen=True, slots=True)
class CompiledKernels:
    """All functions of a kernel key, compiled for one target.

    `sources` says per function whether its schedule is "tuned" or "default"; `tuning` per tuned
    function which record it is from.
    """

    key: KernelKey
    target: Target
    executable: Any
    sources: Mapping[str, str]
    tuning: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def export(self, path: Path) -> None:
        """Write the shared library; needs a C++ compiler."""
        self.executable.export_library(str(path), cc=find_cxx())

    def manifest(self) -> Manifest:
        """What the compiled functions are, for the artifact or the report."""
        return Manifest(
            kernel_key=self.key.to_dict(),
            target=targets.as_dict(self.target),
            sources=self.sources,
            tuning=self.tuning,
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


class StaleRecord(ValueError):
    """A tuning record that no longer leads to the schedule that was measured."""


def recorded_schedule(record: Record, key: KernelKey, target: Target) -> GuidedSchedule:
    """The schedule that `record` describes, made again.

    Raises
    ------
    StaleRecord
        The function, one of its decisions or the program that they gave is no longer there.
    """
    if record.function not in FUNCTIONS:
        raise StaleRecord("there is no function of this name")
    try:
        schedule = scheduled_function(record.function, key, target, record.decisions)
    except Exception as error:  # choices raise ValueError; TVM, where a transform fails, several
        reason = " ".join(str(error).split())[:200]
        raise StaleRecord(f"it cannot be scheduled so ({reason})") from error
    if (found := schedule_hash(record.function, schedule)) != record.schedule_hash:
        raise StaleRecord(f"its schedule gives {found} now, {record.schedule_hash} when measured")
    return schedule


def scheduled_module(
    key: KernelKey, target: Target, schedules: Mapping[str, GuidedSchedule] | None = None
) -> tvm.IRModule:
    """Every function of `key` for `target`: those of `schedules`, the others by default."""
    given = schedules or {}
    return tvm.IRModule(
        {
            name: (given.get(name) or scheduled_function(name, key, target)).mod[name]
            for name in FUNCTIONS
        }
    )


def compile_kernels(
    key: KernelKey,
    target: Target,
    found: Found | None = None,
    notify: Callable[[str], None] = announce_once,
) -> CompiledKernels:
    """Compile every function of `key` for `target`.

    Parameters
    ----------
    key : KernelKey
    target : Target
    found : Found, optional
        Tuning records of exactly this key and target; a function without one, or whose record is
        stale, takes its default schedule.
    notify : callable
        Receives one line per stale record.

    Raises
    ------
    RuntimeError
        TVM's code generator fails.
    """
    found = found or Found()
    tuned = {}
    for name, record in found.records.items():
        try:
            tuned[name] = recorded_schedule(record, key, target)
        except StaleRecord as error:
            notify(f"the tuning record of {name} ({key.slug}) is stale, default instead: {error}")
    executable = tvm.compile(scheduled_module(key, target, tuned), target=target)
    return CompiledKernels(
        key,
        target,
        executable,
        sources={name: "tuned" if name in tuned else "default" for name in FUNCTIONS},
        tuning={name: _provenance(found, name) for name in tuned},
    )


def _provenance(found: Found, name: str) -> dict[str, Any]:
    """What the artifact says of a tuned function."""
    fields = ("device", "date", "default_us", "tuned_us")
    record = found.records[name].to_dict()
    return {**{each: record[each] for each in fields}, "origin": found.origins[name]}
