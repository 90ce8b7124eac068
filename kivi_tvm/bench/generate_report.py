"""Table, Markdown page and plot of `bench generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kivi_tvm.bench.generate import GenerateRecord, LeftOut, Outcome
from kivi_tvm.bench.generate_cases import CHECKED_STEPS, FAMILIES, FULL_PRECISION
from kivi_tvm.pictures import save

COLUMNS = (
    "cache",
    "speed",
    "size",
    "tokens/s",
    "ms",
    "p20-p80",
    "prefill s",
    "MB",
    "peak MB",
    "KL",
    "error",
)
WIDTH = 120  # of tables, at least: rich takes 80 columns without a terminal and cuts numbers
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
NOTES = f"""\
quanto, hqq: transformers' QuantizedCache. speed and size: against DynamicCache in the same dtype,
1 being its own (speed: more is better, size: less). ms: the median decode step, fed the same tokens
whatever was predicted; all caches of a context, in every dtype, take turns of a few steps.
tokens/s: from that median, prefill excluded. prefill: one sample. MB: what the cache holds after
the last step (codes, scales, zeros, window, tables and scratch; tensors' storages). peak MB:
highest resident memory above the loaded model during the prompt / during decoding, each cache in a
process of its own. KL: mean over the first {CHECKED_STEPS} decode steps, nats, from
{FULL_PRECISION.name} in float32; above half of that of the model without a cache a result is wrong.
error: relative L2 of ours to the same algorithm in plain torch. A wrong result gets no time."""
PAGE_NOTES = """\
`QuantizedCache` quantizes everything anew once per residual length. With fewer decode steps than
that none is among its timed ones, which favours it. Steps read tokens beyond the context that is
named, also where that is the longest the model was trained for. `DynamicCache eager` prefills with
sdpa and decodes with transformers' eager attention."""


def print_outcome(outcome: Outcome) -> None:
    """One table per context, what was left out, and what the columns mean."""
    console = Console(width=max(WIDTH, Console().width), highlight=False)
    for group in _groups(outcome.records):
        table = Table(title=_title(group[0]), title_justify="left", box=SIMPLE)
        for column in COLUMNS:
            table.add_column(column, justify=_side(column), no_wrap=True)
        for record in group:
            table.add_row(*_row(record, group), style=None if record.passed else "red")
        console.print(table)
    for line in _left_out(outcome.left_out):
        console.print(line)
    console.print(_place(outcome.records[0]))
    console.print(" ".join(NOTES.split()))


def write_markdown(path: Path, outcome: Outcome, command: str) -> None:
    """Write the tables as one Markdown page that says how it was made."""
    lines = ["# Decode speed and memory of a model", ""]
    lines += [f"Written by `{command} --markdown FILE`.", "", NOTES, "", PAGE_NOTES]
    for group in _groups(outcome.records):
        lines += ["", f"## {_title(group[0])}", "", _markdown(COLUMNS)]
        lines += [_markdown(["---" if _side(x) == "left" else "--:" for x in COLUMNS])]
        lines += [_markdown(_row(record, group)) for record in group]
    lines += ["", "Settings:", ""]
    details = {(record.cache, record.context): record.detail for record in outcome.records}
    lines += [f"- {cache} at {context:,}: {text}" for (cache, context), text in details.items()]
    lines += ["", *_left_out(outcome.left_out)]
    versions = outcome.records[0].environment.versions.items()
    named = ", ".join(f"{name} {number}" for name, number in versions)
    lines += ["", f"{_place(outcome.records[0])}; {named}."]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _groups(records: Sequence[GenerateRecord]) -> list[list[GenerateRecord]]:
    """Records of one table: one context and one dtype."""
    groups: dict[tuple[int, str], list[GenerateRecord]] = {}
    for record in records:
        groups.setdefault((record.context, record.dtype), []).append(record)
    return list(groups.values())


def _title(record: GenerateRecord) -> str:
    tokens = f"{record.context:,} tokens, then {record.steps} decode steps"
    return f"{record.model}, {record.dtype}, {tokens}"


def _side(column: str) -> Any:
    return "left" if column == "cache" else "right"


def _row(record: GenerateRecord, group: Sequence[GenerateRecord]) -> list[str]:
    base = next((x for x in group if x.is_baseline), None)
    size = f"{record.bytes / base.bytes:.2f}x" if base else ""
    checked, timing, rate = record.check, record.timing, record.tokens_per_s
    errors = [f"{checked.kl:.4f}", "" if checked.error is None else f"{checked.error:.1e}"]
    held = f"{record.bytes / 1e6:.2f}"
    if timing is None or rate is None:
        return [record.cache, "wrong", size, "", "", "", "", held, "", *errors]
    against = base.tokens_per_s if base else None
    return [
        record.cache,
        f"{rate / against:.2f}x" if against else "",
        size,
        f"{rate:.1f}",
        f"{timing.p50_us / 1e3:.1f}",
        f"{timing.p20_us / 1e3:.1f}-{timing.p80_us / 1e3:.1f}",
        f"{record.prefill_s:.2f}",
        held,
        _peak(record),
        *errors,
    ]


def _peak(record: GenerateRecord) -> str:
    """The two peaks, or nothing where they were not measured."""
    peak = record.peak
    if peak is None or peak.peak_prefill_bytes is None or peak.peak_decode_bytes is None:
        return ""
    return f"{peak.peak_prefill_bytes / 1e6:.0f} / {peak.peak_decode_bytes / 1e6:.0f}"


def _left_out(left_out: Sequence[LeftOut]) -> list[str]:
    """One line per reason."""
    names: dict[str, list[str]] = {}
    for each in left_out:
        names.setdefault(each.reason, []).append(f"{each.cache} ({each.dtype})")
    return [f"Left out: {', '.join(found)}: {reason}." for reason, found in names.items()]


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _place(record: GenerateRecord) -> str:
    environment = record.environment
    commit = environment.commit or "unknown"
    return f"{environment.device}, {environment.threads} threads, commit {commit}"


def plot(records: Sequence[GenerateRecord], path: Path) -> None:
    """Speed and size of the cache over the context, both axes logarithmic.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines: dict[tuple[str, str], list[GenerateRecord]] = {}
    for record in records:
        if record.passed:
            lines.setdefault((record.cache, record.dtype), []).append(record)
    dtypes = list(dict.fromkeys(record.dtype for record in records))
    for group in lines.values():
        style = _style(group[0], dtypes)
        x = [record.context for record in group]
        left.plot(x, [record.tokens_per_s for record in group], **style)
        right.plot(x, [record.bytes / 1e6 for record in group], **style)
    _axes(left, records, "decode tokens/s (higher is better)")
    _axes(right, records, "MB that the cache holds (lower is better)")
    first = records[0]
    figure.suptitle(
        f"{first.model}: {first.environment.device}, {first.environment.threads} threads"
    )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    save(figure, path)


def _style(record: GenerateRecord, dtypes: Sequence[str]) -> dict[str, Any]:
    """A colour per kind of cache, full or hollow markers per bits, a dash per dtype."""
    at = dtypes.index(record.dtype)
    color = f"C{FAMILIES.index(record.family)}"
    return {
        "color": color,
        "linestyle": DASHES[at % len(DASHES)],
        "marker": MARKERS[at % len(MARKERS)],
        "markerfacecolor": "white" if record.bits == 4 else color,
        "label": f"{record.cache}, {record.dtype}",
    }


def _axes(axes: Any, records: Sequence[GenerateRecord], ylabel: str) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel=ylabel)
    axes.xaxis.set_major_locator(FixedLocator(sorted({record.context for record in records})))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(alpha=0.3)
