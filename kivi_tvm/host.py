"""What is here: platform, versions, the checkout's commit, compiler, TVM's runtime."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

from kivi_tvm.errors import UserError

RUNTIME_LIBRARY_ENV = "KIVI_TVM_RUNTIME_LIBRARY"
RUNTIME_LIBRARY = "libtvm_runtime.dylib" if sys.platform == "darwin" else "libtvm_runtime.so"
CUDA_RUNTIME_LIBRARY = "libtvm_runtime_cuda.so"  # beside the other
COMPILERS = ("g++", "clang++", "c++")
LAUNCHERS = ("ccache", "sccache", "distcc")


@dataclass(frozen=True, slots=True)
class Platform:
    """Where a library can be opened: operating system, architecture and C library.

    The version of the C library is recorded for people. It is not compared: the dynamic linker
    does that, symbol by symbol, and refuses without harm.
    """

    system: str
    machine: str
    libc: str
    libc_version: str = ""

    @classmethod
    @cache
    def here(cls) -> Platform:
        libc, version = platform.libc_ver()
        return cls(platform.system(), platform.machine(), libc or "unknown", version)

    @property
    def name(self) -> str:
        return f"{self.system} {self.machine} {self.libc}"

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def available_processors() -> int:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout this file belongs to, `-dirty` if files changed; else None."""
    here = Path(__file__).resolve()
    # A package installed below somebody's repository is not part of it.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None where it fails or is missing."""
    command = ["git", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def find_cxx() -> str | None:
    """The C++ compiler that links libraries: `CXX` if set, else g++, clang++ or c++.

    Returns
    -------
    str or None
        Absolute path of the program; None when there is none, or `CXX` names none. Launchers
        such as ccache and flags in `CXX` are left out: TVM runs one program by its path.
    """
    words = shlex.split(os.environ.get("CXX", ""))
    named = [word for word in words if Path(word).name not in LAUNCHERS][:1]
    return next(filter(None, map(shutil.which, named or COMPILERS)), None)


def find_runtime_library() -> Path:
    """TVM's runtime library, found without importing tvm.

    Returns
    -------
    Path
        `KIVI_TVM_RUNTIME_LIBRARY` if set; else the file of the installed apache-tvm, of a tvm
        package on `sys.path`, or of `TVM_LIBRARY_PATH`.

    Raises
    ------
    UserError
        The variable names no file, or no TVM is installed.
    """
    override = os.environ.get(RUNTIME_LIBRARY_ENV)
    if override:
        path = Path(override).expanduser()
        if not path.is_file():
            raise UserError(f"`{RUNTIME_LIBRARY_ENV}` must name a file, got {override!r}")
        return path.resolve()
    for path in _runtime_candidates():
        if path.is_file():
            return path.resolve()
    raise UserError(
        f"{RUNTIME_LIBRARY} was not found: install apache-tvm 0.27 "
        f"(`pip install 'apache-tvm==0.27.*'`) or set {RUNTIME_LIBRARY_ENV}"
    )


def _runtime_candidates() -> Iterator[Path]:
    try:
        distribution = importlib.metadata.distribution("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        for line in (distribution.read_text("RECORD") or "").splitlines():
            name = line.split(",", 1)[0]
            if name.endswith(f"/{RUNTIME_LIBRARY}"):
                yield Path(str(distribution.locate_file(name)))
    if os.environ.get("TVM_LIBRARY_PATH"):
        yield Path(os.environ["TVM_LIBRARY_PATH"]) / RUNTIME_LIBRARY
    # PathFinder ignores `sys.modules`, where a blocked tvm is None and find_spec would stop.
    spec = PathFinder.find_spec("tvm")
    for location in (spec.submodule_search_locations or []) if spec else []:
        package = Path(location)
        yield package / "lib" / RUNTIME_LIBRARY
        yield package.parent.parent / "build" / "lib" / RUNTIME_LIBRARY
