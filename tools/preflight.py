"""List everything that is missing to set up `.venv`, before anything is downloaded.

Standard library only, and the syntax of Python 3.9, so that an old interpreter can say that
Python 3.11 is needed.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)
GB = 10**9
MIN_MEMORY = 4 * GB  # the demo holds SmolLM2 in float32, torch, TVM and a compiler at once


class Missing(NamedTuple):
    """Something that the setup needs and this machine lacks."""

    what: str
    fix: str


class Plan(NamedTuple):
    """What the setup will download and occupy; estimates, in bytes."""

    torch: str
    download_bytes: int
    disk_bytes: int
    minutes: str


CPU_PLAN = Plan("CPU build", GB // 2, 4 * GB, "2 to 5 minutes")
CUDA_PLAN = Plan("CUDA build, the default for Linux on PyPI", 3 * GB, 12 * GB, "5 to 20 minutes")

# What to type, by package manager. `{v}` is the Python version in use, as 3.11.
INSTALL = {
    "apt-get": {
        "python": "apt-get install python3.11 python3.11-venv",
        "venv": "apt-get install python{v}-venv",
        "compiler": "apt-get install g++",
    },
    "dnf": {
        "python": "dnf install python3.12",
        "venv": "dnf install python{v}",
        "compiler": "dnf install gcc-c++",
    },
    "pacman": {
        "python": "pacman -S python",
        "venv": "pacman -S python",
        "compiler": "pacman -S gcc",
    },
    "zypper": {
        "python": "zypper install python312",
        "venv": "zypper install python3-venv",
        "compiler": "zypper install gcc-c++",
    },
}
BY_HAND = {
    "python": "install Python 3.11, 3.12 or 3.13",
    "venv": "install the modules venv and ensurepip of Python {v}",
    "compiler": "install g++ or clang++",
}


def install_command(part: str) -> str:
    """Return the command that installs `part` here: `python`, `venv` or `compiler`."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for manager, commands in INSTALL.items():
        if shutil.which(manager):
            sudo = "" if os.geteuid() == 0 else "sudo "
            return sudo + commands[part].format(v=version)
    return BY_HAND[part].format(v=version)


def has_cpu_torch(torch: str) -> bool:
    """Tell whether pip will take a CPU build of torch, as far as its settings show."""
    if "cpu" in torch or platform.system() != "Linux":
        return True
    indexes = " ".join(os.environ.get(f"PIP_{k}", "") for k in ("INDEX_URL", "EXTRA_INDEX_URL"))
    if "/cpu" in indexes:
        return True
    version = torch.partition("==")[2] or "*"
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    folders = [Path(p) for p in os.environ.get("PIP_FIND_LINKS", "").split()]
    return any(next(p.glob(f"torch-{version}+cpu-{tag}-*.whl"), None) for p in folders)


def plan(torch: str) -> Plan:
    """Return the expected download and disk use for the requirement `torch`."""
    return CPU_PLAN if has_cpu_torch(torch) else CUDA_PLAN


def memory_bytes() -> int | None:
    """Return this machine's memory, or its container's limit, or None where it is not told."""
    found = []
    try:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (AttributeError, OSError, ValueError):
        pass  # no cgroup v2, or "max": no limit
    return min(found, default=None)


def find_missing(torch: str) -> list[Missing]:
    """Return everything that this machine lacks, with what to do about each."""
    missing = []
    if platform.system() == "Windows":
        missing.append(Missing("Linux (this is Windows)", "use Linux, or WSL on Windows"))
    found = sys.version_info[:2]
    if not OLDEST <= found <= NEWEST:
        text = f"Python 3.11 to 3.13 (`{sys.executable}` is {found[0]}.{found[1]})"
        fix = f"{install_command('python')}, then `make ... PYTHON=python3.11`"
        missing.append(Missing(text, fix))
    lacking = [m for m in ("venv", "ensurepip") if importlib.util.find_spec(m) is None]
    if lacking:
        missing.append(Missing(f"Python's {' and '.join(lacking)}", install_command("venv")))
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    if not any(name and shutil.which(name) for name in compilers):
        missing.append(Missing("a C++ compiler (g++ or clang++)", install_command("compiler")))
    return missing + find_too_small(torch)


def find_too_small(torch: str) -> list[Missing]:
    """Return what is too small here: disk, memory."""
    missing = []
    need = plan(torch)
    free = shutil.disk_usage(ROOT).free
    if free < need.disk_bytes:
        text = f"{need.disk_bytes / GB:.0f} GB of disk (free here: {free / GB:.1f} GB)"
        fix = "free some space"
        if need is CUDA_PLAN:
            fix += f", or take a CPU build of torch with TORCH=, {CPU_PLAN.disk_bytes // GB} GB"
        missing.append(Missing(text, fix))
    memory = memory_bytes()
    if memory is not None and memory < MIN_MEMORY:
        text = f"{MIN_MEMORY / GB:.0f} GB of memory (here: {memory / GB:.1f} GB)"
        missing.append(Missing(text, "use a larger machine or container"))
    return missing


def main() -> int:
    """Print what is missing, or what will be downloaded. Return 1 if anything is missing."""
    torch = os.environ.get("TORCH") or "torch"
    missing = find_missing(torch)
    need = plan(torch)
    if missing:
        print("Missing on this machine:", file=sys.stderr)
        for item in missing:
            print(f"  {item.what}\n    -> {item.fix}", file=sys.stderr)
    print(
        f"Setting up .venv downloads about {need.download_bytes / GB:.1f} GB (torch: {need.torch}),"
        f"\nneeds {need.disk_bytes // GB} GB of disk and takes {need.minutes}, by your connection.",
        file=sys.stderr,
    )
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
