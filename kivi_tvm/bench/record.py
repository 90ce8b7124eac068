"""One line of JSON per measurement, with everything needed to judge it later."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from kivi_tvm.bench.harness import Timing, l3_bytes
from kivi_tvm.cpu import cpu_name
from kivi_tvm.host import installed_version

PACKAGES = ("kivi-tvm", "torch", "apache-tvm", "apache-tvm-ffi", "numpy")


class PlainData(Protocol):
    """What can be written as one JSON object."""

    def to_dict(self) -> dict[str, object]: ...


@dataclass(frozen=True, slots=True)
class Environment:
    """Where and with what a run was made."""

    device: str
    threads: int
    l3_bytes: int
    versions: dict[str, str]
    commit: str | None

    @classmethod
    def current(cls) -> Environment:
        found = {name: installed_version(name) for name in PACKAGES}
        versions = {name: version for name, version in found.items() if version is not None}
        versions["python"] = platform.python_version()
        return cls(cpu_name(), torch.get_num_threads(), l3_bytes(), versions, commit())


@dataclass(frozen=True, slots=True)
class Record:
    """One provider on one workload: correctness, time, bytes by the byte model, environment.

    `error` is the relative L2 distance to the reference in this run and `tolerance` what it had
    to stay under; `timing` is None when it did not. `read_gb_per_s` is the read bandwidth
    measured between the same calls.
    """

    op: str
    workload: str
    tokens: int
    provider: str
    source: str
    target: str
    state: str
    error: float
    tolerance: float
    bytes: int
    timing: Timing | None
    read_gb_per_s: float
    environment: Environment

    @property
    def passed(self) -> bool:
        return self.timing is not None

    def to_dict(self) -> dict[str, object]:
        """Plain data on one level, without times for a provider that failed its check."""
        fields: dict[str, object] = asdict(self)
        del fields["timing"], fields["environment"]
        if self.timing is not None:
            rate = round(self.timing.gb_per_s(self.bytes), 3)
            fields |= asdict(self.timing) | {"gb_per_s": rate}
        return fields | asdict(self.environment) | {"passed": self.passed}


def append_jsonl(path: Path, records: Sequence[PlainData]) -> None:
    """Add one line per record to the file at `path`."""
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record.to_dict()) + "\n")


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
