"""Kernels for work-groups run on a CPU, by an OpenCL runtime: the GPU schedules without a GPU.

`OpenCLLibrary` gives the functions of a kernel key by name as a compiled library does; they take
CPU tensors. PoCL must be installed, and pyopencl.
"""

from __future__ import annotations

import math
from functools import cache

import numpy
import torch
import tvm
import tvm_ffi
from tvm.target import Target
from tvm.tirx import FloatImm, For, IntImm, Var
from tvm.tirx.build import split_host_device_mods
from tvm.tirx.op import reinterpret

from kivi_tvm.compile import scheduled_function

TARGET = Target({"kind": "opencl"}, host="llvm")
# The optimizer of PoCL 3.1 breaks race-free kernels with dynamic loops. Its CPUs have no half
# precision in OpenCL, but clang converts its own type of that format.
BUILD_OPTIONS = ["-cl-opt-disable", "-Dhalf=_Float16", "-Dcl_khr_fp16"]
FP16_PRAGMA = "#pragma OPENCL EXTENSION cl_khr_fp16"
CASTS = [
    line
    for kind in ("float", "half")
    for line in (f"#undef convert_{kind}", f"#define convert_{kind}(x) (({kind})(x))")
]
# 16 bytes of that type at once, which the runtime has no functions for.
HALF_VECTORS = """
half8 __attribute__((overloadable)) vload8(ulong at, const global half* from) {
  half8 found;
  for (int i = 0; i < 8; ++i) found[i] = from[8 * at + i];
  return found;
}
void __attribute__((overloadable)) vstore8(half8 x, ulong at, half* to) {
  for (int i = 0; i < 8; ++i) to[8 * at + i] = x[i];
}
"""
WORDS = {"T": type("T", (), {"min": min, "max": max, "ceildiv": lambda a, b: -(-a // b)})}


class OpenCLLibrary:
    """The functions of one kernel key, compiled when they are asked for."""

    def __init__(self, key):
        self.key = key
        self._kernels = {}

    def __getitem__(self, name):
        if name not in self._kernels:
            self._kernels[name] = OpenCLKernel(scheduled_function(name, self.key, TARGET).mod[name])
        return self._kernels[name]


class OpenCLKernel:
    """One scheduled function, called with CPU tensors and numbers."""

    def __init__(self, function):
        self._parameters = list(function.params)
        device = device_function(function)
        self._arguments = [str(p.name) for p in device.params]
        self.extents = thread_extents(function.body)
        name = device.attrs["global_symbol"]
        module = tvm.IRModule({name: device})
        self.source = tvm.get_global_func("target.build.opencl")(module, TARGET).inspect_source(
            "cl"
        )
        self._kernel = build(self.source, name)

    def __call__(self, *arguments):
        values = self._values(arguments)
        grid = [size(self.extents.get(f"blockIdx.{axis}"), values) for axis in "xyz"]
        group = [size(self.extents.get(f"threadIdx.{axis}"), values) for axis in "xyz"]
        if math.prod(grid):
            run(self._kernel, [values[name] for name in self._arguments], grid, group)

    def _values(self, arguments):
        """Device arguments by name: numpy arrays, and numbers with their dtypes."""
        found = {}
        for parameter, argument in zip(self._parameters, arguments, strict=True):
            if not isinstance(argument, torch.Tensor):
                found[str(parameter.name)] = (
                    numpy.float32 if isinstance(argument, float) else numpy.int32
                )(argument)
                continue
            found[f"{parameter.name}_ptr"] = argument
            shapes = [(parameter.shape, argument.shape), (parameter.strides, argument.stride())]
            for expressions, extents in shapes:
                for expression, extent in zip(expressions, extents):
                    if isinstance(expression, Var):
                        found.setdefault(str(expression.name), numpy.int32(extent))
        return found


def device_function(function):
    """What runs on the device of a scheduled function with one kernel."""
    lower, _, finish = tvm.tirx.get_tir_pipeline("s_tir")
    name = str(function.attrs["global_symbol"])
    module = tvm.tirx.transform.BindTarget(TARGET)(tvm.IRModule({name: function}))
    # Without common subexpressions, which the host would compute for the device.
    with tvm.transform.PassContext(config={"tirx.disable_cse_tir": True}):
        _, devices = split_host_device_mods(lower(module))
    [device] = devices.values()
    [found] = finish()(device).functions.values()
    return found.with_body(tvm_ffi.structural_map(found.body, (FloatImm, exact)))


def exact(number):
    """A float32 constant by its bits: TVM writes seven digits of it into OpenCL sources."""
    value = numpy.float32(number.value)
    if str(number.ty.dtype) != "float32" or numpy.float32(f"{value:e}") == value:
        return number
    return reinterpret("float32", IntImm("uint32", int(value.view(numpy.uint32))))


def thread_extents(stmt):
    """Extents of a kernel's grid and work-groups, by thread axis."""
    found = {}

    def visit(loop):
        if loop.thread_binding is not None:
            found[str(loop.thread_binding.thread_tag)] = loop.extent

    tvm_ffi.structural_walk(stmt, (For, visit))
    return found


def size(extent, values):
    """The value of a grid's extent; 1 where there is none."""
    if extent is None:
        return 1
    return max(0, int(eval(str(extent), dict(WORDS), values)))


@cache
def context():
    import pyopencl

    device = next(
        device
        for platform in pyopencl.get_platforms()
        for device in platform.get_devices()
        if platform.name == "Portable Computing Language"
    )
    made = pyopencl.Context([device])
    return made, pyopencl.CommandQueue(made)


def build(source, name):
    import pyopencl

    lines = [line for line in source.splitlines() if not line.startswith(FP16_PRAGMA)]
    source = "\n".join([*CASTS, HALF_VECTORS, *lines])
    made, _ = context()
    return getattr(pyopencl.Program(made, source).build(options=BUILD_OPTIONS), name)


def run(kernel, arguments, grid, group):
    """Launch and wait; tensors are written in place, whatever their strides are."""
    import pyopencl

    made, queue = context()
    flags = pyopencl.mem_flags.READ_WRITE | pyopencl.mem_flags.USE_HOST_PTR
    held = [
        pyopencl.Buffer(made, flags, hostbuf=memory(x)) if isinstance(x, torch.Tensor) else x
        for x in arguments
    ]
    for index, argument in enumerate(held):
        kernel.set_arg(index, argument)
    total = [count * threads for count, threads in zip(grid, group, strict=True)]
    pyopencl.enqueue_nd_range_kernel(queue, kernel, total, group).wait()


def memory(tensor):
    """The bytes from a tensor's first element to the end of its storage, as numpy sees them."""
    storage = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())
    first = tensor.storage_offset() * tensor.element_size()
    found = storage.numpy()[first:]
    return found if len(found) else storage.new_zeros(64).numpy()
