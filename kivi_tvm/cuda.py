"""The CUDA compiler, and where its code runs: without TVM, torch or a GPU."""

from __future__ import annotations

import base64
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
# Where the machine code begins that a source carries behind it, as a comment.
MACHINE_CODE = "\n// kivi-tvm: machine code of the above, as base64\n// "
# How a kernel begins where kernels are launched before earlier ones have ended: "wait" for those;
# and then "release" the next one, whose part before its own wait needs nothing of this kernel; or
# go on, since it waits "later"; or do both "within", and once more where it ends, for threads that
# did not: no kernel ends, or lets the next one begin, before it has waited.
BEGINNINGS = {
    "wait": "kivi_tvm_wait();",
    "release": "kivi_tvm_wait(); kivi_tvm_release();",
    "later": "",
    "within": "",
}
WAITS_LATER = "later", "within"  # and loads before
WAIT_SOURCE = """
__device__ __forceinline__ unsigned kivi_tvm_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
  return 1;
}
"""
RELEASE_SOURCE = """
__device__ __forceinline__ void kivi_tvm_release() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
"""
NEEDS_COMPILER = (
    "needs a CUDA compiler: nvcc on the PATH or below CUDA_HOME, "
    "or NVRTC (`pip install 'kivi-tvm[nvrtc]'`, which has cuda-bindings)"
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


def with_early_launch(source: str, beginnings: Mapping[str, str]) -> str:
    """A CUDA source whose kernels are launched before earlier ones have ended: sm_90 and later.

    PTX ISA 9.7.13.14 ("griddepcontrol"). `beginnings` has one of `BEGINNINGS` by the name of a
    function; the others "wait".
    """

    def launched_early(match: re.Match[str]) -> str:
        head, name, body = match.groups()
        how = beginnings.get(name, "wait")
        end = f"  {BEGINNINGS['release']}\n" if how == "within" else ""
        return f"{head}  {BEGINNINGS[how]}\n{body}{end}}}\n"

    at = source.index('extern "C" __global__')
    sources = {"kivi_tvm_release": RELEASE_SOURCE, "kivi_tvm_wait": WAIT_SOURCE}
    helpers = "".join(text for name, text in sources.items() if name not in source)
    kernel = re.compile(r"((\w+)_kernel\([^)]*\) \{\n)(.*?)^\}\n", re.S | re.M)
    kernels, count = kernel.subn(launched_early, source[at:])
    if count != len(re.findall(r"_kernel\([^)]*\) \{", source[at:])):
        raise ValueError("`source` must have kernels that end in a line of their own")
    return source[:at] + helpers + kernels


def with_asked_bytes(source: str, asked: Mapping[str, int]) -> str:
    """A CUDA source whose machine code tells how much shared memory kernels ask for at launch.

    By the names of variables, which `asked_bytes` reads from the names of all symbols.
    """
    lines = [f'extern "C" __device__ char {name}_asks_{n}_bytes;' for name, n in asked.items()]
    return "\n".join([source, *lines, ""]) if lines else source


def asked_bytes(symbols: str) -> dict[str, int]:
    """Shared memory that kernels ask for at launch, by name, where it is not 0."""
    return {name: int(n) for name, n in re.findall(r"\b(\w+?)_asks_(\d+)_bytes\b", symbols)}


def with_machine_code(source: str, image: bytes) -> str:
    """A CUDA source with what it was compiled to.

    TVM keeps sources where there is no NVIDIA driver, and has them compiled where they are loaded.
    """
    return f"{source}{MACHINE_CODE}{base64.b64encode(image).decode()}\n"


def machine_code_of(source: str) -> bytes | None:
    """The machine code that a source carries; None if it carries none."""
    _, mark, code = source.partition(MACHINE_CODE)
    return base64.b64decode(code) if mark else None


def base_architecture(name: str) -> str:
    """An architecture without the letter of its specific features: "sm_90" of "sm_90a"."""
    return re.sub(r"[af]$", "", name)


def number_of(architecture: str) -> int:
    """The number of an architecture, 90 of "sm_90a"; 0 if it has none."""
    found = re.fullmatch(r"sm_(\d+)", base_architecture(architecture))
    return int(found[1]) if found else 0


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Tell whether machine code for an architecture runs on a device of a compute capability.

    It does on the same major version from its minor one on; with specific features, on exactly its
    own.
    """
    major, minor = divmod(number_of(architecture), 10)
    if base_architecture(architecture) != architecture:
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor
