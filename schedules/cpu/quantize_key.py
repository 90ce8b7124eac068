"""`quantize_key` on a CPU: one thread per group of tokens, channels in SIMD lanes."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.config import KernelKey
from kivi_tvm.ops.quantize_key import FETCH
from kivi_tvm.schedules import Offers
from kivi_tvm.schedules.primitives import (
    choose_width,
    fold_lanes,
    has_block,
    parallelize,
    reduce_over_rows,
    vectorize_last,
)
from kivi_tvm.schedules.spread import spread
from kivi_tvm.targets import Hardware


def offers(key: KernelKey, hardware: Hardware) -> Offers:
    """A prompt of 32768 tokens takes 1.3 times as long without hints (Zen 4, 2 threads)."""
    del key, hardware
    return {"prefetch": (["none", "next"], "next")}


def quantize_key(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `quantize_key` for SIMD lanes and threads."""
    # converting twice costs less than to store what was converted, and codes need not be stored
    sch.compute_inline(sch.get_sblock("load"))
    sch.compute_inline(sch.get_sblock("key_code"))
    word = sch.get_loops(sch.get_sblock("key_word"))[0]
    sch.compute_at(sch.get_sblock("key_place"), word, preserve_unit_loops=True)
    key_group(sch, hardware)
    vectorize_last(sch, sch.get_sblock("store_code"), hardware.float32_lanes)
    if has_block(sch, FETCH):
        spread(sch, [FETCH], [word])
    parallelize(sch, sch.get_sblock("group"))


def key_group(sch: Schedule, hardware: Hardware) -> None:
    """Schedule the blocks of one key group, wherever they stand."""
    width = choose_width(sch, "key_reduced", hardware.float32_lanes)
    reduce_over_rows(sch, sch.get_sblock("key_range"), width)
    width = choose_width(sch, "key_elementwise", hardware.float32_lanes)
    for name in ("key_scale", "key_zero", "key_edge", "key_base", "key_place"):
        vectorize_last(sch, sch.get_sblock(name), width)
    fold_lanes(sch, sch.get_sblock("key_word"))
