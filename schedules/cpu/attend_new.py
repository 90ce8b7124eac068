"""`attend_new` on a CPU: the blocks of `attend_window`, and so its schedule."""

from __future__ import annotations

from tvm.s_tir import Schedule

from kivi_tvm.schedules.cpu.attend_window import attend_window
from kivi_tvm.targets import Hardware


def attend_new(sch: Schedule, hardware: Hardware) -> None:
    """Schedule `attend_new` for SIMD lanes and threads."""
    attend_window(sch, hardware)
