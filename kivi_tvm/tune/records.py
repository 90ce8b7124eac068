"""What tuning has left: `kivi-tvm tune --list` and `--prune`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kivi_tvm import database
from kivi_tvm.database import KernelRecords, Pruned, Record
from kivi_tvm.target_names import slug


def listing(log_dir: Path | None = None, check: bool = True) -> list[dict[str, Any]]:
    """Every record with its figures, as plain JSON data.

    Parameters
    ----------
    log_dir : Path, optional
        Default: the user's directory and the package's, in this order.
    check : bool
        Make every schedule again to see whether the record still holds; takes seconds for many.

    Returns
    -------
    list of dict
        `directory`, `target` and `kernel` (slugs), `function`, `workload`, `default_us`,
        `tuned_us`, `ratio` (default over tuned), `kind`, `date`, `device`, and `stale`: why the
        record is not used, or None.
    """
    roots = database.roots() if log_dir is None else {str(log_dir): Path(log_dir)}
    return [
        {"directory": name, **_row(found, record, check)}
        for name, root in roots.items()
        for found in database.entries(root)
        for record in found.records.values()
    ]


def print_listing(rows: list[dict[str, Any]]) -> None:
    """The listing as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not rows:
        console.print("no tuning records")
    for (directory, target, device, kernel), group in _groups(rows).items():
        title = f"{directory}: {target} ({device})\n{kernel}"
        table = Table(title=title, title_justify="left")
        for name in ("function", "default us", "tuned us", "ratio", "kind", "date"):
            table.add_column(name, justify="right" if "us" in name or name == "ratio" else "left")
        for row in group:
            table.add_row(*_cells(row))
        console.print(table)
        for row in group:
            if row["stale"]:
                console.print(f"stale {row['function']}: {row['stale']}", markup=False)


def prune(
    log_dir: Path | None = None,
    target: str | None = None,
    kernel: str | None = None,
    leftovers: bool = False,
) -> Pruned:
    """Remove the records that no longer hold, or those that are named.

    Parameters
    ----------
    log_dir : Path, optional
        Default: the user's directory.
    target, kernel : str, optional
        Slugs as `listing` gives them. With one or both, all records of that name are removed,
        also those that hold.
    leftovers : bool
        Remove damaged files that were set aside.

    Raises
    ------
    UserError
        The directory can not be written.
    """
    root = database.user_dir() if log_dir is None else Path(log_dir)
    problem = stale if target is None and kernel is None else _named(target, kernel)
    return database.prune(root, problem, leftovers)


def stale(found: KernelRecords, record: Record) -> str | None:
    """Why a record no longer holds, or None."""
    from kivi_tvm import targets
    from kivi_tvm.compile import StaleRecord, recorded_schedule

    try:
        recorded_schedule(record, found.key, targets.from_identity(found.target))
    except (StaleRecord, ValueError) as error:
        return str(error)
    return None


def _row(found: KernelRecords, record: Record, check: bool) -> dict[str, Any]:
    summary = record.summary()
    names = ("function", "workload", "default_us", "tuned_us", "kind", "date", "device")
    return {
        "target": slug(found.target),
        "kernel": found.key.slug,
        **{name: summary[name] for name in names},
        "ratio": record.default_us / record.tuned_us,
        "stale": stale(found, record) if check else None,
    }


def _groups(rows: list[dict[str, Any]]) -> Mapping[tuple[str, ...], list[dict[str, Any]]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        group = row["directory"], row["target"], row["device"], row["kernel"]
        groups.setdefault(group, []).append(row)
    return groups


def _cells(row: Mapping[str, Any]) -> list[str]:
    kind = "stale" if row["stale"] else row["kind"]
    return [
        row["function"],
        f"{row['default_us']:,.1f}",
        f"{row['tuned_us']:,.1f}",
        f"{row['ratio']:.2f}x",
        kind,
        row["date"][:10],
    ]


def _named(target: str | None, kernel: str | None) -> Callable[[KernelRecords, Record], str | None]:
    def problem(found: KernelRecords, record: Record) -> str | None:
        if target in (None, slug(found.target)) and kernel in (None, found.key.slug):
            return "named"
        return None

    return problem
