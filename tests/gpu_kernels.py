"""GPU schedules in the place of a CPU library's functions, for the tests of operators."""

from __future__ import annotations

from functools import cache

import torch
from opencl import OpenCLLibrary


def opencl_library(cfg):
    """The functions of `cfg` on PoCL."""
    return _opencl(cfg.kernel_key())


_opencl = cache(OpenCLLibrary)


@cache
def cuda_library(cfg):
    """The functions of `cfg` on this machine's GPU."""
    from kivi_tvm import build

    return CUDALibrary(build(cfg, "cuda").library, cfg.G_k)


class CUDALibrary:
    """The functions of a CUDA library, which take CPU tensors and write them in place."""

    def __init__(self, library, key_group_size):
        self._library, self._group = library, key_group_size

    def __getitem__(self, name):
        function = self._library[name]

        def call(*arguments):
            if name == "quantize_key" and arguments[-1].shape[2] < self._group:
                return  # as the runtime does: there would be no work-group to launch
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
