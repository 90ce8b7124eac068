"""`kivi-tvm tune --list` and `--prune`: the records of a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kivi_tvm import database
from kivi_tvm.target_names import slug


def show(root: Path, as_json: bool) -> int:
    """Print every record below `root` and of the package; of the former also whether it holds."""
    found = [
        {**_plain(str(root), each, record), "stale": _stale(each, record)}
        for each in database.entries(root)
        for record in each.records.values()
    ]
    found += [
        _plain("package", each, record)
        for each in database.entries(database.package_dir())
        for record in each.records.values()
    ]
    if as_json:
        print(json.dumps({"command": "tune --list", "records": found}))
    elif found:
        _print_table(found)
    else:
        print(f"no tuning records in {root} or in the package")
    return 0


def _stale(found: database.KernelRecords, record: database.Record) -> str | None:
    from kivi_tvm.tune.records import stale

    try:
        return stale(found, record)
    except ValueError as error:
        return f"cannot be checked here ({error})"


def _plain(place: str, found: database.KernelRecords, record: database.Record) -> dict[str, Any]:
    return {"place": place, "target": slug(found.target), "kernels": found.key.slug} | (
        record.to_dict()
    )


def _print_table(found: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for each in found:
        groups.setdefault((each["place"], each["target"], each["kernels"]), []).append(each)
    for (place, target, kernels), records in groups.items():
        table = Table(title=f"{target} {kernels}\n{place}", title_justify="left", box=SIMPLE)
        table.add_column("function", no_wrap=True)
        for column in ("default us", "tuned us", "ratio", "trials"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("date", no_wrap=True)
        for each in records:
            times = each["default_us"], each["tuned_us"]
            table.add_row(
                each["function"],
                *(f"{us:,.1f}" for us in times),
                f"{times[0] / times[1]:.2f}x",
                str(each["trials"]),
                each["date"][:10],
            )
        console.print(table)
        for each in records:
            if each.get("stale"):
                console.print(f"stale: {each['function']}, {each['stale']}", markup=False)


def prune(root: Path, as_json: bool) -> int:
    """Remove records that are no longer used, damaged files and built candidates below `root`."""
    from kivi_tvm.tune.records import remove_scratch, surely_stale

    pruned = database.prune(root, surely_stale, leftovers=True)
    freed = remove_scratch(root)
    facts = {
        "command": "tune --prune",
        "records": [
            dict(zip(("target", "kernels", "function", "why"), each)) for each in pruned.records
        ],
        "files": [str(path) for path in pruned.leftovers],
        "scratch_bytes": freed,
    }
    if as_json:
        print(json.dumps(facts))
        return 0
    for target, kernels, function, why in pruned.records:
        print(f"removed {target} {kernels} {function}: {why}")
    for path in pruned.leftovers:
        print(f"removed {path}")
    print(
        f"{len(pruned.records)} records and {len(pruned.leftovers)} damaged files removed from "
        f"{root}; {freed / 1e6:.1f} MB of built candidates freed"
    )
    return 0
