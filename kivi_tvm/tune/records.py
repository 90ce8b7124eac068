"""What tuning leaves behind, and which of it can go: `kivi-tvm tune --prune`."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from kivi_tvm import targets
from kivi_tvm.compile import StaleRecord, recorded_schedule
from kivi_tvm.database import KernelRecords, Record


def stale(found: KernelRecords, record: Record) -> str | None:
    """Why a record cannot be used any more; None while its schedule gives the recorded hash.

    Raises
    ------
    ValueError
        Nothing can be scheduled for its target here, so that nobody can tell.
    """
    target = targets.from_identity(found.target)
    targets.check_schedulable(target)
    try:
        recorded_schedule(record, found.key, target)
    except StaleRecord as error:
        return str(error)
    return None


def surely_stale(found: KernelRecords, record: Record) -> str | None:
    """As `stale`, and None too where nobody can tell: what `--prune` may remove."""
    try:
        return stale(found, record)
    except ValueError:
        return None


def remove_scratch(root: Path) -> int:
    """Remove built candidates and journals that were set aside; returns the bytes freed.

    A target that some process is tuning for is left alone. Journals stay: they hold results.
    """
    freed = 0
    for folder in (root / ".scratch").glob("*/"):
        locks = [FileLock(path) for path in folder.glob("*.lock")]
        try:
            for lock in locks:
                lock.acquire(timeout=0)
            for path in (*folder.glob("built-*/*"), *folder.glob("*.aside-*")):
                freed += path.stat().st_size
                path.unlink()
        except Timeout:
            continue
        finally:
            for lock in locks:
                lock.release()
    return freed
