"""Journals: one append-only file per task with every finished trial, so that none is lost."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from statistics import median_low
from typing import Any, Self

from filelock import FileLock, Timeout

from kivi_tvm.errors import UserError
from kivi_tvm.schedules.choices import Option
from kivi_tvm.tune.candidate import Failure, Measured, Task

FORMAT_VERSION = 1
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Trial:
    """One finished candidate as its journal keeps it.

    A schedule that failed is kept too, with an empty hash, but nothing was built or measured.
    """

    decisions: Mapping[str, Option]
    schedule_hash: str
    origin: str = "search"
    times_us: tuple[float, ...] = ()
    max_error: float | None = None
    error_limit: float | None = None
    failure: Failure | None = None
    build_s: float = 0.0
    default_us: float | None = None

    @classmethod
    def of(cls, measured: Measured, build_s: float) -> Trial:
        """The trial of a measured candidate."""
        c, m = measured.candidate, measured
        facts = m.times_us, m.max_error, m.error_limit, m.failure
        return cls(
            dict(c.decisions), c.schedule_hash, c.origin, *facts, build_s, measured.default_us
        )

    @property
    def us(self) -> float:
        """The median time; infinite for a failed candidate."""
        return median_low(self.times_us) if self.times_us else math.inf

    def us_beside(self, default_us: float) -> float:
        """The time on a machine on which the default takes `default_us`."""
        return self.us * default_us / self.default_us if self.default_us else self.us

    def to_json(self) -> str:
        failure = self.failure and {"kind": self.failure.kind, "message": self.failure.message}
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps({**fields, "decisions": dict(self.decisions), "failure": failure})

    @classmethod
    def from_json(cls, line: str) -> Trial:
        """The trial that `to_json` wrote; KeyError, TypeError or ValueError for anything else."""
        fields = json.loads(line)
        failure = Failure(**fields["failure"]) if fields["failure"] else None
        return cls(**{**fields, "times_us": tuple(fields["times_us"]), "failure": failure})


@dataclass(slots=True)
class Journal:
    """The file of one task, locked by this process.

    Attributes
    ----------
    path : Path
    trials : list of Trial
        What earlier runs finished, then what `append` was given.
    """

    path: Path
    lock: FileLock
    trials: list[Trial] = field(default_factory=list)

    def append(self, trials: Iterable[Trial]) -> None:
        """Add finished trials in one write, which a crash afterwards cannot take back."""
        new = list(trials)
        text = "".join(f"{trial.to_json()}\n" for trial in new)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.trials += new

    def close(self) -> None:
        """Let other processes write to the file."""
        self.lock.release()


class Journals:
    """The journals of one target, in one directory.

    Parameters
    ----------
    directory : Path
    facts : mapping of str to str or int
        What the trials depend on beside their task: code, versions, device. A file that was
        written under other facts is set aside.
    say : callable
        Receives one line for whatever the user should know.
    """

    def __init__(self, directory: Path, facts: Mapping[str, Any], say: Say) -> None:
        self._directory, self._facts, self._say = directory, dict(facts), say
        self._open: list[Journal] = []
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(directory, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for journal in self._open:
            journal.close()

    def open(self, task: Task) -> Journal:
        """The journal of a task with its finished trials.

        While another process writes to it, this one gets a file of its own, which later runs read.
        """
        name = f"{task.function}-{task.workload.id}"
        try:
            journal = self._lock(name)
            journal.trials = self._read(journal.path, self._header(task))
            journal.trials += self._beside(journal, name, self._header(task))
        except OSError as error:
            raise _unwritable(self._directory, error) from error
        self._open.append(journal)
        return journal

    def _beside(self, journal: Journal, name: str, header: Mapping[str, Any]) -> list[Trial]:
        """What processes that ran at the same time found, as far as `journal` does not have it."""
        known = {trial.schedule_hash for trial in journal.trials}
        found: dict[str, Trial] = {}
        for path in sorted(self._directory.glob(f"{name}*.jsonl")):
            if path.name != journal.path.name and re.fullmatch(r"(\.\d+)?", path.stem[len(name) :]):
                first, *lines = path.read_text(errors="replace").splitlines() or [""]
                if not _differences(first, header):
                    found |= {trial.schedule_hash: trial for trial in _parse(lines)}
        return [trial for digest, trial in found.items() if digest and digest not in known]

    def _lock(self, name: str) -> Journal:
        """The first file of this name that no other process writes to."""
        number = 0
        while True:
            number += 1
            path = self._directory / (f"{name}.jsonl" if number == 1 else f"{name}.{number}.jsonl")
            lock = FileLock(path.with_suffix(".lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            if number > 1:
                self._say(f"another process tunes {name}: this one keeps {path.name}")
            return Journal(path, lock)

    def _header(self, task: Task) -> dict[str, Any]:
        return {"format": FORMAT_VERSION, "task": task.id, "kernel": task.key.slug, **self._facts}

    def _read(self, path: Path, header: Mapping[str, Any]) -> list[Trial]:
        """The trials of a file with this header; it is begun anew if there is none."""
        lines = self._complete_lines(path)
        if lines and (different := _differences(lines[0], header)):
            aside = _free_name(path)
            os.replace(path, aside)
            self._say(f"{path.name} is of other {different}: kept as {aside.name}, begun anew")
            lines = []
        if not lines:
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")
            return []
        trials = list(_parse(lines[1:]))
        if len(trials) < len(lines) - 1:
            self._say(f"{path.name}: {len(lines) - 1 - len(trials)} damaged lines are left out")
        return trials

    def _complete_lines(self, path: Path) -> list[str]:
        """The lines of a file; a last one that a killed process left half written is cut off."""
        if not path.exists():
            return []
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(path, end)
            self._say(f"{path.name}: a half-written last line was dropped")
        return content[:end].decode("utf-8", errors="replace").splitlines()


def _parse(lines: Iterable[str]) -> Iterator[Trial]:
    for line in lines:
        try:
            yield Trial.from_json(line)
        except (KeyError, TypeError, ValueError):
            continue


def _differences(line: str, header: Mapping[str, Any]) -> str:
    """Names of what the first line of a file says otherwise, for people."""
    try:
        found = dict(json.loads(line))
    except (TypeError, ValueError):
        return "or no origin"
    names = [name for name in header if found.get(name) != json.loads(json.dumps(header[name]))]
    return ", ".join(names)


def _free_name(path: Path) -> Path:
    names = (path.with_suffix(f".aside-{number}") for number in count(1))
    return next(name for name in names if not name.exists())


def _unwritable(directory: Path, error: OSError) -> UserError:
    return UserError(
        f"`--log-dir` must be a directory that can be written, got {directory} ({error.strerror})"
    )
