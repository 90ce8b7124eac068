"""`attend` on a CPU: one thread per work item and head, register tiles over SIMD lanes."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.schedules.primitives import (
    contract_in_registers,
    reduce_by_lanes,
    vectorize_last,
)


def attend(sch: Schedule, lanes: int, rows: int = 4, tile: int = 32) -> None:
    # 1. contractions: codes are unpacked in registers, once for all rows of a tile
    contract_in_registers(sch, sch.get_sblock("dot"), sch.get_sblock("score"), rows, tile)
    contract_in_registers(sch, sch.get_sblock("out"), sch.get_sblock("chunk_acc"), rows, tile)
    # 2. reductions by lanes
    for name in ("q_zero", "max", "sum", "p_zero"):
        reduce_by_lanes(sch, sch.get_sblock(name), lanes)
    # 3. elementwise stages
    for name in (
        "q_scaled", "q_fold", "start_acc", "q_key", "prob", "p_fold", "new_acc", "keep_acc",
        "store_acc",
    ):
        vectorize_last(sch, sch.get_sblock(name), lanes)
    # 4. threads
    head, item = sch.get_loops(sch.get_sblock("split"))
    sch.parallel(sch.fuse(head, item))
