"""Tables and the plot of benchmark records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kivi_tvm.bench.peers import BASELINE
from kivi_tvm.bench.record import Record
from kivi_tvm.errors import UserError

COLUMNS = ("provider", "ms", "p20-p80", "MB read", "GB/s", "of read", f"x {BASELINE}", "error")


def print_attention(records: Sequence[Record]) -> None:
    """One table for the records of one workload in one state."""
    first = records[0]
    environment = first.environment
    table = Table(title=f"{first.op} {first.workload}, {first.state}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "provider" else "right")
    baseline = next((r.timing for r in records if r.provider == BASELINE), None)
    for record in records:
        table.add_row(*_row(record, baseline.p50_us if baseline else None))
    console = Console()
    console.print(table)
    console.print(
        f"{environment.device}, {environment.threads} threads; read bandwidth measured between "
        f"the calls: {first.read_gb_per_s:.1f} GB/s; commit {environment.commit or 'unknown'}",
        highlight=False,
    )


def _row(record: Record, baseline_us: float | None) -> list[str]:
    error = f"{record.error:.1e}"
    if record.timing is None:
        reason = f"failed: error {error} above {record.tolerance:.0e}"
        return [f"[red]{record.provider}: {reason}", *[""] * (len(COLUMNS) - 1)]
    timing, rate = record.timing, record.timing.gb_per_s(record.bytes)
    return [
        record.provider,
        f"{timing.p50_us / 1e3:.3f}",
        f"{timing.p20_us / 1e3:.3f}-{timing.p80_us / 1e3:.3f}",
        f"{record.bytes / 1e6:.2f}",
        f"{rate:.1f}",
        f"{rate / record.read_gb_per_s:.0%}",
        f"{baseline_us / timing.p50_us:.2f}" if baseline_us else "",
        error,
    ]


def plot_attention(records: Sequence[Record], path: Path) -> None:
    """Median time over tokens, one line per provider and state, both axes logarithmic.

    Raises
    ------
    UserError
        matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("`--plot` needs matplotlib: pip install 'kivi-tvm[bench]'") from error
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record.timing is not None:
            name = f"{record.provider} ({record.state})"
            lines.setdefault(name, []).append((record.tokens, record.timing.p50_us / 1e3))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="ms per decode")
    axes.set_title(f"{records[0].environment.device}, {records[0].environment.threads} threads")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
