"""Schedules: how each operator's blocks run on a programming model.

`rule(op, hardware)` gives the function over an `s_tir.Schedule` that finds the op's blocks by
name. Programming models are folders; chips are `Hardware` records.

What a schedule cannot do, such as sizing the chunks an operator works in, its factory can: a
schedule file may offer the factory's parameters as choices too, in a function `offers(key)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.cuda import MIN_BLOCKS
from kivi_tvm.schedules.choices import Option
from kivi_tvm.targets import Hardware

Rule = Callable[[Schedule, Hardware], None]
Offers = dict[str, tuple[Sequence[Option], Option]]  # options and default by parameter


def rule(op: str, hardware: Hardware) -> Rule:
    """The schedule of `op` for the programming model of `hardware`.

    Raises
    ------
    ModuleNotFoundError
        There is no schedule of that name for that programming model.
    """
    found: Rule = getattr(_file(op, hardware), op)
    return found


def offers(op: str, hardware: Hardware, key: KernelKey) -> Offers:
    """Parameters of the factory of `op` that may be chosen, for the kernels of `key`."""
    found: Callable[[KernelKey, Hardware], Offers] | None
    found = getattr(_file(op, hardware), "offers", None)
    return found(key, hardware) if found else {}


def fits(op: str, hardware: Hardware, key: KernelKey) -> bool:
    """Whether a work-group of `op` finds room on the chip; true if its schedule has no `fits`."""
    found: Callable[[KernelKey, Hardware], bool] | None
    found = getattr(_file(op, hardware), "fits", None)
    return found(key, hardware) if found else True


def bounds(op: str, hardware: Hardware, key: KernelKey) -> Offers:
    """The choice of how many work-groups of a multiprocessor `op` leaves registers for, on GPUs."""
    if hardware.model != "gpu":
        return {}
    found: Callable[[KernelKey, Hardware], int] | None
    found = getattr(_file(op, hardware), "min_blocks", None)
    default = found(key, hardware) if found else MIN_BLOCKS
    fewest = max(1, (default - 1) // 2)  # of work-groups of twice the warps there are half as many
    return {"min_blocks": ([*range(fewest, default + 2)], default)}


def beginning(op: str, hardware: Hardware, key: KernelKey, extends: bool) -> str:
    """How the kernel of `op` begins where kernels are launched early: of `cuda.BEGINNINGS`.

    `extends` is whether it is for the rows of several new tokens, that are stored afterwards.
    """
    found: Callable[[KernelKey, bool], str] | None
    found = getattr(_file(op, hardware), "beginning", None)
    return found(key, extends) if found else "wait"


def _file(op: str, hardware: Hardware) -> ModuleType:
    return importlib.import_module(f"kivi_tvm.schedules.{hardware.model}.{op}")
