"""A table for people, one JSON object for programs, and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kivi_tvm.eval.compare import Options, Outcome
from kivi_tvm.pictures import save

COLUMNS = ("cache", "perplexity", "change", "top-1", "KL", "B/token", "MB")
SIMULATED = "*"


def to_json(outcomes: Sequence[Outcome], options: Options, model: str, text: str) -> dict[str, Any]:
    """Everything the table says, as plain data; a figure that is no finite number is None."""
    return {
        "command": "eval",
        "model": model,
        "text": text,
        "dtype": options.dtype,
        "prompt": options.prompt,
        "positions": options.positions,
        "group_size": options.group_size,
        "residual_length": options.residual_length,
        "compute": options.compute,
        "caches": [_plain(outcome) for outcome in outcomes],
    }


def _plain(outcome: Outcome) -> dict[str, Any]:
    setting = outcome.setting
    figures = {
        "perplexity": outcome.perplexity,
        "top1": outcome.agreement.top1,
        "kl": outcome.agreement.kl,
    }
    return {
        "name": outcome.name,
        "label": setting.label,
        "key_bits": setting.key_bits,
        "value_bits": setting.value_bits,
        "key_axis": setting.key_axis if setting.key_bits else None,
        "simulated": setting.is_simulated,
        **{name: x if math.isfinite(x) else None for name, x in figures.items()},
        "bytes_per_token": outcome.bytes_per_token,
        "held_bytes": outcome.held_bytes,
    }


def print_table(outcomes: Sequence[Outcome], options: Options, model: str, text: str) -> None:
    """One line per setting on stdout, and what the columns mean."""
    title = (
        f"{model}, {options.dtype}, {text}: {options.positions:,} tokens predicted one by one "
        f"after {options.prompt:,}; KIVI with G={options.group_size}, R={options.residual_length}"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "cache" else "right", no_wrap=True)
    for outcome in outcomes:
        table.add_row(*_row(outcome, outcomes[0]))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "change, top-1 (share of equal predictions), KL (mean, nats): against full precision; "
        "B/token: bytes of a token outside the window; MB: all that the cache held at the end"
    )
    if any(outcome.setting.is_simulated for outcome in outcomes):
        console.print(
            f"{SIMULATED} keys grouped per token, simulated in torch; B/token is computed"
        )


def _row(outcome: Outcome, full: Outcome) -> list[str]:
    held = outcome.held_bytes
    return [
        outcome.setting.label + SIMULATED * outcome.setting.is_simulated,
        f"{outcome.perplexity:.3f}",
        "" if outcome is full else f"{outcome.perplexity / full.perplexity - 1:+.1%}",
        f"{outcome.agreement.top1:.1%}",
        f"{outcome.agreement.kl:.4f}",
        f"{outcome.bytes_per_token:,.0f}",
        "" if held is None else f"{held / 1e6:.2f}",
    ]


def plot(outcomes: Sequence[Outcome], options: Options, model: str, path: Path) -> None:
    """Perplexity over bytes per token, and the divergence of each setting.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_perplexity(left, outcomes)
    _plot_divergence(right, outcomes[1:])
    figure.suptitle(
        f"{model}, {options.dtype}: {options.positions:,} tokens after {options.prompt:,}, "
        f"G={options.group_size}, R={options.residual_length}"
    )
    save(figure, path)


def _plot_perplexity(axes: Any, outcomes: Sequence[Outcome]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for i, outcome in enumerate(outcomes):
        at = outcome.bytes_per_token, outcome.perplexity
        axes.plot(*at, _marker(outcome), color=f"C{i}", label=outcome.setting.label)
    axes.axhline(outcomes[0].perplexity, color="C0", linestyle=":")
    axes.set(xscale="log", xlabel="bytes per token", ylabel="perplexity (lower is better)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend()


def _plot_divergence(axes: Any, outcomes: Sequence[Outcome]) -> None:
    for i, outcome in enumerate(outcomes):
        axes.plot(outcome.agreement.kl, outcome.setting.label, _marker(outcome), color=f"C{i + 1}")
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="mean KL from full precision, nats (lower is better)")
    axes.grid(alpha=0.3, which="both")


def _marker(outcome: Outcome) -> str:
    return "x" if outcome.setting.is_simulated else "o"
