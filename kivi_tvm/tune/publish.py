"""Between a session and the database: records of winners, decisions of records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tvm.target import Target

from kivi_tvm import database, targets
from kivi_tvm.cache_key import sources_digest
from kivi_tvm.manifest import current_versions
from kivi_tvm.schedules.choices import Option
from kivi_tvm.tune.candidate import Task
from kivi_tvm.tune.cases import CASE_SOURCES
from kivi_tvm.tune.outcome import Options, Outcome
from kivi_tvm.tune.runner import Runner


def publisher(
    root: Path,
    target: Target,
    options: Options,
    runner: Runner,
    commit: str | None,
    versions: Mapping[str, str] | None = None,
) -> Callable[[Outcome], None]:
    """What adds an outcome's record to the database below `root`; `versions` as measured with.

    What this machine measures for another processor is "estimated".
    """
    identity = targets.identity(target)
    elsewhere = runner.method == "local" and not targets.is_native(identity)
    kind = "estimated" if elsewhere else "measured"
    measured_with = {**current_versions(), **(versions or {})}

    def publish(outcome: Outcome) -> None:
        record = _record(outcome, options, runner, commit, measured_with, kind)
        database.publish(root, identity, outcome.task.key, {outcome.task.function: record})

    return publish


def _record(
    outcome: Outcome,
    options: Options,
    runner: Runner,
    commit: str | None,
    versions: Mapping[str, str],
    kind: str,
) -> database.Record:
    return database.Record(
        function=outcome.task.function,
        decisions=dict(outcome.decisions),
        schedule_hash=outcome.schedule_hash,
        workload=outcome.task.workload.id,
        default_us=outcome.default_us,
        tuned_us=outcome.tuned_us,
        max_error=outcome.max_error,
        error_limit=outcome.error_limit,
        trials=outcome.trials,
        seed=options.seed,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        device=runner.device.name,
        threads=runner.device.threads,
        runner=runner.method,
        kind=kind,
        commit=commit,
        versions=versions,
        bytes=outcome.nbytes,
        read_gb_per_s=outcome.read_gb_per_s,
    )


def seeds(root: Path, target: Target, task: Task) -> Iterator[Mapping[str, Option]]:
    """Decisions of this target's records of a task's function: of its own kernel key first.

    They are where the search starts. A record is replaced by what a later run finds, so that the
    run must have tried it; and what is best for 2 bits is seldom bad for 4.
    """
    identity = targets.identity(target)
    found = [
        each
        for place in dict.fromkeys((root, *database.roots().values()))
        for each in database.entries(place)
        if each.target == identity and task.function in each.records
    ]
    for each in sorted(found, key=lambda each: each.key != task.key):
        if decisions := each.records[task.function].decisions:
            yield decisions


def facts(target: Target, runner: Runner) -> dict[str, Any]:
    """What a journal's trials depend on beside their task: how they are checked and timed too."""
    return {
        "target": targets.identity(target),
        "runner": runner.method,
        "device": runner.device.name,
        "threads": runner.device.threads,
        "versions": current_versions(),
        "sources": sources_digest(names=(*CASE_SOURCES, "tune/measure.py")),
    }
