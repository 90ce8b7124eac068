"""The name of a build in the cache: a digest of everything that changes the code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kivi_tvm.config import KernelKey
from kivi_tvm.manifest import FORMAT_VERSION, current_versions

# Files and folders of the package from which kernels are generated.
CODE_SOURCES = (
    "config.py",
    "layout.py",
    "targets.py",
    "target_names.py",
    "compile.py",
    "lowering.py",
    "cuda_build.py",
    "gpu_passes.py",
    "statements.py",
    "cuda.py",
    "occupancy.py",
    "launch.cc",
    "database.py",
    "ops",
    "schedules",
)


def cache_name(
    key: KernelKey,
    target: Mapping[str, Any],
    cpu_flags: Iterable[str] = (),
    tuning: str = "",
) -> str:
    """A file name for everything that changes the code: "<slug>-<16 hex digits>".

    Parameters
    ----------
    key : KernelKey
    target : mapping
        The target as plain JSON, "native" already resolved to a processor and its features.
    cpu_flags : iterable of str
        The processor flags that code will need.
    tuning : str
        `database.Found.digest` of the records that are used; tuning one kernel key rebuilds no
        other.
    """
    versions = current_versions()
    identity = {
        "format": FORMAT_VERSION,
        "kernel_key": key.to_dict(),
        "target": target,
        "cpu_flags": sorted(cpu_flags),
        "versions": {name: versions[name] for name in ("tvm", "tvm_ffi")},
        "sources": sources_digest(),
        "tuning": tuning,
    }
    text = json.dumps(identity, sort_keys=True)
    return f"{key.slug}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@cache
def sources_digest(root: Path | None = None, names: tuple[str, ...] = CODE_SOURCES) -> str:
    """SHA-256 over the package's files from which code is generated, or other ones."""
    root = root or Path(__file__).parent
    files: set[Path] = set()
    for name in names:
        path = root / name
        files.update([path] if path.is_file() else path.rglob("*.py"))
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
