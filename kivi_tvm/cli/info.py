"""`kivi-tvm info`: what this installation consists of; imports neither tvm nor torch."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

from kivi_tvm import artifact_cache, cpu, database, host
from kivi_tvm.cli import COMMANDS
from kivi_tvm.errors import UserError

DISTRIBUTIONS = ("kivi-tvm", "apache-tvm", "apache-tvm-ffi", "torch", "numpy", "transformers")
THREAD_VARIABLES = ("TVM_NUM_THREADS", "OMP_NUM_THREADS")
# What decides the speed of CPU kernels; the JSON lists every flag.
SIMD_PREFIXES = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "sve", "bf16", "i8mm")
NO_COMPILER = "none: kernels are compiled anew in each process (apt-get install g++)"


def add_parser(subparsers: Any) -> None:
    """Register the command and its options."""
    parser = subparsers.add_parser("info", help=COMMANDS["info"], description=COMMANDS["info"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--devices", action="store_true", help="ask torch for devices (slower)")
    parser.add_argument(
        "--clear-cache", action="store_true", help="remove compiled kernels from the cache first"
    )


def run(args: argparse.Namespace) -> int:
    """Print the facts as text or JSON."""
    facts = collect(with_devices=args.devices)
    if args.clear_cache:
        facts["cleared"] = artifact_cache.clear_cache()._asdict()
        facts["cache"] = cache_facts()
    print(json.dumps(facts, indent=2) if args.json else "\n".join(_lines(facts)))
    return 0


def collect(with_devices: bool = False) -> dict[str, Any]:
    """Everything `info` prints, as plain JSON data."""
    facts = {
        "versions": {
            **{name: host.installed_version(name) for name in DISTRIBUTIONS},
            "python": platform.python_version(),
        },
        "platform": host.Platform.here().to_dict(),
        "paths": {
            "package": str(Path(__file__).parent.parent),
            "cache": str(artifact_cache.cache_dir()),
            "tuning": str(database.user_dir()),
            "tvm_runtime": _runtime_path(),
        },
        "cpu": {
            "name": cpu.cpu_name(),
            "threads": os.cpu_count(),
            "available_threads": host.available_processors(),
            "thread_variables": {v: os.environ.get(v) for v in THREAD_VARIABLES},
            "flags": sorted(cpu.cpu_flags() or ()),
        },
        "compiler": _compiler(),
        "cache": cache_facts(),
        "tuned": _tuned(),
    }
    return {**facts, "devices": _devices()} if with_devices else facts


def cache_facts() -> dict[str, Any]:
    """Each build in the cache, and the bytes of everything below the cache directory."""
    root = artifact_cache.cache_dir()
    files = (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    builds = [
        {
            "kernels": entry.slug,
            "size_bytes": entry.size_bytes,
            "built": datetime.fromtimestamp(entry.built_at).isoformat(timespec="seconds"),
            "path": str(entry.path),
        }
        for entry in artifact_cache.cache_entries()
    ]
    return {"builds": builds, "size_bytes": sum(path.stat().st_size for path in files)}


def _runtime_path() -> str | None:
    try:
        return str(host.find_runtime_library())
    except UserError:
        return None


def _compiler() -> dict[str, str] | None:
    path = host.find_cxx()
    if path is None:
        return None
    answer = subprocess.run(
        [path, "--version"], capture_output=True, text=True, timeout=10, check=False
    )
    return {"path": path, "version": (answer.stdout.splitlines() or ["unknown"])[0]}


def _tuned() -> list[dict[str, Any]]:
    """Targets with tuning records, the user's first, as builds look them up."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for origin, root in database.roots().items():
        for entry in database.entries(root):
            folder = (root / entry.path).parent
            about = {"target": folder.name, "origin": origin, "kernels": 0, "records": 0}
            row = found.setdefault((origin, folder.name), {**about, "path": str(folder)})
            row["kernels"] += 1
            row["records"] += len(entry.records)
    return list(found.values())


def _devices() -> list[str]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count))]


def _lines(facts: dict[str, Any]) -> list[str]:
    """The same facts for people."""
    processor, compiler = facts["cpu"], facts["compiler"]
    simd = [flag for flag in processor["flags"] if flag.startswith(SIMD_PREFIXES)]
    threads = f"{processor['available_threads']} of {processor['threads']} usable"
    settings = [f"{k}={v}" for k, v in processor["thread_variables"].items() if v is not None]
    rows = [(name, version or "not installed") for name, version in facts["versions"].items()]
    rows += [
        ("platform", " ".join(filter(None, facts["platform"].values()))),
        ("cpu", processor["name"]),
        ("instructions", " ".join(simd) or "unknown"),
        ("threads", ", ".join([threads, *settings])),
        ("compiler", f"{compiler['version']} ({compiler['path']})" if compiler else NO_COMPILER),
        ("package", facts["paths"]["package"]),
        ("tvm runtime", facts["paths"]["tvm_runtime"] or "not found"),
    ]
    rows += [("device", device) for device in facts.get("devices", ())]
    rows += _tuned_rows(facts["tuned"])
    rows += _cache_rows(facts)
    return [f"{name:<16}{value}" for name, value in rows]


def _tuned_rows(tuned: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [
        ("tuned", f"{t['target']}: {t['records']} records of {t['kernels']} kernels ({t['path']})")
        for t in tuned
    ]


def _cache_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    cached = facts["cache"]
    rows = [("cache", f"{facts['paths']['cache']} ({_size(cached['size_bytes'])})")]
    if cleared := facts.get("cleared"):
        freed = _size(cleared["freed_bytes"])
        busy = f"; {cleared['busy']} being built were kept" if cleared["busy"] else ""
        rows.append(("cleared", f"{cleared['removed']} builds, {freed}{busy}"))
    for build in cached["builds"]:
        rows.append(("", f"{build['kernels']}  {_size(build['size_bytes'])}  {build['built']}"))
    return rows


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"
