"""`quantize_value` on a CPU: one thread per word of tokens, channels in SIMD lanes."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.schedules.primitives import (
    choose_width,
    parallelize,
    reduce_by_lanes,
    split_off,
    vectorize_last,
)
from kivi_tvm.targets import Hardware


def quantize_value(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `quantize_value` for SIMD lanes and threads."""
    width = choose_width(sch, "load", hardware.float32_lanes)
    vectorize_last(sch, sch.get_sblock("load"), width)
    value_tokens(sch, hardware)
    word = sch.get_sblock("word")
    channel, slot = sch.get_loops(word)
    outer, lane = split_off(sch, channel, choose_width(sch, "word", hardware.float32_lanes))
    sch.reorder(outer, slot, lane)
    sch.vectorize(lane)
    start = sch.decompose_reduction(word, slot)
    sch.vectorize(sch.get_loops(start)[-1])
    parallelize(sch, sch.get_sblock("group"))


def value_tokens(sch: Schedule, hardware: Hardware) -> None:
    """Schedule the blocks that quantize values token by token, wherever they stand."""
    width = choose_width(sch, "value_reduced", hardware.float32_lanes)
    for name in ("value_low", "value_high", "value_bad"):
        reduce_by_lanes(sch, sch.get_sblock(name), width)
    width = choose_width(sch, "value_code", hardware.float32_lanes)
    vectorize_last(sch, sch.get_sblock("value_code"), width)
