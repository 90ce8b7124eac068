"""`advance` in threads: a thread per row."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.targets import Hardware


def advance(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `advance` for threads."""
    (row,) = sch.get_loops(sch.get_sblock("row"))
    group, lane = sch.split(row, [None, hardware.warp])
    sch.bind(group, "blockIdx.x")
    sch.bind(lane, "threadIdx.x")
