"""Compiled kernels and caches in a torch process: the only place where torch and tvm-ffi meet."""

from __future__ import annotations

from kivi_tvm.runtime.cache import Cache
from kivi_tvm.runtime.layer import CacheLayer
from kivi_tvm.runtime.module import Module, build, load

__all__ = ["Cache", "CacheLayer", "Module", "build", "load"]
