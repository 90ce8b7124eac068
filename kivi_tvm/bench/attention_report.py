"""The tables of `bench attention`: times beside peers, ratios in words, errors of compute modes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import isnan

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kivi_tvm.bench.accuracy import KINDS, Accuracy
from kivi_tvm.bench.provider import HALF, OURS, QUANTIZED
from kivi_tvm.bench.record import Record
from kivi_tvm.bench.report import WIDTH, ms, place
from kivi_tvm.workloads import Workload

COLUMNS = ("provider", "cache", "speed", "read", "ms", "p20-p80", "MB", "error")


def print_attention(records: Sequence[Record], left_out: Mapping[str, str]) -> None:
    """One table for the records of one workload in one state, and what it says in words."""
    first = records[0]
    table = Table(title=_title(first), title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    base = best(r for r in records if r.kind == HALF)
    for record in records:
        table.add_row(*_row(record, base))
    console = Console(width=max(WIDTH, Console().width), highlight=False)
    console.print(table)
    for line in [*summary(records), *_notes(records, base), *_left_out(left_out)]:
        console.print(line, markup=False, soft_wrap=True)


def best(records: Iterable[Record]) -> Record | None:
    """The fastest peer among `records` that was right."""
    right = [(r.timing.p50_us, r) for r in records if r.timing is not None and r.kind != OURS]
    return min(right, key=lambda pair: pair[0])[1] if right else None


def summary(records: Sequence[Record]) -> list[str]:
    """One sentence per provider of ours: ratios to the best peers and to the floor, then the time.

    Parameters
    ----------
    records : sequence of Record
        Of one workload in one state.
    """
    ragged = any(r.padded for r in records)
    wanted = {"16-bit": [r for r in records if r.kind == HALF]}
    if ragged:
        wanted = {"padded 16-bit": [r for r in wanted["16-bit"] if r.padded], **wanted}
    wanted["quantized"] = [r for r in records if r.kind == QUANTIZED]
    rivals = {name: best(group) for name, group in wanted.items()}
    fastest = best(records)
    if fastest is not None and fastest not in rivals.values():
        rivals["other"] = fastest
    return [_sentence(record, rivals) for record in records if record.kind == OURS]


def _sentence(record: Record, rivals: Mapping[str, Record | None]) -> str:
    if record.timing is None:
        return f"{label(record)} is wrong: error {record.error:.1e} above {record.tolerance:.0e}"
    time_us = record.timing.p50_us
    parts = [
        f"{rival.timing.p50_us / time_us:.1f}x the best {name} peer ({rival.provider})"
        for name, rival in rivals.items()
        if rival is not None and rival.timing is not None
    ]
    parts.append(
        f"{record.floor_us / time_us:.0%} of the floor of {ms(record.floor_us)} ms "
        f"({record.bytes / 1e6:.1f} MB at {record.read_gb_per_s:.1f} GB/s)"
    )
    return f"{label(record)} is {', '.join(parts)}; {ms(time_us)} ms"


def label(record: Record) -> str:
    """A provider's name; for ours the mode, whether "auto" takes it, and whose schedules."""
    if record.kind != OURS:
        return record.provider
    auto = "auto, " if record.auto else ""
    return f"kivi-tvm {record.compute} ({auto}{record.source})"


def _title(record: Record) -> str:
    w = record.workload
    rows = f", rows of {min(w.lengths)} to {max(w.lengths)} tokens" if w.lengths else ""
    return f"{record.op} {short_id(w)}{rows}, {record.state}"


def short_id(w: Workload) -> str:
    """The workload's name without the length of every row."""
    return replace(w, lengths=None).id


def _row(record: Record, base: Record | None) -> list[str]:
    error, start = f"{record.error:.1e}", [label(record), record.kind]
    if record.timing is None:
        return [*start, "[red]wrong", *[""] * (len(COLUMNS) - 4), f"[red]{error}"]
    timing, rate = record.timing, record.timing.gb_per_s(record.bytes)
    base_us = base.timing.p50_us if base is not None and base.timing is not None else None
    return [
        *start,
        f"{base_us / timing.p50_us:.2f}" if base_us else "",
        f"{rate / record.read_gb_per_s:.0%}",
        ms(timing.p50_us),
        f"{ms(timing.p20_us)}-{ms(timing.p80_us)}",
        f"{record.bytes / 1e6:.1f}",
        error,
    ]


def _notes(records: Sequence[Record], base: Record | None) -> list[str]:
    first = records[0]
    parts = [
        f"read: share of the {first.read_gb_per_s:.1f} GB/s at which memory was read in this run",
        "error: against attention on what each cache holds",
    ]
    if base is not None:
        parts.insert(0, f"speed: the best 16-bit peer ({base.provider}) is 1")
    if any(record.padded for record in records):
        parts.append("torch's rows are padded and masked")
    return ["; ".join(parts), place(first.environment)]


def _left_out(left_out: Mapping[str, str]) -> list[str]:
    """One line per reason."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    return [f"left out: {', '.join(group)}: {reason}" for reason, group in names.items()]


def print_accuracy(found: Sequence[Accuracy]) -> None:
    """Errors of compute modes, one row each, one column per kind of data."""
    first = found[0]
    title = f"error of decode by compute mode, {short_id(replace(first.workload, data='normal'))}"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for column in ("mode", *KINDS):
        table.add_column(column, justify="left" if column == "mode" else "right", no_wrap=True)
    rows: dict[str, dict[str, str]] = {}
    for each in found:
        name = each.compute + (" (auto)" if each.auto else "")
        share = "-" if isnan(each.share) else f"{100 * each.share:.2g}%"
        cell = f"{each.error:.1e} ({share})"
        rows.setdefault(name, {})[each.workload.data] = cell
    rows["quantization"] = {e.workload.data: f"{e.quantization_error:.1e}" for e in found}
    for name, cells in rows.items():
        table.add_row(name, *(cells[kind] for kind in KINDS))
    console = Console(width=max(WIDTH, Console().width), highlight=False)
    console.print(table)
    console.print(
        "relative L2 distance to the reference on the same codes, in brackets as a part of what "
        "quantization itself does (last row: reference against exact attention); both relative to "
        "the output, which is almost 0 for zero_mean",
        soft_wrap=True,
    )
