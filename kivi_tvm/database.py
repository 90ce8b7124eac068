"""The tuning database: how each function of a kernel key is scheduled best on a target.

Records are looked up in the user's directory first, then among those that come with the package,
one function at a time, and only for exactly the target. Imports neither TVM nor torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from platformdirs import user_data_path

from kivi_tvm import database_files as files
from kivi_tvm.config import KernelKey
from kivi_tvm.errors import UserError
from kivi_tvm.notices import announce, announce_once
from kivi_tvm.target_names import slug
from kivi_tvm.tuning_record import DamagedFile, KernelRecords, Record, checksum, record_problems

__all__ = ["Found", "KernelRecords", "Pruned", "Record", "entries", "find", "prune", "publish"]

TUNING_DIR_ENV = "KIVI_TVM_TUNING_DIR"
Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Found:
    """The records of one kernel key on one target.

    Parameters
    ----------
    records : mapping of str to Record
        By function.
    origins : mapping of str to str
        "user" or "package", by function.
    spare : mapping of str to Record
        The package's, of functions for which the user has one too: for when that is stale.
    paths : tuple of Path
        The files they come from.
    target_known : bool
        There are records for this target, be it of another kernel key.
    """

    records: Mapping[str, Record] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    spare: Mapping[str, Record] = field(default_factory=dict)
    paths: tuple[Path, ...] = ()
    target_known: bool = False

    @property
    def digest(self) -> str:
        """Of all that a build takes from the records; empty without any."""
        if not self.records:
            return ""
        plain = [{n: r.to_dict() for n, r in held.items()} for held in (self.records, self.spare)]
        return checksum({"records": plain, "origins": dict(self.origins)})


class Pruned(NamedTuple):
    """What `prune` removed: records as (target slug, kernel slug, function, why), and files."""

    records: list[tuple[str, str, str, str]]
    leftovers: list[Path]


def user_dir() -> Path:
    """`KIVI_TVM_TUNING_DIR`, else a directory of the user's data; not created."""
    named = os.environ.get(TUNING_DIR_ENV)
    if named:
        return Path(named).expanduser().absolute()
    return user_data_path("kivi-tvm") / "tuning_logs"


def package_dir() -> Path:
    """The records that come with the package."""
    return Path(__file__).parent / "tuning_logs"


def roots() -> dict[str, Path]:
    """Where `find` looks, by origin, first come first served."""
    return {"user": user_dir(), "package": package_dir()}


def publish(
    root: Path,
    target: Mapping[str, Any],
    key: KernelKey,
    records: Mapping[str, Record],
    notify: Notify = announce,
) -> Path:
    """Add records; a function's new record replaces its old one, all others stay.

    A reader, another publisher and whoever looks after a crash see all of the records or none. A
    file of this kernel key that a newer version wrote is set aside.

    Parameters
    ----------
    root : Path
        Made if it does not exist.
    target : mapping
        `targets.identity` of the target.
    key : KernelKey
    records : mapping of str to Record
        By function.
    notify : callable
        Receives one line for each damaged file that is moved aside.

    Returns
    -------
    Path
        The file of the kernel key.

    Raises
    ------
    ValueError
        A record breaks a rule.
    UserError
        The directory can not be written.
    """
    if problems := record_problems(records):
        raise ValueError("; ".join(problems))
    with files.changing(root, slug(target)) as folder:
        written = KernelRecords(target, key, {}).path.name
        others = {found.key: found for found in _sound(folder, notify, written)}
        old = others.get(key, KernelRecords(target, key, {}))
        merged = replace(old, records={**old.records, **records})
        files.write_records(root, merged)
        files.write_manifest(folder, {**others, key: merged}.values())
    return root / merged.path


