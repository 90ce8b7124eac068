"""Schedules for work-groups: every operator has one, and machine code for it has what it needs.

What they compute is tested by `pytest tests/ops --kernels opencl`, where PoCL is installed.
"""

import re
import shutil
import subprocess

import pytest
from configurations import CONFIGS, FEW, HALF, config_id, slow_but
from tvm.target import Target

from kivi_tvm.compile import functions, scheduled_function, scheduled_module
from kivi_tvm.config import KiviConfig
from kivi_tvm.cuda import asked_bytes, known_architectures
from kivi_tvm.cuda_tools import PROGRAMS, compiled, disassembled, find_program
from kivi_tvm.lowering import compile_module
from kivi_tvm.machine_code import parse_sass
from kivi_tvm.occupancy import PARTITIONS, occupancy
from kivi_tvm.schedules.threads import WIDE_HEAD
from kivi_tvm.targets import SHARED_BYTES, hardware

WAIT, RELEASE = "ACQBULK", "PREEXIT"  # griddepcontrol.wait and .launch_dependents
RELEASING = "append_kernel", "attend_batch_kernel", "attend_kernel", "extend_attend_kernel"
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
# States of packed tokens beside their tiles, and among them, where estimates are near the limit.
LAUNCHED = [
    KiviConfig(128, 32, 8, 2, 2, compute="half"),
    KiviConfig(128, 32, 4, 2, 2, compute="half"),
    KiviConfig(128, 32, 8, 4, 4, compute="half"),
    KiviConfig(112, 64, 8, 2, 2, compute="half", group_size=16),
    KiviConfig(128, 32, 8, 8, 2, compute="half", group_size=128),
    *[pytest.param(cfg, marks=pytest.mark.slow) for cfg in HALF if cfg.D <= WIDE_HEAD],
]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def cuda(architecture="sm_90"):
    return Target({"kind": "cuda", "arch": architecture}, host="llvm")


def source_of(key, architecture="sm_90"):
    """The CUDA source of every function of a kernel key."""
    target = cuda(architecture)
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


def instructions(source, architecture):
    """The names of every kernel's instructions."""
    sass = disassembled(compiled(source, architecture))
    return {kernel: [each.name for each in found] for kernel, found in parse_sass(sass).items()}


@pytest.mark.parametrize("cfg", slow_but([*CONFIGS[4::8], *HALF[::8]], [*CONFIGS[::4], *HALF[::4]]))
def test_every_operator_has_a_schedule(cfg):
    key = cfg.kernel_key()
    for name in functions(key, cuda()):
        scheduled_function(name, key, cuda())


def test_a_work_group_shares_what_every_device_gives():
    assert hardware(cuda()).shared_bytes == SHARED_BYTES == 48 * 1024


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(
    "cfg", [*FEW, CONFIGS[11], CONFIGS[15], HALF[6], HALF[8], HALF[10], HALF[14]], ids=config_id
)
def test_machine_code_spills_nothing(cfg, tmp_path):
    # kernels that are launched early have waits and other loads
    of = {False: "sm_80", True: "sm_90"}
    sources = {early: source_of(cfg.kernel_key(), of[early]) for early in of}
    needs_sm_80 = cfg.dtype == "bfloat16" or cfg.compute == "half"
    for architecture in ARCHITECTURES[needs_sm_80:]:
        if architecture not in known_architectures():
            pytest.skip(f"needs nvcc that knows {architecture}")
        source = sources[hardware(cuda(architecture)).early_launch]
        found = resources(source, architecture, tmp_path)
        assert len(found) == len(functions(cfg.kernel_key(), cuda()))
        for name, (_, spilled, shared) in found.items():
            what = f"{name} on {architecture}"
            assert spilled == 0, what
            assert shared <= SHARED_BYTES, what


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize(
    "cfg", [KiviConfig(128, 32, 8, compute=mode) for mode in ("float", "half")], ids=config_id
)
def test_occupancy(cfg, tmp_path):
    """A multiprocessor holds the work-groups that kernels leave registers for.

    Or those that shared memory has room for: no fewer warps than it has schedulers.
    """
    for architecture in ARCHITECTURES[cfg.compute == "half" :]:
        if architecture not in known_architectures():
            pytest.skip(f"needs nvcc that knows {architecture}")
        source = source_of(cfg.kernel_key(), architecture)
        bounds = re.findall(r"__launch_bounds__\((\d+), (\d+)\) (\w+_kernel)\(.*\) {", source)
        asked, found = asked_bytes(source), resources(source, architecture, tmp_path)
        assert {name for *_, name in bounds} == found.keys()
        for threads, groups, name in bounds:
            registers, _, shared = found[name]
            held = occupancy(architecture, int(threads), registers, shared + asked.get(name, 0))
            assert held.warps >= PARTITIONS, f"{name} on {architecture}: {held}"
            assert held.groups >= int(groups) or held.limit != "registers", f"{name}: {held}"


@pytest.mark.parametrize("cfg", LAUNCHED, ids=config_id)
def test_shared_memory_that_tvm_can_launch(cfg):
    """TVM asks for more than the default if the part that is not declared is larger alone."""
    for architecture in ("sm_80", "sm_90"):
        key, name = cfg.kernel_key(), "attend_batch"
        function = scheduled_function(name, key, cuda(architecture)).mod
        source = compile_module(function, cuda(architecture)).mod.imports[0].inspect_source("cuda")
        [asked] = asked_bytes(source).values()
        fixed = sum(4 * int(n) for n in re.findall(r"__shared__ .*float \w+\[(\d+)\];", source))
        assert asked >= SHARED_BYTES or asked + fixed <= SHARED_BYTES, architecture
        assert asked + fixed <= hardware(cuda(architecture)).dynamic_bytes, architecture


@pytest.mark.slow
@needs_nvcc
@pytest.mark.skipif(not all(map(find_program, PROGRAMS)), reason="needs cuobjdump and nvdisasm")
@pytest.mark.parametrize("cfg", [FEW[0], HALF[0]], ids=config_id)
def test_what_is_loaded_before_earlier_kernels_have_ended(cfg):
    """Nothing, but by five kernels from the second-level cache, where all is that was written.

    `attend` of mode "half" and `attend_batch` wait and release within; where they end, for threads
    that have not, or where the first begins, for queries that may just have been written.
    """
    kernels = instructions(source_of(cfg.kernel_key()), "sm_90")
    assert len(kernels) == len(functions(cfg.kernel_key(), cuda()))
    half = cfg.compute == "half"
    within = ("attend_kernel", "attend_batch_kernel")
    others = (*within, "combine_batch_kernel", "combine_few_kernel")
    loading = {"combine_window_kernel", *others * half}
    for kernel, names in kernels.items():
        waits = [at for at, name in enumerate(names) if name == WAIT]
        twice = half and kernel in (*within, "extend_attend_kernel")
        assert len(waits) == 1 + twice, kernel
        accesses = [
            name for name in names[: waits[0]] if name.startswith(("LD", "ST", "RED", "ATOM"))
        ]
        early = [name for name in accesses if not name.startswith(("LDC", "LDS", "STS"))]
        if kernel in loading:
            assert early, kernel
            assert all("STRONG.GPU" in name or "LDGSTS.E.BYPASS" in name for name in early), kernel
        else:
            assert not early, kernel
        assert names.count(RELEASE) == (kernel in RELEASING) + twice, kernel
