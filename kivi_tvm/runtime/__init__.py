"""Compiled kernels and caches in a torch process: the only place where torch and tvm-ffi meet."""

from __future__ import annotations

from kivi_tvm.runtime.authors import AuthorsCache, from_authors, to_authors
from kivi_tvm.runtime.cache import Cache
from kivi_tvm.runtime.layer import CacheLayer
from kivi_tvm.runtime.module import Module, build, load
from kivi_tvm.runtime.persistence import CacheFileError
from kivi_tvm.runtime.rollback import Cropped

__all__ = [
    "AuthorsCache",
    "Cache",
    "CacheFileError",
    "CacheLayer",
    "Cropped",
    "Module",
    "build",
    "from_authors",
    "load",
    "to_authors",
]
