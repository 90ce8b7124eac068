"""`combine_window` in compute mode "half": work-groups of warps, products by tensor cores."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.fragments import QUERIES, FullTile
from kivi_tvm.ops.window_sums import SUMS
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.async_copy import SCOPE
from kivi_tvm.schedules.choices import choose
from kivi_tvm.schedules.early_launch import wait
from kivi_tvm.schedules.gpu.window_sums import window_sums
from kivi_tvm.schedules.threads import (
    WIDE_HEAD,
    WorkGroup,
    blocks_inside,
    keep_local,
    over_groups,
    share,
)
from kivi_tvm.targets import Hardware

SCALARS = "given", "slot", "length", "packed", "oldest", "count", "part", "entries", "attended"
ROW_TILES = 1, 2, 4, 8
WARPS = 2, 4, SUMS


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """Rows of a tile share what is loaded of the window: by default all that an operand holds."""
    fits = [n for n in ROW_TILES if shared_bytes(key.head_dim, n) <= hardware.dynamic_bytes]
    options = sorted({min(n, key.rows) for n in fits})
    return {"row_tile": (options, options[-1])}


def shared_bytes(head_dim: int, rows: int) -> int:
    """Shared memory of a work-group: its sums."""
    return 4 * SUMS * min(rows, QUERIES) * (head_dim + 2)


def min_blocks(key: KernelKey, hardware: Hardware) -> int:
    """As many as registers suffice for."""
    del hardware
    return resident_groups(key.head_dim)


def resident_groups(head_dim: int) -> int:
    """Two, of as many warps as sums; wide heads take more registers, and many addresses do."""
    return 1 if head_dim > WIDE_HEAD or FullTile(head_dim).channels_apart == 2 else 2


def combine_window_half(
    sch: Schedule, hardware: Hardware, options: tuple[int, ...] = WARPS, default: int = SUMS
) -> None:
    """Schedule `combine_window` for one of so many warps."""
    group = WorkGroup(choose(sch, "warps", options, default), hardware.warp)
    for name in SCALARS:
        keep_local(sch, name)
    if hardware.early_launch:
        sch.tensorize(sch.get_sblock("attended"), wait())
    blocks = blocks_inside(sch, sch.get_sblock("partial"))
    window_sums(sch, blocks, sch.get_sblock("q_load"), group)
    share(sch, SCOPE)
    over_groups(sch, sch.get_sblock("head"))
