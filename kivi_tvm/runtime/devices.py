"""The device of a cache: that of its kernels' target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kivi_tvm.cuda import runs_on
from kivi_tvm.errors import UserError

KINDS = {"llvm": "cpu", "cuda": "cuda"}  # torch's device type by TVM's kind of target


def device_of(target: Mapping[str, Any], device: Any) -> torch.device:
    """The device that `device` names, for kernels of `target`.

    Parameters
    ----------
    target : mapping
        TVM's target as plain JSON.
    device : str or torch.device
        A CUDA device without a number is torch's current one.

    Raises
    ------
    UserError
        It is not one that the kernels were compiled for, or there is none.
    """
    found, kind = torch.device(device), KINDS[str(target["kind"])]
    if found.type != kind:
        other = "'cuda'" if kind == "cpu" else "'native'"
        raise UserError(
            f"`device` must be {kind!r}, for which the kernels were built, got {str(device)!r}; "
            f"for the other one build with target={other}"
        )
    if kind == "cpu":
        return found
    if not torch.cuda.is_available():
        raise UserError(
            f"`device` must be a CUDA device that torch can use, got {str(device)!r}: torch "
            f"{torch.__version__} finds no NVIDIA driver or was built without CUDA"
        )
    index = torch.cuda.current_device() if found.index is None else found.index
    if not 0 <= index < torch.cuda.device_count():
        raise UserError(
            f"`device` must be one of {torch.cuda.device_count()} CUDA devices, got {str(device)!r}"
        )
    capability = torch.cuda.get_device_capability(index)
    if not runs_on(str(target["arch"]), capability):
        raise UserError(
            f"`device` must run code for {target['arch']}, for which the kernels were built; "
            f"{torch.cuda.get_device_name(index)} is sm_{capability[0]}{capability[1]}"
        )
    return torch.device("cuda", index)


def processors(device: torch.device) -> int:
    """The multiprocessors of a CUDA device."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
