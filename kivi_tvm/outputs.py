"""Files and directories that commands write to: refused before minutes of work, not after."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from kivi_tvm.errors import UserError


def check_file(flag: str, path: Path | None) -> None:
    """Refuse a file that could not be written; None is fine.

    Raises
    ------
    UserError
        Its folder does not exist, it is a folder itself, or permissions forbid it.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"`{flag}` must be in a folder that exists, got {str(path)!r}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"`{flag}` must be a file that can be written, got {str(path)!r}")


def check_directory(flag: str, path: Path) -> None:
    """Make a directory, or refuse one that files cannot be written to.

    Raises
    ------
    UserError
        It cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"`{flag}` must be a directory that can be written, got {path} ({error.strerror})"
        ) from error
