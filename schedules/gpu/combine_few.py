"""`combine_few`: `combine_window` of mode "half" with few query heads to a work-group."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.combine_few import ROWS
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.gpu.combine_window import beginning
from kivi_tvm.schedules.gpu.combine_window_half import combine_window_half, min_blocks
from kivi_tvm.targets import Hardware

__all__ = ["beginning", "combine_few", "min_blocks", "offers"]


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """Tiles of at most two rows."""
    del key, hardware
    return {"row_tile": ([*range(1, ROWS + 1)], ROWS)}


def combine_few(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `combine_few` for warps."""
    combine_window_half(sch, hardware)
