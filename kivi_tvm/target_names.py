"""What tells two targets apart for tuning records, and a directory name for it; without TVM."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

# Names of operating systems in LLVM triples, whose second part may be a vendor or the system.
_SYSTEMS = ("linux", "darwin", "macos", "ios", "windows", "win32", "freebsd", "wasi", "none")
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
# Fields of TVM's target that do not change the code generated for the device: names, the host
# side, and facts that follow from the processor.
_NOT_IDENTITY = (
    "tag", "keys", "host", "mtriple", "model", "device", "from_device", "num-cores",
    "max_num_threads", "max_threads_per_block", "registers_per_block", "thread_warp_size",
    "max_shared_memory_per_block", "l2_cache_size_bytes",
)  # fmt: skip
_IN_SLUG = ("kind", "machine", "system", "mcpu", "arch")


def identity(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a target that change generated code, in one spelling.

    Parameters
    ----------
    fields : mapping
        TVM's JSON of the target; for "llvm" with `mtriple`. Its vendor and environment are left
        out: "x86_64-conda-linux-gnu" and "x86_64-pc-linux-gnu" are one target.

    Returns
    -------
    dict
        Plain JSON, equal for targets that may share tuning records.
    """
    found = {
        name: sorted(value) if name == "mattr" else value
        for name, value in fields.items()
        if name not in _NOT_IDENTITY and not name.startswith("feature.")
    }
    if "mtriple" in fields:
        found["machine"], found["system"] = _machine_and_system(str(fields["mtriple"]))
        found.setdefault("mcpu", "generic")
    return {name: found[name] for name in sorted(found) if found[name] != []}


def slug(target: Mapping[str, Any]) -> str:
    """A directory name for what `identity` returned, one per target.

    For example `llvm-x86_64-znver4`, with 8 hex digits at the end where processor features or
    other options are set apart, and `cuda-sm_90a`.
    """
    parts = [target.get("kind", "unknown"), target.get("machine")]
    if target.get("system", "linux") != "linux":
        parts.append(target["system"])
    parts += [target.get("mcpu"), target.get("arch")]
    rest = {name: value for name, value in target.items() if name not in _IN_SLUG}
    if rest:
        text = json.dumps(rest, sort_keys=True)
        parts.append(hashlib.sha256(text.encode()).hexdigest()[:8])
    return "-".join(str(part) for part in parts if part).replace("/", "_")


def triple(target: Mapping[str, Any]) -> str | None:
    """An LLVM triple of what `identity` returned; None where it names no machine."""
    if "machine" not in target:
        return None
    environment = "-gnu" if target["system"] == "linux" else ""
    return f"{target['machine']}-unknown-{target['system']}{environment}"


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known names most like `name`, at most `n`, best first."""
    names = list(known)
    # "h100" is all that many remember of "nvidia/nvidia-h100".
    tails = {tag: tag.rpartition("/")[2] for tag in names}

    def likeness(tag: str) -> float:
        matcher = difflib.SequenceMatcher(b=name.lower())
        ratios = []
        for text in (tag, tails[tag], tails[tag].rpartition("-")[2]):
            matcher.set_seq1(text.lower())
            ratios.append(matcher.ratio())
        return max(ratios)

    scored = sorted(((likeness(tag), tag) for tag in names), key=lambda pair: (-pair[0], pair[1]))
    return [tag for score, tag in scored[:n] if score >= 0.6]


def _machine_and_system(llvm_triple: str) -> tuple[str, str]:
    machine, *rest = llvm_triple.split("-")
    system = next((part for part in rest if part.startswith(_SYSTEMS)), rest[-1] if rest else "")
    # "darwin22.1.0": the release of the system is no part of the code.
    return _MACHINES.get(machine, machine), system.rstrip("0123456789.") or "unknown"
