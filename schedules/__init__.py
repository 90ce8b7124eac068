"""Schedules: how each operator's blocks run on a programming model.

`rule(op, hardware)` gives the function over an `s_tir.Schedule` that finds the op's blocks by
name. Programming models are folders; chips are `Hardware` records.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from tvm.s_tir import Schedule

from kivi_tvm.targets import Hardware

Rule = Callable[[Schedule, Hardware], None]


def rule(op: str, hardware: Hardware) -> Rule:
    """The schedule of `op` for the programming model of `hardware`.

    Raises
    ------
    ModuleNotFoundError
        There is no schedule of that name for that programming model.
    """
    module = importlib.import_module(f"kivi_tvm.schedules.{hardware.model}.{op}")
    found: Rule = getattr(module, op)
    return found
