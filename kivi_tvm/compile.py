"""From a kernel key and a target to compiled functions: operators, schedules, code generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm.s_tir import renew_defs
from tvm.target import Target

from kivi_tvm import targets
from kivi_tvm.config import KernelKey
from kivi_tvm.cuda_build import (
    BEGINNING_ATTR,
    EARLY_LAUNCH,
    LAUNCH_PARAMS_ATTR,
    MIN_BLOCKS_ATTR,
)
from kivi_tvm.database import Found, Record
from kivi_tvm.host import find_cxx
from kivi_tvm.lowering import compile_module
from kivi_tvm.manifest import Manifest
from kivi_tvm.notices import announce_once
from kivi_tvm.ops import BATCH_FUNCTIONS, FEW_FUNCTIONS, FUNCTIONS, GPU_FUNCTIONS, OPS
from kivi_tvm.ops.combine_few import has_few
from kivi_tvm.schedules import beginning, bounds, fits, offers, rule
from kivi_tvm.schedules.choices import GuidedSchedule, Option, decide
from kivi_tvm.schedules.threads import WIDE_HEAD

# Linked into every library, so that it can run on torch's threads.
LAUNCH = Path(__file__).with_name("launch.cc")


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
        self.executable.export_library(str(path), cc=find_cxx(), addons=[str(LAUNCH)])

    def manifest(self) -> Manifest:
        """What the compiled functions are, for the artifact or the report."""
        return Manifest(
            kernel_key=self.key.to_dict(),
            target=targets.as_dict(self.target),
            sources=self.sources,
            tuning=self.tuning,
            cpu_flags=targets.required_cpu_flags(self.target),
        )


def functions(key: KernelKey, target: Target) -> dict[str, tuple[str, bool]]:
    """The functions of a module for a target, as in `FUNCTIONS`."""
    if target.kind.name not in targets.GPU_KINDS:
        return FUNCTIONS
    found = FUNCTIONS | GPU_FUNCTIONS
    if key.compute == "half" and key.head_dim <= WIDE_HEAD:  # registers suffice for few warps
        hardware = targets.hardware(target)
        found |= {
            name: (op, extends)
            for name, (op, extends) in BATCH_FUNCTIONS.items()
            if fits(op, hardware, key)
        }
    if has_few(key):
        found |= FEW_FUNCTIONS
    return found


class Scheduler:
    """Makes and schedules the function `name` of `FUNCTIONS`, with any decisions.

    An operator is parsed once for each way of making it (0.1 to 0.2 s); the schedule's own work
    takes 20 to 60 ms.

    Parameters
    ----------
    name : str
    key : KernelKey
        Of the module, also for functions that take several tokens' queries.
    target : Target
    """

    def __init__(self, name: str, key: KernelKey, target: Target) -> None:
        self._name = name
        self._op, self._extends = functions(key, target)[name]
        self._key = replace(key, rows_per_query=key.extend_rows) if self._extends else key
        self._hardware = targets.hardware(target)
        self._offers = offers(self._op, self._hardware, self._key)
        self._bounds = bounds(self._op, self._hardware, self._key)
        self._rule = rule(self._op, self._hardware)
        self._parsed: dict[tuple[Option, ...], Any] = {}

    def begin(self, decisions: Mapping[str, Option]) -> GuidedSchedule:
        """The function as its factory makes it, not scheduled yet.

        Raises
        ------
        ForeignDecisionError
            A decision for the factory is not among its options.
        """
        made = {
            parameter: decide(parameter, options, default, decisions)
            for parameter, (options, default) in (self._offers | self._bounds).items()
        }
        taken = {parameter: made[parameter].taken for parameter in self._offers}
        way = tuple(taken.values())
        if way not in self._parsed:
            function = OPS[self._op](self._key, **taken).with_attr("global_symbol", self._name)
            if self._hardware.early_launch:
                function = function.with_attr(LAUNCH_PARAMS_ATTR, [EARLY_LAUNCH])
                begins = beginning(self._op, self._hardware, self._key, self._extends)
                function = function.with_attr(BEGINNING_ATTR, begins)
            self._parsed[way] = function
        # A schedule changes blocks in place that it should copy: each gets a function anew.
        function = renew_defs(self._parsed[way])
        if self._bounds:
            function = function.with_attr(MIN_BLOCKS_ATTR, made["min_blocks"].taken)
        module = tvm.IRModule({self._name: function})
        schedule = GuidedSchedule(module, decisions, made)
        schedule.work_on(self._name)
        return schedule

    def finish(self, schedule: GuidedSchedule) -> None:
        """Apply the operator's schedule function to what `begin` returned.

        Raises
        ------
        ForeignDecisionError
            A decision is not among its choice's options.
        Exception
            TVM refuses a transformation; several types, InternalError among them.
        """
        self._rule(schedule, self._hardware)


def scheduled_function(
    name: str, key: KernelKey, target: Target, decisions: Mapping[str, Option] | None = None
) -> GuidedSchedule:
    """The function `name` of `FUNCTIONS`, made and scheduled for `target`.

    Parameters
    ----------
    name, key, target
        As for `Scheduler`.
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
    scheduler = Scheduler(name, key, target)
    schedule = scheduler.begin(decisions or {})
    scheduler.finish(schedule)
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
    if record.function not in functions(key, target):
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
    """Every function of `key` for `target`: those of `schedules`, the others by default.

    Without `attend_batch` where `attend` takes other sums than by default: it gives the same bits
    with the default ones alone.
    """
    given = schedules or {}
    names = list(functions(key, target))
    if "attend_batch" in names and "attend" in given:
        sums = given["attend"].choices["warps"]
        if sums.taken != sums.default:
            names.remove("attend_batch")
    return tvm.IRModule(
        {
            name: (given.get(name) or scheduled_function(name, key, target)).mod[name]
            for name in names
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
        Tuning records of exactly this key and target; a function without one, or whose records
        are stale, takes its default schedule.
    notify : callable
        Receives one line per stale record.

    Raises
    ------
    RuntimeError
        TVM's code generator fails.
    """
    found = found or Found()
    tuned: dict[str, GuidedSchedule] = {}
    used: dict[str, Mapping[str, Any]] = {}
    for name, record in found.records.items():
        ways = [(record, found.origins[name])]
        ways += [(found.spare[name], "package")] if name in found.spare else []
        for i, (each, origin) in enumerate(ways, 1):
            try:
                tuned[name] = recorded_schedule(each, key, target)
                used[name] = _provenance(each, origin)
                break
            except StaleRecord as error:
                instead = "default" if i == len(ways) else "the package's"
                notify(
                    f"the tuning record of {name} ({key.slug}) is stale, {instead} instead: {error}"
                )
    module = scheduled_module(key, target, tuned)
    everything = functions(key, target)
    names = [name for name in everything if name in module]
    for name in everything.keys() - set(names):
        notify(
            f"{name} ({key.slug}) is left out: the tuned attend has other sums than by default, "
            "with which it would give other bits"
        )
    executable = compile_module(module, target, for_elsewhere=True)
    return CompiledKernels(
        key,
        target,
        executable,
        sources={name: "tuned" if name in tuned else "default" for name in names},
        tuning={name: each for name, each in used.items() if name in names},
    )


def _provenance(record: Record, origin: str) -> dict[str, Any]:
    """What the artifact says of a tuned function."""
    fields = ("device", "date", "default_us", "tuned_us")
    plain = record.to_dict()
    return {**{each: plain[each] for each in fields}, "origin": origin}
