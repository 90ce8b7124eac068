"""`append` on a CPU: one thread per row and KV head."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.schedules.cpu.quantize_key import key_group
from kivi_tvm.schedules.primitives import choose_width, parallelize, vectorize_last
from kivi_tvm.targets import Hardware

# The statistics of one value token stay scalar: its word is read and written in one scope, where
# TVM cannot factor a reduction, and they are a few hundred operations per head.
ELEMENTWISE = (
    "load_value", "value_code", "load_word", "store_value_code", "load_key", "key_code",
)  # fmt: skip


def append(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `append` for SIMD lanes and threads."""
    width = choose_width(sch, "elementwise", hardware.float32_lanes)
    for name in ELEMENTWISE:
        vectorize_last(sch, sch.get_sblock(name), width)
    key_group(sch, hardware)
    parallelize(sch, sch.get_sblock("row"))
