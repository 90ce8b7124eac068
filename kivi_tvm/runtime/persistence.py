"""A cache as a safetensors file: written as a whole or not at all, checked before it is believed.

The metadata says what the file is (format, version, configuration, pack order) and what the rows
are (`Contents`); the tensors of layer `i` are `layers.i.NAME`. Codes are in pack order "plain".
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kivi_tvm import layout
from kivi_tvm.config import KiviConfig
from kivi_tvm.errors import UserError
from kivi_tvm.host import installed_version
from kivi_tvm.reference import repack
from kivi_tvm.runtime import transfer
from kivi_tvm.runtime.contents import Contents

if TYPE_CHECKING:
    from kivi_tvm.runtime.cache import Cache
    from kivi_tvm.runtime.module import Module

Orders = dict[str, layout.PackOrder]

FORMAT = "kivi-tvm cache"
FORMAT_VERSION = 1
PACK_ORDER = "plain"
WORD_AXIS = 2  # of the words of a page, of keys as of values
# What decides which bits are stored; `compute` says how attention reads them.
CONFIG_FIELDS = (
    "head_dim",
    "num_heads",
    "num_kv_heads",
    "key_bits",
    "value_bits",
    "key_group_size",
    "value_group_size",
    "residual_length",
    "page_size",
    "dtype",
)
# As safetensors calls them; words are held as int32.
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "uint32": "I32"}


class CacheFileError(UserError):
    """A cache file that cannot be written or must not be loaded; the message lists every reason."""


def save(cache: Cache, path: str | Path) -> None:
    """Write what `cache` holds to the file at `path`, replacing it as a whole.

    Every page is written once, however many rows share it; places that no token fills are 0. While
    it is written, the contents are held in memory a second time.

    Raises
    ------
    CacheFileError
        `path` is a directory, or in none that exists.
    OSError
        The file cannot be written; what was at `path` is still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise CacheFileError(f"`path` must be a file in an existing directory, got {str(path)!r}")
    contents, places = transfer.describe(cache)
    own, plain = _orders(cache.module)
    tensors = {
        _key(layer.index, name): _repacked(tensor, name, own, plain)
        for layer in cache.layers
        for name, tensor in transfer.take(layer, contents, places).items()
    }
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        whole.touch()
        mode = (path if path.exists() else whole).stat().st_mode
        try:
            save_file(tensors, whole, metadata=_metadata(cache.cfg, contents))
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        whole.chmod(mode)  # the library makes files that only their writer can read
        os.replace(whole, path)


def load(
    module: Module, path: str | Path, max_tokens: int | None, rollback: int | None, device: Any
) -> Cache:
    """The cache that `save` wrote, for the kernels of `module`.

    Raises
    ------
    CacheFileError
        The file is not one, is incomplete, newer than this package, made for another
        configuration, or holds more than `max_tokens` of a row; nothing was built.
    ValueError
        An argument breaks its rule.
    OSError
        The file cannot be read.
    """
    path = Path(path)
    with _opened(path) as file:
        contents = _checked(file, module.cfg, path)
        if isinstance(max_tokens, int) and contents.longest > max_tokens:
            raise CacheFileError(
                f"cannot load {path}: `max_tokens` must be at least {contents.longest}, the tokens "
                f"of its longest row, got {max_tokens}"
            )
        cache = module.new_cache(
            num_layers=contents.num_layers,
            batch_size=len(contents.rows),
            max_tokens=max_tokens,
            device=device,
            rollback=contents.rollback if rollback is None else rollback,
            window=contents.window,
            sink_tokens=contents.sink_tokens,
        )
        names = list(contents.buffers(module.cfg))
        own, plain = _orders(module)

        def tensors_of(layer: int) -> dict[str, Tensor]:
            return {
                name: _repacked(file.get_tensor(_key(layer, name)), name, plain, own)
                for name in names
            }

        transfer.fill(cache, contents, tensors_of)
    return cache


