"""`combine_batch`: `combine_window` of mode "half" with few warps to a work-group."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.window_sums import FEW
from kivi_tvm.schedules.gpu import combine_window_half as one_row
from kivi_tvm.schedules.gpu.combine_window import beginning
from kivi_tvm.schedules.gpu.combine_window_half import offers
from kivi_tvm.targets import Hardware

__all__ = ["beginning", "combine_batch", "min_blocks", "offers"]

WARPS = 1, 2, 4
RESIDENT_WARPS = 16  # that shared memory should suffice for on a multiprocessor
SYSTEM_BYTES = 1024  # of it, beside those of every work-group


def min_blocks(key: KernelKey, hardware: Hardware) -> int:
    """As many as registers suffice for: 12 warps, or 6 where `combine_window` has half of its."""
    _, rows = offers(key, hardware)["row_tile"]
    return 6 * one_row.resident_groups(key.head_dim) // warps_of(key.head_dim, int(rows), hardware)


def warps_of(head_dim: int, rows: int, hardware: Hardware) -> int:
    """The fewest that shared memory suffices for, but as many as a short window has sums.

    An H100 merges 1024 KV heads of 8 query heads and a window of 128 tokens in 48 us by 4 warps, in
    62 us by 2; of 4 query heads, for which both fit, with windows of 32 tokens by 2 warps faster.
    """
    group, room = one_row.shared_bytes(head_dim, rows) + SYSTEM_BYTES, hardware.dynamic_bytes
    fits = [n for n in WARPS if n >= FEW and RESIDENT_WARPS // n * group <= room + SYSTEM_BYTES]
    return min(fits, default=WARPS[-1])


def combine_batch(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `combine_batch` for warps."""
    _, rows, channels = sch.get(sch.get_sblock("warp_acc")).writes[0].source.shape
    default = warps_of(int(channels), int(rows), hardware)
    one_row.combine_window_half(sch, hardware, WARPS, default)
