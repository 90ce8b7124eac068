"""`fill_window` on a CPU: one thread per ring slot."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.schedules.primitives import choose_width, parallelize, vectorize_last
from kivi_tvm.targets import Hardware


def fill_window(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `fill_window` for SIMD lanes and threads."""
    width = choose_width(sch, "value", hardware.float32_lanes)
    vectorize_last(sch, sch.get_sblock("value"), width)
    parallelize(sch, sch.get_sblock("token"))
