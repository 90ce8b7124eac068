"""Pictures that commands write: refused before minutes of measurement, not after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kivi_tvm.errors import UserError
from kivi_tvm.outputs import check_file


def check_plot(path: Path, extra: str) -> None:
    """Refuse what `save` could not write.

    Parameters
    ----------
    path : Path
    extra : str
        The extra of the distribution that brings matplotlib.

    Raises
    ------
    UserError
        matplotlib is not installed, does not know the kind of picture, or it cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"`--plot` needs matplotlib: pip install 'kivi-tvm[{extra}]'") from error
    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in kinds:
        raise UserError(f"`--plot` must end in one of {kinds}, got {str(path)!r}")
    check_file("--plot", path)


def save(figure: Any, path: Path) -> None:
    """Write a figure.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"`--plot` must be writable, got {str(path)!r} ({error})") from error
