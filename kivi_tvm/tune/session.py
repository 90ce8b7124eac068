"""A tuning session: candidates are built while others are measured, winners published at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median_low
from types import FrameType
from typing import Protocol

from kivi_tvm.schedules.choices import Option
from kivi_tvm.tune.candidate import Built, Candidate, Measured, Task
from kivi_tvm.tune.cost import cost_model
from kivi_tvm.tune.journal import Journals
from kivi_tvm.tune.outcome import Observer, Options, Outcome, Progress, Result
from kivi_tvm.tune.plan import deal
from kivi_tvm.tune.runner import Runner
from kivi_tvm.tune.search import Search
from kivi_tvm.tune.space import Space
from kivi_tvm.tune.work import Work

# What a candidate must gain on the default to replace it: less is within the noise.
MIN_GAIN = 1.02
SEARCH_ROUNDS = 12  # of timing a batch in turn: enough to tell 5%
INTERRUPTED = "interrupted"


class Builds(Protocol):
    """What compiles candidates; `builder.Builder` is one."""

    def submit(self, candidate: Candidate) -> Future[Built]:
        """Compile in the background; what fails is in the `Built`."""
        ...


@dataclass(frozen=True, slots=True)
class Tools:
    """What a session works with.

    Parameters
    ----------
    builder : Builds
    runner : Runner
    journals : Journals
    observer : Observer
    space : callable
        The space of a task.
    seeds : callable
        Decisions that were best for a task's function under other kernel keys.
    publish : callable
        Makes an outcome's record permanent.
    nbytes : callable
        What a call on the task's workload must read and write.
    """

    builder: Builds
    runner: Runner
    journals: Journals
    observer: Observer
    space: Callable[[Task], Space]
    seeds: Callable[[Task], Iterable[Mapping[str, Option]]]
    publish: Callable[[Outcome], None]
    nbytes: Callable[[Task], int]


def tune(tasks: Sequence[Task], options: Options, tools: Tools) -> Result:
    """Tune `tasks`, the important ones first, and publish each winner as soon as it is known.

    Ctrl-C or the end of the time budget lets the batch in flight finish and publishes what there
    is of its task; a second Ctrl-C raises KeyboardInterrupt at once.
    """
    return _Session(tasks, options, tools).run()


@dataclass(frozen=True, slots=True)
class _Batch:
    work: Work
    builds: Sequence[Future[Built]]


class _Session:
    def __init__(self, tasks: Sequence[Task], options: Options, tools: Tools) -> None:
        self._options, self._tools = options, tools
        self._started = time.monotonic()
        self._stopped = ""
        self._bandwidth: float | None = None
        self._works = [self._work(task) for task in tasks]

    def _work(self, task: Task) -> Work:
        options, space = self._options, self._tools.space(task)
        model = cost_model(options.cost_model, options.seed)
        search = Search(task, space, model, options.seed, self._tools.seeds(task))
        return Work(Progress(task, space.size()), search, self._tools.journals.open(task))

    def run(self) -> Result:
        self._tools.observer.begin([work.progress for work in self._works], self._options)
        with self._interruptible():
            self._run_pipeline()
            for work in self._works:
                if work.outcome is None:
                    self._finish_untouched(work)
        new = sum(work.progress.done - work.progress.resumed for work in self._works)
        outcomes = [work.outcome for work in self._works if work.outcome is not None]
        return Result(outcomes, new, time.monotonic() - self._started, self._stopped)

    def _run_pipeline(self) -> None:
        """Measure batch after batch; while one is measured, the next is being built."""
        batches = self._batches()
        batch = next(batches, None)
        while batch is not None:
            following = next(batches, None)
            self._measure(batch)
            if self._stopped:
                for build in following.builds if following else ():
                    build.cancel()
                following = None
            if following is None or following.work is not batch.work:
                self._finish(batch.work)
            batch = following

    def _batches(self) -> Iterator[_Batch]:
        """Deal trials to tasks and propose them; what a small space leaves is dealt again."""
        left = self._options.trials - sum(work.progress.done for work in self._works)
        while True:
            works = [work for work in self._works if work.is_open]
            shares = deal(max(0, left), [work.need for work in works])
            for work, share in zip(works, shares):
                work.plan(share)
            before = left
            for i, (work, share) in enumerate(zip(works, shares)):
                deadline = self._deadline(share, sum(shares[i:]))
                for batch in self._batches_of(work, share, deadline):
                    left -= len(batch.builds)
                    yield batch
            if left == before or left < self._options.batch:
                return  # less than a batch is not worth another comparison

    def _batches_of(self, work: Work, share: int, deadline: float | None) -> Iterator[_Batch]:
        while share > 0 and work.is_open and not self._stopped:
            if deadline is not None and time.monotonic() > deadline:
                return
            work.progress.state = "tuning"
            candidates = work.propose(min(share, self._options.batch))
            if not candidates:
                return
            share -= len(candidates)
            yield _Batch(work, [self._tools.builder.submit(each) for each in candidates])

    def _deadline(self, share: int, left: int) -> float | None:
        """When a task's part of the time that is left ends."""
        budget = self._options.time_budget_s
        if budget is None or not share:
            return None
        now = time.monotonic()
        return now + max(0.0, self._started + budget - now) * share / left

    def _measure(self, batch: _Batch) -> None:
        built = [build.result() for build in batch.builds]
        ready = [each for each in built if each.failure is None]
        times = {each.candidate.schedule_hash: each.seconds for each in built}
        measured = [Measured(b.candidate, failure=b.failure) for b in built if b.failure]
        measured += self._timed(batch.work, ready) if ready else []
        if self._stopped:
            # Some job managers interrupt every process: a crash now says nothing of the candidate.
            measured = [m for m in measured if not m.failure or m.failure.kind != "crash"]
        order = {each.candidate.schedule_hash: i for i, each in enumerate(built)}
        measured.sort(key=lambda each: order[each.candidate.schedule_hash])
        batch.work.take(measured, times)
        self._tools.observer.changed(batch.work.progress)
        budget = self._options.time_budget_s
        if budget is not None and time.monotonic() - self._started > budget:
            self._stopped = self._stopped or "the time budget is used up"

    def _timed(self, work: Work, built: Sequence[Built]) -> list[Measured]:
        """Time a batch: on one device in turn with the default, whose time the others' go by."""
        runner = self._tools.runner
        if not runner.in_turn:
            return runner.measure(built)
        default = next((each for each in built if not each.candidate.decisions), work.default)
        if default is None and (candidate := work.default_candidate()):
            default = self._tools.builder.submit(candidate).result()
        if default is None or default.failure:
            return runner.measure(built)
        work.default = default
        others = [each for each in built if each is not default]
        beside, *found = runner.compare([default, *others], SEARCH_ROUNDS)
        if beside.failure is None:
            found = [replace(each, default_us=beside.us) for each in found]
        return [beside, *found] if len(others) < len(built) else found

    def _finish_untouched(self, work: Work) -> None:
        """All its trials are from earlier runs, or none was reached."""
        if self._stopped == INTERRUPTED:
            self._tools.observer.finished(work.finish(error="not reached"))
        else:
            self._finish(work)

    def _finish(self, work: Work) -> None:
        """Compare the best candidates with the default in turn, and publish the winner."""
        work.progress.state = "comparing"
        self._tools.observer.changed(work.progress)
        builds = [self._tools.builder.submit(each) for each in work.finalists()]
        built = [each for each in (build.result() for build in builds) if not each.failure]
        found = self._tools.runner.compare(built, self._options.rounds) if built else []
        right = [each for each in found if each.failure is None]
        default = next((each for each in right if not each.candidate.decisions), None)
        fields = self._result(default, right) if default else {"error": work.why_failed(found)}
        outcome = work.finish(**fields)
        if outcome.is_tuned:
            self._tools.publish(outcome)
        self._tools.observer.finished(outcome)

    def _result(self, default: Measured, found: Sequence[Measured]) -> dict[str, object]:
        if self._bandwidth is None:
            self._bandwidth = self._tools.runner.read_gb_per_s()
        nbytes = self._tools.nbytes(default.candidate.task)
        return result_fields(default, found, nbytes, self._bandwidth)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C end the session after the batch in flight, the second at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            if self._stopped == INTERRUPTED:
                raise KeyboardInterrupt
            self._stopped = INTERRUPTED
            self._tools.observer.say(
                "interrupted: the batch in flight is finished and what there is published "
                "(Ctrl-C again to stop at once)"
            )

        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def result_fields(
    default: Measured, found: Sequence[Measured], nbytes: int, read_gb_per_s: float
) -> dict[str, object]:
    """The fields of an `Outcome` that the final comparison decides."""
    best = max(found, key=lambda each: _gain(default, each))
    better = _gain(default, best) > MIN_GAIN and best.us < default.us
    winner = best if better else default
    return {
        "decisions": winner.candidate.decisions,
        "schedule_hash": winner.candidate.schedule_hash,
        "default_us": default.us,
        "tuned_us": winner.us,
        "max_error": winner.max_error or 0.0,
        "error_limit": winner.error_limit or 0.0,
        "nbytes": nbytes,
        "read_gb_per_s": read_gb_per_s,
    }


def _gain(default: Measured, found: Measured) -> float:
    """How many times faster than the default: the median over the rounds, each timed in turn."""
    return median_low([a / b for a, b in zip(default.times_us, found.times_us)])
