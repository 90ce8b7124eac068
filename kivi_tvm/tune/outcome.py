"""What a tuning session is asked for, what it shows meanwhile, and what comes of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kivi_tvm.schedules.choices import Option
from kivi_tvm.tune.candidate import Task
from kivi_tvm.tune.space import Size

BATCH = 8


@dataclass(frozen=True, slots=True)
class Options:
    """How long to tune, and how.

    Parameters
    ----------
    trials : int
        Of all tasks together, those of earlier runs included; failed ones count.
    time_budget_s : float or None
    seed : int
    cost_model : str
        A name in `cost.COST_MODELS`.
    batch : int
        Candidates that are built while as many are measured.
    rounds : int
        Of the final comparison.
    """

    trials: int
    time_budget_s: float | None = None
    seed: int = 0
    cost_model: str = "random"
    batch: int = BATCH
    rounds: int = 30


@dataclass(slots=True)
class Progress:
    """How far a task is; it changes while the session runs.

    `curve` is the best time after each trial, in microseconds (infinite before the first success).
    """

    task: Task
    size: Size
    planned: int = 0
    resumed: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    curve: list[float] = field(default_factory=list)
    default_us: float = math.inf
    state: str = "waiting"  # then "tuning", "comparing", "done"

    @property
    def done(self) -> int:
        """Finished trials, earlier runs' included."""
        return len(self.curve)

    @property
    def best_us(self) -> float:
        return self.curve[-1] if self.curve else math.inf


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a task.

    Parameters
    ----------
    task : Task
    decisions, schedule_hash
        Of the winner; no decisions where nothing beats the default.
    default_us, tuned_us : float
        Measured in turn in the final comparison; equal where the default is kept.
    max_error, error_limit : float
        Of the winner against the reference.
    trials : int
    failures : mapping of str to int
        Dropped candidates by kind of failure.
    size : Size
        Of the space.
    exhausted : bool
        Every program of the space was tried.
    curve : tuple of float
        Best microseconds after each trial.
    nbytes : int
        What a call must read and write.
    read_gb_per_s : float
        Measured memory bandwidth.
    error : str or None
        Why there is no result; nothing else than the counts holds then.
    """

    task: Task
    trials: int
    failures: Mapping[str, int]
    size: Size
    exhausted: bool
    curve: tuple[float, ...]
    decisions: Mapping[str, Option] = field(default_factory=dict)
    schedule_hash: str = ""
    default_us: float = math.inf
    tuned_us: float = math.inf
    max_error: float = 0.0
    error_limit: float = 0.0
    nbytes: int = 0
    read_gb_per_s: float = math.nan
    error: str | None = None

    @property
    def is_tuned(self) -> bool:
        """Tell whether there is something to publish: not if only the default was tried."""
        return self.error is None and self.trials > 1

    @property
    def ratio(self) -> float:
        """How many times faster than the default."""
        return self.default_us / self.tuned_us

    @property
    def bound_share(self) -> float:
        """Share of the memory bound: the time that the bytes alone would take, over `tuned_us`."""
        return self.nbytes / (self.read_gb_per_s * 1e3) / self.tuned_us


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a session; `stopped` says why it ended early, empty if it did not."""

    outcomes: Sequence[Outcome]
    new_trials: int
    seconds: float
    stopped: str = ""

    @property
    def trials_per_minute(self) -> float:
        return 60 * self.new_trials / self.seconds if self.seconds else 0.0


def geometric_mean(outcomes: Sequence[Outcome]) -> float:
    """Of the ratios of those that have one; 1 without any."""
    ratios = [math.log(each.ratio) for each in outcomes if each.error is None]
    return math.exp(sum(ratios) / len(ratios)) if ratios else 1.0


class Observer(Protocol):
    """Who is told how a session goes."""

    def begin(self, tasks: Sequence[Progress], options: Options) -> None:
        """All tasks, which change later, before the first trial."""

    def changed(self, task: Progress) -> None:
        """A batch was measured, or the task's state is another."""

    def finished(self, outcome: Outcome) -> None:
        """A task's winner is known and published."""

    def say(self, message: str) -> None:
        """One line for the user."""
