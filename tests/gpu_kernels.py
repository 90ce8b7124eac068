"""GPU schedules in the place of a CPU library's functions, for the tests of operators."""

from __future__ import annotations

from functools import cache

import pytest
from opencl import OpenCLLibrary


def opencl_library(cfg):
    """The functions of `cfg` on PoCL."""
    if cfg.compute_mode() != "float":
        pytest.skip("GPU schedules have no mode of integers")
    return _opencl(cfg.kernel_key())


_opencl = cache(OpenCLLibrary)
