"""`combine_window` in threads: one work-group per row and query head."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.schedules.primitives import split_off
from kivi_tvm.schedules.threads import (
    WorkGroup,
    keep_local,
    over_groups,
    over_threads,
    reduce_by_warps,
    share,
)
from kivi_tvm.targets import Hardware

SCALARS = "slot", "oldest", "count", "entries"
ELEMENTWISE = (
    "q_scaled", "start_stat", "start_acc", "source", "score", "prob", "mass", "chunk_acc",
    "new_stat", "new_sum", "new_acc", "keep_stat", "keep_acc", "level", "weight", "parts_acc",
    "new_stat_parts", "new_sum_parts", "new_acc_parts", "keep_stat_parts", "keep_acc_parts",
    "out", "lse",
)  # fmt: skip
# Few lanes per token, so that many tokens are under way: with a warp each they took 16 us.
THREADS, LANES = 128, 8
TOGETHER = 16  # loads of a thread under way
REDUCED = "dot", "max", "sum", "part_max", "part_sum"


def combine_window(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `combine_window` for work-groups."""
    group = WorkGroup(THREADS // LANES, LANES)
    for name in SCALARS:
        keep_local(sch, name)
    for name in REDUCED:
        reduce_by_warps(sch, sch.get_sblock(name), group)
    for name in ELEMENTWISE:
        over_threads(sch, sch.get_sblock(name), group)
    # a channel per thread, over the tokens or partial results of a chunk
    for name, consumer in (("acc", "chunk_acc"), ("parts_of", "parts_acc")):
        block = sch.get_sblock(name)
        sch.compute_at(block, sch.get_loops(sch.get_sblock(consumer))[-1], preserve_unit_loops=True)
        sch.set_scope(block, 0, "local")
        _, together = split_off(sch, sch.get_loops(block)[-1], TOGETHER)
        sch.unroll(together)
    share(sch)
    over_groups(sch, sch.get_sblock("head"))
