"""`combine_batch`: `combine_window` of mode "half" with few warps to a work-group."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.schedules.gpu import combine_window_half as one_row
from kivi_tvm.schedules.gpu.combine_window import beginning
from kivi_tvm.schedules.gpu.combine_window_half import offers
from kivi_tvm.targets import Hardware

__all__ = ["beginning", "combine_batch", "min_blocks", "offers"]

WARPS = 1, 2, 4


def min_blocks(key: KernelKey) -> int:
    """One more than of `combine_window`, of half of its warps: twice as many spill on sm_86."""
    return one_row.min_blocks(key) + 1


def combine_batch(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `combine_batch` for warps."""
    one_row.combine_window_half(sch, hardware, WARPS)
