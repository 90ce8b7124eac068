"""CUDA sources run on a CPU, lanes and their instructions included: what tensor cores would do.

`EmulatedLibrary` gives the functions of a kernel key by name as a compiled library does; they take
CPU tensors. Needs a C++ compiler with `_Float16`.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from pathlib import Path

import torch
from opencl import OpenCLKernel, size, thread_extents
from tvm.target import Target

from kivi_tvm.compile import scheduled_function
from kivi_tvm.host import find_cxx
from kivi_tvm.lowering import compile_module

TARGET = Target({"kind": "cuda", "arch": "sm_90"}, host="llvm")
HEADER = Path(__file__).with_name("warp_emulator.h")
SIGNATURE = re.compile(r'extern "C" __global__ void .*?(\w+_kernel)\(([^)]*)\) \{')
MMA = re.compile(
    r'__asm__ __volatile__\(\s*"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32"'
    r".*?\);\n",
    re.S,
)
REGISTER = re.compile(r"\(\((?:float|unsigned) \*\)\((.*?)\)\)\[\d\]\)")
COPY = re.compile(r'unsigned address.*?asm volatile\("cp\.async\.cg\.shared\.global.*?\);', re.S)
ARRIVE = re.compile(r'asm volatile\("cp\.async\.wait_all;.*?\);')
EXP2 = re.compile(r'asm\("ex2\.approx\.ftz\.f32.*?\);')
LAUNCHES = re.compile(r'asm volatile\("griddepcontrol\..*?\);')
SHARED = re.compile(r"extern __shared__ .*?(\w+)\[\];")
MOVMATRIX = re.compile(r'asm\("movmatrix\.sync\.aligned\.m8n8\.trans\.b16.*?\);')


class EmulatedLibrary:
    """The functions of one kernel key, compiled when they are asked for."""

    def __init__(self, key):
        self.key = key
        self._kernels = {}

    def __getitem__(self, name):
        if name not in self._kernels:
            schedule = scheduled_function(name, self.key, TARGET)
            self._kernels[name] = EmulatedKernel(schedule.mod)
        return self._kernels[name]


class EmulatedKernel(OpenCLKernel):
    """One scheduled function, called with CPU tensors and numbers."""

    def __init__(self, module):
        [function] = module.functions.values()
        self._parameters = list(function.params)
        self.extents = thread_extents(function.body)
        source = compile_module(module, TARGET).mod.imports[0].inspect_source("cuda")
        [(name, parameters)] = SIGNATURE.findall(source)
        self._arguments = [each.split()[-1] for each in parameters.split(",")]
        self._library = compiled(emulated(source, name))
        self._launch = self._library[f"launch_{name}"]

    def run_after(self, changes):
        """Let the kernel begin before an earlier one ends, by which tensors become others."""
        at, after = (
            (ctypes.c_void_p * len(changes))(*(pair[i].data_ptr() for pair in changes))
            for i in range(2)
        )
        nbytes = (ctypes.c_long * len(changes))(*(x.nbytes for x, _ in changes))
        self._library.run_after(len(changes), at, after, nbytes)

    def __call__(self, *arguments):
        values = self._values(arguments)
        axes = "blockIdx.x", "threadIdx.x", "threadIdx.y"
        grid, *group = (size(self.extents.get(axis), values) for axis in axes)
        held = [as_argument(values[name]) for name in self._arguments]
        assert self._launch(grid, *group, *held) == 0, "threads wait for each other"


def emulated(source, name):
    """A CUDA source as C++ with a function that launches its kernel."""
    body = MOVMATRIX.sub("y = movmatrix_trans(x);", MMA.sub(call_of_mma, source))
    body = LAUNCHES.sub(lambda match: "wait_for_earlier();" * ("wait" in match[0]), body)
    body = EXP2.sub("y = exp2f(x);", body)
    body = ARRIVE.sub("arrive_copies();", COPY.sub("copy_later(to, from);", body))
    body = SHARED.sub(r"alignas(16) static uchar \1[SHARED_BYTES];", body)
    helpers = "\n".join(re.findall(r"__device__ __forceinline__ .*?\n}\n", body, re.S))
    kernel = body[body.index('extern "C" __global__ void') :]
    [(_, parameters)] = SIGNATURE.findall(kernel)
    names = ", ".join(each.split()[-1] for each in parameters.split(","))
    launcher = (
        f'extern "C" int launch_{name}(int blocks, int x, int y, {parameters}) '
        f"{{ return launch(blocks, x, y, [=] {{ {name}({names}); }}); }}"
    )
    return "\n".join([f'#include "{HEADER}"', helpers, kernel, launcher])


def call_of_mma(match):
    d, _, _, _, a, _, _, _, b, *_ = REGISTER.findall(match[0])
    return f"mma_m16n8k16_{match[1]}({d}, {a}, {b});\n"


def compiled(source):
    flags = ["-O1", "-fno-strict-aliasing", "-shared", "-fPIC", "-w", "-march=native"]
    with tempfile.TemporaryDirectory() as folder:
        path, library = Path(folder, "kernel.cc"), Path(folder, "kernel.so")
        path.write_text(source)
        subprocess.run([find_cxx(), *flags, "-o", library, path], check=True)
        return ctypes.CDLL(library)


def as_argument(value):
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return {"int32": ctypes.c_int, "float32": ctypes.c_float}[value.dtype.name](value)
