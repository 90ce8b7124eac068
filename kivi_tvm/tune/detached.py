"""The folder that carries candidates to a device that only runs batch jobs: `candidates.json`.

`emit` writes it, `measure.py batch` reads it there, and `collect` compares the results with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tvm.target import Target

from kivi_tvm import targets
from kivi_tvm.cache_key import sources_digest
from kivi_tvm.database_files import replace_text
from kivi_tvm.errors import UserError
from kivi_tvm.manifest import current_versions
from kivi_tvm.ops import ALL_FUNCTIONS
from kivi_tvm.tune.candidate import Candidate, Failure, Task
from kivi_tvm.tune.cases import CASE_SOURCES
from kivi_tvm.tune.space import Size
from kivi_tvm.tuning_record import checksum, json_text
from kivi_tvm.workloads import Workload

FORMAT_VERSION = 2
CONTENT = "candidates.json"
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Emitted:
    """A candidate and its library below the folder, or why there is none."""

    candidate: Candidate
    library: str | None
    failure: Failure | None = None

    @property
    def id(self) -> str:
        return candidate_id(self.candidate)


@dataclass(frozen=True, slots=True)
class EmittedTask:
    """The candidates of a task.

    Parameters
    ----------
    task : Task
    case : str
        Its case file below the folder.
    nbytes : int
        What a call must read and write.
    size : Size
        Of its space.
    exhausted : bool
        All of its space is there.
    unschedulable : int
        Points that were tried and could not be scheduled.
    candidates : tuple of Emitted
        The default first.
    """

    task: Task
    case: str
    nbytes: int
    size: Size
    exhausted: bool
    unschedulable: int
    candidates: tuple[Emitted, ...]


@dataclass(frozen=True, slots=True)
class Folder:
    """All that a folder's `candidates.json` says.

    Parameters
    ----------
    facts : dict
        `facts` of the target: what must be the same when results are collected.
    seed, trials, rounds : int
    device : str
        "cpu" or "cuda".
    commit : str or None
    tasks : tuple of EmittedTask
    files : mapping of str to str
        SHA-256 of libraries and cases.
    complete : bool
        Not while candidates are still being compiled.
    """

    facts: Json
    seed: int
    trials: int
    rounds: int
    device: str
    commit: str | None
    tasks: tuple[EmittedTask, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    complete: bool = False

    def to_dict(self) -> Json:
        """Plain data with its checksum."""
        names = ("facts", "seed", "trials", "rounds", "device", "commit", "files", "complete")
        content: Json = {name: getattr(self, name) for name in names}
        content["format_version"] = FORMAT_VERSION
        content["tasks"] = [
            {
                "function": each.task.function,
                "workload": asdict(each.task.workload),
                "case": each.case,
                "nbytes": each.nbytes,
                "size": asdict(each.size),
                "exhausted": each.exhausted,
                "unschedulable": each.unschedulable,
            }
            for each in self.tasks
        ]
        content["candidates"] = [_plain(each, e) for each in self.tasks for e in each.candidates]
        content = json.loads(json.dumps(content))
        return {**content, "checksum": checksum(content)}

    def write(self, directory: Path) -> None:
        """Replace the directory's `candidates.json` as a whole."""
        replace_text(directory / CONTENT, json_text(self.to_dict()))


def candidate_id(candidate: Candidate) -> str:
    """What its line of results is found by."""
    return f"{candidate.task.id} {candidate.schedule_hash}"


def facts(target: Target) -> Json:
    """What candidates for a target depend on."""
    versions = current_versions()
    return {
        "target": targets.as_dict(target),
        "versions": {name: versions[name] for name in ("kivi_tvm", "tvm")},
        "sources": sources_digest(names=CASE_SOURCES),
    }


def read_folder(directory: Path) -> Folder:
    """What `Folder.write` wrote.

    Raises
    ------
    UserError
        It is no such folder, it is damaged, or another version wrote it.
    """
    path = directory / CONTENT
    try:
        content = json.loads(path.read_bytes())
        stated = content.pop("checksum")
        if content["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path} must have `format_version` {FORMAT_VERSION}, got "
                f"{content['format_version']}: another version wrote it, so emit to a new directory"
            )
        if stated != checksum(content):
            raise UserError(f"{path} is damaged: its checksum does not hold")
        return _parse(content)
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"{directory} must be a folder of `tune --emit`, got no {CONTENT} ({error.strerror})"
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _plain(task: EmittedTask, each: Emitted) -> Json:
    candidate = each.candidate
    return {
        "id": each.id,
        "task": task.task.id,
        "function": task.task.function,
        "decisions": dict(candidate.decisions),
        "schedule_hash": candidate.schedule_hash,
        "origin": candidate.origin,
        "library": each.library,
        "case": task.case,
        "failure": asdict(each.failure) if each.failure else None,
    }


def _parse(content: Json) -> Folder:
    names = ("facts", "seed", "trials", "rounds", "device", "commit", "files", "complete")
    tasks = tuple(_parse_task(fields, content["candidates"]) for fields in content["tasks"])
    return Folder(**{name: content[name] for name in names}, tasks=tasks)


def _parse_task(fields: Json, candidates: Iterable[Json]) -> EmittedTask:
    function = fields["function"]
    if function not in ALL_FUNCTIONS:
        raise ValueError(f"`function` must be one of {sorted(ALL_FUNCTIONS)}, got {function!r}")
    lengths = fields["workload"].pop("lengths")
    workload = Workload(**fields["workload"], lengths=tuple(lengths) if lengths else None)
    task = Task(function, workload)
    return EmittedTask(
        task,
        fields["case"],
        fields["nbytes"],
        Size(**fields["size"]),
        fields["exhausted"],
        fields["unschedulable"],
        tuple(_parse_candidate(task, each) for each in candidates if each["task"] == task.id),
    )


def _parse_candidate(task: Task, each: Json) -> Emitted:
    failure = Failure(**each["failure"]) if each["failure"] else None
    candidate = Candidate(task, each["decisions"], each["schedule_hash"], each["origin"])
    return Emitted(candidate, each["library"], failure)
