"""The CUDA compiler, and where its code runs: without TVM, torch or a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

# Work-groups of a multiprocessor that a kernel leaves registers for, unless it says otherwise.
MIN_BLOCKS = 3
# How ptxas trades registers: its own default; TVM's, 10, spills on sm_100 and sm_120.
PTXAS_LEVEL = "5"
NEEDS_COMPILER = (
    "needs a CUDA compiler: nvcc on the PATH or below CUDA_HOME, "
    "or NVRTC (`pip install cuda-bindings`)"
)


def find_nvcc() -> str | None:
    """The path of nvcc: on the PATH, or below CUDA_HOME or CUDA_PATH."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [str(Path(home) / "bin") for home in homes if home]
    search = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    return shutil.which("nvcc", path=search)


def find_compiler() -> str | None:
    """The compiler that is used, "nvcc" or else "nvrtc"; None if there is none."""
    if find_nvcc():
        return "nvcc"
    try:
        found = importlib.util.find_spec("cuda.bindings.nvrtc")
    except ModuleNotFoundError:
        return None
    return "nvrtc" if found else None


@cache
def known_architectures() -> tuple[str, ...]:
    """Architectures that the compiler generates code for, such as "sm_90"; () if there is none."""
    compiler = find_compiler()
    if compiler == "nvcc":
        command = [find_nvcc() or "nvcc", "--list-gpu-code"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return tuple(done.stdout.split())
    if compiler == "nvrtc":
        from cuda.bindings import nvrtc

        _, numbers = nvrtc.nvrtcGetSupportedArchs()
        return tuple(f"sm_{number}" for number in numbers)
    return ()


def with_launch_bounds(source: str, blocks: Mapping[str, int] | None = None) -> str:
    """A CUDA source whose kernels say how many of their work-groups are to fit at once.

    Where only the size of a work-group is known, ptxas may spill registers to fit more of them.
    `blocks` has the number by the name of a function, for those that want another than
    `MIN_BLOCKS`.
    """

    def bounds(match: re.Match[str]) -> str:
        threads, function = match.groups()
        wanted = (blocks or {}).get(function, MIN_BLOCKS)
        return f"__launch_bounds__({threads}, {wanted}) {function}"

    return re.sub(r"__launch_bounds__\((\d+)\) (\w+?)(?=_kernel\b)", bounds, source)


def base_architecture(name: str) -> str:
    """An architecture without the letter of its specific features: "sm_90" of "sm_90a"."""
    return re.sub(r"[af]$", "", name)


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Tell whether machine code for an architecture runs on a device of a compute capability.

    It does on the same major version from its minor one on; with specific features, on exactly its
    own.
    """
    number = int(base_architecture(architecture).removeprefix("sm_"))
    major, minor = divmod(number, 10)
    if base_architecture(architecture) != architecture:
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor
