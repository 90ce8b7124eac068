"""Tuning curves as a picture: the best time so far over trials, relative to the default."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kivi_tvm.pictures import save
from kivi_tvm.tune.outcome import Outcome
from kivi_tvm.tune.plan import MAIN_FUNCTION

STYLES = ("-", "--", ":", "-.")
COLORS = 10  # of matplotlib's cycle
LABEL_INCHES = 0.21  # height of a line of the legend


def plot(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """Draw `attend` on the left and the other functions that have choices on the right.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    from matplotlib.figure import Figure

    curves = [x for x in outcomes if len(x.curve) > 1 and math.isfinite(x.curve[0])]
    main = [each for each in curves if each.task.function == MAIN_FUNCTION]
    others = [each for each in curves if each.task.function != MAIN_FUNCTION]
    panels = [(name, x) for name, x in ((MAIN_FUNCTION, main), ("other functions", others)) if x]
    labels = max((len(group) for _, group in panels), default=0)
    size = 5.5 * max(1, len(panels)), 4.5 + LABEL_INCHES * labels
    figure = Figure(figsize=size, layout="constrained")
    for axes, (name, group) in zip(
        figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels
    ):
        _draw(axes, name, group)
    figure.suptitle(title)
    save(figure, path)


def _draw(axes: Any, name: str, group: Sequence[Outcome]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    functions = list(dict.fromkeys(each.task.function for each in group))
    workloads = list(dict.fromkeys(each.task.workload.id for each in group))
    by_workload = len(functions) == 1
    for each in group:
        function = functions.index(each.task.function)
        workload = workloads.index(each.task.workload.id)
        # The first trial is the default.
        relative = [us / each.curve[0] for us in each.curve]
        color, style = (
            (workload % COLORS, workload // COLORS) if by_workload else (function, workload)
        )
        axes.step(
            range(1, len(relative) + 1),
            relative,
            where="post",
            color=f"C{color}",
            linestyle=STYLES[style % len(STYLES)],
            label=_label(each, by_workload, len(workloads) > 1),
        )
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(title=name, xlabel="trial", ylabel="best time so far, of the default's")
    axes.set_ylim(top=1.02)
    axes.grid(alpha=0.3)
    # Below, where it hides no curve.
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _label(outcome: Outcome, by_workload: bool, several: bool) -> str:
    if by_workload:
        return outcome.task.workload.id
    return outcome.task.id if several else outcome.task.function
