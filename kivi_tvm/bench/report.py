"""Tables of call overhead and of operations on a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kivi_tvm.bench.cache import OURS, CacheRecord
from kivi_tvm.bench.overhead import LIMIT_US, Overhead
from kivi_tvm.bench.record import Environment

CACHE_COLUMNS = ("operation", "MB", "ms", "p20-p80", "torch", "MB", "ms")
WIDTH = 100  # of tables, at least: rich takes 80 columns without a terminal and cuts numbers
CACHE_NOTES = """\
One layer, a cache of the tokens and half a window more. Every time is the median of calls on a copy
of its own, and each operation's result was checked in the same run: contents equal those of rows
picked by hand, or of a fresh cache, bit for bit; attention and prefill equal the reference. MB are
pages and windows newly in use (given back if negative), for `save` those of the file; pages that
rows share count once. A full pool grows by a 48th when an operation needs pages, and is copied for
it: `fork, full pool`, `repeat`. Beside: what transformers' `DynamicCache` does for the same purpose
to keys and values in full precision, in the model's dtype; for `decode` and `extend` without the
attention that ours includes. `extend` computes the queries of 16 tokens, however few there are."""


def ms(time_us: float) -> str:
    """Milliseconds in three digits, or all of the whole ones."""
    time_ms = time_us / 1e3
    return f"{time_ms:.0f}" if time_ms >= 1000 else f"{time_ms:.3g}"


def print_overhead(result: Overhead) -> None:
    """The overhead, the whole call and its kernels, in microseconds."""
    table = Table(title=f"one decode call, {result.workload}", title_justify="left")
    for column in ("us", "p50", "p20-p80"):
        table.add_column(column, justify="left" if column == "us" else "right")
    verdict = "below" if result.passed else "[red]NOT below"
    label = f"besides kernels, {verdict} {LIMIT_US:.0f}"
    for name, timing in ((label, result.overhead), ("whole call", result.call)):
        table.add_row(name, f"{timing.p50_us:.1f}", f"{timing.p20_us:.1f}-{timing.p80_us:.1f}")
    for name, time_us in result.kernels_us.items():
        table.add_row(f"kernel {name}", f"{time_us:.1f}", "")
    rest = result.call.p50_us - sum(result.kernels_us.values())
    table.add_row("whole call less kernels", f"{rest:.1f}", "")
    console = Console()
    console.print(table)
    environment = result.environment
    console.print(f"{environment.device}, {environment.threads} threads", highlight=False)


def print_cache(records: Sequence[CacheRecord]) -> None:
    """One table for the records of one workload: every operation beside its peer."""
    table = Table(title=_cache_title(records[0]), title_justify="left", box=SIMPLE)
    for i, column in enumerate(CACHE_COLUMNS):
        table.add_column(column, justify="left" if i in (0, 4) else "right", no_wrap=True)
    for row in _cache_rows(records):
        table.add_row(*row)
    console = Console(width=max(WIDTH, Console().width))
    console.print(table)
    console.print(place(records[0].environment), highlight=False)


def write_cache(path: Path, records: Sequence[CacheRecord], command: str) -> None:
    """Write the tables of all workloads as one Markdown page that says how it was made."""
    by_workload: dict[str, list[CacheRecord]] = {}
    for record in records:
        by_workload.setdefault(record.workload, []).append(record)
    environment = records[0].environment
    versions = ", ".join(f"{name} {number}" for name, number in environment.versions.items())
    written = f"Written by `{command} --markdown FILE`."
    lines = ["# What operations on a cache cost", "", written, "", CACHE_NOTES]
    for group in by_workload.values():
        lines += ["", f"## {_cache_title(group[0])}", "", _markdown(CACHE_COLUMNS)]
        lines += [_markdown(["---" if i in (0, 4) else "--:" for i in range(len(CACHE_COLUMNS))])]
        lines += [_markdown(row) for row in _cache_rows(group)]
    lines += ["", f"{place(environment)}; {versions}."]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cache_title(record: CacheRecord) -> str:
    return f"{record.workload}, rollback {record.rollback}"


def _cache_rows(records: Sequence[CacheRecord]) -> list[list[str]]:
    peers = {record.operation: record for record in records if record.provider != OURS}
    rows = []
    for record in records:
        if record.provider == OURS:
            peer = peers.get(record.operation)
            beside = ["", "", ""] if peer is None else _cache_cells(peer)[:2]
            if peer is not None:
                beside = [peer.provider.removeprefix("torch "), *beside]
            rows.append([record.operation, *_cache_cells(record), *beside])
    return rows


def _cache_cells(record: CacheRecord) -> list[str]:
    """Bytes, median and spread; no time for a wrong result."""
    if record.timing is None:
        return [f"{record.bytes / 1e6:.1f}", "wrong", ""]
    timing = record.timing
    spread = f"{ms(timing.p20_us)}-{ms(timing.p80_us)}"
    return [f"{record.bytes / 1e6:.1f}", ms(timing.p50_us), spread]


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def place(environment: Environment) -> str:
    """Processor, threads and commit."""
    commit = environment.commit or "unknown"
    return f"{environment.device}, {environment.threads} threads, commit {commit}"
