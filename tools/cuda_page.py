"""Write docs/cuda-kernels.md: what ptxas makes of the CUDA kernels, without a GPU.

    .venv/bin/python tools/cuda_page.py

Needs the package's environment with cuobjdump and nvdisasm, and nvcc. Takes about two minutes.
"""

from __future__ import annotations

import re
import subprocess
from itertools import chain
from pathlib import Path
from typing import Any

from kivi_tvm import targets
from kivi_tvm.compile import functions, scheduled_function
from kivi_tvm.config import KiviConfig
from kivi_tvm.cuda import find_nvcc
from kivi_tvm.cuda_tools import kernels_of_source
from kivi_tvm.host import installed_version
from kivi_tvm.lowering import compile_module
from kivi_tvm.machine_code import KernelCode
from kivi_tvm.occupancy import occupancy
from kivi_tvm.ops import ALL_FUNCTIONS, BATCH_FUNCTIONS, FEW_FUNCTIONS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cuda-kernels.md"
WITHOUT_TENSOR_CORES = "sm_75"  # of the instructions that compute mode "half" uses
ARCHITECTURES = (WITHOUT_TENSOR_CORES, "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
CONFIG = KiviConfig(head_dim=128, num_heads=32, num_kv_heads=8)
SHAPES = tuple((group, queries) for group in (32, 128) for queries in (1, 4, 8))
# A turn of a work-group's warp: the codes of 64 tokens' keys and values, shared by its lanes.
CODES_OF_A_LANE = 64 * 128 * 2 // 32
HEAD = """# CUDA kernels in figures

Written by

```sh
.venv/bin/python tools/cuda_page.py
```

from the machine code of nvcc {nvcc} for the default schedules (TVM {tvm}); no GPU took part.
`kivi-tvm inspect FILE --cuda` prints the same figures, and more, of an artifact.

## Every kernel

2 bits, D=128, H=32, H_kv=8, G=32, R=128, float16: compute mode `{mode}`, on {old} `{old_mode}`. A
cell is registers of a thread / bytes of shared memory of a work-group / bytes of local memory and
bytes of all accesses to it (what is spilled), of a thread / work-groups and warps that a
multiprocessor holds at once. Limits are those of the CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability".

"""
LOOPS = """
## Attention's main loop

`attend`, 2 bits, D=128, float16. The loop is the innermost one that loads most; every instruction
in it counts once, also of its rare paths. Wide loads: the share of the bytes that it loads from
global memory in accesses of 16 bytes. I2F: conversions of integers to floats. Logic: LOP3 and SHF
per code, a lane having {codes} codes of 64 tokens' keys and values a turn; the aim is at most 1.
MMA: instructions of tensor cores.

"""
COLUMNS = (
    "G",
    "M",
    "architecture",
    "registers",
    "local, spilled bytes",
    "wide loads",
    "I2F",
    "logic",
)


def kernels(config: KiviConfig, architecture: str, *names: str) -> list[KernelCode]:
    """All kernels for an architecture, or some."""
    target = targets.resolve({"kind": "cuda", "arch": architecture})
    key = targets.kernel_key(config, target)
    found: list[KernelCode] = []
    for name in names or functions(key, target):
        module = compile_module(scheduled_function(name, key, target).mod, target)
        source = module.mod.imports[0].inspect_source("cuda")
        found += kernels_of_source(source, architecture)
    return found


def mode(architecture: str) -> str:
    """The compute mode of the default configuration."""
    target = targets.resolve({"kind": "cuda", "arch": architecture})
    return str(targets.kernel_key(CONFIG, target).compute)


def kernel_cell(kernel: KernelCode) -> str:
    """Registers, memory and occupancy."""
    about = occupancy(kernel.architecture, kernel.threads, kernel.registers, kernel.shared_bytes)
    held = f"{about.groups}, {about.warps}" if about else "?"
    return f"{kernel.registers} / {kernel.shared_bytes} / {memory_cell(kernel)} / {held}"


def memory_cell(kernel: KernelCode) -> str:
    """Bytes of local memory, and of the accesses to it."""
    return f"{kernel.local_bytes}, {kernel.spilled_bytes}"


def kernel_rows() -> list[list[str]]:
    """The table of every kernel on every architecture."""
    found = chain.from_iterable(kernels(CONFIG, each) for each in ARCHITECTURES)
    cells = {(kernel.name, kernel.architecture): kernel_cell(kernel) for kernel in found}
    cells |= {(name, WITHOUT_TENSOR_CORES): "-" for name in BATCH_FUNCTIONS | FEW_FUNCTIONS}
    rows = [[f"`{name}`", *(cells[name, each] for each in ARCHITECTURES)] for name in ALL_FUNCTIONS]
    return [["kernel", *ARCHITECTURES], ["-"] * (len(ARCHITECTURES) + 1), *rows]


def loop_row(group_size: int, queries: int, kernel: KernelCode) -> list[str]:
    """A kernel's main loop."""
    loop = kernel.main_loop
    if loop is None:
        raise SystemExit(f"{kernel.name} on {kernel.architecture} has no loop")
    counts = loop.counts
    return [
        *map(str, (group_size, queries, kernel.architecture, kernel.registers)),
        memory_cell(kernel),
        f"{counts.wide_load_bytes / counts.global_load_bytes:.1%}",
        str(counts["int_to_float"]),
        f"{counts['logic'] / CODES_OF_A_LANE:.2f}",
        str(counts["mma"]),
        str(counts.total),
    ]


def loop_rows() -> list[list[str]]:
    """The table of main loops."""
    rows = [[*COLUMNS, "MMA", "instructions"], [*["-:"] * 2, "-", *["-:"] * 7]]
    for group_size, queries in SHAPES:
        config = KiviConfig(128, 8 * queries, 8, group_size=group_size)
        for architecture in ("sm_80", "sm_90"):
            [kernel] = kernels(config, architecture, "attend")
            rows.append(loop_row(group_size, queries, kernel))
    return rows


def table(rows: list[list[str]]) -> str:
    """Cells as Markdown."""
    return "".join("| " + " | ".join(cells) + " |\n" for cells in rows)


def facts() -> dict[str, Any]:
    """Versions and modes for the page's head."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("needs nvcc on the PATH or below CUDA_HOME")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release [\d.]+, V([\d.]+)", said)
    return {
        "nvcc": version[1] if version else "unknown",
        "tvm": installed_version("apache-tvm"),
        "mode": mode("sm_80"),
        "old": WITHOUT_TENSOR_CORES,
        "old_mode": mode(WITHOUT_TENSOR_CORES),
    }


def page() -> str:
    """The whole page."""
    head = HEAD.format(**facts())
    return head + table(kernel_rows()) + LOOPS.format(codes=CODES_OF_A_LANE) + table(loop_rows())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
