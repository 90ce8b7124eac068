"""`attend_window` on a CPU: one thread per row and KV head."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.attend_window import CHUNK_TOKENS, FETCH_KEYS, FETCH_VALUES
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.primitives import (
    choose_width,
    extent_of,
    has_block,
    parallelize,
    reduce_by_lanes,
    vectorize_last,
)
from kivi_tvm.schedules.spread import spread
from kivi_tvm.schedules.tiles import contract_in_registers, dot_by_lanes, register_tile
from kivi_tvm.targets import Hardware

ELEMENTWISE = ("q_scaled", "start_acc", "prob", "mass", "new_acc", "keep_acc", "store_acc")

DOT_ACCUMULATORS = 8  # enough to hide latency; beyond, the operands run out of registers


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """A chunk longer than the window computes scores for nothing."""
    del key, hardware  # the window's length is a run-time value
    return {
        "chunk_tokens": ([16, 32, 64, 128], CHUNK_TOKENS),
        "prefetch": (["none", "next"], "next"),
    }


def attend_window(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `attend_window` for SIMD lanes and threads."""
    lanes, accumulators = hardware.float32_lanes, hardware.vector_registers // 2
    # 1. contractions
    dot, out = sch.get_sblock("dot"), sch.get_sblock("out")
    M, D, _ = (extent_of(sch, loop) for loop in sch.get_loops(out))
    keys = dot_by_lanes(sch, dot, DOT_ACCUMULATORS, lanes)
    tile = register_tile(M, D // lanes, accumulators)
    values = contract_in_registers(sch, out, sch.get_sblock("chunk_acc"), tile, lanes)
    # 2. reductions by lanes, elementwise stages
    width = choose_width(sch, "reduced", lanes)
    for name in ("max", "sum"):
        reduce_by_lanes(sch, sch.get_sblock(name), width)
    width = choose_width(sch, "elementwise", lanes)
    for name in ELEMENTWISE:
        vectorize_last(sch, sch.get_sblock(name), width)
    # 3. the next chunk's memory, asked for between this one's tiles
    if has_block(sch, FETCH_KEYS):
        spread(sch, [FETCH_KEYS], keys)
        spread(sch, [FETCH_VALUES], values)
    # 4. threads
    parallelize(sch, sch.get_sblock("row"))
