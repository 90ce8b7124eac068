"""One task in a session: its search, its journal, and how far it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from kivi_tvm.tune.candidate import Built, Candidate, Failure, Measured
from kivi_tvm.tune.journal import Journal, Trial
from kivi_tvm.tune.outcome import Outcome, Progress
from kivi_tvm.tune.plan import Need
from kivi_tvm.tune.search import Search

FINALISTS = 5  # candidates that are compared with the default at the end
# Failures that are the candidate's own; others may have been the machine's and are tried again.
LASTING_FAILURES = ("schedule", "wrong")
# After this many trials without a single success a task is given up.
HOPELESS_TRIALS = 16


class Work:
    """The state of one task; trials of earlier runs count as done.

    Parameters
    ----------
    progress : Progress
    search : Search
    journal : Journal
    """

    def __init__(self, progress: Progress, search: Search, journal: Journal) -> None:
        self.progress, self._search, self._journal = progress, search, journal
        self._best: dict[str, tuple[float, Trial]] = {}
        self._default_failure: Failure | None = None
        self.outcome: Outcome | None = None
        self.default: Built | None = None  # beside which others are timed
        self._reported = 0
        self._proposed = 0
        for trial in journal.trials:
            if trial.failure and trial.failure.kind not in LASTING_FAILURES:
                continue
            if not trial.schedule_hash:
                self._search.tell_unschedulable(trial.decisions)
            self._count(trial)
        progress.resumed = progress.done
        self._proposed = progress.done

    @property
    def is_exhausted(self) -> bool:
        """Tell whether every program of the space was tried."""
        size = self.progress.size
        return self._search.exhausted or (size.exact and self._proposed >= size.points)

    @property
    def is_open(self) -> bool:
        """Tell whether further trials make sense."""
        hopeless = self.progress.done >= HOPELESS_TRIALS and not self._best
        return not (self.is_exhausted or hopeless or self._default_failure)

    @property
    def need(self) -> Need:
        """What it could use of the trials that are left."""
        room = max(1, self.progress.size.points - self._proposed)
        least = int(self._proposed == 0)  # the default is measured in any case
        return Need(self.progress.task.function, room, least)

    def plan(self, share: int) -> None:
        """Note how many more trials this task will have."""
        self.progress.planned = self._proposed + share

    def propose(self, n: int) -> list[Candidate]:
        """Up to `n` new candidates; schedules that failed on the way go to the journal."""
        found = self._search.propose(n)
        self._proposed += len(found)
        failed = self._search.failures[self._reported :]
        if failed:
            self._reported += len(failed)
            trials = [
                Trial(point.decisions, "", failure=Failure("schedule", point.failure or ""))
                for point in failed
            ]
            self._journal.append(trials)
            for trial in trials:
                self._count(trial)
        return found

    def take(self, measured: Sequence[Measured], build_s: Mapping[str, float]) -> None:
        """Note finished trials; `build_s` by schedule hash."""
        trials = [Trial.of(each, build_s[each.candidate.schedule_hash]) for each in measured]
        self._journal.append(trials)
        for trial in trials:
            self._count(trial)

    def finalists(self) -> list[Candidate]:
        """The default, then the best others."""
        ordered = [trial for _, trial in sorted(self._best.values(), key=lambda each: each[0])]
        default = [trial for trial in ordered if not trial.decisions]
        others = [trial for trial in ordered if trial.decisions][:FINALISTS]
        task = self.progress.task
        return [Candidate(task, t.decisions, t.schedule_hash, t.origin) for t in default + others]

    def default_candidate(self) -> Candidate | None:
        """The default, once it was measured."""
        return next((each for each in self.finalists() if not each.decisions), None)

    def why_failed(self, compared: Sequence[Measured] = ()) -> str:
        """Why there is no result: without its default a task has nothing to compare with."""
        failed = [each.failure for each in compared if not each.candidate.decisions]
        failure = next(filter(None, failed), self._default_failure)
        if failure is None:
            return "not reached"
        others = f"; {len(self._best)} others work" if self._best else ""
        return f"the default failed: {failure.kind}: {failure.message}{others}"

    def finish(self, **fields: object) -> Outcome:
        """The outcome with `fields`: those of a result, or `error`."""
        progress = self.progress
        self.outcome = Outcome(
            progress.task,
            progress.done,
            dict(progress.failures),
            progress.size,
            self.is_exhausted and progress.done >= self._proposed,
            tuple(progress.curve),
            **fields,  # type: ignore[arg-type]
        )
        progress.state = "done"
        return self.outcome

    def _count(self, trial: Trial) -> None:
        progress = self.progress
        if trial.failure is not None:
            progress.failures[trial.failure.kind] += 1
            if not trial.decisions:
                self._default_failure = trial.failure
        if not trial.schedule_hash:
            return
        if math.isfinite(trial.us) and not trial.decisions:
            progress.default_us = trial.us
        us = trial.us_beside(progress.default_us)
        self._search.tell(trial.decisions, trial.schedule_hash, us)
        if math.isfinite(us):
            self._best[trial.schedule_hash] = us, trial
        progress.curve.append(min(progress.best_us, us))
