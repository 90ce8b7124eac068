"""The files of a tuning database: one JSON file per target and kernel key, replaced as a whole.

`<root>/<target slug>/database_<kernel slug>.json` holds the records; `manifest.json` beside them is
a table of contents, made from them at each change, never a source. A file that is no longer what it
should be is moved aside as `*.corrupt`, never deleted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from kivi_tvm.errors import UserError
from kivi_tvm.tuning_record import (
    FORMAT_VERSION,
    DamagedFile,
    KernelRecords,
    json_text,
    parse_records,
)

MANIFEST = "manifest.json"


def read_records(path: Path) -> KernelRecords:
    """One file, checked completely.

    Raises
    ------
    DamagedFile
        It is not what `write_records` wrote, or belongs elsewhere.
    OSError
        It cannot be read.
    """
    found = parse_records(path.read_bytes())
    if (path.parent.name, path.name) != (found.path.parent.name, found.path.name):
        raise DamagedFile(f"it belongs into {found.path}")
    return found


def write_records(root: Path, found: KernelRecords) -> None:
    """Replace one file, or remove it where no record is left; the lock must be held."""
    path = root / found.path
    if found.records:
        replace_text(path, found.to_json())
    else:
        path.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or whoever looks after a crash, finds the old or the new."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def manifest_text(folder: Path, databases: Iterable[KernelRecords]) -> str:
    """What `write_manifest` writes."""
    found = sorted(databases, key=lambda each: each.key.slug)
    kernels = []
    for each in found:
        digest = hashlib.sha256((folder / each.path.name).read_bytes()).hexdigest()
        records = [each.records[name].summary() for name in sorted(each.records)]
        kernels.append({"file": each.path.name, "sha256": digest, "records": records})
    target = dict(found[0].target)
    return json_text({"format_version": FORMAT_VERSION, "target": target, "kernels": kernels})


def write_manifest(folder: Path, databases: Iterable[KernelRecords]) -> None:
    """Replace a folder's table of contents, or remove it where nothing is left to list."""
    path = folder / MANIFEST
    if found := [each for each in databases if each.records]:
        replace_text(path, manifest_text(folder, found))
    else:
        path.unlink(missing_ok=True)


@contextmanager
def changing(root: Path, target_slug: str) -> Iterator[Path]:
    """The folder of a target, created and locked; what a killed process left there is removed.

    Raises
    ------
    UserError
        The directory can not be written.
    """
    folder = root / target_slug
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            for scratch in folder.glob(".*.tmp"):
                scratch.unlink(missing_ok=True)
            yield folder
    except OSError as error:
        raise UserError(
            f"the tuning directory {root} cannot be written ({error.strerror or error}); "
            "name one that can with --log-dir or KIVI_TVM_TUNING_DIR"
        ) from error


def set_aside(path: Path) -> Path:
    """Rename a damaged file to a name that nothing reads, beside earlier ones."""
    n = 1
    while (aside := path.with_name(f"{path.name}{'' if n == 1 else f'.{n}'}.corrupt")).exists():
        n += 1
    os.replace(path, aside)
    return aside
