"""Compile candidates in processes of their own, which stand still while others are timed."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from tvm.target import Target

from kivi_tvm import targets
from kivi_tvm.host import available_processors
from kivi_tvm.tune.candidate import Built, Candidate, Failure
from kivi_tvm.tune.guard import Guard
from kivi_tvm.tune.measure import Worker, WorkerFailed

START_TIMEOUT_S = 120.0  # importing TVM takes 3 s, on a busy machine a multiple
Job = tuple[Candidate, "Future[Built]"]


class Builder:
    """Compiles candidates to libraries, several at once.

    Parameters
    ----------
    target : Target
    directory : Path
        Receives `<schedule_hash>-<function>.so`; a library that is there is not compiled again.
    processes : int, optional
        Compile processes; by default one per processor.
    timeout_s : float
        For one candidate; time spent in `paused` does not count.
    """

    def __init__(
        self,
        target: Target,
        directory: Path,
        processes: int | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self._target = targets.as_dict(target)
        self._directory, self._timeout_s = directory, timeout_s
        directory.mkdir(parents=True, exist_ok=True)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._guard = Guard()
        self._pause = Pause()
        self._closed = False
        count = available_processors() if processes is None else processes
        self._lines = [
            threading.Thread(target=self._work, name=f"build-{n}", daemon=True)
            for n in range(count)
        ]
        for line in self._lines:
            line.start()

    def submit(self, candidate: Candidate) -> Future[Built]:
        """Compile a candidate; the result has its library or why there is none."""
        future: Future[Built] = Future()
        path = self.path(candidate)
        if path.exists():
            future.set_result(Built(candidate, path, 0.0))
        else:
            self._jobs.put((candidate, future))
        return future

    def path(self, candidate: Candidate) -> Path:
        """Where a candidate's library is."""
        name = f"{candidate.schedule_hash}-{candidate.task.function}.so"
        return self._directory / name

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop all compile processes, and the compilers they started, for this while."""
        with self._pause.held():
            yield

    @property
    def groups(self) -> list[int]:
        """Process groups of the compile processes."""
        return self._pause.groups

    def close(self) -> None:
        """End all compile processes; candidates that are not compiled yet never will be."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job[1].cancel()
        for _ in self._lines:
            self._jobs.put(None)
        self._guard.close()
        for line in self._lines:
            line.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _work(self) -> None:
        """One thread: a compile process and its candidates, one after the other."""
        worker: Worker | None = None
        while (job := self._jobs.get()) is not None:
            candidate, future = job
            if not future.set_running_or_notify_cancel():
                continue
            start = time.perf_counter()
            try:
                worker = worker or self._start()
                built = self._build(worker, candidate)
            except WorkerFailed as error:
                if worker is not None:
                    self._forget(worker)
                worker = None
                kind = "build timeout" if error.kind == "timeout" else "build"
                built = self._failed(candidate, start, Failure(kind, str(error)))
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
                built = self._failed(candidate, start, Failure("build", message))
            future.set_result(built)
        if worker is not None:
            worker.close()
            self._forget(worker)

    def _build(self, worker: Worker, candidate: Candidate) -> Built:
        path = self.path(candidate)
        if path.exists():
            return Built(candidate, path, 0.0)
        request = {
            "function": candidate.task.function,
            "workload": asdict(candidate.task.workload),
            "decisions": dict(candidate.decisions),
            "schedule_hash": candidate.schedule_hash,
            "target": self._target,
            "path": str(path),
        }
        start = time.perf_counter()
        answer = worker.ask(request, self._pause.deadline(self._timeout_s))
        if "failure" in answer:
            return self._failed(candidate, start, Failure(**answer["failure"]))
        return Built(candidate, path, answer["seconds"])

    def _failed(self, candidate: Candidate, start: float, failure: Failure) -> Built:
        return Built(candidate, None, time.perf_counter() - start, failure)

    def _start(self) -> Worker:
        """A compile process that is ready."""
        command = [sys.executable, "-P", "-m", "kivi_tvm.tune.compile_worker"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self._pause.starting() as add:
            if self._closed:
                raise WorkerFailed("crash", "the builder was closed")
            worker = Worker(command, environment)
            # first the guard: from `add` on the process may be stopped
            self._guard.add(worker.process.pid)
            add(worker.process.pid)
        try:
            worker.receive(self._pause.deadline(START_TIMEOUT_S))
        except WorkerFailed:
            self._forget(worker)
            raise
        return worker

    def _forget(self, worker: Worker) -> None:
        self._pause.remove(worker.process.pid)
        self._guard.remove(worker.process.pid)


class Pause:
    """Process groups that can be stopped and always go on."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._groups: set[int] = set()
        self._holders = 0
        self._since = 0.0
        self._total_s = 0.0
        self._going = threading.Condition(self._lock)

    @property
    def groups(self) -> list[int]:
        with self._lock:
            return sorted(self._groups)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """All groups are stopped meanwhile; none is added."""
        with self._lock:
            self._holders += 1
            if self._holders == 1:
                self._since = time.monotonic()
                self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._total_s += time.monotonic() - self._since
                    self._signal(signal.SIGCONT)
                    self._going.notify_all()

    @contextlib.contextmanager
    def starting(self) -> Iterator[Any]:
        """A process may be started: nothing is or gets stopped until its group was added."""
        with self._going:
            while self._holders:
                self._going.wait()
            yield self._groups.add

    def remove(self, group: int) -> None:
        """The group is gone."""
        with self._lock:
            self._groups.discard(group)

    def stopped_s(self) -> float:
        """Seconds for which the groups stood still so far."""
        with self._lock:
            now = time.monotonic() - self._since if self._holders else 0.0
            return self._total_s + now

    def deadline(self, seconds: float) -> Any:
        """What gives the seconds that are left from now on, pauses not counted."""
        start, stopped = time.monotonic(), self.stopped_s()

        def left() -> float:
            return start + seconds + self.stopped_s() - stopped - time.monotonic()

        return left

    def _signal(self, number: signal.Signals) -> None:
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)
