"""GPU schedules in the place of a CPU library's functions, for the tests of operators."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from opencl import OpenCLLibrary

NO_INTEGERS = "GPU schedules have no mode of integers"


def opencl_library(cfg):
    """The functions of `cfg` on PoCL."""
    if cfg.compute_mode() != "float":
        pytest.skip(NO_INTEGERS)
    return _opencl(cfg.kernel_key())


_opencl = cache(OpenCLLibrary)


def cuda_library(cfg):
    """The functions of `cfg` on this machine's GPU."""
    if cfg.compute_mode() != "float":
        pytest.skip(NO_INTEGERS)
    return _cuda(cfg)


@cache
def _cuda(cfg):
    from kivi_tvm import build

    return CUDALibrary(build(cfg, "cuda").library)


class CUDALibrary:
    """The functions of a CUDA library, which take CPU tensors and write them in place."""

    def __init__(self, library):
        self._library = library

    def __getitem__(self, name):
        function = self._library[name]

        def call(*arguments):
            copies = {}
            function(*(_on_gpu(x, copies) for x in arguments))
            torch.cuda.synchronize()
            for storage, copy in copies.values():
                storage.copy_(copy)

        return call


def _on_gpu(x, copies):
    """A tensor with the same strides over a copy of its whole storage; numbers as they are."""
    if not isinstance(x, torch.Tensor):
        return x
    storage = x.untyped_storage()
    if storage.data_ptr() not in copies:
        copies[storage.data_ptr()] = storage, storage.cuda()
    _, copy = copies[storage.data_ptr()]
    empty = torch.empty(0, dtype=x.dtype, device="cuda")
    return empty.set_(copy, x.storage_offset(), x.shape, x.stride())
