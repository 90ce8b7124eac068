"""`attend_window` on a CPU: one thread per row and KV head."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.attend_window import CHUNK_TOKENS
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.primitives import (
    choose_width,
    extent_of,
    parallelize,
    reduce_by_lanes,
    vectorize_last,
)
from kivi_tvm.schedules.tiles import contract_in_registers, dot_by_lanes, register_tile
from kivi_tvm.targets import Hardware

ELEMENTWISE = ("q_scaled", "start_acc", "prob", "mass", "new_acc", "keep_acc", "store_acc")
ACCUMULATORS = 14  # registers of a tile; AVX2 has 16


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """A chunk longer than the window computes scores for nothing."""
    del key, hardware  # the window's length is a run-time value
    return {"chunk_tokens": ([16, 32, 64, 128], CHUNK_TOKENS)}


def attend_window(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `attend_window` for SIMD lanes and threads."""
    lanes = hardware.float32_lanes
    # 1. contractions
    dot, out = sch.get_sblock("dot"), sch.get_sblock("out")
    dot_by_lanes(sch, dot, ACCUMULATORS, lanes)
    M, D, _ = (extent_of(sch, loop) for loop in sch.get_loops(out))
    tile = register_tile(M, D // lanes, ACCUMULATORS)
    contract_in_registers(sch, out, sch.get_sblock("chunk_acc"), tile, lanes)
    # 2. reductions by lanes, elementwise stages
    width = choose_width(sch, "reduced", lanes)
    for name in ("max", "sum"):
        reduce_by_lanes(sch, sch.get_sblock(name), width)
    width = choose_width(sch, "elementwise", lanes)
    for name in ELEMENTWISE:
        vectorize_last(sch, sch.get_sblock(name), width)
    # 3. threads
    parallelize(sch, sch.get_sblock("row"))
