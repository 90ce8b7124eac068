"""`attend_new` on a CPU: one thread per row and KV head."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.schedules.cpu.attend import TILE_ROWS, TILE_VECTORS
from kivi_tvm.schedules.primitives import (
    contract_in_registers,
    parallelize,
    reduce_by_lanes,
    vectorize_last,
)
from kivi_tvm.targets import Hardware

ELEMENTWISE = ("q_scaled", "start_acc", "prob", "mass", "new_acc", "keep_acc", "store_acc")


def attend_new(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `attend_new` for SIMD lanes and threads."""
    lanes = hardware.float32_lanes
    out, chunk_acc = sch.get_sblock("out"), sch.get_sblock("chunk_acc")
    contract_in_registers(sch, out, chunk_acc, TILE_ROWS, TILE_VECTORS * lanes)
    for name in ("dot", "max", "sum"):
        reduce_by_lanes(sch, sch.get_sblock(name), lanes)
    for name in ELEMENTWISE:
        vectorize_last(sch, sch.get_sblock(name), lanes)
    parallelize(sch, sch.get_sblock("row"))
