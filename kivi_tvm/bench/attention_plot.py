"""The plot of `bench attention`: time over tokens or whatever else varies, and the floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kivi_tvm.bench import sweep
from kivi_tvm.bench.attention_report import label
from kivi_tvm.bench.provider import HALF, OURS, QUANTIZED
from kivi_tvm.bench.record import Record
from kivi_tvm.pictures import save

NAMES = {
    "tokens": "tokens in the cache",
    "batch_size": "batch size",
    "queries_per_kv": "query heads per KV head",
    "head_dim": "head dimension",
    "bits": "bits per code",
    "group_size": "group size",
}
MODE_COLORS = {"int8": "#d62728", "int8x2": "#e377c2", "float": "#ff7f0e"}
FAMILY_COLORS = {
    "torch": "#1f77b4",
    "vllm": "#2ca02c",
    "onnxruntime": "#9467bd",
    "openvino": "#17becf",
}
STYLES = {HALF: "-", QUANTIZED: "--"}
MARKERS = "os^vDPX*<>"
MAX_COLUMNS = 3

Point = dict[str, int]


def plot_attention(records: Sequence[Record], path: Path) -> None:
    """Median time, both axes logarithmic, one panel per state and per value of other axes.

    Parameters
    ----------
    records : sequence of Record
        Of any number of workloads and states; those without a time are left out.
    path : Path
        Checked by `pictures.check_plot`.
    """
    from matplotlib.figure import Figure

    timed = [record for record in records if record.timing is not None]
    points = [sweep.values(record.workload) for record in timed]
    varying = [name for name in NAMES if len({point[name] for point in points}) > 1]
    across = varying[0] if varying else "tokens"
    panels = _panels(timed, points, varying[1:])
    columns = min(MAX_COLUMNS, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4 + 5 * columns, 1 + 4.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten().tolist()
    styles = _styles(timed)
    for axes, (title, inside) in zip(grid, panels.items(), strict=False):
        _draw(axes, inside, across, styles)
        axes.set_title(title, fontsize="medium")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    _legend(figure, grid)
    if records:
        first = records[0].environment
        title = f"decode attention, {first.device}, {first.threads} threads"
        figure.suptitle(title, x=0.02, horizontalalignment="left")
    save(figure, path)


def _panels(
    records: Sequence[Record], points: Sequence[Point], others: Sequence[str]
) -> dict[str, list[Record]]:
    """Records by state and by the values of `others`, under a title."""
    panels: dict[str, list[Record]] = {}
    for record, point in zip(records, points, strict=True):
        parts = [record.state, *(f"{NAMES[name]} {point[name]}" for name in others)]
        panels.setdefault(", ".join(parts), []).append(record)
    return panels


def _styles(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """How each provider is drawn: ours thick, peers by package (colour) and cache (dashes)."""
    styles: dict[str, dict[str, Any]] = {}
    families: dict[str, int] = {}
    for record in records:
        if record.provider in styles:
            continue
        if record.kind == OURS:
            color = MODE_COLORS.get(record.compute or "", "black")
            line = ":" if record.provider.endswith("-default") else "-"
            style = {"color": color, "linestyle": line, "linewidth": 3.5, "zorder": 3}
        else:
            family = record.provider.partition("-")[0]
            number = families[family] = families.get(family, -1) + 1
            line = STYLES.get(record.kind, "-.")
            style = {"color": FAMILY_COLORS.get(family, "gray"), "linestyle": line, "linewidth": 1}
            style |= {"marker": MARKERS[number % len(MARKERS)], "markersize": 5, "alpha": 0.85}
        same = [label(each) for each in records if each.provider == record.provider]
        style["label"] = " / ".join(dict.fromkeys(same))
        styles[record.provider] = {"marker": "o", "markersize": 7} | style
    return styles


def _draw(
    axes: Any, records: Sequence[Record], across: str, styles: dict[str, dict[str, Any]]
) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    floor: dict[int, float] = {}
    for record in records:
        if record.timing is None:
            continue
        x = sweep.values(record.workload)[across]
        lines.setdefault(record.provider, []).append((x, record.timing.p50_us / 1e3))
        if record.kind == OURS:
            floor[x] = record.floor_us / 1e3
    for name, line in lines.items():
        axes.plot(*zip(*sorted(line), strict=True), **styles[name])
    if floor:
        name = "memory floor of ours: bytes / read bandwidth"
        marker = "_" if len(floor) == 1 else None
        style = {"color": "black", "linewidth": 2, "marker": marker, "markersize": 14}
        axes.plot(*zip(*sorted(floor.items()), strict=True), label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel=NAMES[across], ylabel="ms per decode")
    ticks = sorted({x for line in lines.values() for x, _ in line})
    axes.set_xticks(ticks, [_short(tick) for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")


def _short(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else str(number)


def _legend(figure: Any, grid: Sequence[Any]) -> None:
    """One legend for all panels, ours and the floor first."""
    found: dict[str, Any] = {}
    for axes in grid:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    order = sorted(found, key=lambda name: not name.startswith(("kivi-tvm", "memory")))
    figure.legend(
        [found[name] for name in order], order, loc="outside right center", fontsize="small"
    )
