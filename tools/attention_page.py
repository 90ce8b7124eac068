"""Write docs/attention.md from docs/attention.jsonl, what `kivi-tvm bench attention` measured.

    python3 tools/attention_page.py [--check]

Standard library only, and the syntax of Python 3.9, as all tools here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
DATA, PAGE = DOCS / "attention.jsonl", DOCS / "attention.md"
MODES = ("int8", "int8x2", "float")
COLUMNS = (
    ("cache", "-"),
    ("state", "-"),
    ("auto is", "-"),
    ("best 16-bit peer", "-"),
    ("best quantized peer", "-"),
    *((f"{mode} / 16-bit / quantized / of floor", "-:") for mode in MODES),
)
HEAD = """# Decode attention beside its peers

One call of `decode` (append, attention over packed tokens and window) against one call of each
peer's decode attention on its own cache of the same tokens. Times are medians of interleaved calls
in one process, each checked before it is timed; "cold" turns through caches that together exceed
the last-level cache several times, as the layers of a model do, "warm" stays on one. A mode's cell
is its time, then how many times faster it is than the best 16-bit and the best quantized peer, then
the share of the floor: the bytes of the cache over the bandwidth at which memory was read in the
same run, which on this machine is about 33 GB/s at some times and 60 at others. Schedules are those
that a build takes: tuned where a record exists, else the default.

"""
FOOT = """
![time against tokens](attention.png)

Made by

```sh
kivi-tvm bench attention --output docs/attention.jsonl --plot docs/attention.png --tokens ...
python3 tools/attention_page.py
```

from {count} measurements on {device}, {threads} threads unless said, commits {commits};
{versions}. Errors are relative L2 distances to attention on what each cache holds;
`docs/attention.jsonl` has them, every peer and every spread.
"""


def read() -> list[dict[str, Any]]:
    """The measurements of attention, in the order of the file."""
    lines = DATA.read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["op"] == "decode_attention"]


def fastest(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The one with the least median time, of those that passed their check."""
    timed = [record for record in records if record["passed"]]
    return min(timed, key=lambda record: record["p50_us"], default=None)


def built(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What a build takes: tuned schedules if there are any."""
    timed = [record for record in records if record["passed"]]
    return min(timed, key=lambda record: record["source"] != "tuned", default=None)


def title(record: dict[str, Any]) -> str:
    """What was attended to."""
    bits = record["key_bits"]
    lengths = record["lengths"]
    tokens = f"100 ... {max(lengths)} tokens" if lengths else f"{record['tokens']} tokens"
    heads = f"H={record['num_heads']}, H_kv={record['num_kv_heads']}, D={record['head_dim']}"
    threads = "" if record["threads"] == 2 else f", {record['threads']} thread"
    batch = f"{record['batch_size']} x " if record["batch_size"] > 1 else ""
    return f"{batch}{tokens}, {heads}, {bits} bits, G={record['group_size']}{threads}"


def cell(
    ours: dict[str, Any] | None, half: dict[str, Any] | None, quantized: dict[str, Any] | None
) -> str:
    """A mode's time, its speed over both kinds of peers, and its share of the floor."""
    if ours is None:
        return ""
    parts = [f"{ours['p50_us'] / 1e3:.3g} ms"]
    parts += [
        f"{rival['p50_us'] / ours['p50_us']:.1f}x" if rival else "-" for rival in (half, quantized)
    ]
    return " / ".join([*parts, f"{100 * ours['floor_us'] / ours['p50_us']:.0f}%"])


def peer(record: dict[str, Any] | None) -> str:
    """A peer and its time."""
    return f"{record['provider']} {record['p50_us'] / 1e3:.3g} ms" if record else "-"


def rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """The cells of every workload and state."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((title(record), record["state"]), []).append(record)
    found = []
    for (name, state), group in groups.items():
        ours = [record for record in group if record["kind"] == "ours"]
        half, quantized = (
            fastest([record for record in group if record["kind"] == kind])
            for kind in ("16-bit", "quantized")
        )
        auto = next(record for record in ours if record["auto"])
        cells = [
            cell(built([r for r in ours if r["compute"] == mode]), half, quantized)
            for mode in MODES
        ]
        found.append([name, state, auto["compute"], peer(half), peer(quantized), *cells])
    return found


def page() -> str:
    """The whole page."""
    records = read()
    table = [[name for name, _ in COLUMNS], [side for _, side in COLUMNS], *rows(records)]
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    last = records[-1]
    versions = ",\n".join(f"{name} {version}" for name, version in last["versions"].items())
    foot = FOOT.format(
        count=len(records),
        device=last["device"],
        threads=2,
        commits=", ".join(sorted({record["commit"] for record in records})),
        versions=versions,
    )
    return HEAD + "\n".join(lines) + "\n" + foot


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
