"""`combine_batch`: `combine_window` of mode "half" with few warps to a work-group."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.combine_window_half import ALL_SUFFIX, SUMS
from kivi_tvm.schedules.gpu import combine_window_half as one_row
from kivi_tvm.schedules.gpu.combine_window import beginning
from kivi_tvm.schedules.gpu.combine_window_half import offers
from kivi_tvm.schedules.primitives import extent_of
from kivi_tvm.schedules.threads import FEW_WARPS, WIDE_HEAD
from kivi_tvm.targets import Hardware

__all__ = ["beginning", "combine_batch", "min_blocks", "offers"]


def min_blocks(key: KernelKey) -> int:
    """With few warps three times as many as of `combine_window`."""
    return one_row.min_blocks(key) * (1 if key.head_dim > WIDE_HEAD else 3)


def combine_batch(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `combine_batch` for warps; registers are too few for wide heads and several sums."""
    channels = extent_of(sch, sch.get_loops(sch.get_sblock(f"out{ALL_SUFFIX}"))[-1])
    wide = channels > WIDE_HEAD
    one_row.combine_window_half(sch, hardware, SUMS if wide else FEW_WARPS)
