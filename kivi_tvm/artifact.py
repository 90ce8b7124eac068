"""Compiled kernels on disk: NAME.so and NAME.json, written together, checked before use."""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kivi_tvm.errors import UserError
from kivi_tvm.host import Platform
from kivi_tvm.manifest import Manifest, manifest_problems, parse_manifest

__all__ = [
    "ArtifactError",
    "Manifest",
    "describe_artifact",
    "manifest_path",
    "read_artifact",
    "write_artifact",
]

# ELF64, little endian; `e_machine` of the System V ABI supplements.
_ELF_IDENT = b"\x7fELF\x02\x01"
_ELF_SHARED_OBJECT = 3
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243}


class ArtifactError(UserError):
    """An artifact that must not be opened; the message lists every reason."""


def manifest_path(path: Path) -> Path:
    """NAME.json of NAME.so."""
    return path.with_suffix(".json")


def write_artifact(path: Path, manifest: Manifest, export: Callable[[Path], None]) -> Manifest:
    """Write a library and its manifest, each replaced as a whole, the manifest last.

    Parameters
    ----------
    path : Path
        The library, NAME.so; its directory must exist.
    manifest : Manifest
        Its `sha256` and `size_bytes` are replaced by the library's.
    export : callable
        Writes the library to the path it is given (same file name, another directory).

    Returns
    -------
    Manifest
        The manifest as written.

    Raises
    ------
    ArtifactError
        The name does not end in .so, or the directory does not exist.
    OSError
        The directory can not be written.
    """
    path = Path(path)
    if path.suffix != ".so":
        raise ArtifactError(f"`path` must end in .so, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ArtifactError(f"`path` must be in an existing directory, got {str(path)!r}")
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as scratch:
        library = Path(scratch) / path.name
        export(library)
        manifest = replace(manifest, sha256=_sha256(library), size_bytes=library.stat().st_size)
        record = manifest_path(library)
        record.write_text(manifest.to_json(), encoding="utf-8")
        os.replace(library, path)
        os.replace(record, manifest_path(path))
    return manifest


def read_artifact(path: Path) -> tuple[Path, Manifest]:
    """Check an artifact completely, without opening the library.

    Parameters
    ----------
    path : Path
        The library, NAME.so, with NAME.json beside it.

    Returns
    -------
    tuple of Path and Manifest
        The library's absolute path, safe to open here, and its manifest.

    Raises
    ------
    ArtifactError
        Anything is missing, damaged or made for another machine, format or version: the message
        names the file and lists every reason.
    """
    path = Path(path).absolute()
    problems = _library_problems(path)
    readable = not problems
    manifest, found = _read_manifest(manifest_path(path))
    problems += found
    if manifest is not None:
        problems += manifest_problems(manifest)
        if readable:
            problems += _content_problems(path, manifest)
    if problems or manifest is None:
        raise ArtifactError(f"cannot load {path}: " + "; ".join(problems))
    return path, manifest


def describe_artifact(path: Path) -> tuple[Manifest, list[str]]:
    """The manifest of an artifact for any machine, and what is wrong with its library.

    Parameters
    ----------
    path : Path
        The library, NAME.so, with NAME.json beside it; it is not opened.

    Returns
    -------
    tuple of Manifest and list of str
        The manifest, and why the library is not the one that it describes.

    Raises
    ------
    ArtifactError
        The file is no library, or its manifest is missing or damaged.
    """
    path = Path(path).absolute()
    _, problems = _elf_machine(path)
    readable = not problems
    manifest, found = _read_manifest(manifest_path(path))
    if manifest is None or not readable:
        raise ArtifactError(f"not an artifact: {path}: " + "; ".join(problems + found))
    return manifest, _content_problems(path, manifest)


def _read_manifest(path: Path) -> tuple[Manifest | None, list[str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return None, [f"its manifest {path.name} cannot be read: {_reason(error)}"]
    manifest, problems = parse_manifest(text)
    return manifest, [f"{path.name}: {problem}" for problem in problems]


def _library_problems(path: Path) -> list[str]:
    """Why the file can not be a library of this machine, from its header alone."""
    machine, problems = _elf_machine(path)
    here = Platform.here()
    expected = _ELF_MACHINES.get(here.machine, machine)
    if not problems and machine != expected:
        return [f"the library must be for ELF machine {expected} ({here.machine}), got {machine}"]
    return problems


def _elf_machine(path: Path) -> tuple[int | None, list[str]]:
    """The machine that a library is for, or why the file is no library.

    None where the system does not use ELF.
    """
    if path.suffix != ".so":
        return None, ["the name must end in .so"]
    try:
        with path.open("rb") as file:
            header = file.read(20)
    except OSError as error:
        return None, [f"the library cannot be read: {_reason(error)}"]
    if Platform.here().system != "Linux":
        return None, []
    if len(header) < 20 or not header.startswith(_ELF_IDENT):
        got = f"got {header[:6]!r}..."
        return None, [f"the library must be a 64-bit little-endian ELF file, {got}"]
    kind, machine = struct.unpack_from("<HH", header, 16)
    if kind != _ELF_SHARED_OBJECT:
        return None, [f"the library must be an ELF shared object (3), got type {kind}"]
    return machine, []


def _content_problems(path: Path, manifest: Manifest) -> list[str]:
    size = path.stat().st_size
    if size != manifest.size_bytes:
        return [f"the library must have {manifest.size_bytes} bytes, got {size}"]
    digest = _sha256(path)
    if digest != manifest.sha256:
        return [f"its sha256 must be {manifest.sha256}, got {digest}"]
    return []


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return str(getattr(error, "strerror", None) or error)