def _orders(module: Module) -> tuple[Orders, Orders]:
    """How codes share words in the module's kernels, and in files; by name of the buffer."""
    keys = module.key, replace(module.key, pack_order=PACK_ORDER)
    own, plain = (
        {"k_code": layout.key_order(key), "v_code": layout.value_order(key)} for key in keys
    )
    return own, plain


def _repacked(tensor: Tensor, name: str, source: Orders, target: Orders) -> Tensor:
    """A layer's buffer with its codes, if it has any, in another order."""
    if name not in source:
        return tensor
    return repack(tensor, WORD_AXIS, source[name], target[name])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise CacheFileError(f"cannot load {path}: it is a directory")
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CacheFileError(
            f"cannot load {path}: it is no complete safetensors file ({error})"
        ) from error
    with file:
        yield file


def _metadata(cfg: KiviConfig, contents: Contents) -> dict[str, str]:
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "kivi_tvm": installed_version("kivi-tvm") or "unknown",
        "pack_order": PACK_ORDER,
        "config": json.dumps(_config(cfg)),
        "contents": json.dumps(contents.to_dict()),
    }


def _config(cfg: KiviConfig) -> dict[str, Any]:
    """The fields that decide what is stored, with their defaults resolved."""
    resolved = {"key_group_size": cfg.G_k, "value_group_size": cfg.G_v, "page_size": cfg.P}
    return {name: resolved.get(name, getattr(cfg, name)) for name in CONFIG_FIELDS}


def _key(layer: int, name: str) -> str:
    return f"layers.{layer}.{name}"


def _checked(file: Any, cfg: KiviConfig, path: Path) -> Contents:
    """What the file says it holds, once everything it says is possible and present.

    Raises
    ------
    CacheFileError
    """
    metadata = file.metadata() or {}
    problems = _format_problems(metadata)
    if not problems:
        try:
            problems = _differences(json.loads(metadata["config"]), cfg)
            contents = Contents.from_dict(json.loads(metadata["contents"]))
            # Rows and tensors can only be judged by the configuration they were made for.
            problems = problems or contents.problems(cfg) or _tensor_problems(file, contents, cfg)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problems = [f"its metadata is damaged ({type(error).__name__}: {error})"]
    if problems:
        raise CacheFileError(f"cannot load {path}: " + "; ".join(problems))
    return contents


def _format_problems(metadata: dict[str, str]) -> list[str]:
    """Why this package does not know what is in the file."""
    writer = metadata.get("kivi_tvm")
    expected = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "pack_order": PACK_ORDER,
    }
    for name, value in expected.items():
        got = metadata.get(name)
        if got != value:
            by = f" (written by kivi-tvm {writer})" if writer else ""
            return [f"its `{name}` must be {value!r}, got {got!r}{by}"]
    return []


def _differences(stored: dict[str, Any], cfg: KiviConfig) -> list[str]:
    """Every field in which the file's configuration is not the module's."""
    own = _config(cfg)
    names = dict.fromkeys((*own, *stored))
    return [
        f"its `{name}` is {stored.get(name)!r}, the module's {own.get(name)!r}"
        for name in names
        if stored.get(name) != own.get(name)
    ]


def _tensor_problems(file: Any, contents: Contents, cfg: KiviConfig) -> list[str]:
    """Every tensor that is missing, unknown, or of another shape or dtype."""
    held = set(file.keys())
    if contents.num_layers > len(held):
        return [f"it must hold {contents.num_layers} layers, got {len(held)} tensors"]
    expected = {
        _key(layer, name): buffer
        for layer in range(contents.num_layers)
        for name, buffer in contents.buffers(cfg).items()
    }
    found = [f"`{name}` is missing" for name in expected if name not in held]
    found += [f"`{name}` is unknown" for name in sorted(held - set(expected))]
    for name in sorted(held & set(expected)):
        tensor, buffer = file.get_slice(name), expected[name]
        got = tensor.get_dtype(), list(tensor.get_shape())
        want = _DTYPES[buffer.dtype], list(buffer.shape)
        if got != want:
            found.append(f"`{name}` must be {want[0]} {want[1]}, got {got[0]} {got[1]}")
    return found
