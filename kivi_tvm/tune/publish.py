"""Between a session and the database: records of winners, decisions of records, what is stale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from tvm.target import Target

from kivi_tvm import database, targets
from kivi_tvm.compile import schedule_hash, scheduled_function
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
        target = targets.from_identity(found.target)
        schedule = scheduled_function(record.function, found.key, target, record.decisions)
    except Exception as error:  # TVM raises several types, InternalError among them
        return f"its schedule fails ({type(error).__name__})"
    now = schedule_hash(record.function, schedule)
    return None if now == record.schedule_hash else "its schedule is another one now"
