"""`quantize_value` on a CPU: one thread per word of tokens, channels in SIMD lanes."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.quantize_value import FETCH
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.primitives import (
    choose_width,
    fold_lanes,
    has_block,
    parallelize,
    split_off,
    vectorize_last,
)
from kivi_tvm.schedules.spread import spread
from kivi_tvm.targets import Hardware


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """A prompt of 32768 tokens takes 1.3 times as long without hints (Zen 4, 2 threads)."""
    del key, hardware
    return {"prefetch": (["none", "next"], "next")}


def quantize_value(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `quantize_value` for SIMD lanes and threads."""
    lanes = hardware.float32_lanes
    # 1. ranges, in registers; converting twice costs less than to store what was converted
    sch.compute_inline(sch.get_sblock("load"))
    ranges = sch.get_sblock("value_range")
    *_, lane, step = sch.get_loops(ranges)
    sch.reorder(step, lane)
    sch.unroll(step)
    sch.vectorize(lane)
    sch.vectorize(sch.get_loops(sch.decompose_reduction(ranges, step))[-1])
    for name in ("value_low", "value_high", "value_probe"):
        fold_lanes(sch, sch.get_sblock(name))
    # 2. stored scales and zeros, a vector of tokens at once
    width = choose_width(sch, "value_elementwise", lanes)
    for name in ("value_scale", "value_zero", "value_edge", "value_base"):
        vectorize_last(sch, sch.get_sblock(name), width)
    # 3. words; codes go into their places without being stored
    sch.compute_inline(sch.get_sblock("value_code"))
    word = sch.get_sblock("word")
    channel, slot = sch.get_loops(word)
    outer, lane = split_off(sch, channel, choose_width(sch, "word", lanes))
    sch.reorder(outer, slot, lane)
    sch.unroll(slot)
    sch.vectorize(lane)
    sch.vectorize(sch.get_loops(sch.decompose_reduction(word, slot))[-1])
    vectorize_last(sch, sch.get_sblock("store_code"), lanes)
    if has_block(sch, FETCH):
        spread(sch, [FETCH], [outer])
    parallelize(sch, sch.get_sblock("group"))
