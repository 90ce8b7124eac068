"""`kivi-tvm tune --collect`: results of a folder that was measured elsewhere become records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

from tvm.target import Target

from kivi_tvm import targets
from kivi_tvm.compile import schedule_hash, scheduled_function
from kivi_tvm.errors import UserError
from kivi_tvm.tune import measure
from kivi_tvm.tune.candidate import Built, Candidate, Failure, Measured, Task
from kivi_tvm.tune.detached import EmittedTask, Folder, candidate_id, facts, read_folder
from kivi_tvm.tune.outcome import Options, Outcome, Result
from kivi_tvm.tune.publish import publisher
from kivi_tvm.tune.runner import DeviceInfo
from kivi_tvm.tune.session import result_fields

Json = dict[str, Any]


class DetachedRunner:
    """A `Runner` whose measurements were made before: what the lines of results say.

    Parameters
    ----------
    header : dict
        The first line.
    lines : sequence of dict
        The others.
    """

    method = "detached"
    in_turn = False  # the batch on the device decided that

    def __init__(self, header: Json, lines: Sequence[Json]) -> None:
        self.device = DeviceInfo(**header["device"])
        self._gb_per_s = float(header["read_gb_per_s"])
        self._measured = {line["id"]: line for line in lines if "id" in line}
        self._compared = {line["task"]: line for line in lines if "task" in line}

    def missing(self, built: Sequence[Built]) -> int:
        """How many candidates have no result."""
        return sum(candidate_id(each.candidate) not in self._measured for each in built)

    def is_compared(self, task: Task) -> bool:
        """Tell whether a task has its final comparison."""
        return task.id in self._compared

    def measure(self, built: Sequence[Built]) -> list[Measured]:
        """What was measured; KeyError for a candidate without a result."""
        return [self._line(each.candidate) for each in built]

    def compare(self, built: Sequence[Built], rounds: int) -> list[Measured]:
        """Those of the candidates that took part in the final comparison of their task."""
        found = []
        for each in built:
            line = self._compared[each.candidate.task.id]
            name, checked = candidate_id(each.candidate), self._line(each.candidate)
            if name in line["failed"]:
                failure = Failure(**line["failed"][name])
                found.append(Measured(each.candidate, failure=failure))
            elif name in line["compared"]:
                times = tuple(line["compared"][name])
                errors = checked.max_error, checked.error_limit
                found.append(Measured(each.candidate, times, *errors))
        return found

    def read_gb_per_s(self) -> float:
        """What was measured there."""
        return self._gb_per_s

    def close(self) -> None:
        """Nothing to let go of."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _line(self, candidate: Candidate) -> Measured:
        line = self._measured[candidate_id(candidate)]
        if "failure" in line:
            return Measured(candidate, failure=Failure(**line["failure"]))
        times = tuple(line["times_us"])
        return Measured(candidate, times, line["max_error"], line["error_limit"])


@dataclass(frozen=True, slots=True)
class Collected:
    """What came of a folder, and what is needed to report it."""

    result: Result
    options: Options
    target: Target
    runner: DetachedRunner


def collect(directory: Path, root: Path) -> Collected:
    """Publish the winners of all tasks whose results are complete.

    A task with missing results, or whose winner's schedule is another one now, has an `error` and
    no record.

    Parameters
    ----------
    directory : Path
        As `emit` made it, with the device's `results.jsonl`.
    root : Path
        Of the records.

    Raises
    ------
    UserError
        The folder or its results are damaged, or belong to other code or other candidates.
    """
    folder = read_folder(directory)
    if not folder.complete:
        raise UserError(f"emitting {directory} was cut off; run --emit again")
    target = _same_code(directory, folder)
    header, *lines = _results(directory / measure.RESULTS, folder)
    runner = DetachedRunner(header, lines)
    options = Options(folder.trials, seed=folder.seed, rounds=folder.rounds)
    # Compiled here, called there.
    there = {"tvm_ffi": header["versions"].get("apache-tvm-ffi") or "unknown"}
    publish = publisher(root, target, options, runner, folder.commit, there)
    outcomes = [_collect_task(each, target, runner, options, publish) for each in folder.tasks]
    measured = sum("id" in line for line in lines)
    seconds = float(sum(line["seconds"] for line in lines))
    return Collected(Result(outcomes, measured, seconds), options, target, runner)


