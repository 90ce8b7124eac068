"""`attend_window` in threads: one work-group per row and tile of query rows of a KV head."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.attend_window import CHUNK_TOKENS
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.primitives import has_block
from kivi_tvm.schedules.threads import (
    keep_local,
    over_groups,
    over_threads,
    reduce_by_warps,
    share,
    work_group,
)
from kivi_tvm.targets import Hardware

ELEMENTWISE = (
    "q_scaled", "start_stat", "start_acc", "score", "prob", "mass", "chunk_acc",
    "new_stat", "new_sum", "new_acc", "keep_stat", "keep_acc", "store_stat", "store_acc",
)  # fmt: skip
REDUCED = "dot", "max", "sum"

ROW_TILES = 1, 2, 4, 8


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """Rows of a tile share what they load, and the shared memory of a work-group."""
    return {"row_tile": fitting_rows(key, hardware)}


def fitting_rows(key: KernelKey, hardware: Hardware) -> tuple[list[int], int]:
    """Numbers of query rows that fit into a work-group, and the largest of them."""
    of_a_row = 4 * (6 * key.head_dim + 4 * CHUNK_TOKENS)
    options = sorted({min(n, key.rows) for n in ROW_TILES if n * of_a_row <= hardware.shared_bytes})
    return options, options[-1]


def attend_window(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `attend_window` for work-groups."""
    group = work_group(sch, hardware)
    if has_block(sch, "oldest"):
        keep_local(sch, "oldest")
        over_threads(sch, sch.get_sblock("source"), group)
    for name in REDUCED:
        reduce_by_warps(sch, sch.get_sblock(name), group)
    for name in ELEMENTWISE:
        over_threads(sch, sch.get_sblock(name), group)
    # a result per thread, over the tokens of the chunk
    out, consumer = sch.get_sblock("out"), sch.get_sblock("chunk_acc")
    sch.compute_at(out, sch.get_loops(consumer)[-1], preserve_unit_loops=True)
    sch.set_scope(out, 0, "local")
    share(sch)
    over_groups(sch, sch.get_sblock("row"))
