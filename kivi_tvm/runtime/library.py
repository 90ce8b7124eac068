"""Compiled libraries in this process: TVM's runtime, opened files, and the thread pool."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import tvm_ffi

from kivi_tvm.cuda import machine_code_of
from kivi_tvm.errors import UserError
from kivi_tvm.host import (
    CUDA_RUNTIME_LIBRARY,
    RUNTIME_LIBRARY,
    available_processors,
    find_runtime_library,
)

Kernel = Callable[..., Any]
# In the order of `kivi_tvm_use_openmp`.
OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_get_max_threads")

COMPILE_CUDA = "tvm_callback_cuda_compile"  # what TVM's runtime calls with a CUDA source

_configured = threading.local()


class LibraryError(UserError):
    """A library that cannot be opened, or that lacks a function."""


class Library:
    """The functions of a compiled module by name: `library["attend"](q, ...)`.

    Parameters
    ----------
    module : object or None
        What `tvm_ffi.load_module` or `tvm.compile` returned; it gives functions by `[name]`. None
        if `load` gets it when the first function is asked for.
    origin : str
        The file, or "in-process"; named in errors.
    on_torch_threads : bool
        Whether its loops run on the threads that torch computes with, or on TVM's own.
    load : callable, optional
    """

    def __init__(
        self,
        module: Any,
        origin: str,
        on_torch_threads: bool = False,
        load: Callable[[], Any] | None = None,
    ) -> None:
        self._module = module
        self._load = load
        self.origin = origin
        self.on_torch_threads = on_torch_threads
        self._functions: dict[str, Kernel] = {}

    def __getitem__(self, name: str) -> Kernel:
        found = self._functions.get(name)
        if found is None:
            found = self._functions[name] = self._look_up(name)
        return found

    @property
    def module(self) -> Any:
        if self._module is None and self._load is not None:
            self._module = self._load()
        return self._module

    def _look_up(self, name: str) -> Kernel:
        try:
            function: Kernel = self.module[name]
        except (AttributeError, KeyError) as error:
            raise LibraryError(f"{self.origin} has no function {name!r}") from error
        return function


def open_library(path: Path, kind: str = "llvm") -> Library:
    """Open a compiled library with tvm-ffi and TVM's runtime alone, without the compiler.

    One for CUDA is opened when the first of its functions is asked for, since that takes a driver:
    a library may be built, saved and inspected where there is no GPU.

    Parameters
    ----------
    path : Path
        A library that `read_artifact` has checked: an unchecked one may end the process.
    kind : str
        Of the target it was compiled for: "llvm" or "cuda".

    Raises
    ------
    LibraryError
        The dynamic linker refuses the file.
    UserError
        TVM's runtime library is not installed.
    """
    # dlopen searches its own path for a name without a slash.
    path = Path(path).absolute()
    if kind == "cuda":
        return Library(None, str(path), load=partial(_open_cuda, path))
    return Library(_open(path), str(path), run_on_torch_threads(path))


def _open(path: Path) -> Any:
    load_runtime()
    try:
        return tvm_ffi.load_module(path)
    except RuntimeError as error:
        raise LibraryError(f"cannot open {path}: {error}") from error


def _open_cuda(path: Path) -> Any:
    load_runtime()
    load_cuda_runtime()
    compiler = tvm_ffi.get_global_func(COMPILE_CUDA, allow_missing=True)

    def machine_code(source: str) -> bytes:
        if code := machine_code_of(source):
            return code
        if compiler is None:
            raise LibraryError(
                f"{path} holds CUDA source without machine code, which takes a compiler"
            )
        return bytes(compiler(source))

    tvm_ffi.register_global_func(COMPILE_CUDA, machine_code, override=True)
    try:
        return _open(path)
    finally:
        # `import tvm` registers its own, which must not be there yet.
        tvm_ffi.registry.remove_global_func(COMPILE_CUDA)
        if compiler is not None:
            tvm_ffi.register_global_func(COMPILE_CUDA, compiler)


def run_on_torch_threads(path: Path) -> bool:
    """Let an opened library run its loops on the threads that torch computes with, if it can.

    Returns
    -------
    bool
        False if torch does not use OpenMP or the library has no launch function of its own
        (`launch.cc`): its loops run on TVM's pool.
    """
    library, functions = ctypes.CDLL(str(path)), openmp_functions()
    if functions is None or not hasattr(library, "kivi_tvm_launch"):
        return False
    library.kivi_tvm_use_openmp((ctypes.c_void_p * len(functions))(*functions))
    # Where the code looks for TVM's function, which was put there when it was opened.
    launch = ctypes.c_void_p.in_dll(library, "__TVMBackendParallelLaunch")
    launch.value = ctypes.cast(library.kivi_tvm_launch, ctypes.c_void_p).value
    return True


@cache
def openmp_functions() -> tuple[int | None, ...] | None:
    """Addresses of `OPENMP` in the OpenMP runtime that torch is linked to; None if there is none.

    A process may have several of them; a search that begins at torch's own library finds its.
    """
    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if "openmp" not in torch.__config__.parallel_info().lower() or not library.exists():
        return None
    try:
        found = [getattr(ctypes.CDLL(str(library)), name) for name in OPENMP]
    except (OSError, AttributeError):
        return None
    return tuple(ctypes.cast(function, ctypes.c_void_p).value for function in found)


@cache
def load_runtime() -> None:
    """Make TVM's runtime symbols visible to the libraries that are opened next.

    A parallel kernel opened without them ends the process: it calls a null pointer. A runtime
    that the process has already (`import tvm` was first) is used; two of them would register the
    same functions twice.
    """
    set_thread_defaults()
    try:
        ctypes.CDLL(RUNTIME_LIBRARY, mode=os.RTLD_NOLOAD | os.RTLD_GLOBAL)
    except OSError:
        path = find_runtime_library()
        try:
            ctypes.CDLL(str(path), mode=os.RTLD_GLOBAL)
        except OSError as error:
            raise LibraryError(f"cannot open TVM's runtime library: {error}") from error


@cache
def load_cuda_runtime() -> None:
    """Make TVM's CUDA runtime known to the libraries that are opened next.

    Raises
    ------
    LibraryError
        It cannot be opened: there is no NVIDIA driver, or no CUDA runtime of its version.
    """
    import torch  # brings a CUDA runtime, which is taken if it is of the version that TVM needs

    path = find_runtime_library().with_name(CUDA_RUNTIME_LIBRARY)
    try:
        ctypes.CDLL(str(path), mode=os.RTLD_GLOBAL)
    except OSError as error:
        raise LibraryError(
            f"cannot open TVM's CUDA runtime: {error}; it needs an NVIDIA driver, and the CUDA "
            f"runtime library that it names (torch here is built for CUDA {torch.version.cuda})"
        ) from error


def set_thread_defaults() -> None:
    """Set TVM's thread variables unless the user has; call before the first kernel runs.

    They matter to libraries that cannot run on torch's threads. Pinned TVM threads fight with
    torch's pool for the same cores (60 us became 118 us). Waiting threads yield so many times
    before they sleep: long enough for the next kernel of a `decode`, since waking one takes 15 to
    40 us (at 512 tokens a `decode` took 183 us without and takes 79 with it), short beside TVM's
    own 300000. TVM's own default count of threads is half the processors it sees.
    """
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "1000")
    os.environ.setdefault("TVM_NUM_THREADS", str(available_processors()))


def configure_threads(n: int) -> int:
    """Let kernels on TVM's pool use `n` threads in this Python thread; free when nothing changes.

    Those on torch's threads use as many as torch. TVM keeps one pool per calling thread, of a size
    fixed by TVM_NUM_THREADS when its first kernel runs; this chooses how many of its threads work.

    Parameters
    ----------
    n : int
        At least 1, as `torch.get_num_threads()` gives it.

    Returns
    -------
    int
        Threads in use: `n`, or the size of the pool if that is smaller.
    """
    if getattr(_configured, "requested", None) == n:
        return int(_configured.in_use)
    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}")
    load_runtime()
    configure, count = _pool_functions()
    # Mode 0: no preference for big or little cores.
    configure(0, n)
    _configured.in_use = int(count())
    _configured.requested = n
    return int(_configured.in_use)


@cache
def _pool_functions() -> tuple[Kernel, Kernel]:
    get = tvm_ffi.get_global_func
    return get("runtime.config_threadpool"), get("runtime.NumThreads")
