"""`attend_batch`: work-groups of warps that attend to packed tokens, then to the window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from tvm import DataType
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.attend_batch import AT_ONCE
from kivi_tvm.ops.fragments import QUERIES
from kivi_tvm.ops.packed_tiles import FIRST
from kivi_tvm.ops.staged_tile import staged_bytes
from kivi_tvm.ops.window_sums import SUMS
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.async_copy import SCOPE, barrier
from kivi_tvm.schedules.gpu import attend_half
from kivi_tvm.schedules.gpu.attend import beginning
from kivi_tvm.schedules.gpu.packed_tiles import COPIES, packed_tiles
from kivi_tvm.schedules.gpu.window_sums import window_sums
from kivi_tvm.schedules.primitives import divisors
from kivi_tvm.schedules.threads import blocks_inside, keep_local, over_groups, share
from kivi_tvm.targets import SHARED_BYTES, Hardware

__all__ = ["attend_batch", "beginning", "fits", "min_blocks", "offers"]

Blocks = Mapping[str, SBlockRV]
SCALARS = (
    "first_row", "given", "slot", "length", "packed", "oldest", "count", "of_row", "entries",
    "none_taken", "after",
)  # fmt: skip
SYSTEM_BYTES = 1024  # of every work-group, besides
MARGIN = 4096


def fits(key: KernelKey, hardware: Hardware) -> bool:
    """Whether a work-group of one warp or more has room for its tiles and states."""
    return bool(_options(key, hardware))


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """As many sums as `attend` has warps by default, for its bits; and the warps that take them.

    Steps of 504 rows of 330 tokens with 8 KV heads took 0.85 of the time of those with `attend` and
    `combine_batch` on an H100 with two, 1.02 with four, 0.89 with one; with 8 query heads to each
    KV head 0.86 with two, 0.94 with four, of which more are on a multiprocessor.
    """
    sums, options = _sums(key, hardware), _options(key, hardware)
    default = AT_ONCE if AT_ONCE in options else options[-1]
    return {"sums": ([sums], sums), "at_once": (options, default)}


def min_blocks(key: KernelKey, hardware: Hardware) -> int:
    """As many as a multiprocessor holds."""
    _, at_once = offers(key, hardware)["at_once"]
    return resident_groups(key, int(at_once), hardware)


def _sums(key: KernelKey, hardware: Hardware) -> int:
    _, warps = attend_half.offers(key, hardware)["warps"]
    return int(warps)


def _options(key: KernelKey, hardware: Hardware) -> list[int]:
    """Warps whose tiles and states find room."""
    sums = _sums(key, hardware)
    return [n for n in divisors(sums, sums) if resident_groups(key, n, hardware)]


def resident_groups(key: KernelKey, at_once: int, hardware: Hardware) -> int:
    """Work-groups of so many warps that a multiprocessor has registers and shared memory for."""
    state = 4 * min(key.rows, QUERIES) * (key.head_dim + 2)
    tiles_or_window = max(at_once * staged_bytes(key), SUMS * state)
    taken = _sums(key, hardware) * state + tiles_or_window + attend_half.ALIGNMENT
    if taken > hardware.dynamic_bytes:
        return 0
    by_memory = (hardware.dynamic_bytes + SYSTEM_BYTES) // (taken + SYSTEM_BYTES)
    return min(attend_half.resident_warps(key) // at_once, by_memory)


def attend_batch(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `attend_batch` for warps."""
    for name in SCALARS:
        keep_local(sch, name)
    packed, window = (blocks_inside(sch, sch.get_sblock(name)) for name in ("warp", "partial"))
    scope = scope_of_states(sch, packed, window)
    group = packed_tiles(sch, packed, sch.get_sblock("q_load"), hardware)
    for block, number in written_states(packed):
        sch.set_scope(block, number, scope)
    keep_local(sch, "attended")
    sch.tensorize(sch.get_sblock("attended"), barrier(scope))
    window_sums(sch, window, sch.get_sblock("q_load_again"), group)
    share(sch, SCOPE)
    over_groups(sch, sch.get_sblock("head"))


def scope_of_states(sch: Schedule, packed: Blocks, window: Blocks) -> str:
    """Where the states of packed tokens are: apart from their tiles, if TVM can launch that.

    TVM takes the dynamic part as one, and lets warps wait for all others before they store what is
    in it beside tiles that those may still read. It asks for more than a work-group has by default
    if the dynamic part is larger alone, of which this knows the size to within `MARGIN`: rows lose
    their last gaps, and what is not needed at once may leave holes.
    """
    tiles = [(packed[f"{FIRST}_{name}_line"], 0) for name in COPIES]
    states, sums = (nbytes(sch, written_states(blocks)) for blocks in (packed, window))
    asked = max(nbytes(sch, tiles), sums)
    asks, fits_without = asked - MARGIN >= SHARED_BYTES, states + asked + MARGIN <= SHARED_BYTES
    return "shared" if asks or fits_without else SCOPE


def written_states(blocks: Blocks) -> list[tuple[SBlockRV, int]]:
    """What has the states of warps: blocks, and numbers of what they write."""
    return [(blocks["warp_stat"], 0), (blocks["warp_stat"], 1), (blocks["warp_acc"], 0)]


def nbytes(sch: Schedule, written: Sequence[tuple[SBlockRV, int]]) -> int:
    """Bytes of buffers that blocks write."""
    buffers = [sch.get(block).writes[number].source for block, number in written]
    return sum(prod(map(int, x.shape)) * DataType(x.dtype).itemsize for x in buffers)
