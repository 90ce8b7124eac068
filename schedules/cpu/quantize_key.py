"""`quantize_key` on a CPU: one thread per group of tokens, channels in SIMD lanes."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.schedules.primitives import (
    choose_width,
    parallelize,
    reduce_over_rows,
    vectorize_last,
)
from kivi_tvm.targets import Hardware


def quantize_key(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `quantize_key` for SIMD lanes and threads."""
    width = choose_width(sch, "load", hardware.float32_lanes)
    vectorize_last(sch, sch.get_sblock("load"), width)
    key_group(sch, hardware)
    parallelize(sch, sch.get_sblock("group"))


def key_group(sch: Schedule, hardware: Hardware) -> None:
    """Schedule the blocks of one key group, wherever they stand."""
    width = choose_width(sch, "key_reduced", hardware.float32_lanes)
    for name in ("key_low", "key_high", "key_bad"):
        reduce_over_rows(sch, sch.get_sblock(name), width)
    width = choose_width(sch, "key_elementwise", hardware.float32_lanes)
    for name in ("key_scale", "key_zero", "key_code"):
        vectorize_last(sch, sch.get_sblock(name), width)
