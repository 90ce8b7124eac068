"""`kivi-tvm tune --emit`: compile candidates into a folder that measures itself elsewhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tvm.target import Target

from kivi_tvm.database_files import replace_text
from kivi_tvm.errors import UserError
from kivi_tvm.schedules.choices import Option
from kivi_tvm.tune import measure
from kivi_tvm.tune.builder import Builder
from kivi_tvm.tune.candidate import Candidate, Task
from kivi_tvm.tune.cases import make_case
from kivi_tvm.tune.cost import RandomCost
from kivi_tvm.tune.detached import CONTENT, Emitted, EmittedTask, Folder, facts, read_folder
from kivi_tvm.tune.outcome import Options
from kivi_tvm.tune.plan import Need, deal
from kivi_tvm.tune.search import Search
from kivi_tvm.tune.space import Space, explorer

README = "README.txt"
TEXT = """Candidates of kivi-tvm tune, to be measured on a device that only runs batch jobs.

On the device, in an environment with torch, numpy, apache-tvm-ffi and TVM's runtime library
(pip install apache-tvm, or name libtvm_runtime.so in KIVI_TVM_RUNTIME_LIBRARY):

    python measure.py batch .

It writes results.jsonl and may be cut off at any time: the same command goes on. Where the folder
came from, with results.jsonl copied back into it:

    kivi-tvm tune --collect DIR
"""
Say = Callable[[str], None]
Seeds = Callable[[Task], Iterable[Mapping[str, Option]]]


@dataclass(slots=True)
class _Share:
    """A task and the candidates that it has so far."""

    task: Task
    space: Space
    search: Search
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def need(self) -> Need:
        room = max(0, self.space.size().points - len(self.candidates))
        room = 0 if self.search.exhausted else max(room, 1)
        return Need(self.task.function, room, int(not self.candidates))


def emit(
    tasks: Sequence[Task],
    target: Target,
    directory: Path,
    options: Options,
    seeds: Seeds,
    say: Say,
    commit: str | None = None,
) -> Folder:
    """Fill a folder with compiled candidates, their cases and the script that measures them.

    There is no feedback while candidates are chosen: each function's default and the decisions of
    `seeds`, then random points. Libraries and cases that an earlier call left for the same code
    and target are kept; results of other candidates are moved aside, never deleted.

    Parameters
    ----------
    tasks : sequence of Task
        The important ones first.
    target : Target
    directory : Path
        Made if it does not exist.
    options : Options
        `trials` of all tasks together, `seed` and `rounds`.
    seeds : callable
        Decisions of the target's records for a task's function.
    say : callable
        Receives one line per step.
    commit : str or None

    Raises
    ------
    UserError
        The directory holds something else, or cannot be written.
    """
    kind = "cuda" if target.kind.name == "cuda" else "cpu"
    folder = Folder(facts(target), options.seed, options.trials, options.rounds, kind, commit)
    try:
        _prepare(directory, folder)
        shares = _chosen(tasks, target, options, seeds)
        say(f"compiling {sum(len(each.candidates) for each in shares)} candidates")
        with Builder(target, directory / "lib") as builder:
            emitted = tuple(_emit_task(each, directory, builder, say) for each in shares)
        return _finish(directory, replace(folder, tasks=emitted, complete=True), say)
    except OSError as error:
        raise UserError(
            f"`--emit` must be a directory that can be written, got {directory} ({error.strerror})"
        ) from error


def _prepare(directory: Path, folder: Folder) -> None:
    """Make the folder, and empty it of what was compiled from other code or for another target."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"`--emit` must be a directory, got the file {directory}")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / CONTENT).is_file():
        raise UserError(
            f"`--emit` must be an empty directory or one of an earlier --emit, got {directory}"
        )
    before = read_folder(directory) if (directory / CONTENT).is_file() else None
    if before is None or before.facts != folder.facts:
        if before is not None:
            _set_aside_results(directory)
            for path in (*directory.glob("lib/*.so"), *directory.glob("cases/*.pt")):
                path.unlink()
        directory.mkdir(parents=True, exist_ok=True)
        folder.write(directory)
    for name in ("lib", "cases"):
        (directory / name).mkdir(exist_ok=True)


def _chosen(tasks: Sequence[Task], target: Target, options: Options, seeds: Seeds) -> list[_Share]:
    """Deal the trials; what a small space leaves is dealt again."""
    shares = []
    for task in tasks:
        space = Space(explorer(task.function, task.key, target))
        search = Search(task, space, RandomCost(), options.seed, seeds(task))
        shares.append(_Share(task, space, search))
    left, before = options.trials, -1
    while before != left and (left > 0 or before == -1):
        before = left
        for share, n in zip(shares, deal(max(0, left), [share.need for share in shares])):
            found = share.search.propose(n)
            share.candidates += found
            left -= len(found)
    return shares


def _emit_task(share: _Share, directory: Path, builder: Builder, say: Say) -> EmittedTask:
    """Compile the candidates of a task and write its case."""
    builds = [builder.submit(each) for each in share.candidates]
    task, name = share.task, f"cases/{share.task.function}-{share.task.workload.id}.pt"
    case = make_case(task)
    if not (directory / name).exists():
        case.save(directory / name)
    emitted = []
    for built in (build.result() for build in builds):
        library = f"lib/{built.library.name}" if built.library else None
        emitted.append(Emitted(built.candidate, library, built.failure))
    say(f"{task.id}: {sum(each.library is not None for each in emitted)} candidates")
    return EmittedTask(
        task,
        name,
        case.nbytes,
        share.space.size(),
        share.search.exhausted,
        len(share.search.failures),
        tuple(emitted),
    )


def _finish(directory: Path, folder: Folder, say: Say) -> Folder:
    """Write the table of contents last: who finds it complete finds all that it names."""
    libraries = (each.library for task in folder.tasks for each in task.candidates)
    used = {*filter(None, libraries), *(task.case for task in folder.tasks)}
    files = {name: measure.sha256(directory / name) for name in sorted(used)}
    done = replace(folder, files=files)
    before = read_folder(directory)
    if before.to_dict() != done.to_dict() and (aside := _set_aside_results(directory)):
        say(f"results of other candidates are kept as {aside.name}")
    scratch = directory / f".measure.py.{os.getpid()}.tmp"
    shutil.copyfile(measure.__file__, scratch)
    os.replace(scratch, directory / "measure.py")
    replace_text(directory / README, TEXT)
    done.write(directory)
    return done


def _set_aside_results(directory: Path) -> Path | None:
    path = directory / measure.RESULTS
    if not path.exists():
        return None
    n = 1
    while (aside := path.with_name(f"results-{n}.jsonl")).exists():
        n += 1
    os.replace(path, aside)
    return aside
