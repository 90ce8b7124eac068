"""Tasks, compiled libraries and faulty ones for the tests of tuning."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

from kivi_tvm import build
from kivi_tvm.host import find_cxx
from kivi_tvm.tune.candidate import Built, Candidate, Task
from kivi_tvm.workloads import Workload

# The geometry of `test_tiny`, whose kernels other tests use as well.
TINY = Workload(num_heads=4, num_kv_heads=2, head_dim=64, tokens=2000, dtype="float32")
HALF = replace(TINY, num_heads=9, num_kv_heads=3, dtype="float16", compute="float")
WIDE = replace(
    TINY,
    num_heads=14,
    head_dim=128,
    key_bits=4,
    value_bits=4,
    group_size=64,
    dtype="bfloat16",
    compute="float",
)

# A library whose function does not what it should; `BODY` is C++.
FAULTY = """
#include <cstdio>
#include <cstdlib>
#include <unistd.h>
extern "C" int __tvm_ffi_{function}(void*, const void*, int, void*) {{ {body}; return 0; }}
"""


def library(workload: Workload):
    """The default kernels for a workload."""
    return build(workload.cfg).library


def built(task: Task, path: Path | None = None) -> Built:
    """A candidate that is the default kernel, or the library at `path`."""
    path = Path(library(task.workload).origin) if path is None else path
    return Built(Candidate(task, {}, f"{path.stem}"), path, 0.0)


def faulty(folder: Path, name: str, function: str, body: str) -> Path:
    """A library whose function runs `body`."""
    source, path = folder / f"{name}.cc", folder / f"{name}.so"
    source.write_text(FAULTY.format(function=function, body=body))
    subprocess.run([find_cxx(), "-shared", "-fPIC", "-o", path, source], check=True)
    return path
