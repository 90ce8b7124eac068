"""Measure candidates on this machine, in a process that they can only end for themselves."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from kivi_tvm.host import RUNTIME_LIBRARY_ENV, available_processors, find_runtime_library
from kivi_tvm.tune.candidate import Built, Failure, Measured, Task
from kivi_tvm.tune.cases import make_case
from kivi_tvm.tune.guard import Guard
from kivi_tvm.tune.measure import Worker, WorkerFailed, serve_command, worker_environment
from kivi_tvm.tune.runner import DeviceInfo

START_TIMEOUT_S = 120.0
Json = dict[str, Any]


class LocalRunner:
    """Checks and times candidates in a worker process (`measure.py serve`).

    Parameters
    ----------
    quiet : callable, optional
        Gives a context in which the machine is left to the timing, such as `Builder.paused`.
    threads : int, optional
        Of the kernels; by default one per processor.
    timeout_s : float
        For loading, checking and timing a candidate, each.
    device : str
        "cpu" or "cuda".
    """

    method = "local"
    in_turn = True

    def __init__(
        self,
        quiet: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        threads: int | None = None,
        timeout_s: float = 30.0,
        device: str = "cpu",
    ) -> None:
        self._quiet, self._timeout_s, self._kind = quiet, timeout_s, device
        self._environment = {
            **worker_environment(available_processors() if threads is None else threads),
            RUNTIME_LIBRARY_ENV: str(find_runtime_library()),
        }
        self._folder = Path(tempfile.mkdtemp(prefix="kivi-tvm-cases-"))
        self._cases: dict[Task, Path] = {}
        self._loaded: Task | None = None
        self._worker: Worker | None = None
        self._guard = Guard()
        self._guard.add_folder(self._folder)
        self.device = DeviceInfo(**self._ask({"do": "device"}))

    def measure(self, built: Sequence[Built]) -> list[Measured]:
        """Check each candidate against the reference, then time it; the order is kept."""
        return [self._measure(each) for each in built]

    def compare(self, built: Sequence[Built], rounds: int) -> list[Measured]:
        """Time candidates of one task in turn, so that a busy machine slows all of them alike.

        Raises
        ------
        ValueError
            The candidates are of several tasks, or `rounds` is less than 1.
        """
        if len({each.candidate.task.id for each in built}) > 1:
            raise ValueError("`built` must be candidates of one task, got several")
        if rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, got {rounds}")
        found = [self._check(each) for each in built]
        while left := [i for i, each in enumerate(found) if each.failure is None]:
            libraries = [str(built[i].library) for i in left]
            try:
                self._load(built[0].candidate.task)
                with self._quiet():
                    request = {"do": "compare", "libraries": libraries, "rounds": rounds}
                    answer = self._ask(request)
            except WorkerFailed as error:
                failure = {"kind": error.kind, "message": str(error)}
                answer = {"failure": failure, "culprit": error.at or 0}
            if "failure" not in answer:
                for i, times in zip(left, answer["times_us"]):
                    found[i] = replace(found[i], times_us=tuple(times))
                return found
            at = left[answer["culprit"]]
            found[at] = Measured(built[at].candidate, failure=Failure(**answer["failure"]))
        return found

    def read_gb_per_s(self) -> float:
        """Rate at which the device reads its memory, measured now."""
        with self._quiet():
            return float(self._ask({"do": "bandwidth"})["gb_per_s"])

    def close(self) -> None:
        """End the worker and remove the case files."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        self._guard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _measure(self, built: Built) -> Measured:
        found = self._check(built)
        if found.failure is not None:
            return found
        try:
            with self._quiet():
                answer = self._ask({"do": "time", "library": str(built.library)})
        except WorkerFailed as error:
            return Measured(built.candidate, failure=Failure(error.kind, str(error)))
        if "failure" in answer:
            return Measured(built.candidate, failure=Failure(**answer["failure"]))
        return replace(found, times_us=tuple(answer["times_us"]))

    def _check(self, built: Built) -> Measured:
        """The candidate without times, its error or its failure."""
        if built.failure is not None or built.library is None:
            missing = Failure("build", "there is no library")
            return Measured(built.candidate, failure=built.failure or missing)
        try:
            answer = self._load(built.candidate.task)
            if "failure" not in answer:
                answer = self._ask({"do": "check", "library": str(built.library)})
        except WorkerFailed as error:
            return Measured(built.candidate, failure=Failure(error.kind, str(error)))
        if "failure" in answer:
            return Measured(built.candidate, failure=Failure(**answer["failure"]))
        return Measured(built.candidate, (), answer["max_error"], answer["error_limit"])

    def _load(self, task: Task) -> Json:
        """Make the worker hold the task's case."""
        if self._loaded == task and self._worker is not None:
            return {}
        if task not in self._cases:
            path = self._folder / f"{len(self._cases)}.pt"
            make_case(task).save(path)
            self._cases[task] = path
        answer = self._ask({"do": "load", "case": str(self._cases[task])})
        self._loaded = None if "failure" in answer else task
        return answer

    def _ask(self, request: Json, timeout_s: float | None = None) -> Json:
        """An answer of the worker, which is started if there is none."""
        if self._worker is None:
            self._loaded = None
            self._worker = Worker(serve_command(self._kind), self._environment)
            self._guard.add(self._worker.process.pid)
            self._await(lambda worker: worker.receive(START_TIMEOUT_S))
        seconds = self._timeout_s if timeout_s is None else timeout_s
        return self._await(lambda worker: worker.ask(request, seconds))

    def _await(self, wait: Callable[[Worker], Json]) -> Json:
        worker = self._worker
        if worker is None:
            raise WorkerFailed("crash", "there is no worker")
        try:
            return wait(worker)
        except WorkerFailed:
            self._guard.remove(worker.process.pid)
            self._worker = None
            raise