def _same_code(directory: Path, folder: Folder) -> Target:
    """The target, if candidates emitted now would be the same."""
    target = targets.resolve(folder.facts["target"])
    now = facts(target)
    if other := [name for name in now if folder.facts.get(name) != now[name]]:
        raise UserError(
            f"{directory} was emitted with other {', '.join(other)} than there are now; "
            "emit and measure it again"
        )
    return target


def _results(path: Path, folder: Folder) -> list[Json]:
    """The lines of a results file that belongs to this folder."""
    try:
        lines = measure.parse_results(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist: run `python measure.py batch .` in the folder on the device"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path.parent}: {error}") from error
    if not lines:
        raise UserError(f"{path} holds no whole line: run measure.py again on the device")
    if lines[0].get("folder") != folder.to_dict()["checksum"]:
        raise UserError(f"{path} holds results of other candidates than {path.parent}")
    if (kind := lines[0]["device"]["kind"]) != folder.device:
        raise UserError(f"{path} must be of a {folder.device} device, got {kind}")
    return lines


def _collect_task(
    task: EmittedTask,
    target: Target,
    runner: DetachedRunner,
    options: Options,
    publish: Callable[[Outcome], None],
) -> Outcome:
    """The outcome of one task, published if it has a result."""
    built = [Built(e.candidate, Path(e.library), 0.0) for e in task.candidates if e.library]
    found = [Measured(e.candidate, failure=e.failure) for e in task.candidates if e.failure]
    if missing := runner.missing(built):
        fields: Json = {"error": f"{missing} of {len(built)} candidates are not measured yet"}
    elif built and not runner.is_compared(task.task):
        fields = {"error": "its best candidates are not compared with the default yet"}
    else:
        compared = runner.compare(built, options.rounds)
        failed = {m.candidate.schedule_hash: m for m in compared if m.failure}
        found += [failed.get(m.candidate.schedule_hash, m) for m in runner.measure(built)]
        fields = _fields(task, target, runner, compared, found)
    outcome = _outcome(task, found, fields)
    if outcome.is_tuned:
        publish(outcome)
    return outcome


def _fields(
    task: EmittedTask,
    target: Target,
    runner: DetachedRunner,
    compared: Sequence[Measured],
    found: Sequence[Measured],
) -> Json:
    """What the final comparison decides, or why it cannot."""
    right = [each for each in compared if each.failure is None]
    default = next((each for each in right if not each.candidate.decisions), None)
    if default is None:
        failures = (m.failure for m in (*compared, *found) if not m.candidate.decisions)
        why = next(filter(None, failures), Failure("load", "it is not among the candidates"))
        return {"error": f"the default failed: {why.kind}: {why.message}"}
    fields = result_fields(default, right, task.nbytes, runner.read_gb_per_s())
    name, key = task.task.function, task.task.key
    try:
        again = schedule_hash(name, scheduled_function(name, key, target, fields["decisions"]))  # type: ignore[arg-type]
    except Exception as error:  # TVM raises several types, InternalError among them
        return {"error": f"its schedule fails now ({type(error).__name__})"}
    if again != fields["schedule_hash"]:
        return {"error": f"its schedule gives {again} now, {fields['schedule_hash']} when emitted"}
    return fields


def _outcome(task: EmittedTask, found: Sequence[Measured], fields: Json) -> Outcome:
    failures = Counter(each.failure.kind for each in found if each.failure)
    if task.unschedulable:
        failures["schedule"] += task.unschedulable
    curve = tuple(accumulate((each.us for each in found), min))
    return Outcome(
        task.task, len(found), dict(failures), task.size, task.exhausted, curve, **fields
    )
