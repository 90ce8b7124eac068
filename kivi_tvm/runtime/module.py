"""A compiled module: built or loaded once, the maker of caches."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kivi_tvm.artifact import ArtifactError, Manifest, read_artifact, write_artifact
from kivi_tvm.artifact_cache import CacheUnavailable, cached
from kivi_tvm.cache_key import cache_name
from kivi_tvm.config import KernelKey, KiviConfig
from kivi_tvm.database import Found
from kivi_tvm.errors import UserError
from kivi_tvm.host import find_cxx
from kivi_tvm.notices import announce
from kivi_tvm.runtime import persistence
from kivi_tvm.runtime.cache import Cache
from kivi_tvm.runtime.library import Library, open_library, set_thread_defaults
from kivi_tvm.runtime.options import CacheOptions
from kivi_tvm.runtime.tuned import find_records

if TYPE_CHECKING:
    from tvm.target import Target

    from kivi_tvm.compile import CompiledKernels

Device = Any  # torch.device or what torch.device() takes


class Module:
    """The compiled kernels of one configuration; `build` and `load` make it.

    Attributes
    ----------
    cfg : KiviConfig
    source : str
        "compiled" (this call compiled it), "cache" (the per-user cache had it), "file" (`load`)
        or "in-process" (compiled without a file: see `build`).
    """

    def __init__(
        self,
        cfg: KiviConfig,
        library: Library,
        manifest: Manifest,
        source: str,
        kernels: CompiledKernels | None = None,
    ) -> None:
        self.cfg = cfg
        self.source = source
        self.library = library
        self._manifest = replace(manifest, config=cfg.to_dict())
        self._kernels = kernels

    @property
    def key(self) -> KernelKey:
        """What the kernels were compiled for."""
        return self._manifest.key

    @property
    def target(self) -> Mapping[str, Any]:
        """TVM's target that the kernels were compiled for, as plain data."""
        return self._manifest.target

    @property
    def manifest(self) -> dict[str, Any]:
        """What the kernels are: key, target, versions, and per kernel "tuned" or "default"."""
        return self._manifest.to_dict()

    def __repr__(self) -> str:
        key = self._manifest.key.slug
        heads = f"H={self.cfg.H}, H_kv={self.cfg.H_kv}"
        return f"Module({key}, {heads}, source={self.source!r}, threads={self.threads!r})"

    def __copy__(self) -> Module:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Module:
        """Itself: nothing of it changes."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a module cannot be pickled: use `module.save` and `kivi_tvm.load`")

    @property
    def threads(self) -> str:
        """What kernels run on: threads of "torch", or "tvm" for a pool of their own; "cuda"."""
        if self.target["kind"] == "cuda":
            return "cuda"
        return "torch" if self.library.on_torch_threads else "tvm"

    def save(self, path: str | Path) -> None:
        """Write NAME.so and NAME.json, to be loaded where there is no compiler.

        Raises
        ------
        ArtifactError
            The name does not end in .so, or its directory does not exist.
        UserError
            The kernels were compiled in process and there is no C++ compiler to link them, or the
            file they were loaded from is gone.
        """
        if self._kernels is None:
            origin = Path(self.library.origin)
            if not origin.is_file():
                raise UserError(f"`save` copies {origin}, which was removed; build again")
            write_artifact(Path(path), self._manifest, partial(_copy, origin))
            return
        if find_cxx() is None:
            raise UserError("saving kernels that were compiled in process needs a C++ compiler")
        write_artifact(Path(path), self._manifest, self._kernels.export)

    def new_cache(
        self,
        num_layers: int = 1,
        batch_size: int = 1,
        max_tokens: int | None = None,
        device: Device = "cpu",
        rollback: int = 0,
        window: str = "kivi",
        sink_tokens: int = 0,
    ) -> Cache:
        """An empty cache.

        Parameters
        ----------
        num_layers : int
            Layers that share page table and lengths. With 1, `prefill`, `decode`, `extend` and
            `dequantize` may be called on the cache itself.
        batch_size : int
            Rows, each of which holds one sequence.
        max_tokens : int or None
            Tokens per sequence beyond which a step raises; None: limited by memory alone.
            Memory grows with what is stored; `Cache.reserve` takes it at once.
        device : str or torch.device
            "cpu", or a "cuda" device for kernels that were built for CUDA.
        rollback : int
            Tokens `E` that `Cache.crop` takes back exactly, even across a flush. Costs `E` slots in
            every ring, and with `window="kivi"` a second ring of keys.
        window : str
            "kivi" (a flushed key block is seen dequantized at once, Algorithm 1) or "exact" (its
            keys stay exact until their values leave the window).
        sink_tokens : int
            First tokens of every row that stay in full precision for good; the others are a KIVI
            cache of their own.

        Raises
        ------
        ValueError
            An argument breaks its rule; the message lists every one that does.
        """
        return Cache(
            self,
            CacheOptions(num_layers, batch_size, max_tokens, device, rollback, window, sink_tokens),
        )

    def load_cache(
        self,
        path: str | Path,
        max_tokens: int | None = None,
        rollback: int | None = None,
        device: Device = "cpu",
    ) -> Cache:
        """The cache that `Cache.save` wrote; it goes on with the same bits.

        Parameters
        ----------
        path : str or Path
        max_tokens : int or None
            As in `new_cache`; not taken from the file.
        rollback : int, optional
            Tokens that can be taken back, more or fewer than in the saved cache; default as there.
            Those that were not held in full precision stay so.
        device : str or torch.device
            As in `new_cache`.

        Raises
        ------
        CacheFileError
            The file is of another kind, incomplete, newer, made for another configuration, or has
            a row above `max_tokens`; the message lists every reason. Like all safetensors files it
            has no checksum: changed bits of a tensor are not noticed.
        ValueError
            Another argument breaks its rule.
        OSError
            The file cannot be read.
        """
        return persistence.load(self, path, max_tokens, rollback, device)


def build(cfg: KiviConfig, target: str | Mapping[str, Any] | Target = "native") -> Module:
    """Compiled kernels for `cfg`, from the per-user cache or compiled now.

    Where the cache directory cannot be written or no C++ compiler exists, the kernels are compiled
    in process and a line on stderr says so. Schedules come from tuning records of exactly this
    target where there are any; `Module.manifest` says which.

    Parameters
    ----------
    cfg : KiviConfig
    target : str, mapping or Target
        "native" (this machine's CPU), an LLVM target of this architecture as TVM takes it, or
        "cuda", which takes an `arch` where there is no GPU.

    Raises
    ------
    TypeError
        `cfg` is not a KiviConfig.
    UserError
        The target is unknown, or kernels for it cannot be built.
    """
    if not isinstance(cfg, KiviConfig):
        raise TypeError(f"`cfg` must be a KiviConfig, got {cfg!r}")
    from kivi_tvm import targets

    resolved = targets.resolve(target)
    key = targets.kernel_key(cfg, resolved)
    return build_with(cfg, resolved, find_records(cfg, key, targets.identity(resolved)))


def build_with(cfg: KiviConfig, target: Target, found: Found) -> Module:
    """`build` for a resolved target with the given tuning records: none for default schedules."""
    set_thread_defaults()
    from kivi_tvm import targets

    if find_cxx() is None:
        reason = "no C++ compiler was found (set CXX or install g++)"
        return _in_process(cfg, target, found, reason)
    flags = targets.required_cpu_flags(target)
    key = targets.kernel_key(cfg, target)
    name = cache_name(key, targets.as_dict(target), flags, found.digest)

    def make(path: Path) -> None:
        kernels = _compile(key, target, found)
        write_artifact(path, kernels.manifest(), kernels.export)

    try:
        entry = cached(name, make)
    except CacheUnavailable as error:
        return _in_process(cfg, target, found, str(error))
    source = "cache" if entry.hit else "compiled"
    return Module(cfg, open_library(entry.path, target.kind.name), entry.manifest, source)


def load(path: str | Path) -> Module:
    """A module that `Module.save` wrote, checked completely before its library is opened.

    Needs tvm-ffi and TVM's runtime library, not the compiler.

    Raises
    ------
    ArtifactError
        Anything is missing, damaged or made for another machine, format or version; the message
        lists every reason.
    """
    library, manifest = read_artifact(Path(path))
    if manifest.config is None:
        raise ArtifactError(f"cannot load {library}: its manifest names no configuration")
    opened = open_library(library, str(manifest.target["kind"]))
    return Module(KiviConfig(**manifest.config), opened, manifest, "file")


def _copy(origin: Path, to: Path) -> None:
    shutil.copyfile(origin, to)


def _compile(key: KernelKey, target: Target, found: Found) -> CompiledKernels:
    announce(f"compiling kernels {key.slug} (once; a few seconds)")
    from kivi_tvm.compile import compile_kernels

    start = time.perf_counter()
    kernels = compile_kernels(key, target, found)
    announce(f"compiled {len(kernels.sources)} kernels in {time.perf_counter() - start:.1f} s")
    return kernels


def _in_process(cfg: KiviConfig, target: Target, found: Found, reason: str) -> Module:
    announce(
        f"{reason}; kernels are compiled in process, for this process alone, and run on threads "
        "of their own beside torch's: slower between other work"
    )
    from kivi_tvm import targets

    kernels = _compile(targets.kernel_key(cfg, target), target, found)
    library = Library(kernels.executable, "in-process")
    return Module(cfg, library, kernels.manifest(), "in-process", kernels)
