"""Compiled kernels kept per user and built once, however many processes ask."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from kivi_tvm.artifact import ArtifactError, Manifest, manifest_path, read_artifact
from kivi_tvm.errors import UserError
from kivi_tvm.manifest import parse_manifest
from kivi_tvm.notices import announce

CACHE_DIR_ENV = "KIVI_TVM_CACHE_DIR"
_WAIT_BEFORE_NOTICE_S = 1.0
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


class CacheUnavailable(UserError):
    """The cache directory can not be written; kernels must be compiled in process."""


@dataclass(frozen=True, slots=True)
class CachedArtifact:
    """A checked artifact of the cache; `hit` is False if this call built it."""

    path: Path
    manifest: Manifest
    hit: bool


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One build as `kivi-tvm info` lists it, from its manifest, unchecked."""

    path: Path
    slug: str
    size_bytes: int
    built_at: float


class Cleared(NamedTuple):
    """What `clear_cache` did; `busy` builds were being written and are kept."""

    removed: int
    freed_bytes: int
    busy: int


def cache_dir() -> Path:
    """`KIVI_TVM_CACHE_DIR`, else the user's cache directory; not created."""
    named = os.environ.get(CACHE_DIR_ENV)
    return Path(named).expanduser().absolute() if named else user_cache_path("kivi-tvm")


def kernel_dir() -> Path:
    """Where compiled kernels lie inside `cache_dir()`."""
    return cache_dir() / "kernels"


def cached(
    name: str,
    make: Callable[[Path], object],
    notify: Callable[[str], None] = announce,
) -> CachedArtifact:
    """The artifact `name` of the per-user cache, made by one process if it is not there.

    Parameters
    ----------
    name : str
        What `kivi_tvm.cache_key.cache_name` returned.
    make : callable
        Called with the path of the library, to call `write_artifact` on it; other processes
        that ask for the same name wait for it.
    notify : callable
        Receives one line when an entry was damaged or another process is waited for.

    Returns
    -------
    CachedArtifact
        Checked by `read_artifact`.

    Raises
    ------
    CacheUnavailable
        The directory can not be written.
    """
    path = kernel_dir() / f"{name}.so"
    if found := _find(path):
        return found
    with _writing(path), _locked(path, notify):
        # Another process may have built it while this one waited for the lock.
        if found := _find(path):
            return found
        _quarantine(path, notify)
        _remove_scratch(path)
        make(path)
    return CachedArtifact(*read_artifact(path), hit=False)


def cache_entries() -> list[CacheEntry]:
    """What the cache holds, by name; libraries are not opened or checked."""
    return [entry for path in sorted(kernel_dir().glob("*.so")) if (entry := _entry(path))]


def clear_cache() -> Cleared:
    """Remove every compiled kernel of the cache except those being built right now.

    A library that some process has open keeps working there.
    """
    try:
        names = {path.name.split(".")[0] for path in kernel_dir().glob("[!.]*")}
    except NotADirectoryError:
        names = set()
    outcomes = [_clear(kernel_dir() / f"{name}.so") for name in sorted(names)]
    return Cleared(
        removed=sum(outcome.removed for outcome in outcomes),
        freed_bytes=sum(outcome.freed_bytes for outcome in outcomes),
        busy=sum(outcome.busy for outcome in outcomes),
    )


def _find(path: Path) -> CachedArtifact | None:
    try:
        return CachedArtifact(*read_artifact(path), hit=True)
    except ArtifactError:
        return None


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Create the directory, private to the user, and name it when it can not be written."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unavailable(path, error) from error
    try:
        yield
    except OSError as error:
        if error.errno in _UNWRITABLE:
            raise _unavailable(path, error) from error
        raise


def _unavailable(path: Path, error: OSError) -> CacheUnavailable:
    return CacheUnavailable(
        f"the kernel cache {path.parent} cannot be written ({error.strerror}); "
        f"set {CACHE_DIR_ENV} to a directory that can"
    )


@contextmanager
def _locked(path: Path, notify: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=_WAIT_BEFORE_NOTICE_S)
    except Timeout:
        notify(f"waiting for another process that compiles {path.stem}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _quarantine(path: Path, notify: Callable[[str], None]) -> None:
    """Move a damaged entry aside, so that it can be looked at; the latest one is kept."""
    if not path.exists() and not manifest_path(path).exists():
        return
    try:
        read_artifact(path)
    except ArtifactError as error:
        for part in filter(Path.exists, (path, manifest_path(path))):
            os.replace(part, f"{part}.corrupt")
        notify(f"a damaged cache entry was moved to {path.name}.corrupt and is rebuilt ({error})")


def _entry(path: Path) -> CacheEntry | None:
    """None for an entry that vanished or is being replaced meanwhile."""
    try:
        manifest, _ = parse_manifest(manifest_path(path).read_text(encoding="utf-8"))
        stat = path.stat()
    except (OSError, UnicodeDecodeError):
        return None
    slug = manifest.key.slug if manifest else "unreadable"
    return CacheEntry(path, slug, stat.st_size, stat.st_mtime)


def _clear(library: Path) -> Cleared:
    """Remove all files of one build: library, manifest, damaged copies, leftovers and lock."""
    lock = FileLock(library.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return Cleared(removed=0, freed_bytes=0, busy=1)
    except OSError as error:
        raise _unavailable(library, error) from error
    removed, freed = int(library.exists()), 0
    for part in library.parent.glob(f"{library.stem}.*"):
        freed += part.stat().st_size
        part.unlink()
    _remove_scratch(library)
    lock.release()
    return Cleared(removed, freed, busy=0)


def _remove_scratch(library: Path) -> None:
    """What a process that was killed while it wrote left behind."""
    for scratch in library.parent.glob(f".{library.stem}-*"):
        shutil.rmtree(scratch, ignore_errors=True)
