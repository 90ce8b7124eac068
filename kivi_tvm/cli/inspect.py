"""`kivi-tvm inspect`: what an artifact holds; its library is never opened."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kivi_tvm.artifact import describe_artifact
from kivi_tvm.cli import COMMANDS
from kivi_tvm.errors import UserError
from kivi_tvm.manifest import Manifest, manifest_problems

if TYPE_CHECKING:
    from kivi_tvm.machine_code import KernelCode

DAMAGED_STATUS = 1
FIGURES = (
    ("registers", "registers"),
    ("shared", "shared_bytes"),
    ("local", "local_bytes"),
    ("spilled", "spilled_bytes"),
    ("threads", "threads"),
)
LOOP_COLUMNS = (
    *((f"LDG {bits}", bits) for bits in ("32", "64", "128")),
    ("LDS", "shared_loads"),
    ("MMA", "mma"),
    ("I2F", "int_to_float"),
    ("F2I", "float_to_int"),
    ("F2F", "float_to_float"),
    *((name, name) for name in ("logic", "integer", "other", "total")),
)


def add_parser(subparsers: Any) -> None:
    """Register the command and its options."""
    parser = subparsers.add_parser(
        "inspect",
        help=COMMANDS["inspect"],
        description=f"{COMMANDS['inspect']}. The library is not opened, and may be for another "
        "machine. The exit status is 1 if the library is not the one of its manifest.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="NAME.so, beside NAME.json")
    parser.add_argument(
        "--cuda",
        action="store_true",
        help="registers, memory, occupancy and the instructions of innermost loops, per kernel",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what the artifact holds as text or JSON."""
    manifest, damage = describe_artifact(args.file)
    facts = describe(args.file, manifest, damage)
    if args.cuda:
        facts["cuda"] = machine_code(args.file, manifest)
    print(json.dumps(facts, indent=2) if args.json else "\n".join(_lines(facts)))
    return DAMAGED_STATUS if damage else 0


def describe(path: Path, manifest: Manifest, damage: list[str]) -> dict[str, Any]:
    """What the manifest says, and whether it is true, as plain JSON data."""
    record = manifest.to_dict()
    names = ("kernel_key", "config", "target", "versions", "platform", "sha256", "size_bytes")
    return {
        "file": str(path),
        "kernels": manifest.key.slug,
        **{name: record[name] for name in names},
        "sources": record["sources"],
        "tuning": record["tuning"],
        "cpu_flags": record["cpu_flags"],
        "architecture": record["target"].get("arch") if _is_cuda(manifest) else None,
        "damage": damage,
        "not_for_this_machine": manifest_problems(manifest),
    }


def machine_code(path: Path, manifest: Manifest) -> dict[str, Any]:
    """Figures of every kernel's machine code, as plain JSON data."""
    from kivi_tvm.cuda_tools import cuda_code

    if not _is_cuda(manifest):
        kind = manifest.target.get("kind")
        raise UserError(
            f"`--cuda` is for artifacts of CUDA kernels; the target of {path} is {kind}"
        )
    code = cuda_code(path.read_bytes(), str(manifest.target["arch"]))
    return {"code_from": code.origin, "kernels": [kernel_facts(each) for each in code.kernels]}


def kernel_facts(kernel: KernelCode) -> dict[str, Any]:
    """A kernel's figures; `loops` are its innermost ones."""
    from kivi_tvm.occupancy import occupancy

    about = occupancy(kernel.architecture, kernel.threads, kernel.registers, kernel.shared_bytes)
    return {
        "kernel": kernel.name,
        "architecture": kernel.architecture,
        **{name: getattr(kernel, name) for _, name in FIGURES},
        "occupancy": about and about.to_dict(),
        "instructions": kernel.counts.to_dict(),
        "loops": [{"address": loop.address, **loop.counts.to_dict()} for loop in kernel.loops],
    }


def _is_cuda(manifest: Manifest) -> bool:
    return manifest.target.get("kind") == "cuda"


def _lines(facts: Mapping[str, Any]) -> list[str]:
    """The same facts for people."""
    target, sources = facts["target"], facts["sources"]
    needs = facts["architecture"] or " ".join(facts["cpu_flags"]) or "no special instructions"
    rows = [
        ("file", f"{facts['file']} ({facts['size_bytes'] / 1e3:.0f} kB)"),
        ("kernels", facts["kernels"]),
        ("target", " ".join(str(target[k]) for k in ("kind", "mcpu", "arch") if k in target)),
        ("needs", needs),
        ("platform", " ".join(filter(None, facts["platform"].values()))),
        ("versions", ", ".join(f"{name} {each}" for name, each in facts["versions"].items())),
        ("sha256", facts["sha256"] if not facts["damage"] else "NOT that of the file"),
    ]
    rows += [("damaged", problem) for problem in facts["damage"]]
    rows += [("not here", problem) for problem in facts["not_for_this_machine"]]
    rows += [(kernel, _source(kernel, facts)) for kernel in sources]
    lines = [f"{name:<18}{value}" for name, value in rows]
    return [*lines, *_code_lines(facts["cuda"])] if "cuda" in facts else lines


def _source(kernel: str, facts: Mapping[str, Any]) -> str:
    """Where a kernel's schedule is from."""
    if (record := facts["tuning"].get(kernel)) is None:
        return str(facts["sources"][kernel])
    times = f"{record['default_us']:.4g} to {record['tuned_us']:.4g} us"
    return f"tuned by {record['origin']} on {record['device']}, {record['date']}: {times}"


def _code_lines(code: Mapping[str, Any]) -> list[str]:
    origins = {
        "library": "machine code of the library",
        "source": "machine code that nvcc here makes of the library's source",
    }
    names = ["kernel", "arch", *(title for title, _ in FIGURES), "groups", "warps", "limited by"]
    figures = [names]
    loops = [["loop of", "arch", "at", *(title for title, _ in LOOP_COLUMNS)]]
    for kernel in code["kernels"]:
        head = [kernel["kernel"], kernel["architecture"]]
        figures.append(head + [str(kernel[name]) for _, name in FIGURES] + _occupancy(kernel))
        for loop in kernel["loops"]:
            counts = {**loop, **loop["global_loads"]}
            cells = [str(counts[name]) for _, name in LOOP_COLUMNS]
            loops.append([*head, f"{loop['address']:#x}", *cells])
    return ["", origins[code["code_from"]], *_table(figures), "", *_table(loops)]


def _occupancy(kernel: Mapping[str, Any]) -> list[str]:
    if (about := kernel["occupancy"]) is None:
        return ["?", "?", "?"]
    return [str(about["groups"]), f"{about['warps']}/{about['max_warps']}", about["limit"]]


def _table(rows: list[list[str]]) -> Iterable[str]:
    """Columns as wide as their cells: names on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [
            cell.ljust(width) if at < 2 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths))
        ]
        yield "  ".join(cells).rstrip()
