"""The record beside a compiled library: what it computes, where it runs, and its checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from kivi_tvm.config import KernelKey, KiviConfig
from kivi_tvm.cpu import missing_cpu_flags
from kivi_tvm.host import Platform, installed_version

# Raised whenever the manifest or what a compiled function takes, returns or means changes: an
# artifact of another format is refused.
FORMAT_VERSION = 4
DISTRIBUTIONS = {"kivi_tvm": "kivi-tvm", "tvm": "apache-tvm", "tvm_ffi": "apache-tvm-ffi"}
# First release that works and first one that is not known to (the pins of pyproject.toml).
VERSION_RANGES = {"tvm": ((0, 27, 0), (0, 28, 0)), "tvm_ffi": ((0, 1, 14), (0, 2, 0))}
KERNEL_SOURCES = ("default", "tuned")
TUNING_FIELDS = {"device", "date", "default_us", "tuned_us", "origin"}


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that must hold before a compiled library may be opened.

    Parameters
    ----------
    kernel_key : dict
        `KernelKey.to_dict()`.
    target : dict
        TVM's target as plain JSON, with the processor it was resolved to.
    sources : dict
        Per kernel, "default" or "tuned": where its schedule came from.
    tuning : dict
        Per tuned kernel, which record: `device`, `date`, `default_us`, `tuned_us`, and `origin`,
        "user" or "package".
    config : dict or None
        `KiviConfig.to_dict()`; None in the per-user cache, where an artifact serves every
        configuration with this kernel key.
    cpu_flags : tuple of str
        What the processor must have, as `cpu_requirements` gives it.
    platform : Platform
        Where the library can be opened.
    versions : dict
        Versions of kivi_tvm, tvm and tvm_ffi that built it.
    sha256, size_bytes : str, int
        Of the library; filled in by `write_artifact`.
    """

    kernel_key: Mapping[str, Any]
    target: Mapping[str, Any]
    sources: Mapping[str, str]
    tuning: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    cpu_flags: tuple[str, ...] = ()
    platform: Platform = field(default_factory=Platform.here)
    versions: Mapping[str, str] = field(default_factory=lambda: current_versions())
    sha256: str = ""
    size_bytes: int = 0
    format_version: int = FORMAT_VERSION

    @property
    def key(self) -> KernelKey:
        return KernelKey(**self.kernel_key)

    @property
    def compute(self) -> str:
        """The compute mode that `attend` was compiled for."""
        return str(self.kernel_key["compute"])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, with a checksum over itself."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        record["platform"] = self.platform.to_dict()
        record["cpu_flags"] = list(self.cpu_flags)
        for name in ("kernel_key", "target", "sources", "tuning", "versions"):
            record[name] = dict(record[name])
        record["compute"] = self.compute
        return {**record, "checksum": _checksum(record)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


def current_versions() -> dict[str, str]:
    """Versions of kivi_tvm, tvm and tvm_ffi in this environment ("unknown" if not installed)."""
    return {name: installed_version(dist) or "unknown" for name, dist in DISTRIBUTIONS.items()}


def parse_manifest(text: str) -> tuple[Manifest | None, list[str]]:
    """A manifest from its JSON text, or None and every reason why it is not one."""
    try:
        record = json.loads(text)
    except ValueError as error:
        return None, [f"the manifest must be JSON: {error}"]
    if not isinstance(record, dict):
        return None, [f"the manifest must be a JSON object, got {type(record).__name__}"]
    if record.get("format_version") != FORMAT_VERSION:
        got = record.get("format_version")
        return None, [f"`format_version` must be {FORMAT_VERSION}, got {got!r}"]
    problems = _structure_problems(record)
    if problems:
        return None, problems
    values = {f.name: record[f.name] for f in fields(Manifest)}
    values["platform"] = Platform(**record["platform"])
    values["cpu_flags"] = tuple(record["cpu_flags"])
    return Manifest(**values), []


def manifest_problems(manifest: Manifest) -> list[str]:
    """Why this machine and this environment can not run what the manifest describes."""
    here = Platform.here()
    found = _version_problems("built with", manifest.versions)
    found += _version_problems("installed", current_versions())
    if manifest.platform.name != here.name:
        found.append(f"`platform` must be {here.name}, got {manifest.platform.name}")
    elif missing := missing_cpu_flags(manifest.cpu_flags):
        found.append(f"it needs a processor with {', '.join(missing)}, which this one lacks")
    return found


def _checksum(record: Mapping[str, Any]) -> str:
    content = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _structure_problems(record: dict[str, Any]) -> list[str]:
    found = []
    expected = {"compute", "checksum", *(f.name for f in fields(Manifest))}
    for name in sorted(expected - record.keys()):
        found.append(f"`{name}` is missing from the manifest")
    for name in sorted(record.keys() - expected):
        found.append(f"`{name}` is not a field of the manifest")
    if not found and record["checksum"] != (expected_sum := _checksum(record)):
        found.append(
            f"`checksum` must be {expected_sum[:12]}..., got {str(record['checksum'])[:15]!r}: "
            "the manifest was changed after it was written"
        )
    return found or _content_problems(record)


def _content_problems(record: dict[str, Any]) -> list[str]:
    """What a writer other than `write_artifact` could have put wrong."""
    found = []
    for name in ("kernel_key", "target", "sources", "tuning", "versions", "platform"):
        if not isinstance(record[name], dict):
            found.append(f"`{name}` must be an object, got {record[name]!r}")
    if not _is_list_of_str(record["cpu_flags"]):
        found.append(f"`cpu_flags` must be a list of strings, got {record['cpu_flags']!r}")
    if found:
        return found
    if set(record["platform"]) != {f.name for f in fields(Platform)}:
        found.append(f"`platform` must have the fields of Platform, got {record['platform']!r}")
    for kernel, source in record["sources"].items():
        if source not in KERNEL_SOURCES:
            found.append(f"`sources` of {kernel} must be in {KERNEL_SOURCES}, got {source!r}")
    tuned = {kernel for kernel, source in record["sources"].items() if source == "tuned"}
    if record["tuning"].keys() != tuned:
        found.append(f"`tuning` must name the tuned kernels, got {sorted(record['tuning'])}")
    for kernel, origin in record["tuning"].items():
        if not isinstance(origin, dict) or origin.keys() != TUNING_FIELDS:
            found.append(f"`tuning` of {kernel} must have {sorted(TUNING_FIELDS)}, got {origin!r}")
    return found + _config_problems(record)


def _config_problems(record: dict[str, Any]) -> list[str]:
    try:
        key = KernelKey(**record["kernel_key"])
        cfg = None if record["config"] is None else KiviConfig(**record["config"])
    except (TypeError, ValueError) as error:
        return [f"`kernel_key` and `config` must be a build's: {error}"]
    if cfg is None:
        return []
    hardware = [(True, False), (False, True), (False, False)]  # byte_dot, tensor_cores
    keys = [cfg.kernel_key(key.pack_order, *each) for each in hardware]
    if key not in [replace(each, rows_per_query=key.rows_per_query) for each in keys]:
        return [f"`config` must have the kernel key {key.slug}, got {keys[0].slug}"]
    return []


def _is_list_of_str(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _version_problems(origin: str, versions: Mapping[str, str]) -> list[str]:
    found = []
    for name, (first, end) in VERSION_RANGES.items():
        version = versions.get(name, "unknown")
        # A runtime library without its Python package has no version to compare.
        if origin == "installed" and version == "unknown":
            continue
        if not first <= _release(version) < end:
            found.append(f"{name} must be >={_dotted(first)},<{_dotted(end)}, {origin} {version}")
    return found


def _release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, 0 where there is none: "0.27.dev1" -> (0, 27, 0)."""
    parts = [*version.split("."), "", "", ""][:3]
    return tuple(int(part) if part.isdecimal() else 0 for part in parts)


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