def find(target: Mapping[str, Any], key: KernelKey, notify: Notify = announce_once) -> Found:
    """The records of exactly this target and kernel key.

    A damaged file of the user's is moved aside and reported; one that a newer version wrote, or
    that cannot be moved, is left where it is and reported.

    Parameters
    ----------
    target : mapping
        `targets.identity` of the target.
    key : KernelKey
    notify : callable
        Receives one line for each damaged file.
    """
    records: dict[str, Record] = {}
    origins: dict[str, str] = {}
    spare: dict[str, Record] = {}
    paths: list[Path] = []
    known = False
    for origin, root in roots().items():
        path = root / KernelRecords(target, key, {}).path
        known = known or any(path.parent.glob("database_*.json"))
        found = _read(path, notify, repair=origin == "user")
        # Equal names of directories do not make equal targets.
        if found is None or dict(found.target) != dict(target):
            continue
        new = {name: r for name, r in found.records.items() if name not in records}
        spare |= {name: r for name, r in found.records.items() if name in records}
        records.update(new)
        origins.update(dict.fromkeys(new, origin))
        paths.append(path)
    return Found(records, origins, spare, tuple(paths), known)


def entries(root: Path, notify: Notify = announce_once) -> list[KernelRecords]:
    """Everything that a directory holds, by target and kernel key; nothing is changed.

    Damaged files are reported and left out.
    """
    found = (_read(path, notify) for path in sorted(root.glob("*/database_*.json")))
    return [each for each in found if each is not None]


def prune(
    root: Path,
    problem: Callable[[KernelRecords, Record], str | None],
    leftovers: bool = False,
    notify: Notify = announce,
) -> Pruned:
    """Remove records, and on request what was moved aside.

    Parameters
    ----------
    root : Path
    problem : callable
        Why a record is to be removed; None for those that stay.
    leftovers : bool
        Remove `*.corrupt` files that were set aside before.
    notify : callable
        Receives one line for each damaged file that is moved aside now, and for each that a newer
        version wrote, which stays.

    Raises
    ------
    UserError
        The directory can not be written.
    """
    removed, deleted = [], []
    for name in sorted({path.parent.name for path in root.glob("[!.]*/database_*")}):
        with files.changing(root, name) as folder:
            deleted += list(_delete_leftovers(folder)) if leftovers else []
            kept = {}
            for found in _sound(folder, notify):
                why = {n: text for n, r in found.records.items() if (text := problem(found, r))}
                removed += [(name, found.key.slug, n, text) for n, text in why.items()]
                left = {n: r for n, r in found.records.items() if n not in why}
                kept[found.key] = replace(found, records=left)
                if why:
                    files.write_records(root, kept[found.key])
            files.write_manifest(folder, kept.values())
    return Pruned(removed, deleted)


def _sound(folder: Path, notify: Notify, written: str = "") -> Iterator[KernelRecords]:
    """The files of a locked folder; what is damaged is moved aside.

    A file of a newer version is left to that version, unless it is the one about to be `written`.
    """
    for path in sorted(folder.glob("database_*.json")):
        try:
            yield files.read_records(path)
        except DamagedFile as error:
            if error.newer and path.name != written:
                notify(f"tuning records {path} are left as they are: {error}")
            else:
                notify(f"{files.set_aside(path)} was set aside: {error}")


def _read(path: Path, notify: Notify, repair: bool = False) -> KernelRecords | None:
    try:
        return files.read_records(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        notify(f"tuning records {path} are not used: {error.strerror}")
    except DamagedFile as error:
        if repair and not error.newer and _repaired(path, notify):
            return None
        notify(f"tuning records {path} are not used: {error}")
    return None


def _repaired(path: Path, notify: Notify) -> bool:
    """Move what is damaged in a folder aside, unless it cannot be written."""
    try:
        with files.changing(path.parent.parent, path.parent.name) as folder:
            files.write_manifest(folder, list(_sound(folder, notify)))
    except UserError:
        return False
    return True


def _delete_leftovers(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.glob("*.corrupt")):
        path.unlink()
        yield path
