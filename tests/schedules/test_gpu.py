"""Schedules for work-groups: every operator has one, and machine code for it has what it needs.

What they compute is tested by `pytest tests/ops --kernels opencl`, where PoCL is installed.
"""

import re
import shutil
import subprocess

import pytest
from configurations import CONFIGS, FEW, HALF, config_id
from tvm.target import Target

from kivi_tvm.compile import functions, scheduled_function, scheduled_module
from kivi_tvm.cuda import known_architectures
from kivi_tvm.lowering import compile_module
from kivi_tvm.targets import SHARED_BYTES, hardware

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def cuda(architecture="sm_90"):
    return Target({"kind": "cuda", "arch": architecture}, host="llvm")


def source_of(key):
    """The CUDA source of every function of a kernel key."""
    target = cuda()
    made = compile_module(scheduled_module(key, target), target)
    return made.mod.imports[0].inspect_source("cuda")


def resources(source, architecture, folder):
    """(registers, spilled and local bytes, shared bytes) of every kernel, as ptxas says."""
    path = folder / "kernels.cu"
    path.write_text(source)
    command = ["nvcc", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-o"]
    done = subprocess.run(
        [*command, folder / "kernels.cubin", path], capture_output=True, text=True, check=True
    )
    found = {}
    for name, text in re.findall(
        r"Compiling entry function '(\w+)'(.*?)Compile time", done.stderr, re.S
    ):
        stack, *spills = map(int, re.findall(r"(\d+) bytes (?:stack|spill)", text))
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        shared = re.search(r"(\d+) bytes smem", text)
        found[name] = registers, stack + sum(spills), int(shared[1]) if shared else 0
    return found


@pytest.mark.parametrize("cfg", [*CONFIGS[::4], *HALF[::4]], ids=config_id)
def test_every_operator_has_a_schedule(cfg):
    for name in functions(cuda()):
        scheduled_function(name, cfg.kernel_key(), cuda())


def test_a_work_group_shares_what_every_device_gives():
    assert hardware(cuda()).shared_bytes == SHARED_BYTES == 48 * 1024


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(
    "cfg", [*FEW, CONFIGS[11], CONFIGS[15], HALF[8], HALF[10], HALF[14]], ids=config_id
)
def test_machine_code_spills_nothing(cfg, tmp_path):
    source = source_of(cfg.kernel_key())
    needs_sm_80 = cfg.dtype == "bfloat16" or cfg.compute == "half"
    for architecture in ARCHITECTURES[needs_sm_80:]:
        if architecture not in known_architectures():
            pytest.skip(f"needs nvcc that knows {architecture}")
        found = resources(source, architecture, tmp_path)
        assert len(found) == len(functions(cuda()))
        for name, (_, spilled, shared) in found.items():
            what = f"{name} on {architecture}"
            assert spilled == 0, what
            assert shared <= SHARED_BYTES, what
