"""Between a session and the database: records of winners, decisions of records, what is stale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tvm.target import Target

from kivi_tvm import database, targets
from kivi_tvm.cache_key import sources_digest
from kivi_tvm.compile import recorded_schedule
from kivi_tvm.manifest import current_versions
from kivi_tvm.schedules.choices import Option
from kivi_tvm.tune.candidate import Task
from kivi_tvm.tune.outcome import Options, Outcome
from kivi_tvm.tune.runner import Runner


def publisher(
    root: Path, target: Target, options: Options, runner: Runner, commit: str | None
) -> Callable[[Outcome], None]:
    """What adds an outcome's record to the database below `root`."""
    identity = targets.identity(target)

    def publish(outcome: Outcome) -> None:
        record = _record(outcome, options, runner, commit)
        database.publish(root, identity, outcome.task.key, {outcome.task.function: record})

    return publish


def _record(
    outcome: Outcome, options: Options, runner: Runner, commit: str | None
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
        kind="measured",
        commit=commit,
        versions=current_versions(),
        bytes=outcome.nbytes,
        read_gb_per_s=outcome.read_gb_per_s,
    )


def seeds(root: Path, target: Target, task: Task) -> Iterator[Mapping[str, Option]]:
    """Decisions of this target's records of a task's function for other kernel keys, and its own.

    They are where the search starts: what is best for 2 bits is seldom bad for 4.
    """
    identity = targets.identity(target)
    for each in (*database.roots().values(), root):
        for found in database.entries(each):
            record = found.records.get(task.function)
            if found.target == identity and record is not None and record.decisions:
                yield record.decisions


def problem(found: database.KernelRecords, record: database.Record) -> str | None:
    """Why a record cannot be used any more; None while its schedule gives the recorded hash."""
    try:
        recorded_schedule(record, found.key, targets.from_identity(found.target))
    except ValueError as error:  # StaleRecord, or a target that this TVM does not know
        return str(error)
    return None


def facts(target: Target, runner: Runner) -> dict[str, Any]:
    """What a journal's trials depend on beside their task."""
    return {
        "target": targets.identity(target),
        "runner": runner.method,
        "device": runner.device.name,
        "threads": runner.device.threads,
        "versions": current_versions(),
        "sources": sources_digest(),
    }


def remove_scratch(root: Path) -> int:
    """Remove built candidates and journals that were set aside; returns the bytes freed.

    A target that some process is tuning for is left alone. Journals stay: they hold results.
    """
    freed = 0
    for folder in (root / ".scratch").glob("*/"):
        locks = [FileLock(path) for path in folder.glob("*.lock")]
        try:
            for lock in locks:
                lock.acquire(timeout=0)
            for path in (*folder.glob("built-*/*"), *folder.glob("*.aside-*")):
                freed += path.stat().st_size
                path.unlink()
        except Timeout:
            continue
        finally:
            for lock in locks:
                lock.release()
    return freed
