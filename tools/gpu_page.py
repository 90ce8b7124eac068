"""Write docs/gpu.md and docs/gpu.png from what tools/gpu_check.py found and measured.

    .venv/bin/python tools/gpu_page.py

Needs matplotlib.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent.parent / "docs"
CHECKS, STEPS, MODELS, PAGE, PLOT = (
    DOCS / name
    for name in (
        "gpu-checks-h100.jsonl", "gpu-h100.jsonl", "gpu-decode-h100.jsonl", "gpu.md", "gpu.png",
    )
)  # fmt: skip
Record = dict[str, Any]
SHAPE = "kv_heads", "bits", "group_size"
HEAD = """# On an NVIDIA GPU

## A decode step

One layer's step (append, attention, merge) against the fastest of PyTorch's attention backends
(flash, cuDNN, memory-efficient; query heads given as heads or as rows of their KV head) on a
float16 cache with its new token written, both replayed in CUDA graphs of the layers of a model, or
so many more that their caches exceed the L2 cache, warmed up, and checked against float64 attention
first. D=128, 32 query heads. `attend` is timed in a graph of its own, where each begins while the
one before ends, as it does behind `append` in a step. "Share" is the rate at which it reads packed
memory over the bandwidth of a copy in the same run, read and written bytes counted; a read alone
can be faster than a copy.

![times faster than 16-bit attention against tokens](gpu.png)

"""
MODEL_HEAD = """
## Whole models at equal memory

Decoding with random weights of the shape of a model, bfloat16, as many sequences as fit in the
memory of the cache at their full length: bytes of a sequence as the cache itself counts them. The
16-bit cache is allocated exactly and written in place, or joined with every new token as
transformers' `DynamicCache` does. A step is the whole model in one CUDA graph; "rest" is the same
without attention and cache. The paper's setting is a prompt of 161 and an output of 338 tokens,
timed half way; pages hold 32 tokens there (`page_size=32`), of which such short sequences waste the
fewest, and 128 in the other.

"""
CHECK_HEAD = """
## What was checked

The tests of every operator against the reference, and of caches, with the kernels of this GPU; then
NVIDIA's compute-sanitizer on decode steps of both compute modes.

"""
FOOT = """
Made by

```sh
python tools/gpu_check.py FOLDER --commit NAME  # on the GPU; its three files are those of this page
.venv/bin/python tools/gpu_page.py
```

on {device}, driver {driver}, CUDA {cuda}, torch {torch}. {commits}
"""


def read(path: Path) -> list[Record]:
    """The measurements of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def title(record: Record) -> str:
    """Heads, bits and groups."""
    heads = f"H=32, H_kv={record['kv_heads']}"
    return f"{heads}, {record['bits']} bits, G={record['group_size']}"


def shapes(records: list[Record]) -> dict[str, list[Record]]:
    """Measurements by what `title` says of them."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(title(record), []).append(record)
    return found


def thousands(tokens: int) -> str:
    """Tokens as people say them."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def table(columns: tuple[tuple[str, str], ...], rows: list[list[str]]) -> str:
    """Cells as Markdown; a column has a title and an alignment."""
    lines = [[name for name, _ in columns], [align for _, align in columns], *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def step_tables(records: list[Record]) -> str:
    """A table per shape."""
    names = ("B", "tokens", "step, us", "peer, us", "times faster", "`attend`, us", "share")
    text = ""
    for name, found in shapes(records).items():
        rows = [
            [
                str(each["batch"]), thousands(each["tokens"]), f"{each['step_us']:.1f}",
                f"{each['peer_us']:.1f}", f"**{each['speedup']:.2f}**", f"{each['attend_us']:.1f}",
                f"{each['share_of_copy']:.2f}",
            ]
            for each in found
        ]  # fmt: skip
        schedule = " or ".join(dict.fromkeys(each["source"] for each in found))
        text += f"### {name}\n\n`attend` has its {schedule} schedule.\n\n"
        text += f"{table(tuple((each, '-:') for each in names), rows)}\n"
    return text.rstrip("\n") + "\n"


def model_table(records: list[Record]) -> str:
    """One row per cache."""
    columns = (
        ("model", "-"), ("tokens", "-:"), ("memory, GiB", "-:"), ("cache", "-"),
        ("bytes of a sequence", "-:"), ("sequences", "-:"), ("step, ms", "-:"),
        ("rest, ms", "-:"), ("tokens/s", "-:"), ("throughput", "-:"),
    )  # fmt: skip
    rows = [
        [
            each["model"], thousands(each["full_tokens"]), str(each["memory_bytes"] >> 30),
            each["cache"], f"{each['row_bytes'] / 1e6:.1f} MB", str(each["batch"]),
            f"{each['step_ms']:.1f}", f"{each['rest_ms']:.1f}", f"{each['tokens_per_s']:.0f}",
            f"**{each['throughput_ratio']:.2f}**",
        ]
        for each in records
    ]  # fmt: skip
    return table(columns, rows)


def check_table(records: list[Record]) -> str:
    """One row per check."""
    rows = [
        [
            each["check"], f"{each['tests']} tests" if "tests" in each else "compute-sanitizer",
            f"{each.get('failures', 0) + each['errors']}", f"{each['seconds']:.0f} s",
        ]
        for each in records
    ]  # fmt: skip
    return table((("check", "-"), ("of", "-"), ("failures", "-:"), ("took", "-:")), rows)


def commits(*measured: list[Record]) -> str:
    """What was measured at which commit."""
    names = [" and ".join(dict.fromkeys(x["commit"] for x in records)) for records in measured]
    if len(set(names)) == 1:
        return f"All of it is of commit {names[0]}."
    parts = zip(("Checks", "steps", "models"), names, strict=True)
    return ", ".join(f"{what} are of commit {name}" for what, name in parts) + "."


def page(checks: list[Record], steps: list[Record], models: list[Record]) -> str:
    """The whole page."""
    first = steps[0]
    about = {name: first[name] for name in ("device", "driver", "cuda")}
    foot = FOOT.format(
        torch=first["versions"]["torch"], commits=commits(checks, steps, models), **about
    )
    return (
        HEAD + step_tables(steps) + MODEL_HEAD + model_table(models)
        + CHECK_HEAD + check_table(checks) + foot
    )  # fmt: skip


def draw(records: list[Record], path: Path) -> None:
    """Times faster than the peer against tokens, a panel per shape, a line per batch."""
    panels = shapes(records)
    columns = 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(10.5, 3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True).flatten()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, found) in zip(grid, panels.items(), strict=False):
        for batch, marker in ((1, "o"), (8, "s"), (32, "^"), (256, "D")):
            line = [(each["tokens"], each["speedup"]) for each in found if each["batch"] == batch]
            axes.plot(*zip(*line, strict=True), marker=marker, label=f"batch {batch}")
        axes.axhline(1, color="0.5", linewidth=1)
        axes.set_xscale("log", base=2)
        ticks = sorted({each["tokens"] for each in records})
        axes.set_xticks(ticks, [thousands(each) for each in ticks])
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
    grid[0].set_ylim(0, 1.08 * max(each["speedup"] for each in records))
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.supylabel("times faster than 16-bit attention")
    figure.supxlabel("tokens")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    measured = read(STEPS)
    PAGE.write_text(page(read(CHECKS), measured, read(MODELS)), encoding="utf-8")
    draw(measured, PLOT)
