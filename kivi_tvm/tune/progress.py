"""How a session goes: a live table on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Self

from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kivi_tvm.tune.outcome import Options, Outcome, Progress

OTHER_LINES = 8  # of a terminal, besides one per task
PREFIX = "kivi-tvm: "


def microseconds(us: float) -> str:
    """Four digits or so; a dash for what has no time."""
    if not math.isfinite(us):
        return "-"
    return f"{us:,.0f}" if us >= 1000 else f"{us:.3g}" if us < 100 else f"{us:.1f}"


def failures_text(failures: Mapping[str, int]) -> str:
    """For example `3 schedule, 1 wrong`."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(failures.items()))


def duration(seconds: float) -> str:
    """For example `4 min 05 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Display:
    """Shows a session; an `Observer`. Nothing is drawn while candidates are timed.

    Parameters
    ----------
    console : Console, optional
        By default of stderr.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._tasks: Sequence[Progress] = ()
        self._options = Options(trials=1)
        self._started = time.monotonic()
        # Redrawn after each batch only: a refreshing thread would disturb the timing.
        self._live = Live(console=self._console, auto_refresh=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def begin(self, tasks: Sequence[Progress], options: Options) -> None:
        """All tasks, which change later, before the first trial."""
        self._tasks, self._options = tasks, options
        self._started = time.monotonic()
        resumed = sum(task.resumed for task in tasks)
        spaces = sum(task.size.points > 1 for task in tasks)
        self.say(
            f"{options.trials} trials over {len(tasks)} functions, {spaces} of them with choices; "
            f"cost model {options.cost_model}, seed {options.seed}"
        )
        if resumed:
            self.say(f"{resumed} trials were finished by earlier runs")
        if self._console.is_terminal:
            self._live.start()
            self._draw()

    def changed(self, task: Progress) -> None:
        """A batch was measured, or the task's state is another."""
        if self._live.is_started:
            self._draw()
        elif task.state == "tuning":
            failed = failures_text(task.failures)
            self.say(
                f"{task.task.id}: {task.done}/{task.planned} trials, best "
                f"{microseconds(task.best_us)} us ({self._ratio(task)})"
                + (f", failed: {failed}" if failed else "")
                + f"; {self.pace()}"
            )

    def finished(self, outcome: Outcome) -> None:
        """A task's winner is known and published."""
        if outcome.error is not None:
            self.say(f"{outcome.task.id}: no result: {outcome.error}")
        elif not self._live.is_started:
            self.say(
                f"{outcome.task.id}: default {microseconds(outcome.default_us)} us, "
                f"tuned {microseconds(outcome.tuned_us)} us ({outcome.ratio:.2f}x)"
            )
        if self._live.is_started:
            self._draw()

    def say(self, message: str) -> None:
        """One line for the user."""
        self._console.print(f"{PREFIX}{message}", markup=False, soft_wrap=True)

    def pace(self) -> str:
        """Trials done, their rate, and the time left."""
        done = sum(task.done for task in self._tasks)
        new = done - sum(task.resumed for task in self._tasks)
        planned = sum(max(task.planned, task.done) for task in self._tasks)
        elapsed = time.monotonic() - self._started
        text = f"{done} of {planned} trials"
        left = math.inf
        if new:
            text += f", {60 * new / elapsed:.0f} per minute"
            left = (planned - done) * elapsed / new
        if self._options.time_budget_s is not None:
            left = min(left, max(0.0, self._options.time_budget_s - elapsed))
        return text + (f", about {duration(left)} left" if math.isfinite(left) else "")

    def _draw(self) -> None:
        self._live.update(self._picture(), refresh=True)

    def _picture(self) -> RenderableType:
        table = Table(box=SIMPLE)
        table.add_column("function", no_wrap=True)
        for column in ("trials", "default us", "best us", "ratio"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("failed")
        table.add_column("state", no_wrap=True)
        several = len({task.task.workload for task in self._tasks}) > 1
        for task in self._shown():
            table.add_row(
                task.task.id if several else task.task.function,
                f"{task.done}/{max(task.planned, task.done)}",
                microseconds(task.default_us),
                microseconds(task.best_us),
                self._ratio(task),
                failures_text(task.failures),
                task.state,
            )
        return Group(table, Text(self.pace()))

    def _shown(self) -> Sequence[Progress]:
        """The tasks around the one that is being tuned, as many as the terminal has lines."""
        room = max(1, self._console.height - OTHER_LINES)
        busy = [i for i, task in enumerate(self._tasks) if task.state in ("tuning", "comparing")]
        first = max(0, min((busy or [0])[0] - room // 2, len(self._tasks) - room))
        return self._tasks[first : first + room]

    @staticmethod
    def _ratio(task: Progress) -> str:
        ratio = task.default_us / task.best_us if math.isfinite(task.best_us) else math.nan
        return f"{ratio:.2f}x" if math.isfinite(ratio) else "-"
