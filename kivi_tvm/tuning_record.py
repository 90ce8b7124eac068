"""One tuning record, and the records of a kernel key as JSON text with a checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kivi_tvm.config import KernelKey
from kivi_tvm.target_names import slug

# Raised when a file or a record takes another form; a newer file is left to newer versions.
FORMAT_VERSION = 1
KINDS = ("measured", "estimated")
Option = int | str


class DamagedFile(ValueError):
    """A file that is not what its name says; `newer` if only another version can tell."""

    def __init__(self, reason: str, newer: bool = False) -> None:
        super().__init__(reason)
        self.newer = newer


@dataclass(frozen=True, slots=True)
class Record:
    """How one function is scheduled, and the measurement that decided it.

    Parameters
    ----------
    function : str
        A name in `ops.ALL_FUNCTIONS`.
    decisions : mapping of str to int or str
        Choices made otherwise than by default.
    schedule_hash : str
        `compile.schedule_hash` of the scheduled function: the record holds while running the
        schedule again gives the same.
    workload : str
        Id of the shapes it was measured on.
    default_us, tuned_us : float
        Of the default and of these decisions, measured in turn in the same run.
    max_error, error_limit : float
        Against the reference; 0 and 0 where results must be equal bit for bit.
    trials, seed : int
        Candidates tried for this function, and the seed that chose them.
    date : str
        ISO 8601.
    device, threads, runner
        What it ran on, and how.
    kind : str
        "measured" or "estimated".
    commit : str or None
        Of the source, where it is a checkout.
    versions : mapping of str to str
    bytes : int
        What a call must read and write.
    read_gb_per_s : float or None
        Memory bandwidth that was measured beside it, in units of 1e9 bytes.
    """

    function: str
    decisions: Mapping[str, Option]
    schedule_hash: str
    workload: str
    default_us: float
    tuned_us: float
    max_error: float
    error_limit: float
    trials: int
    seed: int
    date: str
    device: str
    threads: int
    runner: str
    kind: str
    commit: str | None
    versions: Mapping[str, str]
    bytes: int
    read_gb_per_s: float | None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "decisions": dict(self.decisions), "versions": dict(self.versions)}

    def summary(self) -> dict[str, Any]:
        """How the record came about, without how it schedules."""
        left_out = ("decisions", "schedule_hash")
        return {name: x for name, x in self.to_dict().items() if name not in left_out}


@dataclass(frozen=True, slots=True)
class KernelRecords:
    """The tuned functions of one kernel key on one target: the content of one file."""

    target: Mapping[str, Any]
    key: KernelKey
    records: Mapping[str, Record]

    @property
    def path(self) -> Path:
        """Where it lies below the root."""
        return Path(slug(self.target)) / f"database_{self.key.slug}.json"

    def to_json(self) -> str:
        content = {
            "format_version": FORMAT_VERSION,
            "target": dict(self.target),
            "kernel_key": self.key.to_dict(),
            "records": {name: record.to_dict() for name, record in self.records.items()},
        }
        return json_text({**content, "checksum": checksum(content)})


def parse_records(text: bytes) -> KernelRecords:
    """What `KernelRecords.to_json` wrote, checked completely.

    Raises
    ------
    DamagedFile
    """
    content = _parse_object(text)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise DamagedFile(f"`format_version` must be {FORMAT_VERSION}, got {version!r}", newer)
    if content.pop("checksum", None) != checksum(content):
        raise DamagedFile("its checksum does not hold")
    try:
        records = {name: Record(**value) for name, value in content["records"].items()}
        found = KernelRecords(content["target"], KernelKey(**content["kernel_key"]), records)
        found.path  # noqa: B018 - target and key must have a name
    except (AttributeError, KeyError, TypeError) as error:
        raise DamagedFile(f"it is not a tuning database ({error})") from error
    if problems := record_problems(records):
        raise DamagedFile("; ".join(problems))
    return found


def record_problems(records: Mapping[str, Record]) -> list[str]:
    """Every rule that a record breaks, so that nothing is published that could not be read."""
    return [
        f"{name}: {problem}"
        for name, record in records.items()
        for problem in _problems(record, name)
    ]


def json_text(content: Mapping[str, Any]) -> str:
    """JSON as all files of the database are written."""
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parse_object(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON or of the encoding
        raise DamagedFile(f"it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"it must be a JSON object, got {type(content).__name__}")
    return content


def _problems(record: Record, name: str) -> list[str]:
    found = [
        f"`{field.name}` must be {field.type}, got {getattr(record, field.name)!r}"
        for field in fields(Record)
        if not _CHECKS[str(field.type)](getattr(record, field.name))
    ]
    if found:
        return found
    if record.function != name:
        found.append(f"`function` must be {name!r}, got {record.function!r}")
    if record.kind not in KINDS:
        found.append(f"`kind` must be one of {list(KINDS)}, got {record.kind!r}")
    for time in ("default_us", "tuned_us"):
        if getattr(record, time) <= 0:
            found.append(f"`{time}` must be positive, got {getattr(record, time)}")
    if record.max_error > record.error_limit:
        found.append(f"`max_error` must be at most {record.error_limit}, got {record.max_error}")
    return found


def _is_number(value: object) -> bool:
    # False for NaN, too.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_mapping(value: object, of: type | Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(each, of) and not isinstance(each, bool)
        for name, each in value.items()
    )


# By the annotation of the field.
_CHECKS: dict[str, Callable[[object], bool]] = {
    "str": lambda x: isinstance(x, str) and x != "",
    "str | None": lambda x: x is None or isinstance(x, str),
    "int": lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0,
    "float": _is_number,
    "float | None": lambda x: x is None or _is_number(x),
    "Mapping[str, Option]": lambda x: _is_mapping(x, int | str),
    "Mapping[str, str]": lambda x: _is_mapping(x, str),
}
