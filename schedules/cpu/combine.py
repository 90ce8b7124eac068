"""`combine` on a CPU: one thread per row and query head."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.schedules.primitives import choose_width, parallelize, vectorize_last
from kivi_tvm.targets import Hardware


def combine(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `combine` for SIMD lanes and threads."""
    # "add" updates its accumulator in place, which TVM does not vectorize but LLVM does
    width = choose_width(sch, "elementwise", hardware.float32_lanes)
    for name in ("start", "out"):
        vectorize_last(sch, sch.get_sblock(name), width)
    parallelize(sch, sch.get_sblock("head"))
