"""What a session found: a table for people and one JSON object for programs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kivi_tvm.tune.outcome import Options, Outcome, Result, geometric_mean
from kivi_tvm.tune.plan import MAIN_FUNCTION
from kivi_tvm.tune.progress import duration, failures_text, microseconds
from kivi_tvm.tune.runner import Runner

LOGGED_COLUMNS = 100  # in a file or a pipe, where no width is known
COLUMNS = ("trials", "space", "default us", "tuned us", "ratio", "of bound")


def print_table(result: Result, where: str) -> None:
    """One table per workload on stdout, geometric means, and what failed."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, LOGGED_COLUMNS)
    for workload in dict.fromkeys(each.task.workload for each in result.outcomes):
        table = Table(title=workload.id, title_justify="left", box=SIMPLE)
        table.add_column("function", no_wrap=True)
        for column in COLUMNS:
            table.add_column(column, justify="right", no_wrap=True)
        for outcome in result.outcomes:
            if outcome.task.workload == workload:
                table.add_row(outcome.task.function, *_row(outcome))
        console.print(table)
    for line in _lines(result, where):
        console.print(line, markup=False, soft_wrap=True)


def _row(outcome: Outcome) -> list[str]:
    counts = [str(outcome.trials), str(outcome.size) + "!" * outcome.exhausted]
    if outcome.error is not None:
        return [*counts, "-", "-", "-", "-"]
    return [
        *counts,
        microseconds(outcome.default_us),
        microseconds(outcome.tuned_us),
        f"{outcome.ratio:.2f}x",
        f"{outcome.bound_share:.1%}",
    ]


def _lines(result: Result, where: str) -> list[str]:
    found = [
        f"geometric mean {_means(result)}; {result.new_trials} trials in "
        f"{duration(result.seconds)}, {result.trials_per_minute:.0f} per minute",
        "of bound: time that the bytes of a call take at the measured read bandwidth, of tuned us; "
        "!: every program of the space was tried",
    ]
    if failed := sum((Counter(each.failures) for each in result.outcomes), Counter()):
        found.append(f"failed candidates: {failures_text(failed)}")
    found += [f"{x.task.id}: no result: {x.error}" for x in result.outcomes if x.error is not None]
    if result.stopped:
        found.append(f"{result.stopped}; the same command again goes on")
    if any(each.is_tuned for each in result.outcomes):
        found.append(f"published in {where}")
    return found


def _means(result: Result) -> str:
    main = [each for each in result.outcomes if each.task.function == MAIN_FUNCTION]
    of_main = f"{MAIN_FUNCTION} {geometric_mean(main):.3f}x, " if main else ""
    return f"{of_main}all {geometric_mean(result.outcomes):.3f}x"


def to_json(
    result: Result, options: Options, target: Mapping[str, Any], runner: Runner, where: str
) -> dict[str, Any]:
    """Everything the table says, as plain data; a figure that is no finite number is None."""
    return {
        "command": "tune",
        "target": dict(target),
        "device": asdict(runner.device),
        "runner": runner.method,
        "options": asdict(options),
        "published_in": where if any(each.is_tuned for each in result.outcomes) else None,
        "stopped": result.stopped or None,
        "new_trials": result.new_trials,
        "seconds": round(result.seconds, 3),
        "trials_per_minute": round(result.trials_per_minute, 2),
        "geometric_mean": geometric_mean(result.outcomes),
        "functions": [_plain(outcome) for outcome in result.outcomes],
    }


def _plain(outcome: Outcome) -> dict[str, Any]:
    ok = outcome.error is None
    figures = {
        "default_us": outcome.default_us,
        "tuned_us": outcome.tuned_us,
        "ratio": outcome.ratio if ok else math.nan,
        "bound_share": outcome.bound_share if ok else math.nan,
        "read_gb_per_s": outcome.read_gb_per_s,
    }
    return {
        "function": outcome.task.function,
        "workload": outcome.task.workload.id,
        "kernel_key": outcome.task.key.slug,
        "decisions": dict(outcome.decisions),
        "schedule_hash": outcome.schedule_hash or None,
        "trials": outcome.trials,
        "failures": dict(outcome.failures),
        "space": {"points": outcome.size.points, "exact": outcome.size.exact},
        "exhausted": outcome.exhausted,
        **{name: x if math.isfinite(x) else None for name, x in figures.items()},
        "max_error": outcome.max_error if ok else None,
        "error_limit": outcome.error_limit if ok else None,
        "bytes": outcome.nbytes if ok else None,
        "curve_us": [us if math.isfinite(us) else None for us in outcome.curve],
        "error": outcome.error,
    }
