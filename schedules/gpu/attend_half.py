"""`attend` in compute mode "half": work-groups of warps, products by tensor cores."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.fragments import QUERIES, HalfTile
from kivi_tvm.ops.staged_tile import staged_bytes
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.async_copy import SCOPE
from kivi_tvm.schedules.gpu.packed_tiles import packed_tiles
from kivi_tvm.schedules.threads import (
    WIDE_HEAD,
    blocks_inside,
    keep_local,
    over_groups,
    over_threads,
    share,
)
from kivi_tvm.targets import Hardware

SCALARS = "b", "part", "slot", "packed", "first_row"
WARPS = 1, 2, 4
ALIGNMENT = 128  # bytes
# That a multiprocessor has registers for; and with more of them: for several tokens, wide heads, or
# less wide ones whose lanes take pairs of channels instead of four.
RESIDENT_WARPS, FEWER_WARPS = 12, 8
PAIRED_HEAD = 96


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """So many warps that as many as possible are on a multiprocessor; of equal counts the most.

    With one or two instead of four an H100 took 0.86 to 1.17 of the time for 8 sequences of 32k
    tokens (2 bits with heads of 64, and 4 bits), but 0.96 to 2.47 of it for one of 4k, whose few
    work-groups leave most of the GPU idle.
    """
    fits = [n for n in WARPS if shared_bytes(key, n) <= hardware.dynamic_bytes]
    wide = [n for n in fits if n > 1] or fits  # one warp alone has too much to do besides
    return {"warps": (fits, max(wide, key=lambda n: (n * resident_groups(key, n, hardware), n)))}


def min_blocks(key: KernelKey, hardware: Hardware) -> int:
    """As many as a multiprocessor holds."""
    _, warps = offers(key, hardware)["warps"]
    return resident_groups(key, int(warps), hardware)


def resident_groups(key: KernelKey, warps: int, hardware: Hardware) -> int:
    """Work-groups of so many warps that a multiprocessor has registers and shared memory for."""
    return min(resident_warps(key) // warps, hardware.dynamic_bytes // shared_bytes(key, warps))


def resident_warps(key: KernelKey) -> int:
    """Warps that a multiprocessor has registers for."""
    pairs = HalfTile(key).channels_apart == 2 and key.head_dim > PAIRED_HEAD
    fewer = pairs or key.head_dim > WIDE_HEAD or key.rows_per_query > 1
    return FEWER_WARPS if fewer else RESIDENT_WARPS


def shared_bytes(key: KernelKey, warps: int) -> int:
    """Shared memory of a work-group, at most: tiles and states of its warps, aligned."""
    states = 4 * min(key.rows, QUERIES) * (key.head_dim + 2) * warps
    return warps * staged_bytes(key) + states + ALIGNMENT


def attend_half(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `attend` for warps."""
    for name in SCALARS:
        keep_local(sch, name)
    blocks = blocks_inside(sch, sch.get_sblock("split"))
    group = packed_tiles(sch, blocks, blocks["q_load"], hardware)
    # the warps of a work-group, joined through shared memory
    for name in "store_stat", "store_acc":
        over_threads(sch, sch.get_sblock(name), group)
    share(sch, SCOPE)
    over_groups(sch, sch.get_sblock("split"))
