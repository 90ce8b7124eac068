"""What tuning passes around: a task, its candidates, and what became of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

from kivi_tvm.config import KernelKey
from kivi_tvm.workloads import Workload

Option = int | str

# Why a candidate has no time. "wrong": its result differs from the reference.
FAILURE_KINDS = ("schedule", "build", "build timeout", "load", "wrong", "crash", "timeout")


@dataclass(frozen=True, slots=True)
class Task:
    """One compiled function to tune, on the shapes of one workload."""

    function: str  # a name in `ops.ALL_FUNCTIONS`
    workload: Workload

    @property
    def key(self) -> KernelKey:
        return self.workload.cfg.kernel_key()

    @property
    def id(self) -> str:
        """For example `attend B1-H32-Hkv8-T8192-D128-b2-G32`."""
        return f"{self.function} {self.workload.id}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to schedule a task's function.

    Parameters
    ----------
    task : Task
    decisions : mapping of str to int or str
        What is chosen otherwise than by default; empty for the default schedule.
    schedule_hash : str
        Of the scheduled function: candidates with equal hashes are the same program.
    origin : str
        "default", "record" (decisions of another kernel's record) or "search".
    """

    task: Task
    decisions: Mapping[str, Option]
    schedule_hash: str
    origin: str = "search"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a candidate was dropped; `kind` is one of `FAILURE_KINDS`."""

    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Built:
    """A candidate's library, or why there is none."""

    candidate: Candidate
    library: Path | None
    seconds: float
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """A candidate's times in microseconds, or why there are none.

    `default_us` is the default's median in the same rounds, where both were timed in turn: what a
    busy machine does to one it does to the other.

    `max_error` is its largest error against the reference relative to nothing but the reference's
    norm; 0 for functions whose results must be equal bit for bit.
    """

    candidate: Candidate
    times_us: tuple[float, ...] = ()
    max_error: float | None = None
    error_limit: float | None = None
    failure: Failure | None = None
    default_us: float | None = None

    @property
    def us(self) -> float:
        """The median time; infinite for a failed candidate."""
        return median_low(self.times_us) if self.times_us else float("inf")
